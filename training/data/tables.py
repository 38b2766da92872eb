"""Tables of labels beside folders of images."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path


def find_table(folder: Path) -> Path:
    """The folder's `labels.csv` or `labels.jsonl`."""
    found = [path for path in (folder / "labels.csv", folder / "labels.jsonl") if path.is_file()]
    if len(found) != 1:
        raise FileNotFoundError(f"{folder} needs one of labels.csv and labels.jsonl")
    return found[0]


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV file with a header, or of a file with one JSON object a line."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        if path.suffix.lower() == ".csv":
            yield from csv.DictReader(lines)
            return
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as wrong:
                raise ValueError(f"{path}:{number} is not JSON: {wrong}") from wrong
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number} is not a JSON object")
            yield {str(key): str(value) for key, value in row.items() if value is not None}
