"""The command `lemma-fast read`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lemma_fast.cli.exits import misused, say
from lemma_fast.cli.options import (
    BatchSize,
    Device,
    JsonLines,
    KeepAbove,
    Model,
    Overwrite,
    Photos,
    Quiet,
    RecognizerName,
    Recursive,
    Verbose,
)

if TYPE_CHECKING:
    from lemma_fast.cli.results import Outcome

EXAMPLES = """
Examples:

  lemma-fast read photo.jpg                       its text, on standard output

  lemma-fast read photos/ -r -o out/ --compare    NAME_read.txt; boxes drawn in

  lemma-fast read photos/ --jsonl words.jsonl     words, corners, both readings

  lemma-fast read photo.jpg --recognizer tesseract

Exit codes: 0 all is well, 1 some inputs failed, 2 bad option, no such input or something missing.
"""


def read(
    paths: Photos,
    output: Annotated[
        Optional[str],  # noqa: UP045  (typer reads this on Python 3.10 too)
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder for NAME_read.txt, made where missing; sub-folders are kept. Without it "
            "texts go to standard output, but for --jsonl -.",
            rich_help_panel="Results",
        ),
    ] = None,
    overwrite: Overwrite = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also write NAME_read_compare.png: the photograph with its words' boxes and "
            "texts, green where the reading of the network's result counts.",
            rich_help_panel="Results",
        ),
    ] = False,
    recursive: Recursive = False,
    recognizer: RecognizerName = "rapidocr",
    margin: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=0.0,
            max=1.0,
            help="By how much surer the reading of the network's result must be to count. "
            "Default: 0.2 for rapidocr, which reads blurred words well by itself, else 0.",
            show_default=False,
            rich_help_panel="Reading",
        ),
    ] = None,
    keep_above: KeepAbove = 32,
    model: Model = "small",
    device: Device = "auto",
    batch_size: BatchSize = None,
    jsonl: JsonLines = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Read the text in photographs (extra: ocr).

    Lines are found and straightened. Words that are small and blurred go through the network, and
    are read before and after; the surer reading counts. Reports go to standard error.
    """
    shown = output is None and jsonl != "-"
    if shown and jsonl is None and sys.stdout is None:
        misused("standard output is closed: give -o or --jsonl")
    if compare and output is None:
        misused("--compare writes a file: give -o a folder")
    from lemma_fast.cli.photographs import checked, go_over_photographs, text_of

    checked(quiet, verbose, output)
    one = len(paths) == 1 and (paths[0] == "-" or os.path.isfile(paths[0]))

    def show(outcome: Outcome) -> None:
        text = text_of(outcome) if shown else None
        if text is None:
            return
        if not one:
            say(f"==> {outcome.source.path} <==")
        for line in text.splitlines():
            say(line)

    go_over_photographs(
        paths,
        output,
        enlarge=False,
        suffix="_read",
        form=None,
        overwrite=overwrite,
        compare=compare,
        recursive=recursive,
        model=model,
        device=device,
        batch_size=batch_size,
        keep_above=keep_above,
        recognizer=recognizer,
        margin=margin,
        jsonl=jsonl,
        quiet=quiet,
        verbose=verbose,
        then=show,
    )
