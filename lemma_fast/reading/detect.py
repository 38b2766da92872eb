"""Where the lines of text are in a photograph: PP-OCRv6's detector, from rapidocr's wheel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from lemma_fast.reading.regions import Quad, as_quad
from lemma_fast.recognizers.rapidocr import checked_threads, open_engine, speaking_plainly

Pixels = npt.NDArray[np.uint8]

# The whole picture is seen with a short side of at least this, and a long side of at most that.
_SHORT, _LONG = 736, 2000
# A picture that is larger is seen a second time in full size, piece by piece, up to so many pixels.
_MOST_PIXELS = 24_000_000
_TILE, _MARGIN = 960, 64
# In a shrunk picture lines count that are taller than this there, in full size those that are lower
# than that; where both see a line the first counts. Boxes of small text are loose.
_LARGE, _SMALL = 32, 160
# Narrower or lower pictures are padded to this shape: the detector was not taught on strips.
_STRIP = 8


class Detector(Protocol):
    """Anything that finds lines of text."""

    def detect(self, pixels: Pixels) -> Sequence[npt.ArrayLike]:
        """Return the quads of the lines in RGB pixels [H, W, 3]."""
        ...


class RapidDetector:
    """PP-OCRv6 small's detector in ONNX Runtime, on the CPU; nothing is downloaded.

    A picture of more than 2000 pixels a side is seen twice, shrunk and in full size, so that small
    words in a large photograph are found. Memory is bounded: the full size goes through in tiles.
    """

    def __init__(self, *, threads: int | None = None) -> None:
        """Load the model; raise FileNotFoundError, with what to install, where it is missing."""
        self.threads = checked_threads(threads)
        engine = open_engine(self.threads)
        with speaking_plainly():
            self._model: Any = engine._load_det_model()
        # The usual thousand is reached by the specks of a large photograph.
        self._model.postprocess_op.max_candidates = 10_000

    def detect(self, pixels: Pixels) -> list[Quad]:
        """Return the quads of the lines in RGB pixels [H, W, 3]; raises RuntimeError."""
        height, width = pixels.shape[:2]
        canvas = np.zeros(
            (max(height, width // _STRIP), max(width, height // _STRIP), 3), dtype=np.uint8
        )
        top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
        canvas[top : top + height, left : left + width] = pixels
        long, short = max(canvas.shape[:2]), min(canvas.shape[:2])
        whole = min(max(1.0, _SHORT / short), _LONG / long)
        with speaking_plainly():
            quads = self._seen(canvas, whole)
            if whole < 1:
                full = min(1.0, (_MOST_PIXELS / canvas[..., 0].size) ** 0.5)
                large = [quad for quad in quads if _height(quad) * whole > _LARGE]
                small = [quad for quad in self._seen(canvas, full) if _height(quad) < _SMALL]
                quads = large + [
                    quad for quad in small if not any(_inside(quad, other) for other in large)
                ]
        return _usable([quad - (left, top) for quad in quads], width, height)

    def _seen(self, pixels: Pixels, scale: float) -> list[Quad]:
        """Find the lines of a picture that is seen at a scale, in its own coordinates."""
        height, width = pixels.shape[:2]
        size = [max(32, 32 * round(scale * side / 32)) for side in (width, height)]
        image = Image.fromarray(pixels)
        shrunk = np.asarray(image.resize((size[0], size[1]), Image.Resampling.BILINEAR))
        text = np.zeros((size[1], size[0]), dtype=np.float32)
        one = size[0] * size[1] <= _LONG * _LONG
        step = max(size) if one else _TILE
        for y in range(0, size[1], step):
            for x in range(0, size[0], step):
                above, before = min(y, _MARGIN), min(x, _MARGIN)
                tile = shrunk[y - above : y + step + _MARGIN, x - before : x + step + _MARGIN]
                found = self._model.session(_input(tile))[0, 0]
                part = text[y : y + step, x : x + step]
                part[:] = found[above:, before:][: part.shape[0], : part.shape[1]]
        quads, _ = self._model.postprocess_op(text[None, None], (height, width))
        return [np.asarray(quad, dtype=np.float64) for quad in quads]


def _input(tile: Pixels) -> npt.NDArray[np.float32]:
    """Turn RGB [H, W, 3] into the detector's input [1, 3, H, W], BGR from -1 to 1."""
    scaled: npt.NDArray[np.float32] = tile[..., ::-1].astype(np.float32) / 127.5 - 1
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


def _height(quad: Quad) -> float:
    """Length of the shorter side, which for a line that stands upright is its letters' height."""
    edges = np.linalg.norm(np.roll(quad, -1, axis=0) - quad, axis=1)
    return float(min(edges[0] + edges[2], edges[1] + edges[3]) / 2)


def _inside(quad: Quad, other: Quad) -> bool:
    """Whether the middle of a quad lies in another one, both clockwise as seen on the screen."""
    edges = np.roll(other, -1, axis=0) - other
    way = quad.mean(axis=0) - other
    return bool((edges[:, 0] * way[:, 1] - edges[:, 1] * way[:, 0] >= 0).all())


def _usable(quads: list[Quad], width: int, height: int) -> list[Quad]:
    """Move corners into the picture, and leave out what is no quad then."""
    found = []
    for quad in quads:
        try:
            found.append(as_quad(np.clip(quad, 0, (width, height))))
        except ValueError:
            continue
    return found
