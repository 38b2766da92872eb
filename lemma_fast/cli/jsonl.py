"""The file of `--jsonl`: one line of JSON for each input. A file of an earlier run is continued."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, get_args

from lemma_fast.atomic import replacing
from lemma_fast.cli.exits import misused
from lemma_fast.cli.inputs import STDIN, Inputs
from lemma_fast.cli.results import Outcome, Photographed, Status
from lemma_fast.errors import reason
from lemma_fast.images import image_suffixes
from lemma_fast.outputs import check_output, is_stream, make_folder

if TYPE_CHECKING:
    from lemma_fast.recognizers import Reading

# How every line begins, by which one that was cut short is known.
_HEAD = b'{"input": '


class Unreported(Exception):
    """What --jsonl names takes no more lines; the message is one sentence that says why."""


@dataclass
class Lines:
    """Writes lines; `path` is None for a stream.

    `earlier` has the status of each input that the file names already. Such a line stays where this
    run only skips the input, and goes where the run does something else with it.
    """

    file: TextIO
    path: Path | None = None
    earlier: dict[str, str] = field(default_factory=dict)
    redone: set[str] = field(default_factory=set)

    def add(self, outcome: Outcome) -> None:
        """Write the line of one input; raises Unreported."""
        content = as_json(outcome)
        known = self.earlier.get(str(outcome.source.path))
        if known is not None:
            if outcome.status == "skipped" and known != "error":
                return
            self.redone.add(str(outcome.source.path))
        try:
            self.file.write(json.dumps(content) + "\n")
            self.file.flush()
        except BrokenPipeError:
            # Whoever read has enough: typer ends the run as every filter ends then.
            raise
        except OSError as error:
            _discard(self.file)
            raise Unreported(f"cannot write --jsonl: {reason(error)}") from None

    def drop_redone(self, until: int) -> None:
        """Take the earlier lines, the first `until` bytes, of the redone inputs out of the file."""
        if self.path is None or not self.redone:
            return
        try:
            with (
                replacing(self.path) as partial,
                self.path.open("rb") as old,
                partial.open("wb") as new,
            ):
                while line := old.readline():
                    if old.tell() > until or json.loads(line)["input"] not in self.redone:
                        new.write(line)
        except OSError as error:
            raise Unreported(f"cannot write --jsonl: {reason(error)}") from None


def check(target: str | None, inputs: Inputs, overwrite: bool) -> None:
    """Judge what --jsonl names before the work; raises OutputError, or ends the command."""
    if target is None or is_stream(Path(target)):
        return
    if target == STDIN:
        if sys.stdout is None:
            misused("--jsonl -: standard output is closed")
        return
    path = Path(target)
    if path.suffix.lower() in image_suffixes() or inputs.holds(path):
        misused(f"--jsonl {path} would replace an image")
    results = None if inputs.output is None else os.path.abspath(inputs.output)
    if os.path.abspath(path.parent) == results and not os.path.lexists(path.parent):
        # It is made later, and has been tried.
        return
    check_output(path, "--jsonl", overwrite=overwrite, made_here=_made_here)


@contextmanager
def opened(target: str | None) -> Iterator[Lines | None]:
    """Open what --jsonl names, once it has been checked; raises Unreported."""
    if target is None:
        yield None
        return
    if target == STDIN:
        yield Lines(sys.stdout)
        return
    path = Path(target)
    earlier: dict[str, str] = {}
    whole = 0
    try:
        if not is_stream(path):
            make_folder(path.parent)
            earlier, whole = _continued(path)
        file = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise Unreported(f"cannot write --jsonl {path}: {reason(error)}") from None
    lines = Lines(file, None if is_stream(path) else path, earlier)
    with file:
        try:
            yield lines
        except BaseException:
            with suppress(Unreported):
                lines.drop_redone(whole)
            raise
    lines.drop_redone(whole)


def _continued(path: Path) -> tuple[dict[str, str], int]:
    """Make a file ready for more lines; returns what `read_back` does. Raises OSError."""
    if not os.path.lexists(path):
        return {}, 0
    if path.is_symlink() or not _made_here(path):
        # --overwrite was given, or the check would not have let this pass.
        path.unlink()
        return {}, 0
    earlier, whole = read_back(path)
    os.truncate(path, whole)
    with path.open("rb+") as file:
        # An editor may have taken the last line's end.
        if whole and file.seek(-1, os.SEEK_END) and file.read() != b"\n":
            whole += file.write(b"\n")
    return earlier, whole


def read_back(path: Path) -> tuple[dict[str, str], int]:
    """Return the status of each input in a file of `--jsonl`, and how many bytes its lines have.

    The last line may have been cut short by a kill; it does not count. Raises ValueError where a
    line is not one that `as_json` makes, OSError where the file cannot be read.
    """
    statuses: dict[str, str] = {}
    whole = 0
    with path.open("rb") as file:
        for line in file:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n") and line[: len(_HEAD)] == _HEAD[: len(line)]:
                    break
                raise ValueError("a line is not JSON") from error
            fits = isinstance(content, dict) and content.get("status") in get_args(Status)
            if not fits or not isinstance(content.get("input"), str):
                raise ValueError("a line is not one of --jsonl")
            statuses[content["input"]] = content["status"]
            whole += len(line)
    return statuses, whole


def as_json(outcome: Outcome) -> dict[str, object]:
    """Build the JSON line of one input."""
    unread = [] if outcome.unread is None else [f"not read: {outcome.unread}"]
    return {
        "input": str(outcome.source.path),
        "status": outcome.status,
        "output": _text(outcome.output),
        "compare": _text(outcome.compare),
        "error": outcome.reason if outcome.status == "error" else None,
        "reason": outcome.reason if outcome.status == "skipped" else None,
        "input_size": outcome.input_size,
        "output_size": outcome.output_size,
        "ms": round(outcome.milliseconds, 2),
        **(_of_page(outcome) if isinstance(outcome, Photographed) else _of_crop(outcome)),
        "notes": [*outcome.notes, *unread],
    }


def _of_crop(outcome: Outcome) -> dict[str, object]:
    found = outcome.found
    return {
        "text": None if found is None else found.text,
        "length": None if found is None else found.length,
        "sharpness": None if found is None else round(found.sharpness, 3),
        "share": None if found is None else round(found.share, 3),
        "before": _reading(outcome.before),
        "after": _reading(outcome.after),
    }


def _of_page(outcome: Photographed) -> dict[str, object]:
    page = {} if outcome.page is None else outcome.page.to_dict()
    return {"text": page.get("text"), "lines": page.get("lines")}


def _made_here(path: Path) -> bool:
    try:
        read_back(path)
    except ValueError:
        return False
    if not os.access(path, os.W_OK):
        raise PermissionError(13, "Permission denied")
    return True


def _discard(file: TextIO) -> None:
    """Let go of what a file did not take, or closing it fails on the same once more."""
    with suppress(OSError, io.UnsupportedOperation), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), file.fileno())


def _reading(reading: Reading | None) -> dict[str, object] | None:
    if reading is None:
        return None
    return {"text": reading.text, "confidence": round(reading.confidence, 4)}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
