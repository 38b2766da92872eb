"""What the commands over pictures share: before the work, and from one outcome to the next."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from lemma_fast.cli import jsonl as lines
from lemma_fast.cli.exits import fail, interruptible, misused
from lemma_fast.cli.inputs import Inputs
from lemma_fast.cli.report import Report
from lemma_fast.cli.results import Outcome

if TYPE_CHECKING:
    import torch

    from lemma_fast.recognizers import Recognizer


def standard_input(paths: list[str]) -> bytes | None:
    """Read standard input where one of the paths is -."""
    if "-" not in paths:
        return None
    if sys.stdin is None:
        misused("-: standard input is closed")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        misused(f"cannot read standard input: {error.strerror}")


def report_absence(
    inputs: Inputs, report: Report, jsonl: str | None, kind: type[Outcome] = Outcome
) -> bool:
    """Report inputs of which none is there, if so; `kind` is what their lines are made of."""
    if any(source.absence() is None for source in inputs):
        return False
    try:
        with lines.opened(jsonl) as report.jsonl:
            for source in inputs:
                outcome = kind(source)
                outcome.fail(source.absence() or "not there when it was looked for")
                report.add(outcome)
    except lines.Unreported as error:
        report.say(f"error: {error}")
    return True


def go_through(
    outcomes: Iterable[Outcome],
    inputs: Inputs,
    report: Report,
    jsonl: str | None,
    then: Callable[[Outcome], None] = lambda outcome: None,
) -> None:
    """Report each outcome, and do `then`; ends the command where it is interrupted."""
    whole = "results that were written are whole"
    try:
        with (
            interruptible(f"{whole}, the same call goes on", report.say) as check,
            lines.opened(jsonl) as report.jsonl,
            report.progress(inputs) as show,
        ):
            for outcome in outcomes:
                report.add(outcome)
                then(outcome)
                show()
                check()
    except lines.Unreported as error:
        report.say(f"error: {error}; stopped, {whole}")
        raise typer.Exit(1) from None


def opened_reader(
    wanted: str | None, device: torch.device, option: str = "--read"
) -> Recognizer | None:
    """Open the recogniser of NAME or NAME=CHECKPOINT and let it read an empty crop.

    Raises ValueError or FileNotFoundError; ends the command where it cannot read.
    """
    if wanted is None:
        return None
    import torch

    from lemma_fast.recognizers import load_recognizer

    name, _, checkpoint = wanted.partition("=")
    reader = load_recognizer(name, checkpoint or None, device=device)
    try:
        reader.read(torch.ones(1, 3, 32, 128, device=device))
    except (RuntimeError, OSError, ValueError, MemoryError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        fail(f"{option} {name} does not work here: {said}")
    return reader


@contextmanager
def asking_the_hub(model: str, report: Report) -> Iterator[None]:
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
