"""What the options of several commands share."""

from __future__ import annotations

import os
from typing import Annotated, Any, Optional

import typer

from lemma_fast.cli.exits import misused

MODEL_HELP = (
    "A packaged name, a .safetensors written by lemma-fast, a published .pth, or a Hugging Face "
    "Hub id. A packaged name is never a file: write ./small for a file of that name."
)
ANY_MODEL_HELP = f"{MODEL_HELP} Also the file of a network of the paper's Table 3, and bicubic."


def one_of(*words: str) -> dict[str, Any]:
    """Make typer's arguments for an option that is one of a few words."""

    def parse(text: str) -> str:
        if text not in words:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(words)}")
        return text

    return {"parser": parse, "metavar": f"[{'|'.join(words)}]"}


def check_suffix(suffix: str) -> None:
    """End the command where a suffix would lead to another folder."""
    if any(mark in suffix for mark in (os.sep, os.altsep or os.sep, "\0")):
        misused(f"--suffix {suffix!r} is not part of a file name")


def check_reports(quiet: bool, verbose: bool) -> None:
    """End the command where it shall say less and more."""
    if quiet and verbose:
        misused("-q and -v contradict each other")


# Options of the commands over pictures.
Suffix = Annotated[str, typer.Option(help="Appended to each name.", rich_help_panel="Results")]
Form = Annotated[
    Optional[str],  # noqa: UP045  (typer reads this on Python 3.10 too)
    typer.Option(
        "--format",
        help="Format of results, png by default; webp is lossless, jpg has no transparency.",
        show_default=False,
        **one_of("png", "jpg", "webp"),
        rich_help_panel="Results",
    ),
]
Photos = Annotated[
    list[str],
    typer.Argument(
        metavar="PHOTO",
        help="Photographs, folders, glob patterns, or - for standard input.",
        show_default=False,
    ),
]
Recursive = Annotated[
    bool,
    typer.Option(
        "-r", "--recursive", help="Read sub-folders of folders too.", rich_help_panel="Inputs"
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace existing results, which are skipped without it; never an input.",
        rich_help_panel="Results",
    ),
]
KeepAbove = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="PIXELS",
        help="Words taller than this are large enough: the network is not asked. 0 asks it about "
        "words of any height.",
        rich_help_panel="Network",
    ),
]
Model = Annotated[str, typer.Option(help=MODEL_HELP, rich_help_panel="Network")]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda, cuda:1, ... of the network; the detector and rapidocr run on the "
        "CPU.",
        rich_help_panel="Network",
    ),
]
BatchSize = Annotated[
    Optional[int],  # noqa: UP045  (typer reads this on Python 3.10 too)
    typer.Option(
        min=1,
        metavar="N",
        help="Words that go through together. Default: 32 on the CPU, 256 on a GPU.",
        rich_help_panel="Network",
    ),
]
RecognizerName = Annotated[
    str,
    typer.Option(
        "--recognizer",
        metavar="NAME[=FILE]",
        help="Who reads: rapidocr or tesseract; or abinet, aster, crnn, matrn, moran, parseq or "
        "text_focus with its checkpoint, to which lines are shown word by word.",
        rich_help_panel="Reading",
    ),
]
JsonLines = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="FILE",
        help="Write one line of JSON for each photograph: status, output or error, text, lines and "
        "words with their corners, what was read before and after, which counts and why. - for "
        "standard output. A FILE of an earlier run is continued.",
        rich_help_panel="Reports",
    ),
]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="Report errors only.", rich_help_panel="Reports")
]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Name every file.", rich_help_panel="Reports")
]
