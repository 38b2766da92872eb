"""Pairs of word crops, low and high resolution: TextZoom, recognition benchmarks, folders.

Every data set gives `Crop(lr, hr, label, id)`: lr [4, 16, 64] and hr [4, 32, 128], float32 in
[0, 1], the fourth plane being the mask of `with_mask`. Records that are missing are left out when a
set is opened, and those that do not decode when it is checked or read into memory: each is named in
`skipped`, none is replaced by another. One that turns out damaged later raises `RecordError`.
"""

from __future__ import annotations

import os
import string
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lemma_fast.images import resize
from lemma_fast.training.data.lmdb import RecordError, Records, decode
from lemma_fast.training.data.tables import find_table, is_image_file, read_table
from lemma_fast.training.synthesis.degrade import Bytes, degrade_benchmark

HR_SIZE = (32, 128)
LR_SIZE = (16, 64)
Cache = Literal["none", "ram"]
Check = Literal["keys", "decode"]
_PRINTABLE = frozenset(string.digits + string.ascii_letters + string.punctuation)


class Crop(NamedTuple):
    """One pair, or (as `collate` makes it) a batch: then labels and ids are lists."""

    lr: Tensor
    hr: Tensor
    label: str
    id: str


class Pair(NamedTuple):
    """One pair as stored after resizing: uint8 [16, 64, 3] and [32, 128, 3]."""

    lr: Bytes
    hr: Bytes
    label: str
    id: str


@dataclass(frozen=True)
class Skipped:
    """A record that is not in the set, and why."""

    id: str
    reason: str

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


def with_mask(image: Tensor) -> Tensor:
    """RGB uint8 [..., 3, H, W] to float32 [..., 4, H, W] in [0, 1], on the same device.

    The mask is 0 where the grey level (as Pillow computes it) exceeds the image's mean, else 1.
    """
    # Pillow's weights, in 1/65536.
    red, green, blue = image.to(torch.int32).unbind(-3)
    grey = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    pixels = grey.shape[-2] * grey.shape[-1]
    mask = grey * pixels <= grey.sum(dim=(-2, -1), keepdim=True)
    planes = torch.cat([image, mask.unsqueeze(-3).to(torch.uint8) * 255], dim=-3)
    return planes.to(torch.float32) / 255


class PairDataset(Dataset[Crop]):
    """What the three kinds of sets share: resizing, masks, and the copy in memory."""

    def __init__(self) -> None:
        self.skipped: list[Skipped] = []
        self._memory: tuple[Tensor, Tensor, list[str], list[str]] | None = None

    @abstractmethod
    def stored(self, index: int) -> tuple[Image.Image, Image.Image | None, str]:
        """hr, lr (None where it is made of hr) and label as stored; may raise `RecordError`."""

    @abstractmethod
    def _make_lr(self, index: int, hr: Image.Image) -> Bytes:
        """uint8 [16, 64, 3] for a record that has only hr."""

    @abstractmethod
    def record_id(self, index: int) -> str:
        """The name of the record at `index`, unique in the set."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _keep(self, positions: list[int]) -> None:
        """Leave only the records at these positions."""

    def pair(self, index: int) -> Pair:
        """The pair at `index`, from 0; raises `RecordError` where it cannot be read."""
        return self.resized(index, *self.stored(index))

    def resized(self, index: int, hr: Image.Image, lr: Image.Image | None, label: str) -> Pair:
        """The pair of what `stored` gave at `index`."""
        small = _resized(lr, LR_SIZE) if lr is not None else self._make_lr(index, hr)
        return Pair(small, _resized(hr, HR_SIZE), clean_label(label), self.record_id(index))

    @abstractmethod
    def files(self) -> Iterator[Path]:
        """The files that the set is read from."""

    def __getitem__(self, index: int) -> Crop:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Crop]:
        """Several crops at once, which `DataLoader` asks for: one pass of `with_mask` each way."""
        lr, hr, labels, ids = self.raw(indices)
        return [
            Crop(*items) for items in zip(with_mask(lr), with_mask(hr), labels, ids, strict=True)
        ]

    def raw(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, list[str], list[str]]:
        """uint8 lr [n, 3, 16, 64], hr [n, 3, 32, 128], labels, ids: `with_mask` does the rest."""
        places = [index + len(self) if index < 0 else index for index in indices]
        for index, place in zip(indices, places, strict=True):
            if not 0 <= place < len(self):
                raise IndexError(f"index {index} of a set of {len(self)} crops")
        if self._memory is not None:
            lr, hr, labels, ids = self._memory
            at = torch.as_tensor(places, dtype=torch.long)
            return lr[at], hr[at], [labels[i] for i in places], [ids[i] for i in places]
        small, large, names, known = zip(*(self.pair(place) for place in places), strict=True)
        return _stacked(small), _stacked(large), list(names), list(known)

    def check(self) -> list[Skipped]:
        """Decode every record, leave out those that fail, and return all that is left out."""
        self._load(keep_images=False)
        return self.skipped

    def leave_out(self, damaged: Sequence[Skipped]) -> None:
        """Leave out records that are known to be damaged."""
        names = {record.id for record in damaged}
        self._keep([i for i in range(len(self)) if self.record_id(i) not in names])
        self.skipped += damaged

    def load(self) -> PairDataset:
        """Keep the whole set in memory as uint8, 7.7 KB a crop; what fails is left out."""
        if self._memory is None:
            self._load(keep_images=True)
        return self

    def _prepare(self, check: Check, cache: Cache) -> None:
        if cache not in ("none", "ram") or check not in ("keys", "decode"):
            raise ValueError(f"cache {cache!r} or check {check!r}: none or ram, keys or decode")
        if cache == "ram":
            self.load()
        elif check == "decode":
            self.check()

    def _load(self, keep_images: bool) -> None:
        kept: list[int] = []
        failed: list[Skipped] = []
        size = len(self) if keep_images else 0
        lr = torch.empty(size, 3, *LR_SIZE, dtype=torch.uint8)
        hr = torch.empty(size, 3, *HR_SIZE, dtype=torch.uint8)
        labels: list[str] = []
        ids: list[str] = []
        for index in range(len(self)):
            try:
                pair = self.pair(index)
            except RecordError as wrong:
                failed.append(Skipped(self.record_id(index), str(wrong)))
                continue
            if keep_images:
                lr[len(kept)], hr[len(kept)] = _planes(pair.lr), _planes(pair.hr)
                labels.append(pair.label)
                ids.append(pair.id)
            kept.append(index)
        self.skipped += failed
        if len(kept) < len(self):
            self._keep(kept)
        if keep_images:
            self._memory = lr[: len(kept)], hr[: len(kept)], labels, ids


class _LmdbDataset(PairDataset):
    """Records of several roots, one after the other; roots are opened in each worker."""

    def __init__(self, roots: Sequence[str | Path], image_keys: Sequence[str]) -> None:
        super().__init__()
        if not roots:
            raise ValueError("no root is given")
        self.roots = [Records(root) for root in roots]
        # (root, record from 1) of each index.
        self._places: list[tuple[int, int]] = []
        for number, root in enumerate(self.roots):
            absent = root.missing(("label", *image_keys))
            for record in range(1, root.count + 1):
                if record in absent:
                    reason = f"{', '.join(absent[record])} missing"
                    self.skipped.append(Skipped(self._name(number, record), reason))
                else:
                    self._places.append((number, record))

    def __len__(self) -> int:
        return len(self._places)

    def record_id(self, index: int) -> str:
        return self._name(*self._places[index])

    def files(self) -> Iterator[Path]:
        for root in self.roots:
            yield root.root if root.root.is_file() else root.root / "data.mdb"

    def _name(self, number: int, record: int) -> str:
        return f"{self.roots[number].root}#{record:09d}"

    def _keep(self, positions: list[int]) -> None:
        self._places = [self._places[i] for i in positions]


class TextZoomDataset(_LmdbDataset):
    """TextZoom as published, or a synthetic set: one or more LMDB roots joined.

    Images are resized (bicubic) to the network's sizes; labels keep ASCII letters, digits and
    punctuation. `check="decode"` decodes every image first; `cache="ram"` does, and keeps them.
    """

    def __init__(self, *roots: str | Path, check: Check = "keys", cache: Cache = "none") -> None:
        super().__init__(roots, ("image_hr", "image_lr"))
        self._prepare(check, cache)

    def stored(self, index: int) -> tuple[Image.Image, Image.Image | None, str]:
        number, record = self._places[index]
        root = self.roots[number]
        hr, lr = root.image(b"image_hr-%09d" % record), root.image(b"image_lr-%09d" % record)
        return hr, lr, root.text(b"label-%09d" % record)

    def _make_lr(self, index: int, hr: Image.Image) -> Bytes:
        return _resized(hr, LR_SIZE)


class BenchmarkDataset(_LmdbDataset):
    """Crops of a recognition benchmark (IC15, SVT, SVTP, CUTE80) with the paper's degradation.

    The paper takes the crops of at most 16 x 64 = 1024 pixels: hr is the crop, lr the crop after
    `degrade_benchmark`, drawn by (seed, root, record), both resized. `largest=None` takes all. What
    is left out for its size (also under 4 pixels a side) is in `wrong_size`, not in `skipped`.
    """

    def __init__(
        self,
        *roots: str | Path,
        seed: int = 0,
        degrade: bool = True,
        largest: int | None = 16 * 64,
        cache: Cache = "none",
    ) -> None:
        super().__init__(roots, ("image",))
        self.seed = seed
        self.degrade = degrade
        self.wrong_size: list[str] = []
        fitting: list[int] = []
        for index in range(len(self)):
            try:
                width, height = self._image(index).size
            except RecordError as wrong:
                self.skipped.append(Skipped(self.record_id(index), str(wrong)))
                continue
            if min(width, height) < 4 or (largest is not None and width * height > largest):
                self.wrong_size.append(self.record_id(index))
            else:
                fitting.append(index)
        self._keep(fitting)
        self._prepare("keys", cache)

    def stored(self, index: int) -> tuple[Image.Image, Image.Image | None, str]:
        number, record = self._places[index]
        return self._image(index), None, self.roots[number].text(b"label-%09d" % record)

    def _make_lr(self, index: int, hr: Image.Image) -> Bytes:
        if not self.degrade:
            return _resized(hr, LR_SIZE)
        rng = np.random.default_rng((self.seed, *self._places[index]))
        return _resized(Image.fromarray(degrade_benchmark(np.asarray(hr), rng)), LR_SIZE)

    def _image(self, index: int) -> Image.Image:
        number, record = self._places[index]
        return self.roots[number].image(b"image-%09d" % record)


class FolderDataset(PairDataset):
    """A folder with a table of labels: `labels.csv` (with a header) or `labels.jsonl`.

    Columns `hr`, `lr`, `label` name pairs of files, relative to the table. Where `lr` is absent, or
    the columns are `file` and `label`, lr is made of the image: `degradation="bicubic"` resizes it,
    `"paper"` also runs `degrade_benchmark` on the small image.
    """

    def __init__(
        self,
        folder: str | Path,
        labels: str | Path | None = None,
        *,
        degradation: Literal["bicubic", "paper"] = "bicubic",
        seed: int = 0,
        check: Check = "keys",
        cache: Cache = "none",
    ) -> None:
        super().__init__()
        if degradation not in ("bicubic", "paper"):
            raise ValueError(f"degradation is bicubic or paper, not {degradation!r}")
        self.folder = Path(folder)
        self.degradation = degradation
        self.seed = seed
        self.table = self.folder / labels if labels is not None else find_table(self.folder)
        self.rows: list[tuple[Path, Path | None, str]] = []
        for number, row in read_table(self.table):
            hr_name = row.get("hr") or row.get("file")
            if not hr_name or row.get("label") is None:
                self.skipped.append(
                    Skipped(
                        f"{self.table}:{number}", "needs hr (or file) and label, no more fields"
                    )
                )
                continue
            hr = self.table.parent / hr_name
            lr = self.table.parent / row["lr"] if row.get("lr") else None
            absent = [
                str(path) for path in (hr, lr) if path is not None and not is_image_file(path)
            ]
            if absent:
                self.skipped.append(Skipped(str(hr), f"{', '.join(absent)} missing"))
            else:
                self.rows.append((hr, lr, row["label"]))
        self._prepare(check, cache)

    def __len__(self) -> int:
        return len(self.rows)

    def record_id(self, index: int) -> str:
        return str(self.rows[index][0])

    def files(self) -> Iterator[Path]:
        yield self.table
        for hr, lr, _ in self.rows:
            yield from (path for path in (hr, lr) if path is not None)

    def stored(self, index: int) -> tuple[Image.Image, Image.Image | None, str]:
        hr_path, lr_path, label = self.rows[index]
        hr = decode(hr_path, str(hr_path))
        lr = decode(lr_path, str(lr_path)) if lr_path is not None else None
        return hr, lr, label

    def _make_lr(self, index: int, hr: Image.Image) -> Bytes:
        lr = _resized(hr, LR_SIZE)
        if self.degradation == "paper":
            # Seeded by the name, so that a row's picture does not depend on the rows around it.
            encoded = os.fsencode(self.rows[index][0].name)
            name = sum(256**i * byte for i, byte in enumerate(encoded))
            lr = degrade_benchmark(lr, np.random.default_rng((self.seed, name)))
        return lr

    def _keep(self, positions: list[int]) -> None:
        self.rows = [self.rows[i] for i in positions]


def hold_out(
    dataset: PairDataset, share: float, seed: int = 0
) -> tuple[Subset[Crop], Subset[Crop]]:
    """Split at random into (the rest, `share` of the set), the same way for the same seed."""
    if not 0 < share < 1:
        raise ValueError(f"share is between 0 and 1, not {share}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    taken = max(1, round(share * len(dataset)))
    return Subset(dataset, sorted(order[taken:])), Subset(dataset, sorted(order[:taken]))


def clean_label(label: str) -> str:
    """The label's ASCII letters, digits and punctuation."""
    return "".join(letter for letter in label if letter in _PRINTABLE)


def _resized(image: Image.Image, size: tuple[int, int]) -> Bytes:
    height, width = size
    return np.asarray(resize(image, (width, height)))


def _planes(image: Bytes) -> Tensor:
    # A copy, because Pillow's pixels are read-only and torch warns of that.
    return torch.from_numpy(np.array(image.transpose(2, 0, 1)))


def _stacked(images: Sequence[Bytes]) -> Tensor:
    return torch.stack([_planes(image) for image in images])
