"""The photograph at twice its size, the network's words blended into it where they belong."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from lemma_fast.reading.page import Line, Page
from lemma_fast.reading.regions import Quad, homography, rectangle, warped
from lemma_fast.reading.strips import Strip

# The seam of a word is this share of its height, and its colours are matched over that one.
_SEAM, _SMOOTH = 0.12, 0.5
# What was read this surely must be read in the result, too.
_SURE = 0.8


@dataclass(frozen=True, eq=False)
class Enlarged:
    """A photograph at twice its size (RGB, or RGBA where it has transparency), and what it says.

    `page` is in the coordinates of the photograph before.
    """

    image: Image.Image
    page: Page


def enlargement(image: Image.Image) -> Image.Image:
    """Double an RGB image (Lanczos)."""
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.LANCZOS)


def blend(large: Image.Image, strip: Strip, line: Line) -> None:
    """Write the network's words of a strip into the enlarged photograph, in place.

    A word that was read surely and is read otherwise in the result is left out. `line` is what was
    chosen of the strip.
    """
    kept = _kept(strip, line)
    for region in strip.regions:
        if region.result is not None and kept.get(id(region), True):
            _blend(large, region.result, 2 * strip.quad_of(region))


def _kept(strip: Strip, line: Line) -> dict[int, bool]:
    """Whether each word that the network made reads as before, where that was sure."""
    if len(line.words) != len(strip.regions):
        # Other words were read in the result, and more surely.
        return {}
    kept = {}
    for region, word in zip(strip.regions, line.words, strict=True):
        if word.after is None:
            kept[id(region)] = word.before.confidence < _SURE
        else:
            same = word.after.text.strip() == word.before.text.strip()
            kept[id(region)] = same or word.before.confidence < _SURE
    return kept


def _blend(large: Image.Image, word: Image.Image, quad: Quad) -> None:
    """Blend a straight word [RGB] into the quad of the enlarged photograph that it comes from."""
    width, height = word.size
    left, top = np.floor(quad.min(axis=0)).astype(int) - 1
    right, bottom = np.ceil(quad.max(axis=0)).astype(int) + 1
    left, top = max(0, int(left)), max(0, int(top))
    size = min(large.width, int(right)) - left, min(large.height, int(bottom)) - top
    if min(size) < 1:
        return
    around = large.crop((left, top, left + size[0], top + size[1]))
    local = quad - (left, top)
    out = homography(local, rectangle(width, height))
    back = homography(rectangle(width, height), local)
    matched = _matched(word, warped(around, word.size, back))
    # Beyond its edges the word goes on as its outermost pixels, so that no black comes in.
    rim = 2
    padded = Image.fromarray(np.pad(np.asarray(matched), ((rim, rim), (rim, rim), (0, 0)), "edge"))
    shift = np.array([[1, 0, rim], [0, 1, rim], [0, 0, 1]], dtype=np.float64)
    there = warped(padded, size, shift @ out)
    mask = warped(_mask(width, height), size, out)
    large.paste(Image.composite(there, around, mask), (left, top))


def _matched(word: Image.Image, before: Image.Image) -> Image.Image:
    """Give a word the colours of what was there before, but for its detail."""
    blur = ImageFilter.GaussianBlur(_SMOOTH * word.height)
    new, old = (np.asarray(each.filter(blur), dtype=np.float32) for each in (word, before))
    moved = np.asarray(word, dtype=np.float32) + old - new
    return Image.fromarray(np.rint(moved.clip(0, 255)).astype(np.uint8))


def _mask(width: int, height: int) -> Image.Image:
    """1 inside, falling smoothly to 0 at the edges."""
    seam = max(1.5, _SEAM * height)

    def ramp(length: int) -> npt.NDArray[np.float64]:
        at = np.arange(length) + 0.5
        share = np.clip(np.minimum(at, length - at) / seam, 0, 1)
        return share * share * (3 - 2 * share)

    both = np.outer(ramp(height), ramp(width))
    return Image.fromarray(np.rint(255 * both).astype(np.uint8))


def boxes(large: Image.Image, page: Page) -> Image.Image:
    """Draw the boxes of a photograph's words over its enlargement [RGB]."""
    scaled = Page(large, tuple(_doubled(line) for line in page.lines))
    return scaled.overlay()


def _doubled(line: Line) -> Line:
    words = tuple(replace(word, quad=2 * word.quad, height=2 * word.height) for word in line.words)
    return replace(line, quad=2 * line.quad, words=words)
