"""Tesseract as a word reader: the installed program, one process over a list of crops.

Not a recogniser of the published tables, but an independent judge that anyone can install. Crops
are enlarged (bicubic), stretched to full contrast, inverted where the text is light on dark, and
given a white border first, because Tesseract expects dark letters of 20-40 pixels on a white page.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from lemma_fast.recognizers import base

_HEIGHT = 64
_BORDER = 10
_TEXT_LEVEL = "5"


def prepare(pixels: NDArray[np.uint8]) -> Image.Image:
    """Turn an RGB crop (H, W, 3) uint8 into what Tesseract likes to see.

    Grey, enlarged one to four times towards a height of 64, autocontrast, light background (a crop
    whose outline is mostly dark is inverted), white border.
    """
    image = Image.fromarray(pixels).convert("L")
    factor = _factor(image.height)
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    image = ImageOps.autocontrast(image)
    # a white frame round a dark crop would be read as a shape of its own
    if np.median(_outline(np.asarray(image))) < 128:
        image = ImageOps.invert(image)
    return ImageOps.expand(image, _BORDER, fill=255)


def _factor(height: int) -> int:
    return min(4, max(1, round(_HEIGHT / height)))


def _outline(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


class Tesseract:
    """Reads word crops with the `tesseract` program (`--psm 8 --oem 1`)."""

    name = "tesseract"

    def __init__(
        self, *, language: str = "eng", jobs: int = 1, executable: str = "tesseract"
    ) -> None:
        """Look the program up; `jobs` processes share the crops of one call.

        Raise FileNotFoundError where it is not installed.
        """
        found = shutil.which(executable)
        if found is None:
            raise FileNotFoundError(
                f"no program {executable!r}: install Tesseract (Debian: apt-get install"
                " tesseract-ocr), or leave this recogniser out"
            )
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        self.executable = found
        self.language = language
        self.jobs = jobs

    def version(self) -> str | None:
        """Name the program and the language files that it reads with; None where one is not found.

        Two readers of the same version read the same in the same crops.
        """
        said = [
            subprocess.run(
                [self.executable, option], capture_output=True, text=True, encoding="utf-8"
            ).stdout
            for option in ("--version", "--list-langs")
        ]
        folder = re.search(r'"(.+)"', said[1])
        if not said[0].strip() or folder is None:
            return None
        parts = [said[0].splitlines()[0]]
        for language in self.language.split("+"):
            path = Path(folder[1], f"{language}.traineddata")
            if not path.is_file():
                return None
            parts.append(f"{language} {hashlib.sha256(path.read_bytes()).hexdigest()}")
        return ", ".join(parts)

    def read(self, images: Tensor) -> list[base.Reading]:
        """Read RGB `images` (N, 3, H, W) in [0, 1], clamped.

        The text is all that was read in the crop, without spaces; the confidence is the lowest
        of its parts, 0 where nothing was read.
        """
        base.check_images(images)
        scaled = images.detach().float().clamp(0, 1).mul(255).round().byte()
        pixels = scaled.permute(0, 2, 3, 1).cpu().numpy()
        chunks = [chunk for chunk in np.array_split(pixels, self.jobs) if len(chunk)]
        with ThreadPoolExecutor(self.jobs) as pool:
            return [reading for part in pool.map(self._read_chunk, chunks) for reading in part]

    def read_lines(self, crops: Sequence[NDArray[np.uint8]]) -> list[base.ReadLine]:
        """Read RGB crops [H, W, 3] uint8 of whole lines, and find their words (`--psm 7`)."""
        order = np.array_split(np.arange(len(crops)), self.jobs)
        chunks = [[crops[n] for n in part] for part in order if len(part)]
        with ThreadPoolExecutor(self.jobs) as pool:
            tables = list(pool.map(lambda chunk: self._table(chunk, "7"), chunks))
        return [
            line
            for table, chunk in zip(tables, chunks, strict=True)
            for line in parse_lines(table, chunk)
        ]

    def _read_chunk(self, crops: Sequence[NDArray[np.uint8]]) -> list[base.Reading]:
        return parse(self._table(crops, "8"), len(crops))

    def _table(self, crops: Sequence[NDArray[np.uint8]], segmentation: str) -> str:
        """Run the program over crops of any sizes; returns its TSV."""
        with tempfile.TemporaryDirectory(prefix="lemma-fast-") as folder:
            paths = [Path(folder, f"{n}.png") for n in range(len(crops))]
            for path, crop in zip(paths, crops, strict=True):
                # these files live for a moment: speed counts, size does not
                prepare(crop).save(path, compress_level=1)
            listing = Path(folder, "list.txt")
            listing.write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
            command = [self.executable, str(listing), "-", "-l", self.language]
            finished = subprocess.run(
                [*command, "--psm", segmentation, "--oem", "1", "tsv"],
                capture_output=True,
                text=True,
                encoding="utf-8",
                # more threads make Tesseract slower on images as small as these
                env={**os.environ, "OMP_THREAD_LIMIT": "1"},
            )
        if finished.returncode:
            raise RuntimeError(f"tesseract failed: {finished.stderr.strip()[-500:]}")
        return finished.stdout


def parse(table: str, count: int) -> list[base.Reading]:
    """Turn Tesseract's TSV, whose pages are the crops in order, into `count` readings."""
    return [
        base.Reading(
            text := "".join(word.text for word in words),
            min(word.confidence for word in words) if text else 0.0,
        )
        for words in _words(table, [1] * count)
    ]


def parse_lines(table: str, crops: Sequence[np.ndarray]) -> list[base.ReadLine]:
    """Turn Tesseract's TSV, whose pages are the crops in order, into lines.

    The confidence of a line is the least of its words', 0 where nothing was read.
    """
    lines = []
    for words in _words(table, [_factor(crop.shape[0]) * crop.shape[1] for crop in crops]):
        read = tuple(word for word in words if word.text)
        sure = min((word.confidence for word in read), default=0.0)
        lines.append(base.ReadLine(" ".join(word.text for word in read), sure, read))
    return lines


def _words(table: str, widths: Sequence[int]) -> list[list[base.ReadWord]]:
    """Collect the words of each page, whose width without its border is given."""
    count = len(widths)
    found: list[list[base.ReadWord]] = [[] for _ in range(count)]
    pages = set()
    for row in csv.DictReader(table.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE):
        page = int(row["page_num"]) - 1
        pages.add(page)
        if row["level"] == _TEXT_LEVEL:
            left = int(row["left"]) - _BORDER
            ends = (max(0, left), min(widths[page], left + int(row["width"])))
            sure = float(row["conf"]) / 100
            found[page].append(
                base.ReadWord(row["text"].strip(), sure, *(end / widths[page] for end in ends))
            )
    if pages != set(range(count)):
        raise RuntimeError(f"tesseract answered for {len(pages)} of {count} crops")
    return found
