"""Which records of a set do not decode, kept from one start of a run to the next.

To find that out every record is decoded, 0.6 ms each. A verdict holds for the files as they are:
their names, sizes and times, and the versions of what decodes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import PIL

from lemma_fast import __version__
from lemma_fast.atomic import replace_file
from lemma_fast.training.data.pairs import PairDataset, Skipped


class Verdicts:
    """A file of verdicts; one that is absent or damaged costs the decoding, no more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed = False
        self.left_out: dict[str, list[list[str]]] = {}
        with suppress(OSError, ValueError, TypeError, RecursionError):
            self.left_out = _read(path)

    def check(self, crops: PairDataset) -> None:
        """Leave out of a set what does not decode; decodes a set that is new or has changed."""
        state = _state(crops)
        known = self.left_out.get(state)
        if known is not None:
            crops.leave_out([Skipped(name, reason) for name, reason in known])
            return
        before = len(crops.skipped)
        found = crops.check()[before:]
        self.left_out[state] = [[record.id, record.reason] for record in found]
        self.changed = True

    def save(self) -> None:
        """Write the file where there is something new in it; raises OSError."""
        if self.changed:
            replace_file(self.path, json.dumps(self.left_out))
            self.changed = False


def _read(path: Path) -> dict[str, list[list[str]]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    records = [record for found in dict(content).values() for record in found]
    if not all(len(record) == 2 and all(type(x) is str for x in record) for record in records):
        raise ValueError("not a file of verdicts")
    return dict(content)


def _state(crops: PairDataset) -> str:
    facts: list[object] = [__version__, PIL.__version__, type(crops).__name__, len(crops)]
    for path in crops.files():
        found = path.stat()
        facts.append([os.fsencode(path.resolve()).hex(), found.st_size, found.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
