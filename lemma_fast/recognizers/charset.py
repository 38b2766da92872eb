"""The alphabets of the recognisers, and labels as the tensors each loss wants.

Every alphabet maps a run of consecutive class ids to characters; the ids outside the run are
special (blank, end, padding). Two label streams exist on purpose, because the published training
uses two: the text-focus Transformer sees the filtered label, the prior sees the unfiltered one.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_LETTERS_LAST = string.digits + string.ascii_lowercase
_PRINTABLE = string.digits + string.ascii_letters + string.punctuation


@dataclass(frozen=True, slots=True)
class Charset:
    """Class ids `first, first + 1, ...` stand for `characters`; `end` closes a text."""

    characters: str
    first: int
    end: int
    size: int

    def encode(self, text: str) -> list[int]:
        """Return the class ids of `text`; raise ValueError for a character that has none."""
        ids = []
        for character in text:
            index = self.characters.find(character)
            if index < 0:
                raise ValueError(f"{character!r} in {text!r} is not one of {self.characters!r}")
            ids.append(self.first + index)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the characters up to the first `end`; other special ids are left out."""
        text = []
        for value in ids:
            if value == self.end:
                break
            if 0 <= value - self.first < len(self.characters):
                text.append(self.characters[value - self.first])
        return "".join(text)


#: CRNN (0 is the CTC blank) and the text-focus Transformer (0 is start, end and padding).
FOCUS = Charset(_LETTERS_LAST, first=1, end=0, size=37)
#: LEMMA's prior, ABINet and MATRN: 0 is null, then a-z, then 1-9, then 0.
PRIOR = Charset(string.ascii_lowercase + "1234567890", first=1, end=0, size=37)
#: MORAN: the end comes last.
MORAN = Charset(_LETTERS_LAST, first=0, end=36, size=37)
#: ASTER: 94 characters, then end, padding, unknown.
ASTER = Charset(_PRINTABLE, first=0, end=94, size=97)
#: PARSeq: end, 94 characters, then begin and padding (which the head never predicts).
PARSEQ = Charset(_PRINTABLE, first=1, end=0, size=97)


def filter_label(text: str) -> str:
    """Lower-case `text`, then delete every character outside `0-9a-z`."""
    return "".join(character for character in text.lower() if character in _LETTERS_LAST)


class FocusLabels(NamedTuple):
    """Labels for the text-focus Transformer, padded with 0 to a common length T.

    `inputs` (N, T) int64 is the text shifted right by one (teacher forcing; position 0 is the
    start), `targets` (N, T) int64 is the text with its end, `lengths` (N,) int64 counts the
    targets with the end.
    """

    inputs: Tensor
    targets: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FocusLabels:
        """Return the three tensors on `device`."""
        return FocusLabels(*(part.to(device, non_blocking=non_blocking) for part in self))

    def live(self) -> Tensor:
        """Return (N, T) bool: True where a target counts, False where it is padding."""
        index = torch.arange(self.targets.shape[1], device=self.targets.device)
        return index < self.lengths[:, None]


def encode_focus_labels(labels: Sequence[str], pad_to: int | None = None) -> FocusLabels:
    """Filter the labels and encode them for the text-focus Transformer.

    T is the longest label plus its end, or `pad_to`, which keeps the shape the same from batch to
    batch and changes no loss. Raise ValueError where a label does not fit `pad_to`.
    """
    rows = [FOCUS.encode(filter_label(label)) for label in labels]
    longest = max((len(row) for row in rows), default=0) + 1
    if pad_to is not None and longest > pad_to:
        name = max(labels, key=lambda label: len(filter_label(label)))
        raise ValueError(f"{name!r} and its end need {longest} positions, pad_to is {pad_to}")
    shape = (len(rows), pad_to or longest)
    inputs = torch.zeros(shape, dtype=torch.int64)
    targets = torch.zeros(shape, dtype=torch.int64)
    for n, row in enumerate(rows):
        ids = torch.tensor(row, dtype=torch.int64)
        targets[n, : len(row)] = ids
        inputs[n, 1 : len(row) + 1] = ids
    lengths = torch.tensor([len(row) + 1 for row in rows], dtype=torch.int64)
    return FocusLabels(inputs, targets, lengths)


def encode_prior_labels(
    labels: Sequence[str], length: int = 26, *, filtered: bool = False
) -> Tensor:
    """Encode labels for the prior's two classifiers: (N, length) int64, padded with null (0).

    Faithful by default: the label is lower-cased but not filtered, so that the apostrophe of
    "don't" becomes a null inside the word; `filtered=True` leaves such characters out instead,
    as the other label stream does. Labels are cut at `length`.
    """
    ids = torch.zeros(len(labels), length, dtype=torch.int64)
    for n, label in enumerate(labels):
        text = filter_label(label) if filtered else label.lower()
        row = [PRIOR.characters.find(character) + PRIOR.first for character in text[:length]]
        # find() gives -1 for a character without a class, and -1 + first is null
        ids[n, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids


class CTCLabels(NamedTuple):
    """Labels for CTC: `targets` (sum of lengths,) int64 without blanks, `lengths` (N,) int64."""

    targets: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CTCLabels:
        """Return both tensors on `device`."""
        return CTCLabels(*(part.to(device, non_blocking=non_blocking) for part in self))


def encode_ctc_labels(labels: Sequence[str]) -> CTCLabels:
    """Filter the labels and join their class ids for a CTC loss with blank 0."""
    rows = [FOCUS.encode(filter_label(label)) for label in labels]
    flat = [value for row in rows for value in row]
    return CTCLabels(
        torch.tensor(flat, dtype=torch.int64),
        torch.tensor([len(row) for row in rows], dtype=torch.int64),
    )


def collapse_ctc(path: Iterable[int], blank: int = 0) -> list[int]:
    """Merge repeats and drop blanks: the class ids a greedy CTC path spells."""
    ids = []
    last = blank
    for value in path:
        if value not in (blank, last):
            ids.append(value)
        last = value
    return ids
