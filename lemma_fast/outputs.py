"""Where a command may write: one rule for every output, judged and tried before the work begins.

An output is never an input, never a folder, and never a file that is there already unless the user
asked to replace it or the command made it. A link counts as a file that is there; replacing it
leaves what it points to as it is.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from lemma_fast.errors import reason


class OutputError(ValueError):
    """An output that must not or cannot be written; the message is one sentence with its name."""


def check_output(
    path: Path,
    option: str = "",
    *,
    overwrite: bool = False,
    inputs: Iterable[str | Path] = (),
    endings: tuple[str, ...] = (),
    made_here: Callable[[Path], bool] | None = None,
    way_out: str = "--overwrite replaces it",
) -> None:
    """Raise OutputError unless `path` may be written and can be; leaves nothing behind.

    `option` is how the user named it, such as "-o", for the message. `inputs` are the files that
    are read. `endings`, in lower case, are those that the name may have; capitals count as the
    same. A file that is there is replaced with `overwrite` alone, or where `made_here` says that an
    earlier run of this command wrote it; that is not asked of a link. `way_out` ends the message
    about it.
    """
    name = f"{option} {path}" if option else str(path)
    if endings and path.suffix.lower() not in endings:
        raise OutputError(f"{name}: the name must end in {' or '.join(endings)}")
    try:
        if os.path.isdir(path):
            raise OutputError(f"{name} is a folder, not the name of a file")
        if _is_there(path):
            if any(_same(path, source) for source in inputs):
                raise OutputError(f"{name} would replace an input: they are the same file")
            own = made_here is not None and not path.is_symlink() and made_here(path)
            if not overwrite and not own:
                kind = "exists and is a link" if path.is_symlink() else "exists"
                raise OutputError(f"{name} {kind}; {way_out}")
        if not os.path.isdir(path.parent):
            raise OutputError(f"{name}: there is no folder {path.parent}")
        _try_to_write(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {name}: {reason(error)}") from None


def check_folder(path: Path, option: str = "") -> None:
    """Raise OutputError unless files can be written into `path`, which need not be there yet.

    It is not made: nothing is left behind.
    """
    name = f"{option} {path}" if option else str(path)
    try:
        there = path
        while not os.path.lexists(there) and there != there.parent:
            there = there.parent
        if not os.path.isdir(there):
            raise OutputError(f"cannot write to {name}: {there} is not a folder")
        _try_to_write(there)
    except OSError as error:
        raise OutputError(f"cannot write to {name}: {reason(error)}") from None


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, however deep (Python's own way is recursive)."""
    missing = []
    while not folder.is_dir() and folder != folder.parent:
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)


def is_stream(path: Path) -> bool:
    """Whether `path` is a device or a pipe, which takes what is written and keeps nothing."""
    return str(path).startswith(("/dev/", "/proc/")) or (
        os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    )


def _same(path: Path, source: str | Path) -> bool:
    return os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source)


def _is_there(path: Path) -> bool:
    """Whether something has the name, a broken link too; raises OSError where none can have it."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _try_to_write(folder: Path) -> None:
    """Make a file there that is gone when it is closed."""
    with tempfile.TemporaryFile(dir=folder, prefix=".lemma-fast-", suffix=".tmp"):
        pass
