"""What each input becomes: the name of its result, and what is known of it in the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from lemma_fast.cli.exits import misused
from lemma_fast.cli.inputs import COMPARE, STDIN, Source
from lemma_fast.images import Format, image_suffixes
from lemma_fast.outputs import check_folder

if TYPE_CHECKING:
    from lemma_fast.reading import Page
    from lemma_fast.recognizers import Reading
    from lemma_fast.upscale import Upscaled

Status = Literal["ok", "kept", "skipped", "error"]
_ENDINGS: dict[str, Format] = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}


@dataclass
class Outcome:
    """What became of one input. `output` is None where nothing was written to a file.

    `found` is what the network returned. `before` and `after` are what a recogniser read in the
    bicubic crop and in the result; `unread` says why it failed to.
    """

    source: Source
    status: Status = "ok"
    reason: str | None = None
    output: Path | None = None
    compare: Path | None = None
    input_size: tuple[int, int] | None = None
    output_size: tuple[int, int] | None = None
    milliseconds: float = 0.0
    found: Upscaled | None = None
    before: Reading | None = None
    after: Reading | None = None
    unread: str | None = None
    notes: list[str] = field(default_factory=list)

    def fail(self, reason: str) -> None:
        """Record that this input has no result."""
        self.status, self.reason, self.output, self.compare = "error", reason, None, None

    def skip(self, reason: str) -> None:
        """Record that nothing was to be done."""
        self.status, self.reason = "skipped", reason


@dataclass
class Photographed(Outcome):
    """What became of a photograph: what was read in it, None where nothing was."""

    page: Page | None = None


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

    @classmethod
    def chosen(
        cls, paths: Sequence[str], output: str | None, suffix: str, form: str | None
    ) -> Naming:
        """Understand -o, --suffix and --format; ends the command, or raises OutputError."""
        folder = None if output in (None, STDIN) else Path(str(output))
        file = None if folder is None else _as_file(paths, folder, str(output))
        if file is not None:
            named = _ENDINGS[file.suffix.lower()]
            if form not in (None, named):
                misused(f"-o {file} contradicts --format {form}")
            return cls(suffix, named, None, file)
        if folder is not None:
            if os.path.isfile(folder):
                misused(
                    f"-o {folder} is a file, neither a folder nor the name of an image "
                    f"({', '.join(_ENDINGS)})"
                )
            check_folder(folder, "-o")
        return cls(suffix, cast(Format, form or "png"), folder)

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


def _as_file(paths: Sequence[str], output: Path, typed: str) -> Path | None:
    """Return `-o` where it names a file: it looks like an image's name, and is no folder."""
    if output.is_dir() or typed.endswith(("/", os.sep)):
        return None
    ending = output.suffix.lower()
    if ending not in _ENDINGS:
        if ending in image_suffixes():
            misused(f"-o {output}: results are written as .png, .jpg or .webp")
        return None
    if len(paths) != 1 or os.path.isdir(paths[0]):
        misused(f"-o {output} names one file: give one image, or -o a folder")
    if not output.parent.is_dir():
        misused(f"-o {output}: there is no folder {output.parent}")
    check_folder(output.parent, "-o")
    return output
