"""The command `lemma-fast photo`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from lemma_fast.cli.exits import misused
from lemma_fast.cli.options import (
    BatchSize,
    Device,
    Form,
    JsonLines,
    KeepAbove,
    Model,
    Overwrite,
    Photos,
    Quiet,
    RecognizerName,
    Recursive,
    Suffix,
    Verbose,
    check_suffix,
)

EXAMPLES = """
Examples:

  lemma-fast photo photo.jpg                       photo_x2.png beside it

  lemma-fast photo photos/ -r -o out/ --compare    before, after and boxes in one

  lemma-fast photo photos/ -o out/ --format jpg

Exit codes: 0 all is well, 1 some inputs failed, 2 bad option, no such input or something missing.
"""


def photo(
    paths: Photos,
    output: Annotated[
        Optional[str],  # noqa: UP045  (typer reads this on Python 3.10 too)
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder for results, made where missing; sub-folders are kept. A name such as "
            "out.png for one photograph. Default: beside each input.",
            rich_help_panel="Results",
        ),
    ] = None,
    suffix: Suffix = "_x2",
    form: Form = None,
    overwrite: Overwrite = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also write NAME_compare.png: before, after, and the words' boxes.",
            rich_help_panel="Results",
        ),
    ] = False,
    recursive: Recursive = False,
    recognizer: RecognizerName = "rapidocr",
    keep_above: KeepAbove = 32,
    model: Model = "small",
    device: Device = "auto",
    batch_size: BatchSize = None,
    jsonl: JsonLines = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Double the size of photographs, their small words by the network (extra: ocr).

    Words that are small and blurred are straightened, go through the network, and are blended back
    into the photograph, whose rest is enlarged by Lanczos. A word that was read surely before and
    is read otherwise after stays as it was.
    """
    check_suffix(suffix)
    if "-" in paths and output is None:
        misused("a photograph from standard input needs -o")
    from lemma_fast.cli.photographs import checked, go_over_photographs

    checked(quiet, verbose, output)
    go_over_photographs(
        paths,
        output,
        enlarge=True,
        suffix=suffix,
        form=form,
        overwrite=overwrite,
        compare=compare,
        recursive=recursive,
        model=model,
        device=device,
        batch_size=batch_size,
        keep_above=keep_above,
        recognizer=recognizer,
        margin=None,
        jsonl=jsonl,
        quiet=quiet,
        verbose=verbose,
    )
