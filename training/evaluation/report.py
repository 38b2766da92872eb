"""What `lemma-fast evaluate` shows and writes: tables, JSON, Markdown, a plot."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from rich.table import Table

from lemma_fast.atomic import replace_file, replacing
from lemma_fast.outputs import check_folder, check_output, make_folder
from lemma_fast.training.evaluation.evaluate import ROWS
from lemma_fast.training.evaluation.summary import AVERAGE, Summary, Value
from lemma_fast.training.evaluation.tables import one_line, readable

_FILES = ("evaluation.json", "evaluation.md", "crops.png", "lengths.png")
_TITLE, _MAKER = "# Evaluation", "lemma-fast evaluate"
# How many records a table's foot names.
_NAMED = 5


def note(summary: Summary) -> str:
    """One sentence on how the numbers came about."""
    if summary.protocol == "official":
        how = (
            "Published protocol: images unclamped, PSNR and SSIM by batch (they depend on the "
            "batch size), accuracy rounded before averaging"
        )
    else:
        how = "Images clamped and judged one by one, 95 % intervals by bootstrap over crops"
    return f"{how}; average weighted by {summary.weighting}{_left_out(summary)}."


def _left_out(summary: Summary) -> str:
    """How many records are not in the numbers, and the names of the first ones."""
    count = sum(summary.skipped.values())
    if not count:
        return ""
    # Without the folders, because a table is narrow.
    names = [one_line(Path(r.id).name) for found in summary.left_out.values() for r in found]
    shown = names[:_NAMED] + ([f"and {count - _NAMED} more"] if count > _NAMED else [])
    noun = "record" if count == 1 else "records"
    return f"; {count} damaged {noun} left out" + (f" ({', '.join(shown)})" if names else "")


def cell(column: str, value: Value | None, interval: bool = True, signed: bool = False) -> str:
    """A number with its interval; accuracy and CER in per cent."""
    if value is None or math.isnan(value.mean):
        return "-"
    factor = 100.0 if column.endswith(("accuracy", "CER")) else 1.0
    digits = 1 if factor == 100 else {"PSNR": 2, "SSIM": 4}.get(column, 3)
    sign = "+" if signed else ""
    text = f"{factor * value.mean:{sign}.{digits}f}"
    if value.low is None or value.high is None or not interval:
        return text
    return f"{text} [{factor * value.low:{sign}.{digits}f}, {factor * value.high:{sign}.{digits}f}]"


def heading(column: str) -> str:
    """A column's name with its unit."""
    unit = "dB" if column == "PSNR" else "%" if column.endswith(("accuracy", "CER")) else ""
    return f"{column} {unit}".strip()


def lines(
    summary: Summary, columns: Sequence[str] | None = None, intervals: bool = True
) -> list[list[str]]:
    """The table of some columns, or all, as texts: a line for each subset and row."""
    found = []
    shown = summary.columns if columns is None else columns
    for name, rows in summary.table.items():
        size = sum(summary.crops.values()) if name == AVERAGE else summary.crops[name]
        for row in ROWS:
            cells = [cell(c, rows[row].get(c), intervals) for c in shown]
            found.append([f"{name} ({size})" if row == ROWS[0] else "", row, *cells])
        gain = summary.gain[name]
        cells = [cell(c, gain.get(c), intervals, signed=True) for c in shown]
        found.append(["", "SR - bicubic", *cells])
    return found


def forms(summary: Summary) -> list[list[Table]]:
    """The table for `print_tables`: as one, by recogniser, without intervals, as a list."""
    by_reader: dict[str, list[str]] = {}
    for column in summary.columns:
        by_reader.setdefault(column.rpartition(" ")[0], []).append(column)
    blocks = list(by_reader.values())
    tables = [
        [_table(summary, columns, intervals, last=columns is split[-1]) for columns in split]
        for intervals in (True, False)
        for split in ([summary.columns], blocks)
    ]
    return [*tables, [_list(summary)]]


def _list(summary: Summary) -> Table:
    """Every number with its interval on a line of its own, for the narrowest terminals."""
    found = Table(show_header=False, box=None, padding=0, caption=note(summary))
    found.caption_justify = "left"
    for name, row, *cells in lines(summary):
        if name:
            found.add_row(name)
        found.add_row(f"  {row}")
        for column, text in zip(summary.columns, cells, strict=True):
            if text != "-":
                found.add_row(f"    {heading(column)}:")
                found.add_row(f"      {text}")
    return found


def _table(summary: Summary, columns: Sequence[str], intervals: bool, last: bool) -> Table:
    words = note(summary)
    if not intervals and summary.protocol == "corrected":
        words += " The terminal is too narrow for the intervals: -o writes them."
    table = Table(caption=words if last else None, caption_justify="left")
    for title in ("set (crops)", "row", *map(heading, columns)):
        table.add_column(title.replace(" ", "\n", 1), no_wrap=True)
    for line in lines(summary, columns, intervals):
        if line[0]:
            table.add_section()
        table.add_row(*line)
    return table


def markdown(summary: Summary, about: Mapping[str, Any]) -> str:
    """The table and what was measured."""
    titles = ["set (crops)", "row", *map(heading, summary.columns)]
    text = [_TITLE, ""]
    text += [f"- {name}: {value}" for name, value in about.items()]
    text += ["", note(summary), ""]
    text += [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    # Names may hold the sign that ends a cell.
    rows = [[text.replace("|", "\\|") for text in line] for line in lines(summary)]
    text += [f"| {' | '.join(row)} |" for row in rows]
    for name, records in summary.left_out.items():
        if records:
            text += ["", f"Left out of {name}:", ""]
            text += [f"- {one_line(str(record))}" for record in records]
    return "\n".join(text) + "\n"


def as_json(summary: Summary, about: Mapping[str, Any]) -> str:
    """Everything that was measured, fractions as fractions; numbers that are none are null."""

    def plain(value: Value) -> dict[str, float | None]:
        return {
            name: number if number is not None and math.isfinite(number) else None
            for name, number in value._asdict().items()
        }

    def rows(found: Mapping[str, Value]) -> dict[str, Any]:
        return {column: plain(value) for column, value in found.items()}

    content = {
        **about,
        "protocol": summary.protocol,
        "weighting": summary.weighting,
        "crops": summary.crops,
        "skipped": summary.skipped,
        "left_out": {
            name: [{"id": readable(r.id), "reason": readable(r.reason)} for r in records]
            for name, records in summary.left_out.items()
        },
        "results": {
            name: {row: rows(found) for row, found in table.items()}
            for name, table in summary.table.items()
        },
        "gain_over_bicubic": {name: rows(found) for name, found in summary.gain.items()},
        "by_length": {
            reader: {
                row: {str(length): {"hits": h, "crops": n} for length, (h, n) in counts.items()}
                for row, counts in found.items()
            }
            for reader, found in summary.lengths.items()
        },
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def plot_lengths(summary: Summary, path: Path) -> None:
    """Word accuracy by length of the label, a panel for each recogniser (the paper's Fig. 5)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    readers = list(summary.lengths)
    figure = Figure(figsize=(6.4, 3.2 * len(readers)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(readers), squeeze=False)[:, 0]
    for panel, reader in zip(panels, readers, strict=True):
        crops = summary.lengths[reader][ROWS[0]]
        beside = panel.twinx()
        beside.bar(list(crops), [n for _, n in crops.values()], color="0.9", zorder=0)
        beside.set_ylabel("crops")
        panel.set_zorder(beside.get_zorder() + 1)
        panel.patch.set_visible(False)
        for row in ROWS:
            counts = summary.lengths[reader][row]
            shares = [100 * hits / n for hits, n in counts.values()]
            panel.plot(list(counts), shares, marker="o", markersize=3, label=row)
        panel.set(title=reader, xlabel="characters", ylabel="word accuracy (%)", ylim=(0, 102))
        panel.legend(loc="upper right")
    figure.savefig(path, format="png", dpi=120, metadata={"Software": _MAKER})


def prepare(
    folder: Path, *, plot: bool, overwrite: bool = False, inputs: Iterable[str | Path] = ()
) -> None:
    """Judge before the work whether `write` can write; raises OutputError or ImportError.

    A file that is there is replaced with `overwrite` alone, or where `write` made it.
    """
    if plot:
        importlib.import_module("matplotlib")
    check_folder(folder, "-o")
    inputs = list(inputs)
    for name in _FILES if os.path.isdir(folder) else ():
        check_output(folder / name, "-o", overwrite=overwrite, inputs=inputs, made_here=_made_here)


def _made_here(path: Path) -> bool:
    """Whether an earlier `write` made the file."""
    content = path.read_bytes()
    if path.suffix == ".md":
        return content.startswith(_TITLE.encode())
    if path.suffix == ".png":
        return content.startswith(b"\x89PNG") and f"Software\0{_MAKER}".encode() in content[:1024]
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"protocol", "results", "gain_over_bicubic"} <= found.keys()


def write(
    folder: Path, summary: Summary, about: Mapping[str, Any], sheet: Image.Image
) -> list[Path]:
    """Write `evaluation.json`, `.md`, `crops.png` and `lengths.png`, each whole, into a folder."""
    make_folder(folder)
    paths = [folder / name for name in _FILES]
    replace_file(paths[0], as_json(summary, about))
    replace_file(paths[1], markdown(summary, about))
    marked = PngImagePlugin.PngInfo()
    marked.add_text("Software", _MAKER)
    with replacing(paths[2]) as partial:
        sheet.save(partial, "PNG", pnginfo=marked)
    if not summary.lengths:
        return paths[:3]
    with replacing(paths[3]) as partial:
        plot_lengths(summary, partial)
    return paths
