"""The pages of an LMDB file, checked before LMDB maps them.

LMDB trusts a file: a page that is not there, or an offset that leads out of one, ends the process.
Read here are the pages of keys alone, as LMDB 0.9 lays them out on 64-bit machines; those that hold
nothing but a value's bytes are only counted.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

# Magic number, version; flags, depth, branch and leaf pages, root of the keys; last page, number
# of the transaction. What is left out are the address, the map's size, and the tree of free pages.
_META = struct.Struct("=16xII16xI44x4xHHQQ16xQQQ")
_MAGIC, _VERSION = 0xBEEFC0DE, 1
# Own number, flags, and the ends of the table of offsets and of free space.
_HEADER = struct.Struct("=Q2xHHH")
# Low and high half of a size or of a page's number, flags or its top, length of the key.
_NODE = struct.Struct("=HHHH")
_BRANCH, _LEAF, _KINDS = 1, 2, 0x2F
_BIG = 1
_NONE = (1 << 64) - 1


class SetError(ValueError):
    """A set that cannot be read at all; the message names the file and says why."""


class _Meta(NamedTuple):
    magic: int
    version: int
    page_size: int
    flags: int
    depth: int
    branches: int
    leaves: int
    root: int
    last: int
    transaction: int


class _Absent(Exception):
    """A page is needed that lies behind the end of the file."""


def check_pages(path: Path) -> None:
    """Raise SetError unless every page that LMDB would follow to find a value is sound.

    Raises OSError where the file cannot be opened.
    """
    with path.open("rb") as file:
        handle = file.fileno()
        size = os.fstat(handle).st_size
        if not size:
            raise SetError(f"{path} is empty")
        meta = _newest(handle, path)
        needed = (meta.last + 1) * meta.page_size
        try:
            _walk(handle, path, meta, min(size // meta.page_size, meta.last + 1))
        except _Absent as absent:
            if size < needed:
                raise SetError(
                    f"{path} is cut short: it has {size:,} bytes of {needed:,}, "
                    f"{needed - size:,} are missing"
                ) from None
            raise SetError(f"{path} is damaged: {absent}") from None


def _newest(handle: int, path: Path) -> _Meta:
    first = _meta(handle, path, 0)
    second = _meta(handle, path, first.page_size)
    meta = second if second.transaction > first.transaction else first
    if meta.flags:
        raise SetError(f"{path} is an LMDB of another kind: its keys are not plain ones")
    return meta


def _meta(handle: int, path: Path, place: int) -> _Meta:
    data = os.pread(handle, _META.size, place)
    if len(data) < _META.size:
        # A web page or a note that was saved under the name has no magic number either.
        if data[16:20] == _MAGIC.to_bytes(4, "little") or place:
            raise SetError(f"{path} is cut short: even its first two pages are not whole")
        raise SetError(f"{path} is not an LMDB")
    meta = _Meta._make(_META.unpack(data))
    if meta.magic != _MAGIC:
        raise SetError(
            f"{path} is damaged: no LMDB meta page" if place else f"{path} is not an LMDB"
        )
    if meta.version != _VERSION:
        raise SetError(f"{path} is an LMDB of version {meta.version}; version {_VERSION} is read")
    size = meta.page_size
    if not 256 <= size <= 65536 or size & (size - 1):
        raise SetError(f"{path} is damaged: its pages would have {size} bytes")
    return meta


def _walk(handle: int, path: Path, meta: _Meta, pages: int) -> None:
    """Follow the tree of keys from its root; `pages` are in the file."""
    if meta.root == _NONE:
        return
    left = meta.branches + meta.leaves
    stack = [(meta.root, meta.depth)]
    while stack:
        number, depth = stack.pop()
        left -= 1
        if left < 0 or depth < 1:
            raise SetError(f"{path} is damaged: its pages do not form a tree")
        if number >= pages:
            raise _Absent(f"page {number} of {pages}")
        page = os.pread(handle, meta.page_size, number * meta.page_size)
        try:
            for below in _below(page, number, leaf=depth == 1, pages=pages):
                stack.append((below, depth - 1))
        except (ValueError, struct.error):
            raise SetError(f"{path} is damaged: page {number} of {pages} is not sound") from None


def _below(page: bytes, number: int, *, leaf: bool, pages: int) -> list[int]:
    """The pages that a page of keys points to; raises ValueError where it is not sound."""
    own, flags, lower, upper = _HEADER.unpack_from(page)
    count = (lower - 16) // 2
    sound = own == number and flags & _KINDS == (_LEAF if leaf else _BRANCH)
    # With a single branch LMDB ends the process.
    if not sound or count < (1 if leaf else 2) or not lower <= upper <= len(page):
        raise ValueError("header")
    below = []
    for place in struct.unpack_from(f"={count}H", page, 16):
        low, high, top, key = _NODE.unpack_from(page, place)
        start = place + 8 + key
        if not leaf:
            below.append(low | high << 16 | top << 32)
            held = 0
        elif top & _BIG:
            held = 8
            (first,) = struct.unpack_from("=Q", page, start)
            last = first + (15 + (low | high << 16)) // len(page)
            if last >= pages:
                raise _Absent(f"page {last} of {pages}")
        else:
            held = low | high << 16
        if place < upper or start + held > len(page):
            raise ValueError("node")
    return below
