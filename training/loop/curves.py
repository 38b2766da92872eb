"""The curves of a run: `metrics.csv` and TensorBoard."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lemma_fast.atomic import replace_file
from lemma_fast.training.evaluation.tables import readable
from lemma_fast.training.loop.folder import BOARD, CURVES, damaged


class Curves:
    """`metrics.csv` in long form, to which a resumed run appends, and TensorBoard.

    What lies past the step that a run resumes at is dropped. Raises SettingsError.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self.path = folder / CURVES
        kept = [row for row in read_curves(self.path) if row[0] <= step] if step else []
        replace_file(self.path, _lines([("step", "name", "value"), *kept]))
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            (folder / BOARD).mkdir(exist_ok=True)
            place = str(folder / BOARD)
            if readable(place) != place:
                # TensorBoard takes names in UTF-8 alone; by its number a folder has another one.
                place = f"/proc/self/fd/{os.open(place, os.O_RDONLY)}"
            # Without `purge_step` a killed chunk's last points would be drawn twice.
            self.board = SummaryWriter(place, purge_step=step or None)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Append the values of a step."""
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_lines((step, name, repr(float(x))) for name, x in values.items()))
        self.draw(values, step)

    def draw(self, values: Mapping[str, float], step: int) -> None:
        """Show values in TensorBoard alone."""
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.board is not None:
            self.board.close()


def read_curves(path: Path) -> list[tuple[int, str, float]]:
    """Rows of a file of curves; a last line that a crash has torn is left out."""
    if not path.is_file():
        return []
    number = 1
    try:
        text = path.read_text(encoding="utf-8")
        rows = []
        for number, row in enumerate(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])), 1):
            if number > 1:
                step, name, value = row
                rows.append((int(step), name, float(value)))
    except (OSError, ValueError, csv.Error) as error:
        way = "take that line out; without the file the run goes on and begins its curves anew"
        raise damaged(path, f"line {number}: {error}", way) from error
    return rows


def _lines(rows: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
