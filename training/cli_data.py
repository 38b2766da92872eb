"""`lemma-fast data`: synthesize, inspect and pack data sets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lemma_fast.training.data.inspect import Report, contact_sheet
from lemma_fast.training.data.inspect import inspect as summarise
from lemma_fast.training.data.pack import pack as pack_folder
from lemma_fast.training.data.pack import unpack
from lemma_fast.training.data.pairs import Skipped
from lemma_fast.training.synthesis.degrade import STRENGTHS
from lemma_fast.training.synthesis.faces import missing_packages
from lemma_fast.training.synthesis.render import Difficulty, synthesize
from lemma_fast.training.synthesis.words import Split

app = typer.Typer(help="Make, look at and convert training data.", no_args_is_help=True)
_out = Console()
_err = Console(stderr=True)
_SHOWN = 20


@app.command("synthesize")
def synthesize_command(
    out: Annotated[Path, typer.Argument(help="Folder of the new LMDB, in TextZoom's layout.")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many pairs.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same pairs.")] = 0,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes; all cores by default.")
    ] = None,
    fonts: Annotated[
        list[str] | None,
        typer.Option(help="train, test (the reserved ones), or folders; may be given again."),
    ] = None,
    words: Annotated[str, typer.Option(help="train or test: no word is in both.")] = "train",
    difficulty: Annotated[
        str, typer.Option(help=f"{', '.join(STRENGTHS)}, or mixed in equal parts.")
    ] = "mixed",
    dictionary: Annotated[
        str, typer.Option(help="system, builtin (a short list), or a file with one word a line.")
    ] = "system",
    overwrite: Annotated[bool, typer.Option(help="Replace a set that is there.")] = False,
) -> None:
    """Draw words in scenes and write them as pairs of low and high resolution."""
    source = _font_source(fonts or ["train"])
    if words not in ("train", "test"):
        raise typer.BadParameter(f"--words is train or test, not {words}")
    if difficulty not in (*STRENGTHS, "mixed"):
        known = ", ".join(STRENGTHS)
        raise typer.BadParameter(f"--difficulty is one of {known}, mixed; not {difficulty}")
    split, level = cast(Split, words), cast(Difficulty, difficulty)
    if isinstance(source, str):
        absent = missing_packages(cast(Split, source))
        if absent:
            _err.print(
                f"drawn without the font packages that are not installed: {', '.join(absent)}"
            )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=_err, transient=True) as progress:
            task = progress.add_task("drawing", total=n)
            recipe = synthesize(
                out,
                n,
                seed,
                jobs or os.cpu_count() or 1,
                fonts=source,
                words=split,
                difficulty=level,
                dictionary=dictionary,
                overwrite=overwrite,
                progress=lambda done: progress.update(task, completed=done),
            )
    except (OSError, ValueError) as wrong:
        raise _failure(wrong) from wrong
    _out.print(f"{out}: {n} pairs, seed {seed}, {recipe['faces']} faces, words of {split}")


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="An LMDB, or a folder with labels.csv or .jsonl.")],
    sheet: Annotated[
        Path | None, typer.Option(help="Write a contact sheet (PNG): bicubic, HR, label.")
    ] = None,
    crops: Annotated[int, typer.Option(min=1, help="Crops on the contact sheet.")] = 60,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first ones.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count crops, sizes and labels, name damaged records; exit code 1 where there are any."""
    try:
        report = summarise(path, limit)
        if sheet is not None:
            contact_sheet(path, crops).save(sheet, "PNG")
    except (OSError, ValueError) as wrong:
        raise _failure(wrong) from wrong
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        _print_report(report)
    if sheet is not None:
        _err.print(f"contact sheet: {sheet}")
    if report.skipped:
        raise typer.Exit(1)


@app.command("pack")
def pack_command(
    source: Annotated[Path, typer.Argument(help="A folder with a table, or an LMDB.")],
    out: Annotated[Path, typer.Argument(help="The new LMDB, or the new folder.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an LMDB that is there.")] = False,
) -> None:
    """Turn a folder of pairs into an LMDB, or an LMDB into a folder, byte for byte."""
    try:
        if (source / "data.mdb").is_file() or source.is_file():
            written, skipped = unpack(source, out)
        else:
            written, skipped = pack_folder(source, out, overwrite=overwrite)
    except (OSError, ValueError) as wrong:
        raise _failure(wrong) from wrong
    _out.print(f"{out}: {written} pairs")
    _print_skipped(skipped)
    if skipped:
        raise typer.Exit(1)


def _font_source(fonts: list[str]) -> str | tuple[str, ...]:
    if len(fonts) == 1 and fonts[0] in ("train", "test"):
        return fonts[0]
    mixed = [name for name in fonts if name in ("train", "test")]
    if mixed:
        raise typer.BadParameter(f"{mixed[0]} stands alone; do not give other fonts beside it")
    return tuple(fonts)


def _failure(wrong: Exception) -> typer.Exit:
    _err.print(f"[red]error:[/red] {wrong}", highlight=False)
    return typer.Exit(2)


def _print_report(report: Report) -> None:
    table = Table(title=report.path, show_header=False, title_justify="left")
    table.add_row("crops", str(report.crops))
    table.add_row("skipped", str(len(report.skipped)))
    table.add_row("HR sizes", _counts(report.hr_sizes))
    table.add_row("LR sizes", _counts(report.lr_sizes))
    table.add_row("label lengths", _counts(report.label_lengths, len(report.label_lengths)))
    table.add_row("letters", report.letters)
    if report.bicubic_psnr is not None:
        table.add_row("bicubic PSNR", f"{report.bicubic_psnr:.2f} dB")
    if report.recipe is not None:
        table.add_row("recipe", ", ".join(f"{k} {v}" for k, v in report.recipe.items()))
    _out.print(table)
    _print_skipped(report.skipped)


def _counts(counts: dict[str, int] | dict[int, int], shown: int = 6) -> str:
    parts = [f"{key}: {count}" for key, count in list(counts.items())[:shown]]
    rest = len(counts) - len(parts)
    return ", ".join(parts) + (f", and {rest} more" if rest > 0 else "")


def _print_skipped(skipped: list[Skipped]) -> None:
    for record in skipped[:_SHOWN]:
        _err.print(f"skipped {record.id}: {record.reason}", highlight=False, soft_wrap=True)
    if len(skipped) > _SHOWN:
        _err.print(f"and {len(skipped) - _SHOWN} more (--json lists all)")
