"""The command `lemma-fast upscale`."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Annotated, Optional, cast

import typer

from lemma_fast.cli.exits import fail, misused
from lemma_fast.cli.options import (
    ANY_MODEL_HELP,
    Form,
    Overwrite,
    Quiet,
    Recursive,
    Suffix,
    Verbose,
    check_reports,
    check_suffix,
    one_of,
)
from lemma_fast.outputs import OutputError

if TYPE_CHECKING:
    from lemma_fast.images import Size

EXAMPLES = """
Examples:

  lemma-fast upscale word.png                   word_x2.png beside it

  lemma-fast upscale crops/ -r -o out/          a folder and its sub-folders

  lemma-fast upscale crops/ -o out/ --compare   also before and after in one

  lemma-fast upscale crops/ -o out/ --jsonl -   a line of JSON for each input

  lemma-fast upscale - -o - < word.png | tesseract - - --psm 8

Exit codes: 0 all is well, 1 some inputs failed, 2 bad option, no such input or no weights.
"""


def upscale(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            help="Images, folders, glob patterns, or - for standard input.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Optional[str],  # noqa: UP045  (typer reads this on Python 3.10 too)
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder for results, made where missing; sub-folders are kept. A name such as "
            "out.png for one image; - for standard output. Default: beside each input.",
            rich_help_panel="Results",
        ),
    ] = None,
    suffix: Suffix = "_x2",
    form: Form = None,
    size: Annotated[
        str,
        typer.Option(
            help="x2: twice the input's width and height. native: 128x32, for recognisers that "
            "take no other size.",
            **one_of("x2", "native"),
            rich_help_panel="Results",
        ),
    ] = "x2",
    always: Annotated[
        bool,
        typer.Option(
            "--always",
            help="Give crops that are sharp already the network's whole result too. By default "
            "half of theirs is the bicubic enlargement, because they have little to gain.",
            rich_help_panel="Results",
        ),
    ] = False,
    keep_above: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="PIXELS",
            help="Crops taller than this, whatever they show, are taken for legible: copied byte "
            "for byte under their own ending, and reported as kept. 0 upscales every crop.",
            rich_help_panel="Results",
        ),
    ] = 32,
    overwrite: Overwrite = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also write NAME_compare.png: input, bicubic, result and attention side by side.",
            rich_help_panel="Results",
        ),
    ] = False,
    recursive: Recursive = False,
    model: Annotated[
        str,
        typer.Option(
            help=ANY_MODEL_HELP,
            rich_help_panel="Network",
        ),
    ] = "small",
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cuda, cuda:1, ...; auto is the first CUDA device, or else the CPU.",
            rich_help_panel="Network",
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="auto is float32; on CUDA with PyTorch's TF32 setting.",
            **one_of("auto", "float32", "bfloat16"),
            rich_help_panel="Network",
        ),
    ] = "auto",
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1,
            metavar="N",
            help="Crops that go through together. Default: 32 on the CPU, 256 on a GPU.",
            rich_help_panel="Network",
        ),
    ] = None,
    accelerate: Annotated[
        bool,
        typer.Option(
            "--accelerate/--no-accelerate",
            help="Run the folded, fused copy of the network, or the network as it is.",
            rich_help_panel="Network",
        ),
    ] = True,
    read: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="NAME[=FILE]",
            help="Also let a recogniser read each crop before (bicubic) and after, for --jsonl and "
            "--compare: rapidocr (extra: ocr) or tesseract; or abinet, aster, crnn, matrn, moran, "
            "parseq or text_focus with its checkpoint.",
            rich_help_panel="Reports",
        ),
    ] = None,
    jsonl: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="Write one line of JSON for each input: status, output or error, sizes, "
            "milliseconds, the text that the network's prior read, its length, the crop's "
            "sharpness, the network's share of the result, and what --read read. - for standard "
            "output. A FILE of an earlier run is continued: the lines of inputs that are only "
            "skipped, or not given this time, stay.",
            rich_help_panel="Reports",
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Double the size of word crops.

    Each crop holds one word, cut out close. Crops of any size and any image format go through.
    Unreadable files are reported and skipped. Reports go to standard error.
    """
    _check(paths, output, suffix, compare, read, jsonl, quiet, verbose)
    # Torch takes a second, and a network more: what is asked wrongly is said before.
    from lemma_fast.cli import jsonl as lines
    from lemma_fast.cli.inputs import Inputs
    from lemma_fast.cli.report import Report
    from lemma_fast.cli.results import Naming
    from lemma_fast.cli.running import (
        asking_the_hub,
        go_through,
        opened_reader,
        report_absence,
        standard_input,
    )

    try:
        naming = Naming.chosen(paths, output, suffix, form)
        inputs = Inputs(paths, suffix, recursive, naming.output, standard_input(paths))
        lines.check(jsonl, inputs, overwrite)
    except OutputError as error:
        misused(error)
    report = Report(quiet, verbose)
    if not verbose:
        # Pillow's remarks on odd but readable files.
        warnings.filterwarnings("ignore", module=r"PIL\.")
    if report_absence(inputs, report, jsonl):
        report.close(inputs, output, keep_above)
        raise typer.Exit(2)
    from lemma_fast.checkpoint import CheckpointError
    from lemma_fast.cli.stream import Stream
    from lemma_fast.recognizers import RapidOCR
    from lemma_fast.upscale import Upscaler

    chosen = cast("Size", size)
    try:
        with asking_the_hub(model, report):
            upscaler = Upscaler(
                model, device, dtype, batch_size, chosen, accelerate=accelerate, always=always
            )
        reader = opened_reader(read, upscaler.device)
    except (CheckpointError, FileNotFoundError) as error:
        fail(str(error))
    except ValueError as error:
        misused(error)
    report.detail(f"model {model}, {upscaler!r}")
    if isinstance(reader, RapidOCR):
        report.detail(f"recogniser {reader!r}")
        report.remarks.append(reader.caution)
    stream = Stream(
        inputs,
        naming,
        upscaler,
        chosen,
        keep_above,
        overwrite,
        compare,
        to_stdout=output == "-",
        reader=reader,
    )
    go_through(stream, inputs, report, jsonl)
    raise typer.Exit(report.close(inputs, output, keep_above))


def _check(
    paths: list[str],
    output: str | None,
    suffix: str,
    compare: bool,
    read: str | None,
    jsonl: str | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Refuse options that contradict each other."""
    check_reports(quiet, verbose)
    if read is not None and not (jsonl or compare or verbose):
        misused("what --read finds is not shown: give --jsonl, --compare or -v")
    check_suffix(suffix)
    if output == "-":
        if len(paths) != 1 or os.path.isdir(paths[0]):
            misused("-o - takes exactly one image")
        if jsonl == "-":
            misused("-o - and --jsonl - both want standard output")
        if compare:
            misused("--compare writes a file of its own: give -o a folder")
        if sys.stdout is None:
            misused("-o -: standard output is closed")
        if sys.stdout.isatty():
            misused("-o - would write an image to the terminal: redirect it")
    elif "-" in paths and output is None:
        misused("an image from standard input needs -o DIR, -o FILE or -o -")
