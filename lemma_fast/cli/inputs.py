"""From the command line's paths to input files."""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lemma_fast.cli.exits import misused
from lemma_fast.errors import reason
from lemma_fast.images import image_suffixes

STDIN = "-"
COMPARE = "_compare"


@dataclass(frozen=True)
class Source:
    """One input: a file, or the bytes read from standard input (`path` is "-" then).

    `below` is the folder it lies in, seen from the folder that was given on the command line.
    `fault` says why a path stands for no file at all: a pattern or a folder without any.
    """

    path: Path
    below: Path = Path()
    data: bytes | None = None
    fault: str | None = None

    @property
    def stem(self) -> str:
        """Name without its ending, to which the suffix is appended."""
        return "stdin" if self.data is not None else self.path.stem

    @property
    def content(self) -> Path | bytes:
        """What the decoder reads."""
        return self.path if self.data is None else self.data

    def absence(self) -> str | None:
        """Say why there is nothing to read, None where something is there."""
        if self.fault is None and self.data is None:
            try:
                os.stat(self.path)
            except OSError as error:
                return reason(error)
        return self.fault


@dataclass
class Inputs:
    """Finds the files that paths, folders and glob patterns name, in a fixed order.

    Folders give their image files, by ending, and are read one at a time. Left out there, and
    named: files without an image's ending (`not_images`), and results of an earlier run
    (`earlier`: `word_x2.png` where `word.*` is beside it), so that a second run over a folder does
    not enlarge its own results. A file that is named is always taken. `stdin` is the image that
    the path "-" stands for; it comes first.
    """

    paths: Sequence[str]
    suffix: str
    recursive: bool = False
    output: Path | None = None
    stdin: bytes | None = None
    not_images: list[str] = field(default_factory=list, init=False)
    earlier: list[str] = field(default_factory=list, init=False)
    _stems_seen: dict[Path, set[str]] = field(default_factory=dict, init=False)

    def __iter__(self) -> Iterator[Source]:
        """Yield each input; one that does not exist is yielded too, to be reported like others."""
        self.not_images, self.earlier = [], []
        if self.stdin is not None:
            yield Source(Path(STDIN), data=self.stdin)
        for path in self._expanded():
            # Unlike Path.is_dir, this takes a path that may not be looked at for no folder.
            if os.path.isdir(path):
                sources = self._folder(path)
                yield next(sources, None) or Source(path, fault=self._no_images())
                yield from sources
            elif glob.has_magic(str(path)) and not os.path.lexists(path):
                yield Source(path, fault="no file matches")
            else:
                yield Source(path)

    def _no_images(self) -> str:
        hint = "" if self.recursive else " (sub-folders are read with --recursive)"
        return f"no images in this folder{hint}"

    def _expanded(self) -> Iterator[Path]:
        for text in self.paths:
            if text == STDIN:
                continue
            # A pattern reaches us where the shell leaves it alone; a real name goes before.
            if glob.has_magic(text) and not os.path.lexists(text):
                yield from map(Path, _matches(text) or [text])
            else:
                yield Path(text)

    def _folder(self, top: Path) -> Iterator[Source]:
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(folder) as entries:
                    listed = sorted((entry.name, _is_folder(entry)) for entry in entries)
            except OSError as error:
                yield Source(folder, fault=reason(error))
                continue
            files = [name for name, is_folder in listed if not is_folder]
            folders = [name for name, is_folder in listed if is_folder]
            stems = {os.path.splitext(name)[0] for name in files}
            below = folder.relative_to(top)
            for name in files:
                if not _looks_like_image(name):
                    if not name.startswith("."):
                        self.not_images.append(os.path.join(folder, name))
                elif self._is_earlier(name, stems):
                    self.earlier.append(os.path.join(folder, name))
                else:
                    yield Source(folder / name, below)
            for name in reversed(folders) if self.recursive else ():
                child = folder / name
                # Links may form a circle, and the results' own folder is no input.
                if not (name.startswith(".") or child.is_symlink() or self._is_output(child)):
                    waiting.append(child)

    def _is_earlier(self, name: str, stems: set[str]) -> bool:
        stem = os.path.splitext(name)[0]
        plain = stem.removesuffix(self.suffix + COMPARE)
        if plain == stem and self.suffix:
            plain = stem.removesuffix(self.suffix)
        return plain != stem and plain in stems

    def _is_output(self, folder: Path) -> bool:
        try:
            return self.output is not None and os.path.samefile(folder, self.output)
        except OSError:
            return False

    def holds(self, path: Path) -> bool:
        """Whether an existing file is itself one of the inputs, and must not be written over."""
        files, tops = self._given
        if real(path) in files:
            return True
        folder = Path(_real_folder(str(path.parent.absolute())))
        for top in tops:
            inside = folder == top or (self.recursive and top in folder.parents)
            left_out = folder != top and self.output is not None and self._is_output(folder)
            if inside and not left_out and _looks_like_image(path.name):
                return not self._is_earlier(path.name, self._stems(folder))
        return False

    @functools.cached_property
    def _given(self) -> tuple[set[str], list[Path]]:
        """The named files, and the named folders, with links resolved."""
        paths = list(self._expanded())
        folders = [path for path in paths if os.path.isdir(path)]
        named = [path for path in paths if not os.path.isdir(path)]
        files = {real(path) for path in named} | {_resolved(str(path)) for path in named}
        return files, [Path(_resolved(str(folder))) for folder in folders]

    def _stems(self, folder: Path) -> set[str]:
        if folder not in self._stems_seen:
            # One folder at a time is enough: results come in the order of the inputs.
            try:
                listed = os.listdir(folder)
            except OSError:
                # A folder that may be entered, not read: what lies there counts as an input.
                listed = []
            self._stems_seen = {folder: {os.path.splitext(name)[0] for name in listed}}
        return self._stems_seen[folder]


def _looks_like_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder; a link that leads nowhere or may not be followed is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _matches(pattern: str) -> list[str]:
    """Return the sorted names that a pattern matches; or ends the command."""
    try:
        return sorted(glob.glob(pattern, recursive=True))
    except RecursionError:
        misused(
            f"{pattern}: the folders are nested too deep for a pattern; name a folder and use -r"
        )


def _resolved(path: str) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, RecursionError):
        # A chain of links that no system call would follow to its end.
        return os.path.abspath(path)


@functools.lru_cache(maxsize=1024)
def _real_folder(folder: str) -> str:
    return _resolved(folder)


def real(path: Path) -> str:
    """Name a file so that two ways to write it compare equal; links among its folders resolved."""
    return os.path.join(_real_folder(str(path.parent.absolute())), path.name)
