"""TextZoom's LMDB layout, read and written: records from 1 up, encoded image bytes, UTF-8 labels.

    num-samples, label-%09d, image_hr-%09d, image_lr-%09d    pairs (TextZoom)
    num-samples, label-%09d, image-%09d                      single crops (benchmarks)

A process opens an environment once, when the first record is read, and keeps it. Before a fork it
is closed, because LMDB forbids that a child uses its parent's; both open it again when they read.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType

import lmdb
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lemma_fast.images import ImageError, open_image
from lemma_fast.training.data.pages import SetError, check_pages
from lemma_fast.training.data.places import new_folder

COUNT_KEY = b"num-samples"
RECIPE_KEY = b"recipe"
_TERABYTE = 1 << 40
_COMMIT_EVERY = 1000


class RecordError(ValueError):
    """A record that is missing or cannot be decoded; the message names set and key."""


def is_lmdb(root: str | Path) -> bool:
    """Whether `root` is a file, or a folder with `data.mdb`: what `Records` opens."""
    return Path(root).is_file() or (Path(root) / "data.mdb").is_file()


class Records:
    """The records of one LMDB folder or file, by key; may be pickled, forked, used by threads.

    What cannot be read as a set raises SetError or RecordError, with its path and the reason.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not is_lmdb(self.root):
            raise FileNotFoundError(f"no LMDB at {self.root}: a folder with data.mdb is needed")
        count = self.get(COUNT_KEY)
        if count is None or not count.isdigit():
            raise RecordError(f"{self.root}: key {COUNT_KEY.decode()} is missing or no number")
        entries = _environment(self.root).stat()["entries"]
        # Every record that is missing is named later: that list must end.
        if len(count) > 18 or int(count) > entries:
            said = count[:18].decode() + ("..." if len(count) > 18 else "")
            raise RecordError(
                f"{self.root}: {COUNT_KEY.decode()} is {said}, but there are {entries} entries"
            )
        self.count = int(count)

    def get(self, key: bytes) -> bytes | None:
        """The value at `key`, or None."""
        with self._reading() as transaction:
            value = transaction.get(key)
            return None if value is None else bytes(value)

    def has(self, start: bytes) -> bool:
        """Whether some key begins with `start`."""
        with self._reading() as transaction, transaction.cursor() as cursor:
            return cursor.set_range(start) and bytes(cursor.key()).startswith(start)

    def missing(self, kinds: Sequence[str]) -> dict[int, list[str]]:
        """The keys `kind-%09d` that are absent, by record; only records that lack one are named."""
        absent: dict[int, list[str]] = {}
        with self._reading() as transaction:
            for kind in kinds:
                for record in range(1, self.count + 1):
                    key = f"{kind}-{record:09d}"
                    if transaction.get(key.encode()) is None:
                        absent.setdefault(record, []).append(key)
        return absent

    @contextmanager
    def _reading(self) -> Iterator[lmdb.Transaction[memoryview]]:
        try:
            # Views, because who asks whether a picture is there need not copy it.
            with _environment(self.root).begin(buffers=True) as transaction:
                yield transaction
        except lmdb.Error as wrong:
            raise SetError(f"{self.root} cannot be read: {wrong}") from wrong

    def text(self, key: bytes) -> str:
        """A label; raises `RecordError` where it is missing or not UTF-8."""
        try:
            return self._require(key).decode("utf-8")
        except UnicodeDecodeError as wrong:
            raise RecordError(f"{self.root}: {key.decode()} is not UTF-8") from wrong

    def image(self, key: bytes) -> Image.Image:
        """An image as RGB; raises `RecordError` where it is missing or does not decode."""
        return decode(self._require(key), f"{self.root}: {key.decode()}")

    def recipe(self) -> dict[str, object] | None:
        """How the set was synthesized, if it says so; `RecordError` where that is damaged."""
        value = self.get(RECIPE_KEY)
        if value is None:
            return None
        try:
            recipe = json.loads(value)
        except (ValueError, RecursionError) as wrong:
            raise RecordError(f"{self.root}: its recipe is not JSON") from wrong
        if not isinstance(recipe, dict):
            raise RecordError(f"{self.root}: its recipe is not a JSON object")
        return recipe

    def _require(self, key: bytes) -> bytes:
        value = self.get(key)
        if value is None:
            raise RecordError(f"{self.root}: {key.decode()} is missing")
        return value


class PairWriter:
    """Writes pairs in order; the set appears at its place when the `with` block ends well.

    On entering raises FileExistsError where `out` is there already, unless it is to be overwritten
    and is a set of pairs, and ValueError where it is one of `inputs` or lies around or in one: see
    `new_folder`. What interrupts the block leaves `out` as it was.
    """

    def __init__(
        self, out: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = ()
    ) -> None:
        self.out = Path(out)
        self.count = 0
        self._inputs = [Path(source) for source in inputs]
        self._overwrite = overwrite
        self._pending: list[tuple[bytes, bytes]] = []

    def add(self, label: str, hr: bytes, lr: bytes) -> None:
        """Append one pair of encoded images."""
        self.count += 1
        self._pending += [
            (b"label-%09d" % self.count, label.encode("utf-8")),
            (b"image_hr-%09d" % self.count, hr),
            (b"image_lr-%09d" % self.count, lr),
        ]
        if len(self._pending) >= 3 * _COMMIT_EVERY:
            self._commit()

    def describe(self, recipe: dict[str, object]) -> None:
        """Store how the set was made."""
        self._pending.append((RECIPE_KEY, json.dumps(recipe, sort_keys=True).encode()))

    def __enter__(self) -> PairWriter:
        judge = _check_replaceable if self._overwrite else _refuse
        with ExitStack() as stack:
            folder = stack.enter_context(
                new_folder(self.out, inputs=self._inputs, replaceable=judge)
            )
            with self._writing():
                # The map is address space, not disk: the file grows with what is put into it.
                # No other process sees the file, so LMDB need not lock it.
                # The mode is the umask's affair.
                opened = lmdb.open(
                    os.fsencode(folder), map_size=_TERABYTE, sync=False, lock=False, mode=0o777
                )
            self._environment = stack.enter_context(closing(opened))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._pending.append((COUNT_KEY, str(self.count).encode()))
            self._commit()
            with self._writing():
                self._environment.sync(True)
            # Who has read what is replaced opens it again.
            close(self.out)

    def _commit(self) -> None:
        with self._writing(), self._environment.begin(write=True) as transaction:
            for key, value in self._pending:
                transaction.put(key, value)
        self._pending.clear()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as wrong:
            raise OSError(f"cannot write {self.out}: {wrong}") from wrong


def _refuse(out: Path) -> None:
    raise FileExistsError(f"{out} is there already; --overwrite replaces a set of pairs")


def _check_replaceable(out: Path) -> None:
    """Raise ValueError unless the folder is a set as `PairWriter` makes them."""
    data = out / "data.mdb"
    if data.is_symlink() or not data.is_file():
        raise ValueError(f"{out} is a folder, but not a set of pairs; it is not replaced")
    try:
        records = Records(out)
        if records.count and not records.has(b"image_hr-"):
            raise ValueError(f"{out} is a set, but not one of pairs")
    except ValueError as wrong:
        raise ValueError(f"{wrong}; it is not replaced") from wrong
    finally:
        close(out)


def decode(source: bytes | Path, name: str) -> Image.Image:
    """A file, or the bytes of one, as an RGB image, decoded as `lemma-fast upscale` does it.

    Raises `RecordError` with `name` where that fails.
    """
    try:
        return open_image(source).opaque
    except ImageError as wrong:
        raise RecordError(f"{name} does not decode: {wrong}") from wrong


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """[h, w, 3] as PNG, compressed lightly: such crops hardly shrink further."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=2)
    return buffer.getvalue()


_lock = threading.RLock()
_open: dict[Path, lmdb.Environment] = {}
# Files that were checked, as they were then; a forked process need not do it again.
_checked: set[tuple[Path, int, int]] = set()


def _environment(root: Path) -> lmdb.Environment:
    """The one place where sets are opened; raises SetError or OSError."""
    path = _data_file(root)
    with _lock:
        if path not in _open:
            found = path.stat()
            state = (path, found.st_size, found.st_mtime_ns)
            if state not in _checked:
                check_pages(path)
                _checked.add(state)
            try:
                _open[path] = lmdb.open(
                    # As bytes, because a name need not be text in this locale.
                    os.fsencode(path),
                    subdir=False,
                    readonly=True,
                    lock=False,
                    readahead=False,
                    meminit=False,
                    max_readers=1024,
                )
            except lmdb.Error as wrong:
                raise SetError(f"{root} cannot be opened: {wrong}") from wrong
        return _open[path]


def close(root: str | Path) -> None:
    """Close this process's environment of the set, if it is open; reading opens it again."""
    with _lock:
        environment = _open.pop(_data_file(Path(root)), None)
        if environment is not None:
            environment.close()


def _data_file(root: Path) -> Path:
    return (root if root.is_file() else root / "data.mdb").resolve()


def _before_fork() -> None:
    _lock.acquire()
    for environment in _open.values():
        environment.close()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_lock.release, after_in_child=_lock.release
    )
