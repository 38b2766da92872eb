"""The command `lemma-fast`. What takes long to import is imported by the command that needs it."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from lemma_fast.cli.bench import bench
from lemma_fast.cli.errors import fail
from lemma_fast.cli.export import export

app = typer.Typer(
    name="lemma-fast",
    help="Scene-text super-resolution: blurred word crops to twice their size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Choice(str, Enum):
    """One of a few words."""

    def __str__(self) -> str:
        """Give the word: older typers look up by it what a parser returned."""
        return str(self.value)


class Form(_Choice):
    """File formats of results."""

    png = "png"
    jpg = "jpg"
    webp = "webp"


class ResultSize(_Choice):
    """Sizes of results."""

    native = "native"
    x2 = "x2"


class Dtype(_Choice):
    """Number formats of the network."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def _choices(kind: type[Enum]) -> str:
    return f"[{'|'.join(choice.value for choice in kind)}]"


def _one_of(kind: type[Enum]) -> Callable[[str], Enum]:
    """Make the parser of an option; typer's own words for a wrong choice are not for users."""

    def parse(text: str) -> Enum:
        try:
            return kind(text)
        except ValueError:
            known = ", ".join(choice.value for choice in kind)
            raise typer.BadParameter(f"{text!r} is not one of {known}") from None

    return parse


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"lemma-fast {version('lemma-fast')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


_EXAMPLES = """
Examples:

  lemma-fast upscale word.png                   word_x2.png beside it

  lemma-fast upscale crops/ -r -o out/          a folder and its sub-folders

  lemma-fast upscale crops/ -o out/ --compare   also before and after in one

  lemma-fast upscale crops/ -o out/ --jsonl -   a line of JSON for each input

  lemma-fast upscale - -o - < word.png | tesseract - - --psm 8

Exit codes: 0 all is well, 1 some inputs failed, 2 bad option, no such input or no weights.
"""


@app.command(epilog=_EXAMPLES)
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
    suffix: Annotated[
        str, typer.Option(help="Appended to each name.", rich_help_panel="Results")
    ] = "_x2",
    form: Annotated[
        Optional[Form],  # noqa: UP045
        typer.Option(
            "--format",
            help="Format of results, png by default; webp is lossless, jpg has no transparency.",
            show_default=False,
            parser=_one_of(Form),
            metavar=_choices(Form),
            rich_help_panel="Results",
        ),
    ] = None,
    size: Annotated[
        ResultSize,
        typer.Option(
            help="native: 128x32, what recognisers take. x2: twice the input's width and height.",
            parser=_one_of(ResultSize),
            metavar=_choices(ResultSize),
            rich_help_panel="Results",
        ),
    ] = ResultSize.native,
    keep_above: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="PIXELS",
            help="Crops taller than this are legible already: copied byte for byte under their own "
            "ending, and reported as kept. 0 upscales every crop.",
            rich_help_panel="Results",
        ),
    ] = 32,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace existing results, which are skipped without it; never an input.",
            rich_help_panel="Results",
        ),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also write NAME_compare.png: input, bicubic, result and attention side by side.",
            rich_help_panel="Results",
        ),
    ] = False,
    recursive: Annotated[
        bool,
        typer.Option(
            "-r", "--recursive", help="Read sub-folders of folders too.", rich_help_panel="Inputs"
        ),
    ] = False,
    model: Annotated[
        str,
        typer.Option(
            help="A packaged name, a .safetensors of ours, a published .pth, or a Hugging Face "
            "Hub id.",
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
        Dtype,
        typer.Option(
            help="auto is float32; on CUDA with PyTorch's TF32 setting.",
            parser=_one_of(Dtype),
            metavar=_choices(Dtype),
            rich_help_panel="Network",
        ),
    ] = Dtype.auto,
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
            "--compare: tesseract, or abinet, aster, crnn, matrn, moran, parseq or text_focus with "
            "its checkpoint.",
            rich_help_panel="Reports",
        ),
    ] = None,
    jsonl: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="Write one line of JSON for each input: status, output or error, sizes, "
            "milliseconds, the text that the network's prior read, its length, and what --read "
            "read. - for standard output.",
            rich_help_panel="Reports",
        ),
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option("-q", "--quiet", help="Report errors only.", rich_help_panel="Reports"),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Name every file.", rich_help_panel="Reports")
    ] = False,
) -> None:
    """Double the size of word crops.

    Each crop holds one word, cut out close. Crops of any size and any image format go through.
    Unreadable files are reported and skipped. Reports go to standard error.
    """
    from lemma_fast.cli.upscale import Request
    from lemma_fast.cli.upscale import upscale as run

    code = run(
        Request(
            paths=paths,
            output=output,
            suffix=suffix,
            form=None if form is None else form.value,
            recursive=recursive,
            overwrite=overwrite,
            compare=compare,
            size=size.value,
            keep_above=keep_above,
            model=model,
            device=device,
            dtype=dtype.value,
            batch_size=batch_size,
            accelerate=accelerate,
            read=read,
            jsonl=jsonl,
            quiet=quiet,
            verbose=verbose,
        )
    )
    raise typer.Exit(code)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Checkpoint to read.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Checkpoint to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing OUT.")
    ] = False,
) -> None:
    """Convert a checkpoint: published .pth to .safetensors, or back, by OUT's ending.

    Nothing but tensors is ever unpickled, and what does not fit is named.
    """
    if os.path.lexists(target):
        if source.exists() and target.exists() and target.samefile(source):
            raise typer.BadParameter("IN and OUT are the same file")
        if not overwrite:
            raise typer.BadParameter(f"{target} exists; --overwrite replaces it")
    if not target.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {target.parent}")
    from lemma_fast.checkpoint import CheckpointError
    from lemma_fast.checkpoint import convert as run

    try:
        run(source, target)
    except CheckpointError as error:
        fail(str(error))
    except (OSError, RuntimeError) as error:
        # Torch reports a full disk as RuntimeError.
        fail(f"cannot write {target}: {str(error).splitlines()[0]}")
    typer.echo(f"wrote {target}")


app.command()(export)
app.command()(bench)


@app.command()
def doctor() -> None:
    """Show versions, devices, what auto chooses and why, and check the packaged weights.

    Paste the output into a bug report. Exit code 1 where something is broken.
    """
    from lemma_fast.cli.doctor import lines

    sound = True
    for subject, finding, in_order in lines():
        sound = sound and in_order
        typer.echo(f"{subject:<16} {'' if in_order else 'BROKEN: '}{finding}")
    raise typer.Exit(not sound)


# These hand their arguments on unread, so that --help is answered by the real command.
_HAND_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_HAND_ON, add_help_option=False, rich_help_panel="Training")
def train(context: typer.Context) -> None:
    """Train a network (extra: train)."""
    _training(context, "train")


@app.command(context_settings=_HAND_ON, add_help_option=False, rich_help_panel="Training")
def evaluate(context: typer.Context) -> None:
    """Measure a network by recognisers and image metrics (extras: train, eval)."""
    _training(context, "evaluate")


@app.command(context_settings=_HAND_ON, add_help_option=False, rich_help_panel="Training")
def data(context: typer.Context) -> None:
    """Synthesize, inspect and pack training data (extra: train)."""
    _training(context, "data")


def _training(context: typer.Context, name: str) -> None:
    try:
        from lemma_fast.training.cli import app as training

        command = typer.main.get_command(training)
        code = command.main(
            args=[name, *context.args], prog_name="lemma-fast", standalone_mode=False
        )
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if missing.split(".")[0] == "lemma_fast":
            fail(f"{name} needs {missing}, which this installation of lemma-fast lacks")
        extras = "train,eval" if name == "evaluate" else "train"
        fail(f"{name} needs {missing}, which is not installed: pip install 'lemma-fast[{extras}]'")
    raise typer.Exit(code if isinstance(code, int) else 0)


def main() -> None:
    """Run the command line; the entry point `lemma-fast`."""
    app(prog_name="lemma-fast")


if __name__ == "__main__":
    main()
