"""The alphabets of the recognisers.

Every alphabet maps a run of consecutive class ids to characters; the ids outside the run are
special (blank, end, padding).
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass

_LETTERS_LAST = string.digits + string.ascii_lowercase
_PRINTABLE = string.digits + string.ascii_letters + string.punctuation


@dataclass(frozen=True, slots=True)
class Charset:
    """Class ids `first, first + 1, ...` stand for `characters`; `end` closes a text."""

    characters: str
    first: int
    end: int
    size: int

    def encode(self, text: str) -> list[int]:
        """Return the class ids of `text`; raise ValueError for a character that has none."""
        ids = []
        for character in text:
            index = self.characters.find(character)
            if index < 0:
                raise ValueError(f"{character!r} in {text!r} is not one of {self.characters!r}")
            ids.append(self.first + index)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the characters up to the first `end`; other special ids are left out."""
        text = []
        for value in ids:
            if value == self.end:
                break
            if 0 <= value - self.first < len(self.characters):
                text.append(self.characters[value - self.first])
        return "".join(text)


#: CRNN (0 is the CTC blank) and the text-focus Transformer (0 is start, end and padding).
FOCUS = Charset(_LETTERS_LAST, first=1, end=0, size=37)
#: LEMMA's prior, ABINet and MATRN: 0 is null, then a-z, then 1-9, then 0.
PRIOR = Charset(string.ascii_lowercase + "1234567890", first=1, end=0, size=37)
#: MORAN: the end comes last.
MORAN = Charset(_LETTERS_LAST, first=0, end=36, size=37)
#: ASTER: 94 characters, then end, padding, unknown.
ASTER = Charset(_PRINTABLE, first=0, end=94, size=97)
#: PARSeq: end, 94 characters, then begin and padding (which the head never predicts).
PARSEQ = Charset(_PRINTABLE, first=1, end=0, size=97)


def filter_label(text: str) -> str:
    """Lower-case `text`, then delete every character outside `0-9a-z`."""
    return "".join(character for character in text.lower() if character in _LETTERS_LAST)


def collapse_ctc(path: Iterable[int], blank: int = 0) -> list[int]:
    """Merge repeats and drop blanks: the class ids a greedy CTC path spells."""
    ids = []
    last = blank
    for value in path:
        if value not in (blank, last):
            ids.append(value)
        last = value
    return ids
