"""`Reader`: a photograph in, its text out, each word read before and after the network."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from lemma_fast import images
from lemma_fast.images import Crop
from lemma_fast.model import LEMMA
from lemma_fast.reading.choose import chosen
from lemma_fast.reading.detect import Detector, RapidDetector
from lemma_fast.reading.lines import ByGaps, LineRecognizer
from lemma_fast.reading.page import Line, Page
from lemma_fast.reading.photo import Enlarged, blend, enlargement
from lemma_fast.reading.regions import Quad, as_quad
from lemma_fast.reading.strips import Strip, batches, read_strips, restore
from lemma_fast.recognizers import RapidOCR, Recognizer, load_recognizer
from lemma_fast.upscale import PathLike, Picture, Upscaler, take_picture

# By how much the reading of the network's result must be surer. Measured: docs/log.md, 2026-11-28.
MARGIN, MARGIN_OF_RAPIDOCR = 0.0, 0.2


class Reader:
    """Reads photographs: finds lines, reads them, and asks the network about small, blurred words.

        reader = Reader()                       # extra: ocr
        page = reader("photo.jpg")              # .text, .lines, .words, .to_dict(), .overlay()
        pages = reader(["a.jpg", "b.jpg"])

    Each word that is small (at most `keep_above` pixels tall, cut close; 0: of any height) and
    blurred (`lemma_fast.sharpness`) goes through the network. Its line is read before and after;
    the reading of the result counts where it is surer by more than `margin`, else the original's.

    `model` and `device` are those of `Upscaler`, or `model` is an Upscaler. `recognizer` is
    "rapidocr", another name of `load_recognizer` that needs no checkpoint, or an object: one with
    `read_lines` (`LineRecognizer`) reads whole lines, one with `read` alone gets them cut at their
    gaps. `detector` is PP-OCRv6's by default. `margin` None is 0.2 for rapidocr and 0 for others.

    Memory does not depend on how many words there are, but for the page itself. Raises
    FileNotFoundError where a package is not installed.
    """

    def __init__(
        self,
        model: PathLike | LEMMA | Upscaler = "small",
        device: str | torch.device = "auto",
        *,
        recognizer: str | LineRecognizer | Recognizer = "rapidocr",
        detector: Detector | None = None,
        keep_above: int = 32,
        margin: float | None = None,
        batch_size: int | None = None,
    ) -> None:
        if keep_above < 0:
            raise ValueError(f"keep_above {keep_above} is less than 0")
        if margin is not None and not 0 <= margin <= 1:
            raise ValueError(f"margin {margin} is not between 0 and 1")
        # First what may be missing, then what takes long.
        reads = load_recognizer(recognizer) if isinstance(recognizer, str) else recognizer
        self.detector: Detector = RapidDetector() if detector is None else detector
        self.upscaler = (
            model
            if isinstance(model, Upscaler)
            else Upscaler(model, device, "auto", batch_size, "x2", always=False)
        )
        self.recognizer: LineRecognizer = (
            reads if isinstance(reads, LineRecognizer) else ByGaps(reads, self.upscaler.device)
        )
        self.keep_above = keep_above
        if margin is None:
            margin = MARGIN_OF_RAPIDOCR if isinstance(reads, RapidOCR) else MARGIN
        self.margin = margin

    def __repr__(self) -> str:
        """Name what was chosen."""
        return (
            f"Reader({self.upscaler!r}, recognizer={self.recognizer!r}, "
            f"keep_above={self.keep_above}, margin={self.margin:g})"
        )

    @overload
    def __call__(self, pictures: Picture) -> Page: ...
    @overload
    def __call__(
        self,
        pictures: list[str]
        | tuple[str, ...]
        | Sequence[Image.Image]
        | Sequence[os.PathLike[str]]
        | Sequence[npt.NDArray[np.uint8]],
    ) -> list[Page]: ...
    def __call__(self, pictures: Picture | Sequence[Picture]) -> Page | list[Page]:
        """Read one photograph, or each of a list; what is taken is what `Upscaler` takes.

        Raises ImageError (a ValueError) or TypeError for what cannot be used, RuntimeError where
        the recogniser or the network fails.
        """
        if isinstance(pictures, list | tuple):
            return [self.read(take_picture(picture)[0]) for picture in pictures]
        return self.read(take_picture(pictures)[0])  # type: ignore[arg-type]

    def read(self, crop: Crop) -> Page:
        """Read a decoded photograph."""
        image = crop.opaque
        return Page(image, tuple(line for _, line in self._lines(image)))

    def enlarge(self, picture: Picture) -> Enlarged:
        """Make a photograph twice as large, its small, blurred words by the network."""
        return self.enlarged(take_picture(picture)[0])

    def enlarged(self, crop: Crop) -> Enlarged:
        """Enlarge a decoded photograph."""
        image = crop.opaque
        large = enlargement(image)
        lines = []
        for strip, line in self._lines(image):
            blend(large, strip, line)
            lines.append(line)
        frame = crop.frame("x2", self.upscaler.native)
        return Enlarged(images.finish(large, frame), Page(image, tuple(lines)))

    def _lines(self, image: Image.Image) -> Iterator[tuple[Strip, Line]]:
        """Find and read the lines of a photograph [RGB], a batch at a time."""
        for batch in batches(image, self.find(image)):
            strips = [s for s in read_strips(image, batch, self.recognizer) if s.line.words]
            restore(strips, self.upscaler, self.keep_above)
            asked = [s for s in strips if any(region.result for region in s.regions)]
            pixels = [np.asarray(strip.restored()) for strip in asked]
            after = iter(self.recognizer.read_lines(pixels) if pixels else [])
            seen = {id(strip): next(after) for strip in asked}
            yield from ((s, chosen(s, seen.get(id(s)), self.margin)) for s in strips)

    def find(self, image: Image.Image) -> list[Quad]:
        """Find the lines of a photograph [RGB], in reading order."""
        found = self.detector.detect(np.asarray(image))
        return _ordered([as_quad(quad) for quad in found])


def _ordered(quads: list[Quad]) -> list[Quad]:
    """Sort from top to bottom, and from left to right those that are side by side."""
    rows: list[list[Quad]] = []
    for quad in sorted(quads, key=lambda quad: float(quad[:, 1].mean())):
        middle = float(quad[:, 1].mean())
        first = rows[-1][0][:, 1] if rows else None
        if first is not None and abs(middle - first.mean()) < (first.max() - first.min()) / 2:
            rows[-1].append(quad)
        else:
            rows.append([quad])
    return [quad for row in rows for quad in sorted(row, key=lambda quad: float(quad[:, 0].mean()))]
