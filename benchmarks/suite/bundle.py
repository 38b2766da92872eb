"""A folder of what a machine without a network lacks: packages, fonts, words, the library.

wheels/*.whl      packages for Python 3.12 on x86-64, unpacked for each run
fonts/PACKAGE/    type faces, each folder with its licence
words.txt         a dictionary, one word a line
_C.abi3.so        the compiled operations, taken where they are those of these sources
contents.json     what is there, from where, under which licence
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from suite.plan import ROOT

LIBRARY, SOURCES = "_C.abi3.so", "LEMMA_FAST_LIBRARY"


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder; None is one with nothing in it."""

    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.folder is not None and not (self.folder / "contents.json").is_file():
            raise FileNotFoundError(f"{self.folder} is no bundle: make one with `make gpu-bundle`")

    def unpack(self, target: Path) -> list[Path]:
        """Unpack the wheels, which Python cannot import compiled modules from; what to add to
        PYTHONPATH.
        """
        if self.folder is None:
            return []
        target.mkdir(parents=True, exist_ok=True)
        for wheel in sorted((self.folder / "wheels").glob("*.whl")):
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(target)
        return [target]

    def environment(self) -> dict[str, str]:
        """What tells the step `build` of the library: its path, if it is of these sources."""
        if self.folder is None or not (self.folder / LIBRARY).is_file():
            return {}
        contents = json.loads((self.folder / "contents.json").read_text("utf-8"))
        if contents.get("library", {}).get("sources") != sources():
            return {}
        return {SOURCES: str(self.folder / LIBRARY)}

    def fonts(self) -> list[Path]:
        """The folders of type faces, one for each package."""
        return sorted((self.folder / "fonts").iterdir()) if self.folder else []

    def words(self) -> str:
        """The dictionary as `lemma-fast data synthesize` takes it."""
        path = self.folder / "words.txt" if self.folder else None
        return str(path) if path is not None and path.is_file() else "builtin"


def sources() -> str:
    """A digest of what the library is made of."""
    digest = hashlib.sha256()
    for path in [*sorted((ROOT / "csrc").rglob("*")), ROOT / "setup.py"]:
        if path.is_file():
            name = path.relative_to(ROOT).as_posix()
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
