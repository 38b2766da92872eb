"""Weights of baselines in and out, and one call that opens them and LEMMA alike."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from lemma_fast import checkpoint
from lemma_fast.baselines.config import NOT_IMPLEMENTED, BaselineConfig, check_name, list_baselines
from lemma_fast.baselines.networks import Baseline, build_baseline, create_baseline
from lemma_fast.checkpoint.files import (
    CheckpointError,
    config_of,
    is_safetensors,
    load_strictly,
    read_metadata,
    read_safetensors,
    save_weights,
    stored_tensors,
    unwrapped,
)
from lemma_fast.model import LEMMA

#: `format` in the metadata of a baseline's weights.
FORMAT = "lemma-fast baseline 1"


def save_baseline(
    model: Baseline, path: str | Path, provenance: Mapping[str, str] | None = None
) -> None:
    """Write `model` as safetensors with its config, a digest of its tensors, and `provenance`."""
    model = cast(Baseline, unwrapped(model))
    metadata = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(model.config)),
        "sha256": checkpoint.digest(stored_tensors(model)),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **(provenance or {}),
    }
    save_weights(model, path, metadata)


def load_baseline(path: str | Path, device: str | torch.device = "cpu") -> Baseline:
    """Open what `save_baseline` wrote, in evaluation mode; raises CheckpointError."""
    path = Path(path)
    state, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    with config_of(path):
        model = build_baseline(BaselineConfig(**json.loads(metadata["config"])))
    if checkpoint.digest(state) != metadata.get("sha256"):
        raise CheckpointError(f"{path}: damaged, its tensors are not those that were written")
    load_strictly(model, state, str(path))
    return model.to(device).eval()


def open_network(source: str | Path, device: str | torch.device = "cpu") -> LEMMA | Baseline:
    """Open a LEMMA as `lemma_fast.load` does, a trained baseline's file, or "bicubic".

    In evaluation mode. Raises CheckpointError, also for a baseline's name where weights are needed.
    """
    name = str(source)
    is_name = isinstance(source, str) or not Path(name).exists()
    if is_name and name.lower() in (*list_baselines(), *NOT_IMPLEMENTED):
        if name == "bicubic":
            return create_baseline(name).to(device).eval()
        try:
            check_name(name)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        raise CheckpointError(
            f"{name} comes without weights: train it (lemma-fast train small-baselines --stage "
            f"{name}), and pass the file"
        )
    path = checkpoint.locate(source)
    if is_safetensors(path) and read_metadata(path).get("format") == FORMAT:
        return load_baseline(path, device)
    return checkpoint.load(path, device)
