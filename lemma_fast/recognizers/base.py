"""What the recognisers share: the reading they return, and checks of their input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lemma_fast.recognizers.charset import Charset

__all__ = [
    "ReadLine", "ReadWord", "Reading", "Recognizer", "check_images", "grey", "read_greedily",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read in one image.

    `confidence` is in [0, 1]; each recogniser says how it is made. `ids` are the class ids of the
    characters, empty where the recogniser has none.
    """

    text: str
    confidence: float
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadWord:
    """A word in a line: where it begins and ends, in shares of the line's width."""

    text: str
    confidence: float
    left: float
    right: float


@dataclass(frozen=True, slots=True)
class ReadLine:
    """What was read in a crop of a whole line, and its words from left to right."""

    text: str
    confidence: float
    words: tuple[ReadWord, ...]


class Recognizer(Protocol):
    """Anything that reads word crops."""

    def read(self, images: Tensor) -> list[Reading]:
        """Read RGB `images` (N, 3, H, W) in [0, 1], pre-processing included."""
        ...


def check_images(images: Tensor) -> None:
    """Raise ValueError unless `images` is a floating-point (N, 3, H, W) batch."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            "expected RGB images (N, 3, H, W) in floating point,"
            f" got {tuple(images.shape)} {images.dtype}"
        )


def grey(images: Tensor) -> Tensor:
    """Turn RGB (N, 3, H, W) into grey (N, 1, H, W) by 0.299 R + 0.587 G + 0.114 B, unclamped."""
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def read_greedily(logits: Tensor, charset: Charset) -> list[Reading]:
    """Turn `logits` [N, T, classes] into readings, each cut at its first end.

    The confidence is the product of the probabilities of the characters and, where there is one,
    of the end.
    """
    probability, best = logits.float().softmax(-1).max(-1)
    is_end = (best == charset.end).int()
    past = is_end.cumsum(1) > is_end
    confidence = probability.masked_fill(past, 1.0).prod(1)
    readings = []
    for row, value in zip(best.tolist(), confidence.tolist(), strict=True):
        ids = row[: row.index(charset.end)] if charset.end in row else row
        readings.append(Reading(charset.decode(ids), value, tuple(ids)))
    return readings
