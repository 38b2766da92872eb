"""Recognisers that read lines, and how one that reads words alone is made to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from lemma_fast.reading.ink import words_by_gaps
from lemma_fast.recognizers import Recognizer
from lemma_fast.recognizers.base import ReadLine, ReadWord

Pixels = npt.NDArray[np.uint8]

# Height and width of a word as `ByGaps` shows it.
_SHOWN = (32, 128)


@runtime_checkable
class LineRecognizer(Protocol):
    """Anything that reads lines and says where their words are."""

    def read_lines(self, crops: Sequence[Pixels]) -> list[ReadLine]:
        """Read RGB crops [H, W, 3] of lines, each in its own size."""
        ...


class ByGaps:
    """Lets a recogniser of words read lines: they are cut at their gaps, and read word by word.

    The confidence of a line is the least of its words'.
    """

    def __init__(self, recognizer: Recognizer, device: str | torch.device = "cpu") -> None:
        self.recognizer = recognizer
        self.device = device

    def read_lines(self, crops: Sequence[Pixels]) -> list[ReadLine]:
        """Read RGB crops [H, W, 3] of lines."""
        cuts = [words_by_gaps(crop) for crop in crops]
        pieces = [
            crop[:, left:right]
            for crop, spans in zip(crops, cuts, strict=True)
            for left, right in spans
        ]
        readings = iter(self.recognizer.read(self._batch(pieces)) if pieces else [])
        lines = []
        for crop, spans in zip(crops, cuts, strict=True):
            width = crop.shape[1]
            found = [(span, next(readings)) for span in spans]
            words = tuple(
                ReadWord(reading.text, reading.confidence, left / width, right / width)
                for (left, right), reading in found
                if reading.text.strip()
            )
            sure = min((word.confidence for word in words), default=0.0)
            lines.append(ReadLine(" ".join(word.text for word in words), sure, words))
        return lines

    def _batch(self, pieces: Sequence[Pixels]) -> Tensor:
        height, width = _SHOWN
        shown = [
            np.asarray(Image.fromarray(piece).resize((width, height), Image.Resampling.BICUBIC))
            for piece in pieces
        ]
        return torch.from_numpy(np.stack(shown)).to(self.device).permute(0, 3, 1, 2).float() / 255
