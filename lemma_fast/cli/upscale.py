"""`lemma-fast upscale`: checks what was asked for, runs the stream, reports what became of it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

import typer

from lemma_fast import images
from lemma_fast.cli.inputs import STDIN, Inputs, Naming, Outcome
from lemma_fast.cli.report import Report, Unreported
from lemma_fast.images import Format, Size, image_suffixes, write_atomically

if TYPE_CHECKING:
    import torch

    from lemma_fast.recognizers import Recognizer

_ENDINGS: dict[str, Format] = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}


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
    accelerate: bool
    read: str | None
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
    from lemma_fast.cli.stream import Stream
    from lemma_fast.upscale import Upscaler

    try:
        with _asking_the_hub(request.model, report):
            upscaler = Upscaler(
                request.model,
                request.device,
                request.dtype,
                request.batch_size,
                request.size,
                accelerate=request.accelerate,
            )
        reader = _reader(request.read, upscaler.device)
    except (CheckpointError, FileNotFoundError) as error:
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
        reader=reader,
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
        except Unreported as error:
            report.say(f"error: {error}; stopped, results that were written are whole")
            return 1
    return report.close(inputs, request.output, request.keep_above)


def _nothing(request: Request, inputs: Inputs, report: Report) -> int:
    """Report inputs of which none is there."""
    try:
        with _lines(request, inputs) as report.jsonl:
            for source in inputs:
                outcome = Outcome(source)
                outcome.fail(source.absence() or "not there when it was looked for")
                report.add(outcome)
    except Unreported as error:
        report.say(f"error: {error}")
    report.close(inputs, request.output, request.keep_above)
    return 2


def _reader(wanted: str | None, device: torch.device) -> Recognizer | None:
    """Open the recogniser of NAME or NAME=CHECKPOINT; raises ValueError or FileNotFoundError."""
    if wanted is None:
        return None
    from lemma_fast.recognizers import load_recognizer

    name, _, checkpoint = wanted.partition("=")
    return load_recognizer(name, checkpoint or None, device=device)


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
    if request.read is not None and not (request.jsonl or request.compare or request.verbose):
        raise typer.BadParameter("what --read finds is not shown: give --jsonl, --compare or -v")
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
