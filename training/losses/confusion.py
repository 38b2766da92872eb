"""How easily characters are confused: the weights of the text-focus loss.

`confusion.tsv` beside this file is the published distance table, 62 x 62 over `0-9 A-Z a-z`:
small means similar. The loss weights predictions by its inverse, folded to 37 classes.
"""

from __future__ import annotations

import csv
import string
from importlib.resources import files

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_AXES = string.digits + string.ascii_uppercase + string.ascii_lowercase


def confusion_distances() -> NDArray[np.float64]:
    """Return the distance table, float64 (62, 62) over `0-9 A-Z a-z`: symmetric, zero diagonal."""
    text = files("lemma_fast.training.losses").joinpath("confusion.tsv").read_text(encoding="ascii")
    header, *rows = csv.reader(text.splitlines(), delimiter="\t")
    if "".join(header[-len(_AXES) :]) != _AXES or "".join(row[0] for row in rows) != _AXES:
        raise ValueError("confusion.tsv: the axes are not 0-9 A-Z a-z")
    return np.array([row[1:] for row in rows], dtype=np.float64)


def confusion_weights(*, unit_diagonal: bool = False) -> Tensor:
    """Return the weights, float32 (37, 37): row the true class, column the predicted one.

    Classes are `-0-9a-z`. The row and the column of `-` are 1, a digit's column is 1 / distance,
    a letter's is the larger of 1 / distance to its upper and its lower case. Rows use the
    lower-case letter alone, so the table is not symmetric.

    Faithful by default: a letter's own weight is 1 / distance between its two cases (0.5 for r,
    33 for m), because the published code skips the diagonal when it folds the cases together.
    `unit_diagonal=True` makes it 1, as it is for the digits.
    """
    distances = confusion_distances()
    lower = [_AXES.index(c) for c in string.digits + string.ascii_lowercase]
    upper = [_AXES.index(c) for c in string.digits + string.ascii_uppercase]
    letters = slice(len(string.digits), None)
    with np.errstate(divide="ignore"):
        same_case = 1.0 / distances[np.ix_(lower, lower)]
        other_case = 1.0 / distances[np.ix_(lower, upper)]
    folded = np.where(np.isinf(same_case), 1.0, same_case)
    folded[:, letters] = np.maximum(same_case, other_case)[:, letters]
    index = np.arange(len(lower))[letters]
    folded[index, index] = other_case[index, index]
    weights = np.ones((len(lower) + 1, len(lower) + 1))
    weights[1:, 1:] = folded
    if unit_diagonal:
        np.fill_diagonal(weights, 1.0)
    return torch.from_numpy(weights.astype(np.float32))
