"""Where the ink is in a straight strip: gaps between words, and how close a word can be cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lemma_fast.recognizers.base import ReadWord

Pixels = npt.NDArray[np.uint8]
Deviation = npt.NDArray[np.float32]

# A pixel has ink where it deviates from the ground by more than this share of the most.
_INK = 0.3
# Of noise alone, in grey levels, nothing can be read.
_NOISE = 8
# A gap as wide as this share of the line's height ends a word.
_GAP = 0.3
# What a word keeps round its ink, in shares of the ink's height.
_RIM = 0.1
# Ink that is lower than this share of the strip is not all of a word.
_LEAST = 0.35


def deviation(strip: Pixels) -> Deviation:
    """How far each pixel [H, W] of a strip [H, W, 3] is from the ground, as a share of the most.

    The ground is the median of the upper and the lower edge; all is 0 where there is no contrast.
    """
    values = strip.astype(np.float32)
    ground = np.median(np.concatenate([values[0], values[-1]]), axis=0)
    away: Deviation = np.abs(values - ground).max(axis=2)
    most = float(np.percentile(away, 99))
    return np.zeros_like(away) if most < _NOISE else away / most


def words_by_gaps(strip: Pixels) -> list[tuple[int, int]]:
    """Cut a line [H, W, 3] into words, each from a column to before another; a blank has none."""
    height, width = strip.shape[:2]
    ink = np.flatnonzero(deviation(strip).max(axis=0) > _INK)
    if not len(ink):
        return []
    gaps = np.flatnonzero(np.diff(ink) > max(2, _GAP * height))
    starts, ends = ink[np.append(0, gaps + 1)], ink[np.append(gaps, len(ink) - 1)] + 1
    rim = max(1, round(_RIM * height))
    return [
        (max(0, int(start) - rim), min(width, int(end) + rim))
        for start, end in zip(starts, ends, strict=True)
    ]


def columns(away: Deviation, words: Sequence[ReadWord]) -> list[tuple[int, int]]:
    """Cut a strip, of which `deviation` is given, between the words that a recogniser names.

    It knows their places roughly: each cut goes into the gap nearby. The first word begins, and
    the last one ends, where the strip does.
    """
    height, width = away.shape
    edges = [0, width]
    for word, after in itertools.pairwise(words):
        middle = (word.right + after.left) / 2 * width
        reach = min(
            0.6 * height,
            (word.right - word.left) * width / 3,
            (after.right - after.left) * width / 3,
        )
        low = int(np.clip(middle - reach, 0, width - 1))
        high = int(np.clip(middle + reach + 1, low + 1, width))
        edges.append(low + _middle_of_gap(away[:, low:high]))
    edges.sort()
    return [(left, max(left + 1, right)) for left, right in itertools.pairwise(edges)]


def _middle_of_gap(away: Deviation) -> int:
    """The middle of the longest run of columns that have hardly more ink than the emptiest."""
    ink = away.max(axis=0)
    empty = np.append(np.append(False, ink <= ink.min() + 0.1), False).astype(np.int8)
    starts, ends = np.flatnonzero(np.diff(empty) == 1), np.flatnonzero(np.diff(empty) == -1)
    longest = int(np.argmax(ends - starts))
    return int(starts[longest] + ends[longest]) // 2


def close_box(away: Deviation) -> tuple[int, int, int, int]:
    """Cut a word, of which `deviation` is given, close: left, top, right, bottom.

    All of it where its ink is too low to be a word.
    """
    height, width = away.shape
    rows = np.flatnonzero(away.max(axis=1) > _INK)
    across = np.flatnonzero(away.max(axis=0) > _INK)
    if not len(rows) or rows[-1] + 1 - rows[0] < _LEAST * height:
        return 0, 0, width, height
    rim = max(1, round(_RIM * (rows[-1] + 1 - rows[0])))
    return (
        max(0, int(across[0]) - rim),
        max(0, int(rows[0]) - rim),
        min(width, int(across[-1]) + 1 + rim),
        min(height, int(rows[-1]) + 1 + rim),
    )
