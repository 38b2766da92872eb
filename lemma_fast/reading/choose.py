"""The surer of two readings of a line: as it was photographed, and with the network's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lemma_fast.reading.page import Line, Word
from lemma_fast.reading.strips import Region, Strip
from lemma_fast.recognizers import Reading
from lemma_fast.recognizers.base import ReadLine, ReadWord

_ORIGINAL = "the network was not asked"


def chosen(strip: Strip, after: ReadLine | None, margin: float) -> Line:
    """Choose what counts in a line; `after` was read in `strip.restored()`, None if nothing was.

    A reading of the network's result counts where its confidence exceeds that of the original by
    more than `margin`, so at equal confidence the original counts. Words are chosen one by one
    where both readings have the same ones, by their places; else the line is chosen as a whole.
    """
    before = strip.line
    if after is None:
        return _line(strip, [_word(strip, region, None, False, margin) for region in strip.regions])
    if letters(before) == letters(after):
        # The same text, however it was cut into words.
        after = replace(
            after, words=tuple(replace(w, confidence=after.confidence) for w in before.words)
        )
    if not same_places(before.words, after.words):
        if after.confidence > before.confidence + margin:
            return _whole(strip, after, margin)
        return _line(
            strip, [_word(strip, region, None, False, margin, after) for region in strip.regions]
        )
    words = []
    for region, other in zip(strip.regions, after.words, strict=True):
        asked = region.result is not None
        surer = asked and other.confidence > region.word.confidence + margin
        words.append(_word(strip, region, other if asked else None, surer, margin))
    return _line(strip, words)


def letters(line: ReadLine) -> str:
    """The text of a line's words without what is between them."""
    return "".join(word.text for word in line.words)


def same_places(one: Sequence[ReadWord], other: Sequence[ReadWord]) -> bool:
    """Whether two readings have as many words, and each pair of them overlaps."""
    if len(one) != len(other):
        return False
    pairs = zip(one, other, strict=True)
    return all(min(a.right, b.right) > max(a.left, b.left) for a, b in pairs)


def _word(
    strip: Strip,
    region: Region,
    after: ReadWord | None,
    surer: bool,
    margin: float,
    other: ReadLine | None = None,
) -> Word:
    """Make the word of a region; `other` is a whole line that has other words and lost."""
    before = Reading(region.word.text, region.word.confidence)
    reading = Reading(after.text, after.confidence) if after is not None else None
    if other is not None and region.result is not None:
        reason = f'other words were read in the result ("{other.text}"), not surer by {margin:g}'
    elif reading is None:
        reason = region.reason or _ORIGINAL
    elif surer:
        reason = f"surer by {reading.confidence - before.confidence:.3f}"
    else:
        reason = f"the result is not surer by more than {margin:g}"
    best = reading if surer and reading is not None else before
    return Word(
        best.text,
        best.confidence,
        strip.quad_of(region),
        before,
        reading,
        "after" if best is reading else "before",
        reason,
        region.box[3] - region.box[1],
        region.sharpness,
    )


def _whole(strip: Strip, after: ReadLine, margin: float) -> Line:
    """Take the line with the network's results as it was read, its words included."""
    before = Reading(strip.line.text, strip.line.confidence)
    by = after.confidence - before.confidence
    words = []
    for word in after.words:
        width, height = strip.image.size
        left = min(width - 1, int(word.left * width))
        region = Region(word, (left, 0, max(left + 1, round(word.right * width)), height))
        reading = Reading(word.text, word.confidence)
        words.append(
            Word(
                word.text,
                word.confidence,
                strip.quad_of(region),
                before,
                reading,
                "after",
                f'the line had other words before ("{before.text}") and is surer by {by:.3f}',
                strip.image.height,
            )
        )
    return Line(after.text, after.confidence, strip.quad, tuple(words))


def _line(strip: Strip, words: list[Word]) -> Line:
    """Put the chosen words into the line's text, whose spaces stay as they were read."""
    text, rest = "", strip.line.text
    for region, word in zip(strip.regions, words, strict=True):
        ahead, found, behind = rest.partition(region.word.text)
        text, rest = text + ahead + (word.text if found else ""), behind
    changed = [word for word in words if word.chosen == "after"]
    confidence = strip.line.confidence
    if changed:
        count = sum(len(word.text) for word in words)
        confidence = sum(len(word.text) * word.confidence for word in words) / max(1, count)
    return Line(text + rest, confidence, strip.quad, tuple(words))
