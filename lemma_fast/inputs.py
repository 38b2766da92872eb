"""From the command line's paths to input files, and from each input to the file it becomes."""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lemma_fast.images import Format, image_suffixes

STDIN = "-"
COMPARE = "_compare"


@dataclass(frozen=True)
class Source:
    """One input: a file, or the bytes read from standard input (`path` is "-" then).

    `below` is the folder it lies in, seen from the folder that was given on the command line.
    """

    path: Path
    below: Path = Path()
    data: bytes | None = None

    @property
    def stem(self) -> str:
        """Name without its ending, to which the suffix is appended."""
        return "stdin" if self.data is not None else self.path.stem

    @property
    def content(self) -> Path | bytes:
        """What the decoder reads."""
        return self.path if self.data is None else self.data


@dataclass
class Inputs:
    """Finds the files that paths, folders and glob patterns name, in a fixed order.

    Folders give their image files, by ending, and are read one at a time. Left out there, and
    counted: files without an image's ending (`not_images`), and results of an earlier run
    (`earlier`: `word_x2.png` where `word.*` is beside it), so that a second run over a folder does
    not enlarge its own results. A file that is named is always taken. `stdin` is the image that
    the path "-" stands for; it comes first.
    """

    paths: Sequence[str]
    suffix: str
    recursive: bool = False
    output: Path | None = None
    stdin: bytes | None = None
    not_images: int = field(default=0, init=False)
    earlier: int = field(default=0, init=False)
    empty: list[str] = field(default_factory=list, init=False)
    _stems_seen: dict[Path, set[str]] = field(default_factory=dict, init=False)

    def __iter__(self) -> Iterator[Source]:
        """Yield each input; one that does not exist is yielded too, to be reported like others."""
        self.not_images = self.earlier = 0
        self.empty = []
        if self.stdin is not None:
            yield Source(Path(STDIN), data=self.stdin)
        for path in self._expanded():
            if path.is_dir():
                sources = self._folder(path, path)
                first = next(sources, None)
                if first is None:
                    self.empty.append(str(path))
                else:
                    yield first
                    yield from sources
            else:
                yield Source(path)

    def _expanded(self) -> Iterator[Path]:
        for text in self.paths:
            if text == STDIN:
                continue
            # A pattern reaches us where the shell leaves it alone; a real name goes before.
            if glob.has_magic(text) and not os.path.lexists(text):
                names = sorted(glob.glob(text, recursive=True))
                yield from map(Path, names or [text])
            else:
                yield Path(text)

    def _folder(self, folder: Path, top: Path) -> Iterator[Source]:
        try:
            with os.scandir(folder) as entries:
                listed = sorted((entry.name, entry.is_dir()) for entry in entries)
        except OSError:
            # The decoder's message tells why it cannot be read.
            yield Source(folder)
            return
        files = [name for name, is_folder in listed if not is_folder]
        folders = [name for name, is_folder in listed if is_folder]
        stems = {os.path.splitext(name)[0] for name in files}
        below = folder.relative_to(top)
        for name in files:
            if not _looks_like_image(name):
                self.not_images += not name.startswith(".")
            elif self._is_earlier(name, stems):
                self.earlier += 1
            else:
                yield Source(folder / name, below)
        for name in folders if self.recursive else ():
            child = folder / name
            # Links may form a circle, and the results' own folder is no input.
            if not name.startswith(".") and not child.is_symlink() and not self._is_output(child):
                yield from self._folder(child, top)

    def _is_earlier(self, name: str, stems: set[str]) -> bool:
        stem = os.path.splitext(name)[0]
        plain = stem.removesuffix(self.suffix + COMPARE)
        if plain == stem and self.suffix:
            plain = stem.removesuffix(self.suffix)
        return plain != stem and plain in stems

    def _is_output(self, folder: Path) -> bool:
        return self.output is not None and real(folder) == real(self.output)

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
        folders = [path for path in paths if path.is_dir()]
        named = [path for path in paths if not path.is_dir()]
        files = {real(path) for path in named} | {os.path.realpath(path) for path in named}
        return files, [Path(os.path.realpath(folder)) for folder in folders]

    def _stems(self, folder: Path) -> set[str]:
        if folder not in self._stems_seen:
            # One folder at a time is enough: results come in the order of the inputs.
            self._stems_seen = {folder: {os.path.splitext(name)[0] for name in os.listdir(folder)}}
        return self._stems_seen[folder]


def _looks_like_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes()


@functools.lru_cache(maxsize=1024)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def real(path: Path) -> str:
    """Name a file so that two ways to write it compare equal; links among its folders resolved."""
    return os.path.join(_real_folder(str(path.parent.absolute())), path.name)


@dataclass(frozen=True)
class Naming:
    """Where results go.

    Beside the input, or below the folder `output` with the sub-folder kept, as
    `<stem><suffix>.<form>`; `file` overrules all of it with one name.
    """

    suffix: str
    form: Format
    output: Path | None = None
    file: Path | None = None

    def result(self, source: Source, ending: str | None = None) -> Path:
        """Name the result; `ending`, with its dot, replaces the format's."""
        if self.file is not None:
            return self.file
        return self._folder(source) / f"{source.stem}{self.suffix}{ending or '.' + self.form}"

    def compare(self, source: Source) -> Path:
        """Name the comparison picture, a PNG beside the result."""
        return self._folder(source) / f"{source.stem}{self.suffix}{COMPARE}.png"

    def _folder(self, source: Source) -> Path:
        if self.file is not None:
            return self.file.parent
        return source.path.parent if self.output is None else self.output / source.below
