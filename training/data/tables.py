"""Tables of labels beside folders of images: read strictly, because a slip loses rows unseen."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from lemma_fast.training.data.pages import SetError

_NAMES = ("labels.csv", "labels.jsonl")
_COLUMNS = (("hr", "file"), ("label",))


def find_table(folder: Path) -> Path:
    """The folder's `labels.csv` or `labels.jsonl`."""
    found = [folder / name for name in _NAMES if (folder / name).is_file()]
    if not found and folder.is_dir():
        # Where case counts, names in capitals are still looked for.
        named = (path for path in folder.iterdir() if path.name.lower() in _NAMES)
        found = [path for path in named if path.is_file()]
    if len(found) != 1:
        raise FileNotFoundError(f"{folder} needs one of labels.csv and labels.jsonl")
    return found[0]


def read_table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with a header, or of a file with one JSON object a line, and their lines.

    Raises SetError with table and line where the table cannot be read as it was meant. A row that
    has more fields than the header is empty: which of them is the label is unknown.
    """
    text = read_text(path)
    yield from _csv(path, text) if path.suffix.lower() == ".csv" else _json(path, text)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; raises SetError with the line where it is none, and OSError."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:2]:
        raise SetError(f"{path}:1: not UTF-8 (it looks like UTF-16): save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        line = data.count(b"\n", 0, wrong.start) + 1
        raise SetError(f"{path}:{line}: not UTF-8: save it as UTF-8") from wrong
    if (place := text.find("\0")) >= 0:
        raise SetError(f"{path}:{text.count(chr(10), 0, place) + 1}: a NUL byte in the text")
    return text


def is_image_file(path: Path) -> bool:
    """Whether the path that a table names is a file; False for one that cannot even be a name."""
    # Unlike pathlib's, this raises nothing where a name is too long or a folder may not be read.
    return os.path.isfile(path)


def _csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = rows.line_num + 1
        try:
            fields = next(rows)
        except StopIteration:
            break
        except csv.Error as wrong:
            raise SetError(f"{path}:{line}: {wrong}; is a quote unclosed?") from wrong
        # Not even a label in quotes has several lines: a quote that someone forgot takes rows in.
        if any("\n" in field or "\r" in field for field in fields):
            raise SetError(f"{path}:{line}: a field of several lines; is a quote unclosed?")
        if header is None:
            header = [field.strip() for field in fields]
            _check_header(path, header)
        elif fields:
            yield (
                line,
                dict(zip(header, fields, strict=False)) if len(fields) <= len(header) else {},
            )
    if header is None:
        raise SetError(f"{path} is empty")


def _check_header(path: Path, header: list[str]) -> None:
    if not all(any(name in header for name in names) for names in _COLUMNS):
        found = ", ".join(header)[:80]
        raise SetError(f"{path}:1: the header needs hr (or file) and label, it has {found!r}")
    if len(set(header)) < len(header):
        raise SetError(f"{path}:1: the header has a column twice")


def _refuse(number: str) -> None:
    raise ValueError(f"{number} is no number of JSON")


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return row


def _json(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_refuse, object_pairs_hook=_once)
        except (ValueError, RecursionError) as wrong:
            raise SetError(f"{path}:{number} is not JSON: {wrong}") from wrong
        if not isinstance(row, dict):
            raise SetError(f"{path}:{number} is not a JSON object")
        for key, value in row.items():
            if isinstance(value, (dict, list, bool)):
                raise SetError(f"{path}:{number}: {key} is neither text nor a number")
        yield number, {key: str(value) for key, value in row.items() if value is not None}
