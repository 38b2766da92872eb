"""Curves as one CSV file in long form, to which a resumed run adds without a seam."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from lemma_fast.atomic import replace_file

HEADER = ("step", "name", "value")


class CurveLogger(Logger):
    """Appends `step,name,value` rows; what lies past the step that a run resumes at is dropped."""

    def __init__(self, path: Path, step: int = 0) -> None:
        super().__init__()
        self.path = path
        if leads():
            kept = [row for row in read(path) if row[0] <= step] if step else []
            lines = io.StringIO()
            csv.writer(lines, lineterminator="\n").writerows([HEADER, *kept])
            replace_file(path, lines.getvalue())

    @property
    def name(self) -> str:
        return "curves"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self.path.open("a", encoding="utf-8", newline="") as file:
            rows = [(step, name, repr(float(value))) for name, value in metrics.items()]
            csv.writer(file, lineterminator="\n").writerows(rows)

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """The settings lie beside the curves already."""


def read(path: Path) -> list[tuple[int, str, float]]:
    """Rows of a file of curves; a last line that a crash has torn is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.reader(io.StringIO(whole)))[1:]
    return [(int(step), name, float(value)) for step, name, value in rows]


def leads() -> bool:
    """Whether this process is the first of its run, the one that writes files."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0
