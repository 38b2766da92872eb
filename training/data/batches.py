"""Batches of a run: which crops a step sees depends on the seed and the step, on nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from lemma_fast.recognizers.charset import filter_label
from lemma_fast.training import signals
from lemma_fast.training.data.inspect import open_pairs
from lemma_fast.training.data.labels import (
    CTCLabels,
    FocusLabels,
    encode_ctc_labels,
    encode_focus_labels,
    encode_prior_labels,
)
from lemma_fast.training.data.pairs import Crop, PairDataset, TextZoomDataset, hold_out
from lemma_fast.training.data.strokes import encode_stroke_labels
from lemma_fast.training.data.verdicts import Verdicts
from lemma_fast.training.settings.schema import DataSettings
from lemma_fast.training.settings.values import SettingsError

#: Names of the encodings of labels: `Batch.focus`, `.prior_ids`, `.ctc` and `.strokes`.
Encoding = Literal["focus", "prior", "ctc", "strokes"]


class Batch(NamedTuple):
    """Crops as stored, uint8 lr [N, 3, 16, 64] and hr [N, 3, 32, 128], and their labels.

    `with_mask` makes network inputs of them, on the device. Encodings of the labels are for the
    text-focus Transformer, for the prior (N, T), for CTC, and for the recogniser of strokes; None
    where no one asked for them.
    """

    lr: Tensor
    hr: Tensor
    labels: list[str]
    focus: FocusLabels | None = None
    prior_ids: Tensor | None = None
    ctc: CTCLabels | None = None
    strokes: FocusLabels | None = None


def mix(*numbers: int) -> int:
    """One 63-bit seed of several numbers."""
    words = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(words[0]) >> 1


class Batches(Sampler[list[int]]):
    """Positions of the crops of steps `first` to `last` - 1, this rank's share of each.

    An epoch is a permutation drawn by (seed, epoch), cut into batches of `size`; what is left at
    its end is dropped. Each rank takes every `ranks`-th crop of a batch.
    """

    def __init__(
        self,
        crops: int,
        size: int,
        seed: int,
        first: int,
        last: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if crops < size:
            raise SettingsError(f"run.batch_size is {size}, but there are {crops} training crops")
        if size % ranks:
            raise SettingsError(f"run.batch_size {size} is not divisible by {ranks} devices")
        self.crops, self.size, self.seed = crops, size, seed
        self.first, self.last = first, last
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        drawn, order = -1, torch.empty(0, dtype=torch.int64)
        for step in range(self.first, self.last):
            epoch, place = divmod(step, self.crops // self.size)
            if epoch != drawn:
                generator = torch.Generator().manual_seed(mix(self.seed, epoch))
                drawn, order = epoch, torch.randperm(self.crops, generator=generator)
            whole = order[place * self.size : (place + 1) * self.size]
            yield whole[self.rank :: self.ranks].tolist()


class EncodedCrops(Dataset[Batch]):
    """A set, or a part of one, that hands out whole batches without a mask channel."""

    def __init__(
        self,
        crops: PairDataset | Subset[Crop],
        length: int,
        filtered: bool = False,
        encodings: Collection[Encoding] = ("focus", "prior", "ctc"),
    ) -> None:
        """Encode labels in `encodings`, those for the prior in `length` positions."""
        self.crops = crops
        self.length = length
        self.filtered = filtered
        self.encodings = encodings

    def __len__(self) -> int:
        return len(self.crops)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        crops = self.crops
        if isinstance(crops, Subset):
            positions = [crops.indices[position] for position in positions]
            crops = crops.dataset  # type: ignore[assignment]
        assert isinstance(crops, PairDataset)
        lr, hr, labels, _ = crops.raw(positions)
        focus = prior_ids = ctc = strokes = None
        if "focus" in self.encodings:
            longest = max(len(filter_label(label)) for label in labels)
            # one shape for nearly all batches
            focus = encode_focus_labels(labels, max(self.length, longest + 1))
        if "prior" in self.encodings:
            prior_ids = encode_prior_labels(labels, self.length, filtered=self.filtered)
        if "ctc" in self.encodings:
            ctc = encode_ctc_labels(labels)
        if "strokes" in self.encodings:
            strokes = encode_stroke_labels(labels)
        return Batch(lr, hr, labels, focus, prior_ids, ctc, strokes)


def open_sets(
    roots: Sequence[str], data: DataSettings, verdicts: Verdicts | None = None
) -> PairDataset:
    """The sets at `roots`, joined; raises SettingsError where they cannot be.

    Every record is decoded once, so that one that is damaged is left out now and ends no run later.
    What `verdicts` knows already is not decoded for that again.
    """
    try:
        found = open_pairs(roots[0]) if len(roots) == 1 else TextZoomDataset(*roots)
        if data.cache == "ram":
            found.load()
        elif verdicts is None:
            found.check()
        else:
            verdicts.check(found)
    except (OSError, ValueError) as error:
        raise SettingsError(str(error)) from error
    return found


def split(
    data: DataSettings, verdicts: Verdicts | None = None
) -> tuple[PairDataset | Subset[Crop], PairDataset | Subset[Crop], list[str]]:
    """What to train on, what to choose the best weights on, and the records left out."""
    train = open_sets(data.train, data, verdicts)
    left_out = [*map(str, train.skipped)]
    kept: PairDataset | Subset[Crop] = train
    chosen: PairDataset | Subset[Crop]
    if data.selection == "held_out":
        kept, chosen = hold_out(train, data.held_out_share, data.held_out_seed)
    else:
        roots = data.validation if data.selection == "validation" else data.test
        chosen = open_sets(roots, data, verdicts)
        left_out += map(str, chosen.skipped)
    if data.validation_crops is not None and data.validation_crops < len(chosen):
        # spread over the set, whose records may be sorted by difficulty
        places = np.linspace(0, len(chosen) - 1, data.validation_crops).astype(int).tolist()
        if isinstance(chosen, Subset):
            chosen = Subset(chosen.dataset, [chosen.indices[place] for place in places])
        else:
            chosen = Subset(chosen, places)
    return kept, chosen, left_out


def _whole(batch: Any) -> Any:
    """The batch that `EncodedCrops` made already, where a loader would stack samples."""
    return batch


def loaded(crops: EncodedCrops, batches: Sampler[list[int]], workers: int) -> Iterator[Batch]:
    """Batches of `crops` in the given order; takes no number from the global generators.

    However this ends, no loading process is left.
    """
    found = iter(_loader(crops, batches, workers))
    try:
        yield from found
    finally:
        # What holds an error holds the iterator too; at the end of the program the processes would
        # be waited for, and these ignore the signal that is to end them.
        if workers:
            found._shutdown_workers()  # type: ignore[attr-defined]


def _loader(crops: EncodedCrops, batches: Sampler[list[int]], workers: int) -> DataLoader[Batch]:
    return DataLoader(
        crops,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_whole,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
        persistent_workers=workers > 0,
        worker_init_fn=signals.ignore,
    )


class InOrder(Sampler[list[int]]):
    """Positions of one rank's crops, batch after batch, none left out."""

    def __init__(self, crops: int, size: int, rank: int = 0, ranks: int = 1) -> None:
        self.positions = list(range(rank, crops, ranks))
        self.size = size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.positions), self.size):
            yield self.positions[start : start + self.size]
