"""Tables and lines on a terminal or in a pipe: no number and no name is cut or read as markup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_ENDLESS = 100_000
_NAMED = 20


def plain_console(**options: Any) -> Console:
    """A console that prints texts as they are: names may hold brackets and colons."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def readable(text: str) -> str:
    r"""`text` with \xNN for what in a name is not UTF-8, so that files and pipes take it."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def one_line(text: str) -> str:
    r"""`readable`, and escapes for what breaks a line or what a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in readable(text))


def skipped_lines(records: Sequence[str], listed: str) -> list[str]:
    """Lines on damaged records: the first ones by name, and how many more `listed` has."""
    lines = [one_line(f"skipped {record}") for record in records[:_NAMED]]
    if len(records) > _NAMED:
        lines.append(f"and {len(records) - _NAMED} more ({listed})")
    return lines


def print_tables(console: Console, *forms: Sequence[Table]) -> None:
    """Print the first form that the terminal has room for, else the last one, whole.

    Each form is the same content as one or several tables, the widest form first. What is no
    terminal, a pipe or a file, has room for all.
    """
    fitting = (form for form in forms if _width(console, form) <= console.width)
    chosen = next(fitting, forms[-1]) if console.is_terminal else forms[0]
    # Where the terminal is too narrow for every form it breaks the lines, which cuts nothing.
    before = console.width
    console.width = max(before if console.is_terminal else 0, _width(console, chosen))
    try:
        for table in chosen:
            console.print(table)
    finally:
        console.width = before


def _width(console: Console, tables: Sequence[Table]) -> int:
    endless = console.options.update(max_width=_ENDLESS)
    return max(Measurement.get(console, endless, table).maximum for table in tables)
