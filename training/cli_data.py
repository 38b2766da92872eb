"""`lemma-fast data`: synthesize, inspect and pack data sets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, cast

import typer
from PIL import Image, PngImagePlugin
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lemma_fast.atomic import replacing
from lemma_fast.outputs import check_output, is_stream
from lemma_fast.training.data.inspect import Report, contact_sheet, open_pairs
from lemma_fast.training.data.inspect import inspect as summarise
from lemma_fast.training.data.lmdb import is_lmdb
from lemma_fast.training.data.pack import pack as pack_folder
from lemma_fast.training.data.pack import unpack
from lemma_fast.training.data.pairs import Skipped
from lemma_fast.training.evaluation.tables import (
    one_line,
    plain_console,
    print_tables,
    readable,
    skipped_lines,
)
from lemma_fast.training.failures import explained
from lemma_fast.training.signals import Stopped, raising
from lemma_fast.training.synthesis.degrade import STRENGTHS
from lemma_fast.training.synthesis.faces import missing_packages
from lemma_fast.training.synthesis.render import Difficulty, synthesize
from lemma_fast.training.synthesis.words import Split

app = typer.Typer(help="Make, look at and convert training data.", no_args_is_help=True)
_out = plain_console()
_err = plain_console(stderr=True)
_MAKER = "lemma-fast data inspect"


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
    overwrite: Annotated[
        bool, typer.Option(help="Replace a set of pairs that is there, and nothing else.")
    ] = False,
) -> None:
    """Draw words in scenes and write them as pairs of low and high resolution."""
    source = _font_source(fonts or ["train"])
    if words not in ("train", "test"):
        raise typer.BadParameter(f"--words is train or test, not {words}")
    if difficulty not in (*STRENGTHS, "mixed"):
        known = ", ".join(STRENGTHS)
        raise typer.BadParameter(f"--difficulty is one of {known}, mixed; not {difficulty}")
    split, level = cast(Split, words), cast(Difficulty, difficulty)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with _writing(out):
        absent = missing_packages(cast(Split, source)) if isinstance(source, str) else []
        if absent:
            _say(f"drawn without the font packages that are not installed: {', '.join(absent)}")
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
    _tell(f"{out}: {n} pairs, seed {seed}, {recipe['faces']} faces, words of {split}")


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="An LMDB, or a folder with labels.csv or .jsonl.")],
    sheet: Annotated[
        Path | None, typer.Option(help="Write a contact sheet (PNG): bicubic, HR, label.")
    ] = None,
    crops: Annotated[int, typer.Option(min=1, help="Crops on the contact sheet.")] = 60,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first ones.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Let --sheet replace a file that is no contact sheet.")
    ] = False,
) -> None:
    """Count crops, sizes and labels, name damaged records; exit code 1 where there are any."""
    with _ending(lambda: "nothing was written"):
        dataset = open_pairs(path)
        if sheet is not None and not is_stream(sheet):
            files = dataset.files()
            check_output(sheet, "--sheet", overwrite=overwrite, inputs=files, made_here=_is_sheet)
        report = summarise(path, limit, dataset)
        if sheet is not None:
            _write_sheet(contact_sheet(path, crops, dataset=dataset), sheet)
    if as_json:
        typer.echo(readable(json.dumps(report.as_dict(), indent=2, ensure_ascii=False)))
    else:
        _print_report(report)
    if sheet is not None:
        _say(f"contact sheet: {sheet}")
    if report.skipped:
        raise typer.Exit(1)


@app.command("pack")
def pack_command(
    source: Annotated[Path, typer.Argument(help="A folder with a table, or an LMDB.")],
    out: Annotated[Path, typer.Argument(help="The new LMDB, or the new folder.")],
    overwrite: Annotated[
        bool,
        typer.Option(help="Replace a set of pairs that is there; a folder of pictures never is."),
    ] = False,
) -> None:
    """Turn a folder of pairs into an LMDB, or an LMDB into a folder, byte for byte."""
    with _writing(out):
        if is_lmdb(source):
            written, skipped = unpack(source, out)
        else:
            written, skipped = pack_folder(source, out, overwrite=overwrite)
    _tell(f"{out}: {written} pairs")
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


@contextmanager
def _ending(left: Callable[[], str]) -> Iterator[None]:
    """Turn what ends a command into one sentence and an exit code; `left` tells of a signal."""
    try:
        with raising():
            yield
    except Stopped as stopped:
        _say(f"{stopped.name}: stopped; {left()}")
        raise typer.Exit(stopped.code) from stopped
    except OSError as wrong:
        named = wrong.filename is not None and wrong.strerror
        _say(f"error: {wrong.filename}: {wrong.strerror}" if named else f"error: {wrong}")
        raise typer.Exit(2) from wrong
    except ValueError as wrong:
        _say(f"error: {wrong}")
        raise typer.Exit(2) from wrong
    except (RuntimeError, MemoryError) as wrong:
        said = explained(wrong, f"free some, or use fewer --jobs; {left()}")
        if said is None:
            raise
        _say(f"error: {said}")
        raise typer.Exit(2) from wrong


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """As `_ending`, for a set that is there whole or not at all."""
    before = _identity(out)

    def left() -> str:
        if _identity(out) != before:
            return f"{out} is complete"
        return f"nothing of the new {out} is left" + ("; the old one is as it was" * bool(before))

    with _ending(left):
        yield


def _identity(out: Path) -> list[tuple[int, int]]:
    """What tells a set from another one under the same name; empty where there is none."""
    found = (path.stat() for path in (out, out / "data.mdb") if path.exists())
    return [(status.st_dev, status.st_ino) for status in found]


def _print_report(report: Report) -> None:
    rows = {
        "crops": str(report.crops),
        "skipped": str(len(report.skipped)),
        "HR sizes": _counts(report.hr_sizes),
        "LR sizes": _counts(report.lr_sizes),
        "label lengths": _counts(report.label_lengths, len(report.label_lengths)),
        "letters": report.letters,
    }
    if report.reduced_labels:
        rows["labels with other letters"] = f"{report.reduced_labels}: those are left out"
    if report.bicubic_psnr is not None:
        rows["bicubic PSNR"] = f"{report.bicubic_psnr:.2f} dB"
    for key, value in (report.recipe or {}).items():
        rows[f"recipe: {key}"] = str(value)
    beside = Table(show_header=False)
    below = Table(show_header=False, box=None, padding=0)
    for name, value in rows.items():
        beside.add_row(one_line(name), one_line(value))
        below.add_row(one_line(f"{name}:"))
        below.add_row(f"  {one_line(value)}")
    _tell(report.path)
    print_tables(_out, [beside], [below])
    _print_skipped(report.skipped)


def _counts(counts: dict[str, int] | dict[int, int], shown: int = 6) -> str:
    parts = [f"{key}: {count}" for key, count in list(counts.items())[:shown]]
    rest = len(counts) - len(parts)
    return ", ".join(parts) + (f", and {rest} more" if rest > 0 else "")


def _print_skipped(skipped: list[Skipped]) -> None:
    for line in skipped_lines([*map(str, skipped)], "`data inspect --json` lists all"):
        _say(line)


def _write_sheet(image: Image.Image, path: Path) -> None:
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", _MAKER)
    with (
        nullcontext(path) if is_stream(path) else replacing(path) as place,
        place.open("wb") as file,
    ):
        image.save(file, "PNG", pnginfo=about)


def _is_sheet(path: Path) -> bool:
    """Whether an earlier `inspect` wrote the file."""
    with path.open("rb") as file:
        start = file.read(1024)
    return start.startswith(b"\x89PNG") and f"Software\0{_MAKER}".encode() in start


def _tell(text: str) -> None:
    _out.print(one_line(text), soft_wrap=True)


def _say(text: str) -> None:
    _err.print(one_line(text), soft_wrap=True)
