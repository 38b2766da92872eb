"""Files that are there whole or not at all, whatever ends the writing."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a free name in the folder of `path`; what is written there becomes `path` at the end.

    Where the block fails nothing is left behind, and `path` stays as it was. Raises OSError.
    """
    # A name of its own: the final one plus an ending could be longer than a file system takes.
    partial = path.parent / f".lemma-fast-{secrets.token_hex(8)}.tmp"
    try:
        yield partial
        partial.replace(path)
    finally:
        # Gone already where all went well.
        partial.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Write a text file, all or nothing."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
