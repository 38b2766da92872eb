"""Measure super-resolution: what recognisers read in bicubic, super-resolved and true crops.

Two protocols. `corrected` clamps images and judges them one by one. `official` is the published
one: recognisers see the small crop itself as the bicubic row and the unclamped result, and PSNR and
SSIM are means over batches of unclamped images, so that they depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.baselines import Baseline
from lemma_fast.devices import device_of
from lemma_fast.model import LEMMA
from lemma_fast.model.crnn_prior import CRNNPrior
from lemma_fast.model.prior import Prior, TextPrior
from lemma_fast.recognizers import Reading, Recognizer, list_recognizers, load_recognizer
from lemma_fast.training.data.pairs import HR_SIZE, PairDataset, Skipped, with_mask
from lemma_fast.training.evaluation.metrics import (
    FloatArray,
    official_psnr,
    official_ssim,
    psnr,
    ssim,
)
from lemma_fast.training.evaluation.readings import Readings, crop_keys
from lemma_fast.training.failures import is_lack_of_memory
from lemma_fast.training.networks import super_resolve

Protocol = Literal["corrected", "official"]
#: What is compared, in the order of every table.
ROWS = ("bicubic", "SR", "HR")
OFFICIAL_BATCH = 64


class PriorReader:
    """The network's own text prior as a recogniser: what its vision part reads.

    Its language part guesses each character from the others alone, and the network has no use for a
    fusion of both.
    """

    name = "prior"

    def __init__(self, prior: TextPrior | CRNNPrior) -> None:
        self.prior = prior

    @torch.no_grad()
    def read(self, images: Tensor) -> list[Reading]:
        """Read RGB `images` (N, 3, H, W); the confidence is that of all valid positions."""
        found, _ = self.prior(images)
        best, ids = found.img_logits.float().softmax(-1).max(-1)
        index = torch.arange(ids.shape[1], device=ids.device)
        lengths = found.pt_lengths
        if isinstance(self.prior, TextPrior):
            lengths = self.prior.valid_lengths(found.img_logits)
        sure = torch.where(index < lengths[:, None], best, 1.0).prod(1)
        return [
            Reading(self.prior.config.spell(row), confidence, tuple(row))
            for row, confidence in zip(ids.tolist(), sure.tolist(), strict=True)
        ]


def open_readers(
    wanted: str, model: LEMMA | Baseline, device: str, jobs: int = 1
) -> dict[str, Recognizer]:
    """Recognisers of `crnn=CHECKPOINT,tesseract,prior`, tried; raises ValueError or OSError."""
    readers: dict[str, Recognizer] = {}
    for item in filter(None, (part.strip() for part in wanted.split(","))):
        name, _, path = item.partition("=")
        if name in readers:
            raise ValueError(f"recogniser {name} is given twice")
        if name == "prior":
            if isinstance(model, Baseline):
                raise ValueError(
                    f"{model.config.name} has no prior that reads: name other recognisers, "
                    "--recognizer crnn=CHECKPOINT,tesseract, or none, --recognizer ''"
                )
            readers[name] = PriorReader(model.prior)
        elif name not in list_recognizers():
            raise ValueError(
                f"no recogniser {name!r}; there are {', '.join([*list_recognizers(), 'prior'])}"
            )
        else:
            options = {"jobs": jobs} if name == "tesseract" else {}
            readers[name] = load_recognizer(name, path or None, device=device, **options)
            if isinstance(reader := readers[name], nn.Module):
                check_finite(reader, path or name)
            else:
                # A program may lack its language files, which is better known before the work.
                with _naming(name):
                    reader.read(torch.ones(1, 3, *HR_SIZE))
    return readers


def check_finite(network: nn.Module, name: str) -> None:
    """Raise ValueError where a weight is infinite or not a number, as then all results are."""
    state = network.state_dict().items()
    broken = [key for key, x in state if x.is_floating_point() and not x.isfinite().all()]
    if broken:
        raise ValueError(
            f"{name}: {len(broken)} of its {len(state)} tensors hold values that are not finite "
            f"numbers, {broken[0]} first: these weights are damaged, or their training diverged"
        )


@dataclass
class Row:
    """One row of a subset, crop by crop: images compared with the true ones, and texts read.

    Under the official protocol `psnr` and `ssim` have an entry a batch. The true crops have none.
    """

    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Subset:
    """A test set and what came out of it."""

    name: str
    labels: list[str]
    rows: dict[str, Row]
    skipped: int = 0
    gain: FloatArray = field(default_factory=lambda: np.empty(0))
    """PSNR of SR less that of bicubic, a crop; chooses what the contact sheet shows."""
    left_out: list[Skipped] = field(default_factory=list)
    """The records that are not in the set, and why; `skipped` is how many."""


class Views(NamedTuple):
    """Each row's RGB images of a batch as recognisers see them, and the network's prior, if any."""

    images: dict[str, Tensor]
    prior: Prior | None


@torch.no_grad()
def views(
    model: LEMMA | Baseline, lr: Tensor, hr: Tensor, protocol: Protocol = "corrected"
) -> Views:
    """Pictures of all rows for uint8 `lr` [N, 3, 16, 64] and `hr` [N, 3, 32, 128]."""
    sr, prior = super_resolve(model, with_mask(lr))
    sr, small, true = sr[:, :3].float(), lr.float() / 255, hr.float() / 255
    if protocol == "official":
        return Views({"bicubic": small, "SR": sr, "HR": true}, prior)
    return Views({"bicubic": enlarged(small).clamp(0, 1), "SR": sr.clamp(0, 1), "HR": true}, prior)


def enlarged(lr: Tensor) -> Tensor:
    """RGB [N, 3, 16, 64] doubled by torch's bicubic, as in the published tables, not clamped."""
    return F.interpolate(lr, HR_SIZE, mode="bicubic", align_corners=False)


def measure(
    model: LEMMA | Baseline,
    name: str,
    crops: PairDataset,
    readers: Mapping[str, Recognizer],
    *,
    protocol: Protocol = "corrected",
    batch_size: int = OFFICIAL_BATCH,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
    known: Mapping[str, Readings] | None = None,
) -> Subset:
    """Go through a test set once, every row and recogniser; `progress` gets the crops done.

    A crop is decoded once, goes through the network once, and is read once a row; bicubic and true
    crops only where `known`, by reader, does not have their texts. What is read there is added and
    saved, also where the evaluation is interrupted.
    """
    device = device_of(model)
    count = len(crops) if limit is None else min(limit, len(crops))
    rows = {row: Row(texts={reader: [] for reader in readers}) for row in ROWS}
    subset = Subset(name, [], rows, len(crops.skipped), left_out=list(crops.skipped))
    gains: list[FloatArray] = []
    known = known or {}
    with _evaluating(model), _saving(known):
        for start in range(0, count, batch_size):
            lr, hr, labels, _ = crops.raw(range(start, min(start + batch_size, count)))
            subset.labels += labels
            seen = views(model, lr.to(device), hr.to(device), protocol).images
            # What a row's pictures are made of, where that is not the network.
            keys = {"bicubic": crop_keys(lr), "HR": crop_keys(hr)} if known else {}
            for row, images in seen.items():
                for who, reader in readers.items():
                    with _naming(who):
                        if who in known and row in keys:
                            place = f"{row} {protocol}" if row == "bicubic" else row
                            texts = known[who].read(reader, place, keys[row], images)
                        else:
                            texts = [reading.text for reading in reader.read(images)]
                    rows[row].texts[who] += texts
            gains.append(_compare(rows, seen, protocol))
            progress(len(labels))
    subset.gain = np.concatenate(gains) if gains else np.empty(0)
    return subset


def _compare(rows: Mapping[str, Row], seen: Mapping[str, Tensor], protocol: Protocol) -> FloatArray:
    """Compare the images of a batch with the true ones; returns the gain in PSNR, a crop."""
    by_crop = {}
    for row in ("bicubic", "SR"):
        images, true = seen[row], seen["HR"]
        if images.shape != true.shape:
            images = enlarged(images)
        by_crop[row] = psnr(images, true).cpu().double().numpy()
        if protocol == "official":
            rows[row].psnr.append(official_psnr(images, true))
            rows[row].ssim.append(official_ssim(images, true))
        else:
            rows[row].psnr += by_crop[row].tolist()
            rows[row].ssim += ssim(images, true).cpu().double().tolist()
    gain: FloatArray = by_crop["SR"] - by_crop["bicubic"]
    return gain


@contextmanager
def _naming(reader: str) -> Iterator[None]:
    """Turn a failure of a recogniser into a ValueError of one sentence that names it."""
    try:
        yield
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        if is_lack_of_memory(error):
            raise
        raise ValueError(f"recogniser {reader}: {' '.join(str(error).split())}") from error


@contextmanager
def _saving(known: Mapping[str, Readings]) -> Iterator[None]:
    try:
        yield
    finally:
        for readings in known.values():
            readings.save()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
