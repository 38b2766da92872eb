"""Stand-ins for the detector and the recogniser: photographs of coloured boxes as lines of text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from echo_model import EchoModel
from PIL import Image

from lemma_fast.reading import Reader
from lemma_fast.recognizers.base import ReadLine, ReadWord
from lemma_fast.upscale import Upscaler

HEIGHT = 12


class Boxes:
    """Finds what it is told to, and counts the pictures."""

    def __init__(self, *quads) -> None:
        self.quads = [np.array(quad, dtype=float) for quad in quads]
        self.seen = 0

    def detect(self, pixels):
        self.seen += 1
        return self.quads


class Reads:
    """Reads `before` in a strip as it is and `after` in one of twice the height; keeps batches."""

    def __init__(
        self, before: Callable[[np.ndarray], ReadLine], after: Callable[[np.ndarray], ReadLine]
    ) -> None:
        self.before, self.after = before, after
        self.batches: list[list[tuple[int, ...]]] = []

    def read_lines(self, crops):
        self.batches.append([crop.shape for crop in crops])
        return [(self.before if len(crop) <= HEIGHT else self.after)(crop) for crop in crops]


def line(*words: tuple[str, float], sure: float | None = None) -> ReadLine:
    """A line of equally wide words."""
    each = 1 / max(1, len(words))
    read = tuple(ReadWord(t, c, each * n, each * (n + 1)) for n, (t, c) in enumerate(words))
    least = min((c for _, c in words), default=0.0)
    return ReadLine(" ".join(t for t, _ in words), least if sure is None else sure, read)


def always(*words: tuple[str, float], sure: float | None = None) -> Callable[..., ReadLine]:
    return lambda crop: line(*words, sure=sure)


def box(x: float, y: float, width: float = 48, height: float = HEIGHT):
    return [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]


def photograph(width: int = 120, height: int = 80) -> Image.Image:
    return Image.new("RGB", (width, height), (90, 120, 150))


def reader(detector, recognizer, model=None, batch_size=4, **options) -> Reader:
    upscaler = Upscaler(model or EchoModel(), "cpu", "auto", batch_size, "x2", always=False)
    return Reader(upscaler, recognizer=recognizer, detector=detector, **options)
