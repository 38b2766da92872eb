"""What `lemma-fast upscale` tells: a person on standard error, a program by JSON lines."""

from __future__ import annotations

import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from lemma_fast import images
from lemma_fast.cli.inputs import STDIN, Inputs, Outcome

if TYPE_CHECKING:
    from lemma_fast.recognizers import Reading

# Of a whole folder that is skipped or kept, so many names are enough; the rest is counted.
_NAMES_SHOWN = 10


class Unreported(Exception):
    """What --jsonl names takes no more lines; the message is one sentence that says why."""


def _discard(file: TextIO) -> None:
    """Let go of what a file did not take, or closing it fails on the same once more."""
    with suppress(OSError, io.UnsupportedOperation), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), file.fileno())


@dataclass
class Report:
    """Tells a person on standard error, and a program by JSON lines."""

    quiet: bool
    verbose: bool
    jsonl: TextIO | None = None
    counts: Counter[str] = field(default_factory=Counter)
    console: Console = field(default_factory=lambda: Console(stderr=True))
    began: float = field(default_factory=time.perf_counter)

    def say(self, text: str) -> None:
        """Print a line as it is, also beside a progress bar."""
        self.console.print(
            _printable(text, self.console.encoding), markup=False, highlight=False, soft_wrap=True
        )

    def detail(self, text: str) -> None:
        """Print a line that only -v asks for."""
        if self.verbose:
            self.say(text)

    @contextmanager
    def progress(self, inputs: Inputs) -> Iterator[Callable[[], None]]:
        """Show a bar where standard error is a terminal; yields the function that moves it on."""
        if self.quiet or not self.console.is_terminal:
            yield lambda: None
            return
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=sum(1 for _ in inputs))
            yield lambda: bar.advance(task)

    def add(self, outcome: Outcome) -> None:
        """Report one input."""
        name = "standard input" if outcome.source.data is not None else str(outcome.source.path)
        self.counts[outcome.status] += 1
        if self.jsonl is not None:
            self._write_line(self.jsonl, as_json(outcome))
        if outcome.status == "error":
            self.say(f"error: {name}: {outcome.reason}")
        elif not self.quiet:
            self._describe(name, outcome)

    def _write_line(self, file: TextIO, content: dict[str, object]) -> None:
        try:
            file.write(json.dumps(content) + "\n")
            file.flush()
        except BrokenPipeError:
            # Whoever read has enough: typer ends the run as every filter ends then.
            raise
        except OSError as error:
            _discard(file)
            raise Unreported(f"cannot write --jsonl: {images.reason(error)}") from None

    def _describe(self, name: str, outcome: Outcome) -> None:
        for note in outcome.notes:
            self.say(f"note: {name}: {note}")
        if outcome.status == "ok":
            said = f'"{outcome.text}"' if outcome.text else "no text"
            if outcome.before is not None and outcome.after is not None:
                said += f'; read "{outcome.before.text}" before, "{outcome.after.text}" after'
            self.detail(f"{name} -> {outcome.output or 'standard output'} ({said})")
            return
        seen = self.counts[outcome.status]
        if self.verbose or seen <= _NAMES_SHOWN:
            why = outcome.reason or f"{_size(outcome.input_size)} is legible already, copied"
            self.say(f"{outcome.status}: {name}: {why}")
        elif seen == _NAMES_SHOWN + 1:
            self.say(f"{outcome.status}: further ones are only counted (-v names them)")

    def close(self, inputs: Inputs, output: str | None, keep_above: int) -> int:
        """Print the summary; returns the exit code."""
        for name in inputs.not_images:
            self.detail(f"left out: {name}: no image, by its ending")
        for name in inputs.earlier:
            self.detail(f"left out: {name}: an earlier result")
        if not self.quiet:
            if self.counts["kept"]:
                self.say(
                    f"Kept crops are taller than {keep_above} pixels; "
                    "--keep-above 0 upscales them too."
                )
            self.say(self._summary(inputs, output))
        return int(self.counts["error"] > 0)

    def _summary(self, inputs: Inputs, output: str | None) -> str:
        counts = self.counts
        parts = [f"{counts['ok']} upscaled"]
        parts += [f"{counts[status]} {status}" for status in ("kept", "skipped") if counts[status]]
        if counts["error"]:
            parts.append(f"{counts['error']} failed")
        if inputs.earlier:
            parts.append(f"{_number(len(inputs.earlier), 'earlier result')} left out")
        if inputs.not_images:
            parts.append(f"{_number(len(inputs.not_images), 'other file')} left out")
        text = f"{', '.join(parts)}, in {time.perf_counter() - self.began:.1f} s"
        if counts["ok"] + counts["kept"]:
            where = {None: "beside the inputs", STDIN: "to standard output"}
            text += f"; written {where.get(output, f'to {output}')}"
        return text + "."


def as_json(outcome: Outcome) -> dict[str, object]:
    """Build the JSON line of one input."""
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
        "text": outcome.text,
        "length": outcome.length,
        "before": _reading(outcome.before),
        "after": _reading(outcome.after),
        "notes": outcome.notes,
    }


def _reading(reading: Reading | None) -> dict[str, object] | None:
    if reading is None:
        return None
    return {"text": reading.text, "confidence": round(reading.confidence, 4)}


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _printable(text: str, encoding: str) -> str:
    """Escape what a file's name may hold, but a terminal cannot show or would obey."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _size(size: tuple[int, int] | None) -> str:
    return "its size" if size is None else f"{size[0]}x{size[1]}"
