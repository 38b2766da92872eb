"""Photographs one after another, for `read` and `photo`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

import typer
from PIL import Image

from lemma_fast import compare as sheets
from lemma_fast import images
from lemma_fast.atomic import replace_file
from lemma_fast.checkpoint import CheckpointError
from lemma_fast.cli import jsonl as lines
from lemma_fast.cli.exits import fail, misused
from lemma_fast.cli.inputs import Inputs
from lemma_fast.cli.options import check_reports
from lemma_fast.cli.report import Report
from lemma_fast.cli.results import Naming, Outcome, Photographed
from lemma_fast.cli.running import (
    asking_the_hub,
    go_through,
    opened_reader,
    report_absence,
    standard_input,
)
from lemma_fast.cli.targets import Targets
from lemma_fast.errors import reason
from lemma_fast.images import Crop, ImageError
from lemma_fast.outputs import OutputError, make_folder
from lemma_fast.reading import Reader
from lemma_fast.reading.photo import boxes, enlargement
from lemma_fast.upscale import Upscaler

# Panels of a comparison are shrunk to this.
_MOST = 1600


@dataclass
class Photographs:
    """Reads every photograph, or enlarges it; iterate over it for the outcomes.

    Each is decoded, read and written before the next one: one is in memory at a time. Without
    `naming` nothing is written.
    """

    inputs: Inputs
    reader: Reader
    naming: Naming | None
    enlarge: bool = False
    overwrite: bool = False
    compare: bool = False

    def __iter__(self) -> Iterator[Outcome]:
        """Yield the outcomes in the order of the inputs."""
        targets = None
        if self.naming is not None:
            targets = Targets(self.inputs, self.naming, self.overwrite)
        for source in self.inputs:
            outcome = Photographed(source)
            began = time.perf_counter()
            try:
                self._do(outcome, targets)
            except ImageError as error:
                outcome.fail(str(error))
            outcome.milliseconds = 1000 * (time.perf_counter() - began)
            yield outcome

    def _do(self, outcome: Photographed, targets: Targets | None) -> None:
        source = outcome.source
        if source.fault is not None:
            outcome.fail(source.fault)
            return
        target: Path | None = None
        with images.opened(source.content) as image:
            outcome.input_size = images.upright_size(image)
            if targets is not None and self.naming is not None:
                target = self.naming.result(source, None if self.enlarge else ".txt")
                if targets.refused(outcome, target, os.path.lexists(target)):
                    return
            crop = images.from_pillow(image)
        outcome.notes.extend(crop.notes)
        if self.compare and targets is not None:
            targets.plan_comparison(outcome)
        try:
            data, sheet = self._made(crop, outcome)
        except (RuntimeError, MemoryError) as error:
            outcome.fail(f"could not be read: {reason(error)}")
            return
        if target is None:
            return
        path = target
        try:
            make_folder(target.parent)
            replace_file(target, data)
            if outcome.compare is not None and sheet is not None:
                path = outcome.compare
                replace_file(path, images.encode(sheet(), "png"))
            outcome.output = target
        except (OSError, ValueError, MemoryError) as error:
            outcome.fail(f"cannot write {path}: {reason(error)}")

    def _made(
        self, crop: Crop, outcome: Photographed
    ) -> tuple[bytes, Callable[[], Image.Image] | None]:
        """Make the result's content, and what draws its comparison."""
        if not self.enlarge:
            page = outcome.page = self.reader.read(crop)
            return (page.text + "\n" if page.text else "").encode(), page.overlay
        assert self.naming is not None
        made = self.reader.enlarged(crop)
        outcome.page = made.page
        outcome.output_size = made.image.size
        if self.naming.form == "jpg" and images.has_visible_transparency(made.image):
            outcome.notes.append("JPEG has no transparency: flattened on white")

        def sheet() -> Image.Image:
            after = images.flatten(made.image, crop.backdrop)
            panels = [
                (enlargement(crop.opaque), f"before {crop.rgb.width}x{crop.rgb.height}, Lanczos"),
                (after, f"lemma-fast {after.width}x{after.height}"),
                (boxes(after, made.page), "words: green where the network's reading counts"),
            ]
            for panel, _ in panels:
                panel.thumbnail((_MOST, _MOST))
            return sheets.sheet([panels])

        return images.encode(made.image, self.naming.form), sheet


def go_over_photographs(
    paths: list[str],
    output: str | None,
    *,
    enlarge: bool,
    suffix: str,
    form: str | None,
    overwrite: bool,
    compare: bool,
    recursive: bool,
    model: str,
    device: str,
    batch_size: int | None,
    keep_above: int,
    recognizer: str,
    margin: float | None,
    jsonl: str | None,
    quiet: bool,
    verbose: bool,
    then: Callable[[Outcome], None] = lambda outcome: None,
) -> NoReturn:
    """Run one of the commands over photographs, and end with its exit code."""
    writes = enlarge or output is not None
    try:
        naming = Naming.chosen(paths, output, suffix, form) if writes else None
        if naming is not None and naming.file is not None and not enlarge:
            misused(f"-o {naming.file} is a picture's name: texts go to a folder")
        folder = None if naming is None else naming.output
        inputs = Inputs(paths, suffix, recursive, folder, standard_input(paths))
        lines.check(jsonl, inputs, overwrite)
    except OutputError as error:
        misused(error)
    report = Report(quiet, verbose, done="enlarged" if enlarge else "read", writes=writes)
    if report_absence(inputs, report, jsonl, Photographed):
        report.close(inputs, output, keep_above)
        raise typer.Exit(2)
    try:
        with asking_the_hub(model, report):
            upscaler = Upscaler(model, device, "auto", batch_size, "x2", always=False)
        reads = opened_reader(recognizer, upscaler.device, "--recognizer")
        assert reads is not None
        reader = Reader(upscaler, recognizer=reads, keep_above=keep_above, margin=margin)
    except (CheckpointError, FileNotFoundError, RuntimeError) as error:
        fail(str(error))
    except ValueError as error:
        misused(error)
    report.detail(f"model {model}, {reader!r}")
    outcomes = Photographs(inputs, reader, naming, enlarge, overwrite, compare)
    go_through(outcomes, inputs, report, jsonl, then)
    raise typer.Exit(report.close(inputs, output, keep_above))


def checked(quiet: bool, verbose: bool, output: str | None) -> None:
    """Refuse options that contradict each other."""
    check_reports(quiet, verbose)
    if output == "-":
        misused("-o - is not taken: name a folder")


def text_of(outcome: Outcome) -> str | None:
    """What was read in a photograph, None where it was not read."""
    page = cast(Photographed, outcome).page
    return None if page is None or outcome.status != "ok" else page.text
