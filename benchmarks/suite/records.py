"""A file of JSON lines: one line for every number, on the disk as soon as it is known.

The first line says what the numbers were measured with. Several processes may append to one file.
A process that is killed while it writes leaves half a line, which costs that line alone.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]
#: Where the processes of a suite find the file, and the time at which the suite began.
PATH, BEGUN = "LEMMA_FAST_RECORDS", "LEMMA_FAST_BEGUN"
NAME = "records.jsonl"


class Records:
    """Appends records to a file; `begun` is the suite's beginning, in seconds of `time.time`."""

    def __init__(self, path: Path, begun: float) -> None:
        self.path, self.begun = path, begun

    def add(self, part: str, record: Record, at: float | None = None) -> None:
        """Write a record of one kind, and the seconds since the beginning, to the disk."""
        at = time.time() - self.begun if at is None else at
        line = json.dumps({"part": part, "at": round(at, 1), **record}).encode() + b"\n"
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                # Whoever wrote last was killed at it.
                line = b"\n" + line
            os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)

    def environment(self) -> dict[str, str]:
        """What a process needs to append to the same file."""
        return {PATH: str(self.path), BEGUN: repr(self.begun)}


def here() -> Records | None:
    """The records of the suite that started this process, None where none did."""
    path = os.environ.get(PATH)
    return Records(Path(path), float(os.environ[BEGUN])) if path else None


def read(path: Path) -> list[Record]:
    """All records of a file but those that were cut while they were written."""
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
