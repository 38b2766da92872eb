"""The command `lemma-fast`: one file per command, assembled here.

What takes long to import is imported by the command that needs it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from lemma_fast.cli.bench import bench
from lemma_fast.cli.convert import convert
from lemma_fast.cli.doctor import doctor
from lemma_fast.cli.exits import fail
from lemma_fast.cli.export import export
from lemma_fast.cli.photo import EXAMPLES as EXAMPLES_OF_PHOTO
from lemma_fast.cli.photo import photo
from lemma_fast.cli.read import EXAMPLES as EXAMPLES_OF_READ
from lemma_fast.cli.read import read
from lemma_fast.cli.upscale import EXAMPLES, upscale

app = typer.Typer(
    name="lemma-fast",
    help="Scene-text super-resolution: blurred word crops to twice their size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


app.command(epilog=EXAMPLES)(upscale)
app.command(epilog=EXAMPLES_OF_READ)(read)
app.command(epilog=EXAMPLES_OF_PHOTO)(photo)
app.command()(convert)
app.command()(export)
app.command()(bench)
app.command()(doctor)

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
