"""Where data commands write: judged before the work, and whole at the end or not there.

What is being written lies in a hidden folder beside its place, with a lock that the run holds. The
lock of a killed run is free: the next run that writes into the same folder clears what it left.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

_WORK = ".lemma-fast-{}.writing"


@contextmanager
def new_folder(
    out: Path,
    *,
    inputs: Sequence[Path] = (),
    replaceable: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` where the block ends well, and is gone otherwise.

    `out` must be free: not there, or an empty folder. With `replaceable`, which raises ValueError
    for what must not be replaced, it may also be a set; then its `data.mdb` is replaced, and no
    other file in it is touched. Raises FileExistsError, ValueError or OSError before anything is
    written; also where another run is writing `out`.
    """
    _check_folder(out, inputs, replaceable)
    with _parents(out.parent), _claimed(out) as work:
        new = work / "new"
        new.mkdir()
        yield new
        # It may have appeared in the meantime.
        _check_folder(out, inputs, replaceable)
        # Each is a single step of the file system: a kill leaves the old one or the new one.
        if _is_free(out):
            new.rename(out)
        else:
            (new / "data.mdb").replace(out / "data.mdb")
            (out / "lock.mdb").unlink(missing_ok=True)


def _check_folder(
    out: Path, inputs: Sequence[Path], replaceable: Callable[[Path], None] | None
) -> None:
    if out.name in ("", ".."):
        raise ValueError(f"{out} is not the name of a new folder")
    if out.is_symlink():
        raise FileExistsError(f"{out} is a link; name the folder itself")
    if os.path.ismount(out):
        # Nothing can be moved there in one step.
        raise ValueError(f"{out} is a mount point; name a folder in it")
    if _is_free(out):
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is there already, and is not a folder")
    for source in inputs:
        around = [source, *source.resolve().parents]
        if any(_same(out, each) for each in around) or any(
            _same(each, source) for each in out.resolve().parents
        ):
            raise ValueError(f"{out} is an input, or above or below one; it is not replaced")
    if replaceable is None:
        raise FileExistsError(f"{out} is there already, and is not empty")
    replaceable(out)


def _is_free(out: Path) -> bool:
    return not os.path.lexists(out) or (
        out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    )


def _same(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make the folders that are missing; those that stay empty are removed again."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for each in missing:
            with suppress(OSError):
                each.rmdir()


@contextmanager
def _claimed(out: Path) -> Iterator[Path]:
    """The folder to write `out` in, which no other run has, and which is gone at the end."""
    name = sha256(os.fsencode(out.name)).hexdigest()[:16]
    work = out.parent / _WORK.format(name)
    for left in out.parent.glob(_WORK.format("*")):
        # Of other places, whose runs may be alive, or belong to somebody else.
        with suppress(OSError):
            _release(left, _locked(left))
    try:
        lock = _locked(work, make=True)
    except BlockingIOError:
        raise FileExistsError(f"another run is writing {out}") from None
    try:
        shutil.rmtree(work / "new", ignore_errors=True)
        yield work
    finally:
        _release(work, lock)


def _locked(work: Path, *, make: bool = False) -> int:
    """Lock a folder of this module's; raises BlockingIOError where a living run has it."""
    while True:
        if make:
            with suppress(FileExistsError):
                work.mkdir()
        flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
        try:
            if not stat.S_ISDIR(work.lstat().st_mode):
                raise NotADirectoryError(f"{work} is not a folder")
            lock = os.open(work / "lock", flags, 0o666)
        except FileNotFoundError:
            if make:
                # Its owner has just removed it.
                continue
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The owner may have removed the file between the two calls.
            if os.path.samestat(os.fstat(lock), (work / "lock").stat()):
                return lock
        except FileNotFoundError:
            if not make:
                os.close(lock)
                raise
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _release(work: Path, lock: int) -> None:
    """Remove what this module wrote to `work`, and `work` where nothing else is in it."""
    try:
        shutil.rmtree(work / "new", ignore_errors=True)
        (work / "lock").unlink(missing_ok=True)
        with suppress(OSError):
            work.rmdir()
    finally:
        os.close(lock)
