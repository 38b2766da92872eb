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
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import lmdb
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

COUNT_KEY = b"num-samples"
RECIPE_KEY = b"recipe"
_TERABYTE = 1 << 40
_COMMIT_EVERY = 1000


class RecordError(ValueError):
    """A record that is missing or cannot be decoded; the message names set and key."""


class Records:
    """The records of one LMDB folder or file, by key; may be pickled, forked, used by threads."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not (self.root.is_file() or (self.root / "data.mdb").is_file()):
            raise FileNotFoundError(f"no LMDB at {self.root}: a folder with data.mdb is needed")
        count = self.get(COUNT_KEY)
        if count is None or not count.isdigit():
            raise RecordError(f"{self.root}: key {COUNT_KEY.decode()} is missing or no number")
        self.count = int(count)

    def get(self, key: bytes) -> bytes | None:
        """The value at `key`, or None."""
        with _environment(self.root).begin(buffers=False) as transaction:
            value: bytes | None = transaction.get(key)
        return value

    def missing(self, kinds: Sequence[str]) -> dict[int, list[str]]:
        """The keys `kind-%09d` that are absent, by record; only records that lack one are named."""
        absent: dict[int, list[str]] = {}
        with _environment(self.root).begin(buffers=True) as transaction:
            for kind in kinds:
                for record in range(1, self.count + 1):
                    key = f"{kind}-{record:09d}"
                    if transaction.get(key.encode()) is None:
                        absent.setdefault(record, []).append(key)
        return absent

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
        """How the set was synthesized, if it says so."""
        value = self.get(RECIPE_KEY)
        return None if value is None else dict(json.loads(value))

    def _require(self, key: bytes) -> bytes:
        value = self.get(key)
        if value is None:
            raise RecordError(f"{self.root}: {key.decode()} is missing")
        return value


class PairWriter:
    """Writes pairs in order; the set appears at its place when the `with` block ends well."""

    def __init__(self, out: str | Path, *, overwrite: bool = False) -> None:
        self.out = Path(out)
        self.count = 0
        if self.out.exists() and not overwrite:
            raise FileExistsError(f"{self.out} is there already; ask for overwriting to replace it")
        self._partial = self.out.with_name(f"{self.out.name}.partial-{os.getpid()}")
        self._partial.mkdir(parents=True)
        # The map is address space, not disk: the file grows with what is put into it.
        self._environment = lmdb.open(str(self._partial), map_size=_TERABYTE, sync=False)
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
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._environment.close()
            shutil.rmtree(self._partial)
            return
        self._pending.append((COUNT_KEY, str(self.count).encode()))
        self._commit()
        self._environment.sync(True)
        self._environment.close()
        (self._partial / "lock.mdb").unlink(missing_ok=True)
        if self.out.exists():
            close(self.out)
            shutil.rmtree(self.out)
        self._partial.rename(self.out)

    def _commit(self) -> None:
        with self._environment.begin(write=True) as transaction:
            for key, value in self._pending:
                transaction.put(key, value)
        self._pending.clear()


def decode(data: bytes, name: str) -> Image.Image:
    """Encoded bytes as an RGB image; raises `RecordError` with `name` where that fails."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    # Pillow reports damage by any of these, by the format.
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as wrong:
        raise RecordError(f"{name} does not decode: {wrong}") from wrong


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """[h, w, 3] as PNG, compressed lightly: such crops hardly shrink further."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=2)
    return buffer.getvalue()


_lock = threading.RLock()
_open: dict[str, lmdb.Environment] = {}


def _environment(root: Path) -> lmdb.Environment:
    name = str(root.resolve())
    with _lock:
        if name not in _open:
            _open[name] = lmdb.open(
                name,
                subdir=root.is_dir(),
                readonly=True,
                lock=False,
                readahead=False,
                meminit=False,
                max_readers=1024,
            )
        return _open[name]


def close(root: str | Path) -> None:
    """Close this process's environment of the set, if it is open; reading opens it again."""
    with _lock:
        environment = _open.pop(str(Path(root).resolve()), None)
        if environment is not None:
            environment.close()


def _before_fork() -> None:
    _lock.acquire()
    for environment in _open.values():
        environment.close()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_lock.release, after_in_child=_lock.release
    )
