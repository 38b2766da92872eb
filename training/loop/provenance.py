"""Where weights come from: what is written into their metadata."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from lemma_fast import __version__
from lemma_fast.training.data.lmdb import RecordError, Records
from lemma_fast.training.evaluation.tables import readable
from lemma_fast.training.settings.schema import Settings, plain
from lemma_fast.training.synthesis.words import digest

_SELECTION = {
    "held_out": "a share held out of the training sets",
    "validation": "sets of its own",
    "test": "THE TEST SETS (the published habit; results on them are too good)",
}


def provenance(
    settings: Settings, train_crops: int, chosen_crops: int, left_out: Sequence[str]
) -> dict[str, str]:
    """All that is known before the first step; all values are texts, as safetensors wants."""
    data = settings.data
    recipes = {Path(root).name: _recipe(root) for root in (*data.train, *data.validation)}
    return {
        "stage": settings.stage,
        "settings": json.dumps(plain(settings)),
        "data": json.dumps(recipes),
        **_words(settings),
        "crops": f"{train_crops} to train on, {chosen_crops} to choose on, "
        f"{len(left_out)} damaged and left out",
        "selection": _SELECTION[data.selection],
        "command": readable(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "seed": str(settings.seed),
        "versions": json.dumps(
            {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lightning": version("lightning"),
                "lemma-fast": __version__,
            }
        ),
    }


def _words(settings: Settings) -> dict[str, str]:
    words = settings.data.words
    if settings.stage != "language" or words is None:
        return {}
    return {"words": f"{readable(words)}, sha256 {digest(words)}"}


def _recipe(root: str) -> dict[str, object] | None:
    path = Path(root)
    if not (path.is_file() or (path / "data.mdb").is_file()):
        return None
    try:
        return Records(path).recipe()
    except RecordError as damaged:
        return {"damaged": readable(str(damaged))}
