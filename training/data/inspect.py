"""What is in a data set: counts, sizes, labels, damage, the level of bicubic, a contact sheet."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lemma_fast.compare import sheet
from lemma_fast.training.data.lmdb import RecordError, Records, is_lmdb
from lemma_fast.training.data.pairs import (
    HR_SIZE,
    BenchmarkDataset,
    FolderDataset,
    PairDataset,
    Skipped,
    TextZoomDataset,
)


@dataclass(frozen=True)
class Report:
    """The summary of a set; sizes are counted as stored, before resizing.

    `reduced_labels` counts the labels that have other characters than ASCII letters, digits and
    punctuation, which are left out of them.
    """

    path: str
    crops: int
    skipped: list[Skipped]
    hr_sizes: dict[str, int]
    lr_sizes: dict[str, int]
    label_lengths: dict[int, int]
    letters: str
    reduced_labels: int
    bicubic_psnr: float | None
    recipe: dict[str, object] | None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def open_pairs(path: str | Path) -> PairDataset:
    """An LMDB of pairs or of single crops, or a folder with a table of labels: what lies there."""
    path = Path(path)
    if not is_lmdb(path):
        return FolderDataset(path)
    if Records(path).has(b"image-"):
        return BenchmarkDataset(path, largest=None)
    return TextZoomDataset(path)


def inspect(
    path: str | Path, limit: int | None = None, dataset: PairDataset | None = None
) -> Report:
    """Read every record (or the first `limit`) and sum up; damage is listed, not raised.

    `dataset` is what `open_pairs` gives for `path`, where the caller has it. What is no set at all
    raises ValueError or OSError.
    """
    dataset = open_pairs(path) if dataset is None else dataset
    skipped = list(dataset.skipped)
    hr_sizes: Counter[str] = Counter()
    lr_sizes: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    letters: set[str] = set()
    reduced = 0
    psnr: list[float] = []
    for index in range(min(len(dataset), limit) if limit is not None else len(dataset)):
        try:
            hr, lr, label = dataset.stored(index)
            pair = dataset.resized(index, hr, lr, label)
        except RecordError as wrong:
            skipped.append(Skipped(dataset.record_id(index), str(wrong)))
            continue
        hr_sizes[_size(hr)] += 1
        lr_sizes[_size(lr) if lr is not None else "made of hr"] += 1
        lengths[len(pair.label)] += 1
        letters.update(pair.label)
        reduced += pair.label != label
        up = np.asarray(_doubled(pair.lr), np.float64)
        error = float(np.mean((up - pair.hr) ** 2))
        psnr.append(10 * float(np.log10(255**2 / max(error, 1e-12))))
    recipe = None
    if isinstance(dataset, TextZoomDataset):
        try:
            recipe = Records(path).recipe()
        except RecordError as wrong:
            skipped.append(Skipped(f"{path}: recipe", str(wrong)))
    return Report(
        path=str(path),
        crops=sum(lengths.values()),
        skipped=skipped,
        hr_sizes=dict(hr_sizes.most_common()),
        lr_sizes=dict(lr_sizes.most_common()),
        label_lengths=dict(sorted(lengths.items())),
        letters="".join(sorted(letters)),
        reduced_labels=reduced,
        bicubic_psnr=float(np.mean(psnr)) if psnr else None,
        recipe=recipe,
    )


def contact_sheet(
    path: str | Path, crops: int = 60, columns: int = 4, dataset: PairDataset | None = None
) -> Image.Image:
    """Crops spread evenly over the set: bicubic beside high resolution, the label below.

    `dataset` is as for `inspect`.
    """
    dataset = open_pairs(path) if dataset is None else dataset
    if len(dataset) == 0:
        raise ValueError(f"{path} has no crop to show")
    places = np.unique(np.linspace(0, len(dataset) - 1, min(crops, len(dataset))).astype(int))
    panels: list[tuple[Image.Image | None, str]] = []
    for place in places:
        try:
            pair = dataset.pair(int(place))
        except RecordError:
            name = ascii(dataset.record_id(int(place)))
            panels += [(None, f"damaged: {name}"), (None, "")]
            continue
        panels += [(_doubled(pair.lr), pair.label), (Image.fromarray(pair.hr), "")]
    row = 2 * columns
    return sheet([panels[first : first + row] for first in range(0, len(panels), row)])


def _doubled(lr: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Image.Image:
    return Image.fromarray(lr).resize((HR_SIZE[1], HR_SIZE[0]), Image.Resampling.BICUBIC)


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
