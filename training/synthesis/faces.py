"""Type faces for synthesis: found by Debian package or by folder, checked, and listed in one order.

A face is named `package/file`, so the same seed draws the same faces wherever the files lie. The
packages of `fonts/test.txt` are reserved for test sets: training never sees their letterforms.
"""

from __future__ import annotations

import re
import string
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Literal

from PIL import ImageFont

# Symbols, key caps and outlines that nobody reads; hairlines vanish at 16 pixels.
_UNFIT = re.compile(
    r"D050000L|StandardSymbols|Symbol|Dingbat|Ornament|Initials|LinBiolinum_K|Wargames|Arrows|Shields"
    r"|Thin|Hairline|ExtraLight|UltraLight|ExtLt|texgyre\w*-math",
    re.IGNORECASE,
)
_SUFFIXES = {".ttf", ".otf"}
_SCRIPT = re.compile(
    r"script|chancery|chorus|lobster|dancing|kaushan|leckerli|ecolier|delphine|handwriting|bajaderka",
    re.IGNORECASE,
)
_LETTERS = string.ascii_letters + string.digits
PUNCTUATION = "'-.,&!%:$/"


@lru_cache(maxsize=2)
def packages(split: Literal["train", "test"]) -> tuple[str, ...]:
    """Debian's font packages of one split, as listed in `fonts/train.txt` and `fonts/test.txt`."""
    listing = resources.files("lemma_fast.training") / "fonts" / f"{split}.txt"
    lines = (line.split("#")[0].strip() for line in listing.read_text("utf-8").splitlines())
    return tuple(sorted({line for line in lines if line}))


@dataclass(frozen=True, order=True)
class Face:
    """One font file; `key` is `package/file` and fixes the order."""

    key: str
    path: str

    @property
    def package(self) -> str:
        return self.key.split("/", 1)[0]

    @property
    def is_script(self) -> bool:
        """Whether its letters join, so that a word in capitals would be unreadable."""
        return _SCRIPT.search(self.key) is not None


def find_faces(source: str | Path | Sequence[str | Path] = "train") -> list[Face]:
    """Usable faces of `train`, `test`, or of folders, sorted by key.

    `train` and `test` are looked up with dpkg. In a folder the name of a file's parent stands for
    its package, and the reserved packages are not sorted out: what was asked for is used. Raises
    `FileNotFoundError` where nothing usable is found.
    """
    if source == "train" or source == "test":
        faces = _in_packages(packages(source))
    else:
        folders = [source] if isinstance(source, (str, Path)) else list(source)
        faces = [face for folder in folders for face in _in_folder(Path(folder))]
    usable = sorted({face for face in faces if is_usable(face.path)})
    if not usable:
        raise FileNotFoundError(f"no usable font in {source!r}; {_advice(source)}")
    return usable


def missing_packages(split: Literal["train", "test"]) -> list[str]:
    """The split's packages that are not installed here: without them its seeds draw other faces."""
    return sorted(set(packages(split)) - _installed().keys())


def digest(faces: Sequence[Face]) -> str:
    """SHA-256 over the keys: two sets of faces with one digest draw alike."""
    return sha256("\n".join(face.key for face in faces).encode()).hexdigest()


@lru_cache(maxsize=4096)
def is_usable(path: str) -> bool:
    """Whether the file opens and draws every ASCII letter and digit as a glyph of its own."""
    if _UNFIT.search(Path(path).name):
        return False
    try:
        font = ImageFont.truetype(path, 32, layout_engine=ImageFont.Layout.BASIC)
        absent = bytes(font.getmask("\uffff"))
        glyphs = [bytes(font.getmask(letter)) for letter in _LETTERS]
    except (OSError, ValueError):
        # Damage may show only where a letter is drawn.
        return False
    # Small capitals make 26 pairs alike; fewer shapes than that is a font of boxes.
    return all(any(g) and g != absent for g in glyphs) and len(set(glyphs)) >= 36


@lru_cache(maxsize=4096)
def punctuation_of(path: str) -> str:
    """The marks of `PUNCTUATION` that the face can draw."""
    font = ImageFont.truetype(path, 32, layout_engine=ImageFont.Layout.BASIC)
    absent = bytes(font.getmask("\uffff"))
    masks = {mark: bytes(font.getmask(mark)) for mark in PUNCTUATION}
    return "".join(mark for mark, mask in masks.items() if any(mask) and mask != absent)


def _in_packages(names: Sequence[str]) -> list[Face]:
    files = _installed()
    return [
        Face(f"{package}/{path.name}", str(path))
        for package in names
        for path in files.get(package, ())
    ]


@lru_cache(maxsize=1)
def _installed() -> dict[str, tuple[Path, ...]]:
    """Font files by installed package, of the packages this module names."""
    found: dict[str, tuple[Path, ...]] = {}
    for package in (*packages("train"), *packages("test")):
        listing = _dpkg("-L", package)
        paths = [Path(line) for line in listing.splitlines()]
        if listing:
            found[package] = tuple(
                path for path in paths if path.suffix.lower() in _SUFFIXES and path.is_file()
            )
    return found


def _dpkg(*arguments: str) -> str:
    """Standard output of `dpkg`, or nothing for a package it does not know."""
    try:
        done = subprocess.run(["dpkg", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as missing:
        raise FileNotFoundError(
            "fonts are looked up by package with dpkg, which is not here: name folders of fonts"
        ) from missing
    return done.stdout if done.returncode == 0 else ""


def _in_folder(folder: Path) -> list[Face]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of fonts: {folder}")
    return [
        Face(f"{path.parent.name}/{path.name}", str(path))
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]


def _advice(source: object) -> str:
    if source == "train" or source == "test":
        return f"install the Debian packages that training/fonts/{source}.txt lists"
    return "a folder with .ttf or .otf files is needed"
