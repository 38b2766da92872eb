"""`lemma-fast upscale`: checks what was asked for, runs the stream, reports what became of it."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from lemma_fast import images
from lemma_fast.images import Format, Size, image_suffixes, write_atomically
from lemma_fast.inputs import STDIN, Inputs, Naming, Outcome

_ENDINGS: dict[str, Format] = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
# Of a whole folder that is skipped or kept, so many names are enough; the rest is counted.
_NAMES_SHOWN = 10


@dataclass(frozen=True)
class Request:
    """The options of `lemma-fast upscale`, as typed."""

    paths: list[str]
    output: str | None
    suffix: str
    form: Format | None
    recursive: bool
    overwrite: bool
    compare: bool
    size: Size
    keep_above: int
    model: str
    device: str
    dtype: str
    batch_size: int | None
    jsonl: str | None
    quiet: bool
    verbose: bool


def upscale(request: Request) -> int:
    """Run one request; returns the exit code, or raises typer.BadParameter."""
    _check(request)
    inputs, naming = _plan(request)
    report = Report(request.quiet, request.verbose)
    if not request.verbose:
        # Pillow's remarks on odd but readable files.
        warnings.filterwarnings("ignore", module=r"PIL\.")
    # Torch takes a second, and a network more: what is asked wrongly is said before.
    if all(source.absence() is not None for source in inputs):
        return _nothing(request, inputs, report)
    from lemma_fast.checkpoint import CheckpointError
    from lemma_fast.stream import Stream
    from lemma_fast.upscale import Upscaler

    try:
        with _asking_the_hub(request.model, report):
            upscaler = Upscaler(
                request.model, request.device, request.dtype, request.batch_size, request.size
            )
    except CheckpointError as error:
        report.say(f"error: {error}")
        return 2
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    report.detail(f"model {request.model}, {upscaler!r}")
    stream = Stream(
        inputs,
        naming,
        upscaler,
        request.size,
        request.keep_above,
        request.overwrite,
        request.compare,
        to_stdout=request.output == STDIN,
    )
    with ExitStack() as stack:
        stack.enter_context(_terminable())
        report.jsonl = stack.enter_context(_lines(request, inputs))
        show = stack.enter_context(report.progress(inputs))
        try:
            for outcome in stream:
                report.add(outcome)
                show()
        except (KeyboardInterrupt, SystemExit):
            report.say("interrupted: results that were written are whole, the same call goes on")
            raise
        except _Unreported as error:
            report.say(f"error: {error}; stopped, results that were written are whole")
            return 1
    return report.close(inputs, request)


def _nothing(request: Request, inputs: Inputs, report: Report) -> int:
    """Report inputs of which none is there."""
    try:
        with _lines(request, inputs) as report.jsonl:
            for source in inputs:
                outcome = Outcome(source)
                outcome.fail(source.absence() or "not there when it was looked for")
                report.add(outcome)
    except _Unreported as error:
        report.say(f"error: {error}")
    report.close(inputs, request)
    return 2


@contextmanager
def _asking_the_hub(model: str, report: Report) -> Iterator[None]:
    """Say so where weights may come from afar, and hide the retries, a dozen lines of them."""
    from lemma_fast.checkpoint import is_hub_id

    if not is_hub_id(model):
        yield
        return
    if not report.quiet:
        report.say(f"{model} is not a local file; asking the Hugging Face Hub")
    from huggingface_hub.utils import logging as hub

    before = hub.get_verbosity()
    if not report.verbose:
        hub.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub.set_verbosity(before)


def _check(request: Request) -> None:
    if request.quiet and request.verbose:
        raise typer.BadParameter("-q and -v contradict each other")
    if any(mark in request.suffix for mark in (os.sep, os.altsep or os.sep, "\0")):
        raise typer.BadParameter(f"--suffix {request.suffix!r} is not part of a file name")
    to_stdout = request.output == STDIN
    if to_stdout:
        if len(request.paths) != 1 or os.path.isdir(request.paths[0]):
            raise typer.BadParameter("-o - takes exactly one image")
        if request.jsonl == STDIN:
            raise typer.BadParameter("-o - and --jsonl - both want standard output")
        if request.compare:
            raise typer.BadParameter("--compare writes a file of its own: give -o a folder")
        if sys.stdout.isatty():
            raise typer.BadParameter("-o - would write an image to the terminal: redirect it")
    elif STDIN in request.paths and request.output is None:
        raise typer.BadParameter("an image from standard input needs -o DIR, -o FILE or -o -")


def _plan(request: Request) -> tuple[Inputs, Naming]:
    output = None if request.output in (None, STDIN) else Path(str(request.output))
    file = _as_file(request, output)
    form = request.form or "png"
    if file is not None:
        form = _ENDINGS[file.suffix.lower()]
        if request.form not in (None, form):
            raise typer.BadParameter(f"-o {file} contradicts --format {request.form}")
    elif output is not None:
        _make_folder(output)
    stdin = sys.stdin.buffer.read() if STDIN in request.paths else None
    inputs = Inputs(request.paths, request.suffix, request.recursive, output, stdin)
    return inputs, Naming(request.suffix, form, None if file else output, file)


def _as_file(request: Request, output: Path | None) -> Path | None:
    """Return `-o` where it names a file: it looks like an image's name, and is no folder."""
    if output is None or output.is_dir() or str(request.output).endswith(("/", os.sep)):
        return None
    ending = output.suffix.lower()
    if ending not in _ENDINGS:
        if ending in image_suffixes():
            raise typer.BadParameter(f"-o {output}: results are written as .png, .jpg or .webp")
        return None
    if len(request.paths) != 1 or os.path.isdir(request.paths[0]):
        raise typer.BadParameter(f"-o {output} names one file: give one image, or -o a folder")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"-o {output}: there is no folder {output.parent}")
    return output


def _make_folder(folder: Path) -> None:
    if os.path.isfile(folder):
        raise typer.BadParameter(
            f"-o {folder} is a file, neither a folder nor the name of an image "
            f"({', '.join(_ENDINGS)})"
        )
    probe = folder / f".lemma-fast-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(probe, b"")
        probe.unlink()
    except OSError as error:
        raise typer.BadParameter(f"cannot write to -o {folder}: {images.reason(error)}") from None


@contextmanager
def _lines(request: Request, inputs: Inputs) -> Iterator[TextIO | None]:
    """Open what --jsonl names."""
    if request.jsonl is None:
        yield None
    elif request.jsonl == STDIN:
        yield sys.stdout
    else:
        path = Path(request.jsonl)
        if path.suffix.lower() in image_suffixes() or inputs.holds(path):
            raise typer.BadParameter(f"--jsonl {path} would replace an image")
        try:
            file = path.open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            reason = images.reason(error)
            raise typer.BadParameter(f"cannot write --jsonl {path}: {reason}") from None
        with file:
            yield file


class _Unreported(Exception):
    """What --jsonl names takes no more lines; the message is one sentence that says why."""


def _discard(file: TextIO) -> None:
    """Let go of what a file did not take, or closing it fails on the same once more."""
    with suppress(OSError, io.UnsupportedOperation), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), file.fileno())


@contextmanager
def _terminable() -> Iterator[None]:
    """Let a plain kill end the run as Ctrl-C does: running writes are finished."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        # Only a main thread may set handlers; elsewhere the caller has its own.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
            raise _Unreported(f"cannot write --jsonl: {images.reason(error)}") from None

    def _describe(self, name: str, outcome: Outcome) -> None:
        for note in outcome.notes:
            self.say(f"note: {name}: {note}")
        if outcome.status == "ok":
            said = f'"{outcome.text}"' if outcome.text else "no text"
            self.detail(f"{name} -> {outcome.output or 'standard output'} ({said})")
            return
        seen = self.counts[outcome.status]
        if self.verbose or seen <= _NAMES_SHOWN:
            why = outcome.reason or f"{_size(outcome.input_size)} is legible already, copied"
            self.say(f"{outcome.status}: {name}: {why}")
        elif seen == _NAMES_SHOWN + 1:
            self.say(f"{outcome.status}: further ones are only counted (-v names them)")

    def close(self, inputs: Inputs, request: Request) -> int:
        """Print the summary; returns the exit code."""
        for name in inputs.not_images:
            self.detail(f"left out: {name}: no image, by its ending")
        for name in inputs.earlier:
            self.detail(f"left out: {name}: an earlier result")
        if not self.quiet:
            if self.counts["kept"]:
                self.say(
                    f"Kept crops are taller than {request.keep_above} pixels; "
                    "--keep-above 0 upscales them too."
                )
            self.say(self._summary(inputs, request.output))
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
        "notes": outcome.notes,
    }


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
