"""Straight strips of a photograph, a line each, and the network's results for their words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from lemma_fast import images
from lemma_fast.images import Crop
from lemma_fast.reading.ink import close_box, columns, deviation
from lemma_fast.reading.lines import LineRecognizer
from lemma_fast.reading.regions import Quad, homography, mapped, rectangle, rectify, turned
from lemma_fast.recognizers.base import ReadLine, ReadWord
from lemma_fast.sharpness import SHARP
from lemma_fast.upscale import Upscaler

# Strips that go together, at most: so many, or so many pixels.
_STRIPS, _PIXELS = 64, 4_000_000
# A line this much taller than wide stands on its side.
_UPRIGHT = 1.5
# Below this confidence a line is read upside down, too, which must be surer by that.
_DOUBTED, _SURER = 0.8, 0.1


@dataclass
class Region:
    """A word of a strip; `box` cuts it close: left, top, right and bottom.

    `result` is the network's picture of the box, twice as large; `reason` says why there is none.
    """

    word: ReadWord
    box: tuple[int, int, int, int]
    reason: str = ""
    sharpness: float | None = None
    result: Image.Image | None = None


@dataclass
class Strip:
    """A line as a straight picture [RGB], what is read in it, and its words.

    `quad` begins where the text does, so for a text that stands on its side it begins elsewhere.
    """

    quad: Quad
    image: Image.Image
    line: ReadLine = field(default_factory=lambda: ReadLine("", 0.0, ()))
    regions: list[Region] = field(default_factory=list)

    def quad_of(self, region: Region) -> Quad:
        """The corners of a word in the photograph."""
        left, top, right, bottom = region.box
        matrix = homography(rectangle(*self.image.size), self.quad)
        return mapped(matrix, rectangle(right - left, bottom - top, left, top))

    def restored(self) -> Image.Image:
        """The strip at twice its size (bicubic), the network's results in their places."""
        width, height = self.image.size
        large = images.resize(self.image, (2 * width, 2 * height))
        if large is self.image:
            large = large.copy()
        for region in self.regions:
            if region.result is not None:
                large.paste(region.result, (2 * region.box[0], 2 * region.box[1]))
        return large


def batches(image: Image.Image, quads: Sequence[Quad]) -> Iterator[list[Strip]]:
    """Straighten the quads, a bounded number at a time."""
    batch: list[Strip] = []
    pixels = 0
    for quad in quads:
        strip = Strip(quad, rectify(image, quad))
        size = strip.image.width * strip.image.height
        if batch and (len(batch) == _STRIPS or pixels + size > _PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append(strip)
        pixels += size
    if batch:
        yield batch


def read_strips(
    image: Image.Image, strips: Sequence[Strip], recognizer: LineRecognizer
) -> list[Strip]:
    """Read strips, and turn those around that are read more surely so; finds their words.

    A strip that stands on its side is read from either side, too, one that is read unsurely upside
    down, too.
    """
    lines = recognizer.read_lines([_pixels(strip) for strip in strips])
    best = [_with_line(strip, line) for strip, line in zip(strips, lines, strict=True)]
    others: list[tuple[int, float, Strip]] = []
    for place, strip in enumerate(best):
        width, height = strip.image.size
        turns = {}
        if height > _UPRIGHT * width:
            turns = {1: 0.0, 3: 0.0}
        elif strip.line.confidence < _DOUBTED:
            turns = {2: _SURER}
        for turn, surer in turns.items():
            quad = turned(strip.quad, turn)
            others.append((place, surer, Strip(quad, rectify(image, quad))))
    found = recognizer.read_lines([_pixels(strip) for _, _, strip in others]) if others else []
    for (place, surer, strip), line in zip(others, found, strict=True):
        if line.confidence > best[place].line.confidence + surer:
            best[place] = _with_line(strip, line)
    return best


def _with_line(strip: Strip, line: ReadLine) -> Strip:
    away = deviation(_pixels(strip))
    regions = []
    for word, (start, end) in zip(line.words, columns(away, line.words), strict=False):
        left, top, right, bottom = close_box(away[:, start:end])
        regions.append(Region(word, (start + left, top, start + right, bottom)))
    return Strip(strip.quad, strip.image, line, regions)


def restore(strips: Sequence[Strip], upscaler: Upscaler, keep_above: int) -> None:
    """Give each word that is small and blurred the network's result, and the others a reason.

    Words taller than `keep_above` pixels (0: none), cut close, and those that are sharp already are
    left as they are. Raises RuntimeError where the network fails.
    """
    waiting: list[tuple[Region, Crop, npt.NDArray[np.float32]]] = []
    for strip in strips:
        for region in strip.regions:
            if 0 < keep_above < region.box[3] - region.box[1]:
                region.reason = f"taller than {keep_above} pixels"
                continue
            crop = Crop(strip.image.crop(region.box))
            planes = upscaler.prepare(crop)
            region.sharpness = upscaler.frame(crop, planes, "x2").sharpness
            if region.sharpness >= SHARP:
                region.reason = "sharp already"
                continue
            waiting.append((region, crop, planes))
            if len(waiting) == upscaler.batch_size:
                _infer(waiting, upscaler)
                waiting.clear()
    _infer(waiting, upscaler)


def _infer(
    waiting: Sequence[tuple[Region, Crop, npt.NDArray[np.float32]]], upscaler: Upscaler
) -> None:
    if not waiting:
        return
    results = upscaler.infer(np.stack([planes for _, _, planes in waiting]))
    for (region, crop, planes), said in zip(waiting, results, strict=True):
        region.result = images.finish(said.image, upscaler.frame(crop, planes, "x2"))


def _pixels(strip: Strip) -> npt.NDArray[np.uint8]:
    return np.asarray(strip.image)
