"""The commands `lemma-fast train`, `evaluate` and `data`; each imports what it needs."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional, cast

import typer

from lemma_fast.training.signals import Stopped, raising

if TYPE_CHECKING:
    from lemma_fast.training.settings import Settings

app = typer.Typer(help="Train, evaluate and make data.", no_args_is_help=True)

_TRAIN = """
Examples:

  lemma-fast train textzoom --stage lemma                the paper, from published recognisers

  lemma-fast train small-synthetic --stage prior         one stage

  lemma-fast train small-synthetic --max-minutes 9       all stages, in chunks

  lemma-fast train small-synthetic data.train=a.lmdb run.batch_size=32

The same command goes on where it stopped, was stopped, or was killed, to the same numbers. On
several devices: torchrun --nproc_per_node=4 -m lemma_fast.cli train CONFIG run.devices=4

SIGTERM and Ctrl-C end a run after the step that is being made, which is saved. Exit codes: 0 all is
well, 1 the loss is not a number, 2 wrong settings or files, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
"""


@app.command(epilog=_TRAIN)
def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a packaged one.")
    ],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads this on Python 3.10 too)
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Changes to all chosen stages, such as run.steps=1000, or to one, such as "
            "stages.prior.run.steps=1000.",
            show_default=False,
        ),
    ] = None,
    stage: Annotated[
        str,
        typer.Option(
            help="language, prior, text_focus, crnn, lemma, srcnn, srresnet, tsrn; all: what the "
            "config has, in order."
        ),
    ] = "all",
    max_minutes: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="Stop after so long, to go on later.", show_default=False),
    ] = None,
    max_steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Stop after so many more steps.", show_default=False),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what a stage has and begin anew.")
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Go on although the settings have changed."),
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print the settings that would be used, and stop.")
    ] = False,
) -> None:
    """Train the stages of a config, one or all; goes on where it stopped."""
    from lemma_fast.training.settings import as_yaml, choose

    advice = (
        "lower run.batch_size or data.workers, or use data.cache=none; the steps that were saved "
        "are kept (--accept-changes goes on with them)"
    )
    with _ending("the same command goes on from what was saved", advice):
        chosen = choose(config, stage, overrides or [])
        if show:
            typer.echo(as_yaml(chosen), nl=False)
        else:
            _train(chosen, max_minutes, max_steps, restart, accept_changes)


def _train(
    chosen: list[Settings],
    max_minutes: float | None,
    max_steps: int | None,
    restart: bool,
    accept_changes: bool,
) -> None:
    from lemma_fast.training.evaluation.tables import one_line
    from lemma_fast.training.loop.fit import fit

    begun = time.monotonic()
    for settings in chosen:
        minutes = max_minutes
        if minutes is not None:
            minutes -= (time.monotonic() - begun) / 60
            # Clocks of several ranks differ; those decide together, after a step.
            alone = settings.run.devices * settings.run.nodes == 1
            if minutes < 0 and alone and settings is not chosen[0]:
                typer.echo(f"{settings.stage}: no time left; the same command goes on")
                return
        outcome = fit(
            settings,
            minutes=minutes,
            steps=max_steps,
            restart=restart,
            accept_changes=accept_changes,
        )
        stopped = None if outcome.signal is None else Stopped(outcome.signal)
        if outcome.leads:
            shown = f"{settings.stage}: step {outcome.step} of {outcome.total}"
            if (best := outcome.best) is not None:
                metric = settings.select.metric
                shown += f", best {metric} {best[metric]:.4g} at step {best['step']:.0f}"
            by = "" if stopped is None else f" by {stopped.name}"
            done = "finished" if outcome.finished else f"stopped{by}; the same command goes on"
            typer.echo(one_line(f"{shown}: {done} ({outcome.folder})"))
        if stopped is not None:
            raise typer.Exit(stopped.code)
        if not outcome.finished:
            return


@app.command()
def evaluate(
    data: Annotated[
        list[Path],
        typer.Argument(metavar="DATA", help="LMDBs, or folders with a table of labels."),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="As of `lemma-fast upscale`: a packaged name, a file, a Hub id; also a trained "
            "baseline's file, or bicubic."
        ),
    ] = "small",
    recognizer: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Who reads: abinet, aster, crnn, matrn, moran, parseq or text_focus, each with "
            "=CHECKPOINT; rapidocr (extra: ocr); tesseract; prior (the network's own); joined by "
            "commas; empty for none.",
        ),
    ] = "prior",
    protocol: Annotated[
        str,
        typer.Option(help="corrected, or official: the published numbers, batch by batch."),
    ] = "corrected",
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Write JSON, Markdown, a contact sheet and a plot by text length.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Crops at once; the official numbers depend on it.")
    ] = 64,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Only the first crops of each set.", show_default=False),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes of tesseract.")] = 1,
    cache: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--cache",
            metavar="DIR",
            help="Where texts that were read in bicubic and true crops are kept: another network "
            "on the same crops pays for its own results alone. Default: lemma-fast/readings in "
            "$XDG_CACHE_HOME or ~/.cache.",
            show_default=False,
        ),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Read everything, keep nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Let -o replace files that no evaluation has written."),
    ] = False,
) -> None:
    """Compare bicubic, super-resolved and true crops: what is read, PSNR and SSIM.

    Damaged records are left out, named and counted; then the exit code is 1.
    """
    from rich.progress import Progress

    from lemma_fast.baselines import open_network
    from lemma_fast.devices import choose_device
    from lemma_fast.outputs import check_folder
    from lemma_fast.recognizers import RapidOCR
    from lemma_fast.training.data.inspect import open_pairs
    from lemma_fast.training.evaluation import report
    from lemma_fast.training.evaluation.contact_sheet import contact_sheet
    from lemma_fast.training.evaluation.evaluate import (
        Protocol,
        check_finite,
        measure,
        open_readers,
    )
    from lemma_fast.training.evaluation.readings import default_folder, open_readings
    from lemma_fast.training.evaluation.summary import subset_names, summarize
    from lemma_fast.training.evaluation.tables import (
        one_line,
        plain_console,
        print_tables,
        readable,
        skipped_lines,
    )

    if protocol not in ("corrected", "official"):
        raise typer.BadParameter(f"--protocol is corrected or official, not {protocol}")
    if cache is not None and no_cache:
        raise typer.BadParameter("--cache and --no-cache contradict each other")
    kind = cast(Protocol, protocol)
    console = plain_console(stderr=True)

    def say(text: str) -> None:
        console.print(one_line(f"note: {text}"), soft_wrap=True)

    with _ending(
        "what recognisers have read is kept, unless --no-cache forbids it",
        "lower --batch-size, or evaluate fewer sets at once",
    ):
        names = subset_names(data)
        sets = [open_pairs(path) for path in data]
        if output is not None:
            read = (file for crops in sets for file in crops.files())
            report.prepare(output, plot=bool(recognizer), overwrite=overwrite, inputs=read)
        if cache is not None:
            check_folder(cache, "--cache")
        place = str(choose_device(device))
        network = open_network(model, device=place)
        check_finite(network, model)
        readers = open_readers(recognizer, network, place, jobs)
        programs = {name: one for name, one in readers.items() if isinstance(one, RapidOCR)}
        for crops in sets:
            # Decoded once, here, where damaged records are left out.
            crops.load()
        folder = cache or default_folder()
        if folder is None and not no_cache:
            say("there is no home folder: what recognisers read is not kept (--cache keeps it)")
        known = {} if no_cache or folder is None else open_readings(readers, folder, say)
        total = sum(min(limit or len(crops), len(crops)) for crops in sets)
        bar = Progress(console=console, transient=True) if console.is_terminal else None
        with bar or nullcontext():
            task = bar.add_task("evaluating", total=total) if bar is not None else None

            def advance(done: int) -> None:
                if bar is not None and task is not None:
                    bar.advance(task, done)

            subsets = [
                measure(
                    network,
                    name,
                    crops,
                    readers,
                    protocol=kind,
                    batch_size=batch_size,
                    limit=limit,
                    progress=advance,
                    known=known,
                )
                for name, crops in zip(names, sets, strict=True)
            ]
        summary = summarize(subsets, kind)
        about = {
            "model": readable(model),
            "recognizers": readable(recognizer),
            "data": readable(", ".join(path.name for path in data)),
            "batch_size": batch_size,
            "device": place,
            **{f"{name} runs as": str(reader) for name, reader in programs.items()},
            **{f"{name} note": reader.caution for name, reader in programs.items()},
            "command": readable(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        }
        if as_json:
            typer.echo(report.as_json(summary, about), nl=False)
        else:
            print_tables(plain_console(), *report.forms(summary))
        for name, program in programs.items():
            say(f"{name} ({program}): {program.caution}")
        if output is not None:
            sheet = contact_sheet(network, subsets, sets, readers)
            for path in report.write(output, summary, about, sheet):
                console.print(one_line(f"wrote {path}"), soft_wrap=True)
        left_out = [str(record) for crops in sets for record in crops.skipped]
        for text in skipped_lines(left_out, "--json and -o list all"):
            console.print(text, soft_wrap=True)
        if left_out:
            raise typer.Exit(1)


@app.command(
    add_help_option=False,
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def data(context: typer.Context) -> None:
    """Synthesize, inspect and pack data sets."""
    # Drawing words needs OpenCV and more, which training does without.
    from lemma_fast.training.cli_data import app as commands

    command = typer.main.get_command(commands)
    name = f"{context.find_root().info_name} data"
    code = command.main(args=context.args, prog_name=name, standalone_mode=False)
    raise typer.Exit(code if isinstance(code, int) else 0)


@contextmanager
def _ending(kept: str, advice: str) -> Iterator[None]:
    """Turn what ends a command into one sentence and an exit code.

    `kept` is said of a signal, `advice` where memory runs out.
    """
    try:
        with raising():
            yield
    except Stopped as stopped:
        typer.echo(f"{stopped.name}: stopped; {kept}", err=True)
        raise typer.Exit(stopped.code) from stopped
    except (OSError, ValueError, FloatingPointError) as error:
        from lemma_fast.training.failures import in_short

        said = in_short(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            # Of a file that was to be replaced by a new one, its own name is the second.
            said = f"{os.fsdecode(error.filename2 or error.filename)}: {error.strerror}"
        _fail(said, error, 1 if isinstance(error, FloatingPointError) else 2)
    except (RuntimeError, MemoryError) as error:
        from lemma_fast.training.failures import explained

        outside = explained(error, advice)
        if outside is None:
            raise
        _fail(outside, error, 2)


def _fail(said: str, error: Exception, code: int) -> NoReturn:
    from lemma_fast.training.evaluation.tables import one_line

    typer.echo(one_line(f"error: {said}"), err=True)
    raise typer.Exit(code) from error
