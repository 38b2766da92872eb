"""Labels as the tensors that each loss takes.

Two streams exist on purpose, because the published training uses two: the text-focus Transformer
sees the filtered label, the prior sees the unfiltered one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lemma_fast.recognizers.charset import FOCUS, PRIOR, filter_label


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
    return teacher_forced(rows, labels, pad_to)


def teacher_forced(
    rows: Sequence[Sequence[int]], labels: Sequence[str], pad_to: int | None = None
) -> FocusLabels:
    """Class ids of texts, without their ends, as inputs and targets; `labels` are for the error."""
    longest = max((len(row) for row in rows), default=0) + 1
    if pad_to is not None and longest > pad_to:
        name = labels[[len(row) for row in rows].index(longest - 1)]
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
