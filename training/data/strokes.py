"""Labels as strokes, for the recogniser of Text Gestalt.

`strokes.tsv` beside this file spells each character in kinds of strokes, 1 to 9; characters of the
same shape share a spelling (C and c are 8; O, o and 0 are 89).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from lemma_fast.training.data.labels import FocusLabels, teacher_forced


@cache
def stroke_table() -> dict[str, list[int]]:
    """The strokes of each letter and digit, and of `$`, which is the end (0)."""
    text = files("lemma_fast.training.data").joinpath("strokes.tsv").read_text(encoding="ascii")
    rows = csv.DictReader(text.splitlines(), delimiter="\t")
    return {row["character"]: [int(stroke) for stroke in row["strokes"]] for row in rows}


def encode_stroke_labels(labels: Sequence[str], pad_to: int | None = None) -> FocusLabels:
    """Encode labels, neither lower-cased nor filtered, for the stroke recogniser.

    Characters that the table lacks are skipped. T is that of the longest label with its end, or
    `pad_to`; raises ValueError where a label does not fit.
    """
    table = stroke_table()
    rows = [[stroke for c in label for stroke in table.get(c, ())] for label in labels]
    return teacher_forced(rows, labels, pad_to)
