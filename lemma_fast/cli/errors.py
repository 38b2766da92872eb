"""How a command ends that cannot do what it was asked for."""

from __future__ import annotations

from typing import NoReturn

import typer


def fail(message: str) -> NoReturn:
    """Say why on standard error and end with exit code 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)
