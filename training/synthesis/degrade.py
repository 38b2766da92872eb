"""What a camera does to a scene, and the paper's degradation of benchmark crops.

Lens, pixel integration and scaling are one matrix an axis: a row holds how much each scene column
weighs in one pixel. Arithmetic is in float64 so that a seed gives the same bytes on any processor.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Strength:
    """Ranges a low-resolution camera is drawn from; blur in its own pixels."""

    height: tuple[int, int]
    blur: tuple[float, float]
    motion: float
    shot: tuple[float, float]
    read: tuple[float, float]
    jpeg: tuple[int, int]
    contrast: tuple[float, float]


STRENGTHS: dict[str, Strength] = {
    "easy": Strength(
        height=(16, 26),
        blur=(0.30, 0.62),
        motion=0.10,
        shot=(1e-5, 4e-4),
        read=(5e-4, 3e-3),
        jpeg=(65, 96),
        contrast=(0.35, 0.95),
    ),
    "medium": Strength(
        height=(13, 21),
        blur=(0.42, 0.80),
        motion=0.20,
        shot=(5e-5, 1.2e-3),
        read=(1e-3, 6e-3),
        jpeg=(45, 90),
        contrast=(0.25, 0.90),
    ),
    "hard": Strength(
        height=(11, 17),
        blur=(0.55, 1.00),
        motion=0.30,
        shot=(1e-4, 3e-3),
        read=(2e-3, 1e-2),
        jpeg=(28, 80),
        contrast=(0.18, 0.85),
    ),
}


def axis_matrix(inputs: int, outputs: int, blur: float, motion: float = 0.0) -> Array:
    """Weights [outputs, inputs] of a lens and sensor; `blur` and `motion` in output pixels.

    The pixel's box is taken as a Gaussian of its variance, 1/12, beside the lens's own.
    """
    scale = inputs / outputs
    deviation = scale * float(np.sqrt(blur * blur + 1 / 12))
    centres = (np.arange(outputs) + 0.5) * scale - 0.5
    shifts = np.linspace(-0.5, 0.5, 5) * motion * scale if motion > 0 else np.zeros(1)
    weights = np.zeros((outputs, inputs))
    for shift in shifts:
        distance = (np.arange(inputs)[None, :] - centres[:, None] - shift) / deviation
        weights += np.exp(-0.5 * distance * distance)
    total: Array = weights / weights.sum(axis=1, keepdims=True)
    return total


def project(light: Array, rows: Array, columns: Array) -> Array:
    """Image [3, h, w] of linear light [3, H, W] through one matrix an axis."""
    planes, _, width = light.shape
    # Rows first: that is the cheaper order, and leaves one product for all planes.
    lines = (rows @ light).reshape(-1, width)
    image: Array = (lines @ columns.T).reshape(planes, rows.shape[0], columns.shape[0])
    return image


def expose(light: Array, shot: float, read: float, rng: np.random.Generator) -> Array:
    """Add Poisson-Gaussian noise to linear light and apply the tone curve; values in [0, 1]."""
    deviation = np.sqrt(np.maximum(shot * light + read * read, 0.0))
    noisy = light + deviation * rng.standard_normal(light.shape)
    return np.sqrt(np.clip(noisy, 0.0, 1.0))


def sharpen(image: Array, gain: float, blur: float = 1.0) -> Array:
    """Unsharp mask of [3, h, w]."""
    _, height, width = image.shape
    soft = project(image, axis_matrix(height, height, blur), axis_matrix(width, width, blur))
    return np.clip(image + gain * (image - soft), 0.0, 1.0)


def to_bytes(image: Array) -> Bytes:
    """[3, h, w] in [0, 1] to uint8 [h, w, 3]."""
    rounded = np.clip(np.rint(image * 255.0), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(rounded.transpose(1, 2, 0))


def compress(image: Bytes, quality: int, phase: tuple[int, int] = (0, 0)) -> Bytes:
    """The image [h, w, 3] after JPEG, its block grid moved by `phase` pixels."""
    height, width, _ = image.shape
    down, right = phase
    padded = np.pad(image, ((down, 0), (right, 0), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    Image.fromarray(padded).save(buffer, "JPEG", quality=quality)
    decoded = np.asarray(Image.open(buffer).convert("RGB"))
    return decoded[down : down + height, right : right + width]


def degrade_benchmark(image: Bytes, rng: np.random.Generator) -> Bytes:
    """The paper's degradation of a crop [h, w, 3] of the recognition benchmarks; size unchanged.

    Gaussian blur, shot and read noise (in four of five), noise reduction by a Gaussian (in seven
    of ten) or a bilateral filter, then an unsharp mask; the constants are the published code's.
    """
    picture = image.astype(np.float64)
    picture = _gaussian(picture, int(rng.choice((3, 5))), rng.uniform(5.0, 6.0))
    if rng.random() > 0.2:
        variance = rng.uniform(0, 0.005) * picture + rng.uniform(0, 0.015)
        noise = np.sqrt(variance) * rng.standard_normal(picture.shape)
        # The published code spares pictures that are nearly white.
        if picture.mean() <= 252.0:
            picture = np.clip(picture + noise, 0.0, 255.0)
    picture = np.rint(picture)
    if rng.random() < 0.7:
        picture = _gaussian(picture, int(rng.choice((3, 5))), rng.uniform(2.0, 3.0))
    else:
        picture = _bilateral(picture, 7, rng.uniform(70.0, 80.0), rng.uniform(70.0, 80.0))
    # Both filters hand over whole numbers there.
    picture = np.rint(picture)
    soft = _gaussian(picture, int(rng.choice((3, 5))), rng.uniform(2.0, 3.0))
    sharp = np.clip(picture + rng.uniform(3.0, 4.0) * (picture - soft), 0.0, 255.0)
    return sharp.astype(np.uint8)


def _gaussian(image: Array, size: int, sigma: float) -> Array:
    """Gaussian of `size` taps on [h, w, c], mirrored at the border without repeating it."""
    reach = size // 2
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        padded = _mirrored(image, reach, axis)
        length = image.shape[axis]
        image = sum(
            (tap * padded.take(range(i, i + length), axis=axis) for i, tap in enumerate(taps)),
            start=np.zeros_like(image),
        )
    return image


def _bilateral(image: Array, size: int, sigma_value: float, sigma_space: float) -> Array:
    """Bilateral filter on [h, w, c] over a disc; distance in value is summed over channels."""
    reach = size // 2
    height, width, _ = image.shape
    padded = _mirrored(_mirrored(image, reach, 0), reach, 1)
    total = np.zeros_like(image)
    weight = np.zeros((height, width, 1))
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if dx * dx + dy * dy > reach * reach:
                continue
            top, left = reach + dy, reach + dx
            moved = padded[top : top + height, left : left + width]
            apart = np.abs(moved - image).sum(axis=2, keepdims=True) / sigma_value
            w = np.exp(-0.5 * (apart**2 + (dx * dx + dy * dy) / sigma_space**2))
            total += w * moved
            weight += w
    return total / weight


def _mirrored(image: Array, reach: int, axis: int) -> Array:
    pads = [(0, 0)] * 3
    pads[axis] = (reach, reach)
    # One row or column has nothing to mirror.
    return np.pad(image, pads, mode="reflect" if image.shape[axis] > 1 else "edge")
