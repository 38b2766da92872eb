"""How good is a super-resolved word: pixels, strings, and how sure we may be.

The functions without a prefix judge image by image, clamped to [0, 1]: what to report. Those
called `official_*` are the published protocol, which depends on how images fall into batches:
for comparing with published tables, and labelled so wherever they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from lemma_fast.recognizers.charset import filter_label

FloatArray = npt.NDArray[np.float64]

#: Images in the test subsets of TextZoom: what published averages are weighted by.
TEXTZOOM_COUNTS: Mapping[str, int] = {"easy": 1619, "medium": 1411, "hard": 1343}

# 128 MB; the crops of TextZoom make 70 MB.
_DRAWS_KEPT = 2**24
#: How far the 11 x 11 window of SSIM reaches.
_SSIM_REACH = 5


def _pair(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the colours of both batches, at least in fp32."""
    images, targets = images[:, :3], targets[:, :3]
    if images.shape != targets.shape or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            "expected two batches (N, C, H, W) of one size with C >= 3,"
            f" got {tuple(images.shape)} and {tuple(targets.shape)}"
        )
    # half types would lose the small differences that are measured here
    return (
        images.to(torch.promote_types(images.dtype, torch.float32)),
        targets.to(torch.promote_types(targets.dtype, torch.float32)),
    )


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Return the PSNR in dB of each image (N,), RGB, clamped to [0, 1]; inf where equal.

    Both are (N, C, H, W) with C >= 3; channels past the third (the mask) are left out.
    """
    images, targets = _pair(images, targets)
    return peak_signal_noise_ratio(
        images.clamp(0, 1), targets.clamp(0, 1), data_range=1.0, reduction="none", dim=(1, 2, 3)
    )


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Return the SSIM of each image (N,), RGB, clamped to [0, 1].

    Gaussian window of 11 x 11, sigma 1.5, averaged where the window lies inside the image.
    """
    images, targets = _pair(images, targets)
    _, similarity = structural_similarity_index_measure(
        images.clamp(0, 1),
        targets.clamp(0, 1),
        sigma=1.5,
        kernel_size=2 * _SSIM_REACH + 1,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    # the whole map, because releases of torchmetrics differ in what of the border they average
    inside = slice(_SSIM_REACH, -_SSIM_REACH)
    return similarity[..., inside, inside].mean((1, 2, 3))


def official_psnr(images: Tensor, targets: Tensor) -> float:
    """Return the published PSNR of a batch: one squared error over all of it, nothing clamped."""
    images, targets = _pair(images, targets)
    error = (255 * images - 255 * targets).square().mean().item()
    return math.inf if error == 0 else 20 * math.log10(255 / math.sqrt(error))


def official_ssim(images: Tensor, targets: Tensor) -> float:
    """Return the published SSIM of a batch: zero padding round the image, nothing clamped."""
    images, targets = _pair(images, targets)
    offsets = torch.arange(11, dtype=torch.float32, device=images.device) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    line = line / line.sum()
    window = torch.outer(line, line).to(images.dtype).expand(3, 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window, padding=5, groups=3)

    mean_x, mean_y = blur(images), blur(targets)
    var_x = blur(images * images) - mean_x**2
    var_y = blur(targets * targets) - mean_y**2
    covariance = blur(images * targets) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    bottom = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return (top / bottom).mean().item()


def official_average(batches: Sequence[float]) -> float:
    """Return the published mean over batches: a last, smaller batch weighs as much as any."""
    return sum(batches) / (len(batches) + 1e-10)


def textzoom_average(values: Mapping[str, float]) -> float:
    """Return the mean of easy, medium and hard, weighted by `TEXTZOOM_COUNTS`."""
    if set(values) != set(TEXTZOOM_COUNTS):
        raise ValueError(
            f"expected {', '.join(TEXTZOOM_COUNTS)}; got {', '.join(values) or 'none'}"
        )
    total = sum(TEXTZOOM_COUNTS.values())
    return sum(count * values[name] for name, count in TEXTZOOM_COUNTS.items()) / total


def word_hits(texts: Sequence[str], labels: Sequence[str]) -> FloatArray:
    """Return 1.0 where a text equals its label, both lower-cased and filtered to `0-9a-z`.

    Two empty strings are equal, as in the published protocol. The mean is the word accuracy.
    """
    pairs = zip(texts, labels, strict=True)
    hits = [filter_label(text) == filter_label(label) for text, label in pairs]
    return np.array(hits, dtype=np.float64)


class EditScores(NamedTuple):
    """Edit distance of each text to its label and the label's length, both (N,), and 1-NED (N,)."""

    distances: FloatArray
    lengths: FloatArray
    one_ned: FloatArray

    @property
    def cer(self) -> float:
        """The character error rate: all edits over all characters; nan without characters."""
        total = self.lengths.sum()
        return float(self.distances.sum() / total) if total else math.nan


def edit_scores(texts: Sequence[str], labels: Sequence[str]) -> EditScores:
    """Compare texts and labels by edit distance, filtered as in `word_hits`.

    1-NED is 1 - distance / the longer length, 1 for two empty strings.
    """
    pairs = [(filter_label(a), filter_label(b)) for a, b in zip(texts, labels, strict=True)]
    return EditScores(
        np.array([Levenshtein.distance(a, b) for a, b in pairs], dtype=np.float64),
        np.array([len(label) for _, label in pairs], dtype=np.float64),
        np.array([Levenshtein.normalized_similarity(a, b) for a, b in pairs], dtype=np.float64),
    )


class Interval(NamedTuple):
    """A mean with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: npt.ArrayLike,
    counts: npt.ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return sum(values) / sum(counts) with its percentile bootstrap interval over images.

    `values` is (N,); without `counts` the ratio is the mean. A character error rate has the edit
    distances as values and the label lengths as counts. For a difference of two systems on the
    same images, pass the differences. The same seed gives the same interval.
    """
    data = np.asarray(values, dtype=np.float64)
    mass = np.ones_like(data) if counts is None else np.asarray(counts, dtype=np.float64)
    if data.ndim != 1 or not len(data) or data.shape != mass.shape:
        raise ValueError(f"expected values (N,), N > 0, got {data.shape}, counts {mass.shape}")
    sums, masses = _resampled([np.stack([data, mass], axis=1)], resamples, seed)[0].T
    return Interval(float(data.sum() / mass.sum()), *_bounds(sums / masses, confidence))


def _resampled(sets: Sequence[FloatArray], resamples: int, seed: int) -> list[FloatArray]:
    """Sums over each set (N, ...), drawn with replacement: (resamples, ...)."""
    sizes = tuple(len(values) for values in sets)
    if resamples * sum(sizes) <= _DRAWS_KEPT:
        draws = _drawn(sizes, resamples, seed)
        return [times @ values for times, values in zip(draws, sets, strict=True)]
    rows = [
        [times @ values for times, values in zip(draw, sets, strict=True)]
        for draw in _draws(sizes, resamples, seed)
    ]
    return [np.stack(column) for column in zip(*rows, strict=True)]


def _draws(sizes: Sequence[int], resamples: int, seed: int) -> Iterator[list[FloatArray]]:
    """How often each image of sets of these `sizes` is drawn, resample after resample."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield [
            np.bincount(rng.integers(size, size=size), minlength=size).astype(np.float64)
            for size in sizes
        ]


# An evaluation has a hundred columns over the same crops: they share their draws.
@lru_cache(maxsize=4)
def _drawn(sizes: tuple[int, ...], resamples: int, seed: int) -> list[FloatArray]:
    return [np.stack(times) for times in zip(*_draws(sizes, resamples, seed), strict=True)]


def _bounds(samples: FloatArray, confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def textzoom_interval(
    values: Mapping[str, npt.ArrayLike],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the weighted TextZoom average with its interval, each subset resampled by itself."""
    data = {name: np.asarray(values[name], dtype=np.float64) for name in values}
    sums = _resampled(list(data.values()), resamples, seed)
    shares = {name: TEXTZOOM_COUNTS[name] / len(x) for name, x in data.items()}
    parts = [share * total for share, total in zip(shares.values(), sums, strict=True)]
    samples = np.sum(parts, axis=0) / sum(TEXTZOOM_COUNTS.values())
    mean = textzoom_average({name: float(x.mean()) for name, x in data.items()})
    return Interval(mean, *_bounds(samples, confidence))
