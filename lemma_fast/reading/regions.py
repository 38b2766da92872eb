"""Quads in a photograph, and the straight pictures of what they hold.

A quad is float64 [4, 2]: the corners of a text in the order in which it is read, top left, top
right, bottom right, bottom left, as (x, y). A pixel's centre lies at half numbers.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

Quad: TypeAlias = npt.NDArray[np.float64]
Matrix: TypeAlias = npt.NDArray[np.float64]


def rectangle(width: float, height: float, left: float = 0.0, top: float = 0.0) -> Quad:
    """Corners of an upright rectangle of this size whose top left is (left, top)."""
    right, bottom = left + width, top + height
    corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return np.array(corners, dtype=np.float64)


def as_quad(corners: npt.ArrayLike) -> Quad:
    """Take corners as a quad; raises ValueError unless they are four, finite, and convex in order.

    Their order may go round either way: a mirrored text is a quad, too.
    """
    quad = np.asarray(corners, dtype=np.float64)
    if quad.shape != (4, 2) or not np.isfinite(quad).all():
        raise ValueError(f"a quad is four finite points [4, 2], not {np.asarray(corners).tolist()}")
    edges = np.roll(quad, -1, axis=0) - quad
    after = np.roll(edges, -1, axis=0)
    turns = edges[:, 0] * after[:, 1] - edges[:, 1] * after[:, 0]
    if not ((turns > 1e-9).all() or (turns < -1e-9).all()):
        raise ValueError(f"the corners {quad.tolist()} are not those of a convex quad")
    return quad


def size_of(quad: Quad) -> tuple[int, int]:
    """Width and height in whole pixels, at least 1: means of the opposite edges."""
    edges = np.linalg.norm(np.roll(quad, -1, axis=0) - quad, axis=1)
    width, height = (edges[0] + edges[2]) / 2, (edges[1] + edges[3]) / 2
    return max(1, round(float(width))), max(1, round(float(height)))


def turned(quad: Quad, quarters: int) -> Quad:
    """The same quad for a text that was turned clockwise by so many quarters."""
    return np.roll(quad, -quarters, axis=0)


def homography(source: Quad, target: Quad) -> Matrix:
    """The perspective map [3, 3] that takes the corners of one quad to those of the other."""
    rows = []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    solved = np.linalg.solve(np.array(rows), np.asarray(target, dtype=np.float64).reshape(8))
    return np.append(solved, 1.0).reshape(3, 3)


def mapped(matrix: Matrix, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Points [N, 2] through a perspective map."""
    lifted = np.column_stack([points, np.ones(len(points))]) @ matrix.T
    return lifted[:, :2] / lifted[:, 2:]


def rectify(image: Image.Image, quad: Quad, size: tuple[int, int] | None = None) -> Image.Image:
    """Straighten (bicubic) what a quad holds, in its own size or the one given, width first.

    What lies outside the image is black.
    """
    size = size or size_of(quad)
    matrix = homography(rectangle(*size), quad)
    return warped(image, size, matrix)


def warped(image: Image.Image, size: tuple[int, int], matrix: Matrix) -> Image.Image:
    """Sample (bicubic) an image where `matrix` takes each pixel of the result, black outside."""
    data = tuple(float(value) for value in (matrix / matrix[2, 2]).reshape(9)[:8])
    return image.transform(size, Image.Transform.PERSPECTIVE, data, Image.Resampling.BICUBIC)
