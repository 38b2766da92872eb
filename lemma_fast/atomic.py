"""Files that are there whole or not at all, whatever ends the writing."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty new file in the folder of `path`; at the end it becomes `path`.

    Where the block fails nothing is left behind, and `path` stays as it was. A link is replaced,
    never followed. The mode is what the umask gives a new file, however the block writes. Raises
    OSError.
    """
    # A name of its own: the final one plus an ending could be longer than a file system takes.
    partial = path.parent / f".lemma-fast-{secrets.token_hex(8)}.tmp"
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        yield partial
        # Some writers, that of safetensors for one, make files that their owner alone may read.
        if partial.stat().st_mode != mode:
            partial.chmod(mode)
        partial.replace(path)
    finally:
        # Gone already where all went well.
        partial.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, all or nothing; see `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
