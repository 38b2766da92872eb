"""What was read in a photograph: lines, words, where they are, and what spoke for each reading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont

from lemma_fast.reading.regions import Quad
from lemma_fast.recognizers import Reading

_CHOSEN, _KEPT = (20, 140, 60), (30, 90, 200)


@dataclass(frozen=True, eq=False)
class Word:
    """A word: `text` and `confidence` are those of the reading that was chosen.

    `quad` [4, 2] are its corners in the photograph, in reading order. `before` was read in the
    photograph, `after` with the network's result in its place, None where the network was not
    asked. `chosen` names the one that counts and `reason` says why. `height` is its own in pixels,
    cut close, `sharpness` as in `lemma_fast.sharpness`, None where the height alone decided.
    """

    text: str
    confidence: float
    quad: Quad
    before: Reading
    after: Reading | None
    chosen: Literal["before", "after"]
    reason: str
    height: int
    sharpness: float | None = None


@dataclass(frozen=True, eq=False)
class Line:
    """A line: its corners in the photograph, in reading order, its text and its words."""

    text: str
    confidence: float
    quad: Quad
    words: tuple[Word, ...]


@dataclass(frozen=True, eq=False)
class Page:
    """A photograph and its lines from top to bottom; lines side by side from left to right.

    `text` has a row for each line. `image` is the photograph, upright and RGB.
    """

    image: Image.Image
    lines: tuple[Line, ...]

    @property
    def words(self) -> tuple[Word, ...]:
        """The words of all lines, in order."""
        return tuple(word for line in self.lines for word in line.words)

    @property
    def text(self) -> str:
        """What was read, a row for each line; "" for a page without text."""
        return "\n".join(line.text for line in self.lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pixels, in plain types that JSON takes."""
        return {
            "size": list(self.image.size),
            "text": self.text,
            "lines": [
                {
                    "text": line.text,
                    "confidence": round(line.confidence, 4),
                    "quad": _plain(line.quad),
                    "words": [_word(word) for word in line.words],
                }
                for line in self.lines
            ],
        }

    def overlay(self) -> Image.Image:
        """Draw the words' boxes and texts over the photograph: green where the network's counts."""
        drawn = self.image.copy()
        draw = ImageDraw.Draw(drawn)
        for word in self.words:
            colour = _CHOSEN if word.chosen == "after" else _KEPT
            corners = [(float(x), float(y)) for x, y in word.quad]
            draw.line([*corners, corners[0]], fill=colour, width=max(1, word.height // 16))
            font = ImageFont.load_default(max(9, min(40, round(0.5 * word.height))))
            left, top = min(x for x, _ in corners), min(y for _, y in corners)
            # Pillow's own font has Latin letters alone.
            shown = word.text.encode("latin-1", "replace").decode("latin-1")
            box = draw.textbbox((left, top), shown, font=font, anchor="lb")
            draw.rectangle(box, fill=(255, 255, 255))
            draw.text((left, top), shown, fill=colour, font=font, anchor="lb")
        return drawn


def _word(word: Word) -> dict[str, Any]:
    return {
        "text": word.text,
        "confidence": round(word.confidence, 4),
        "quad": _plain(word.quad),
        "height": word.height,
        "sharpness": None if word.sharpness is None else round(word.sharpness, 3),
        "before": _reading(word.before),
        "after": _reading(word.after),
        "chosen": word.chosen,
        "reason": word.reason,
    }


def _reading(reading: Reading | None) -> dict[str, Any] | None:
    if reading is None:
        return None
    return {"text": reading.text, "confidence": round(reading.confidence, 4)}


def _plain(quad: Quad) -> list[list[float]]:
    return [[round(float(x), 2), round(float(y), 2)] for x, y in quad]
