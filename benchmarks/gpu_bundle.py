"""Make a folder with what a machine without a network lacks for gpu_suite.py and for training.

    python benchmarks/gpu_bundle.py [FOLDER] [--fonts N] [--build | --library FILE]

Wheels for Python 3.12 on x86-64 come from PyPI, type faces and the word list from Debian: training
faces only, so that the reserved ones stay unseen. `--build` adds the compiled operations, for which
nvcc is needed. docs/gpu.md says how the folder is used; `suite/bundle.py`, what is in it.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from suite.bundle import LIBRARY, sources
from suite.plan import ROOT

#: What the machine has not, of what `lemma-fast train` and `evaluate` import; without their needs,
#: of which these have none.
PACKAGES = ("lmdb", "rapidfuzz")
PLATFORMS = (
    "manylinux_2_28",
    "manylinux_2_27",
    "manylinux_2_17",
    "manylinux2014",
    "manylinux_2_24",
)
#: Some of `training/fonts/train.txt`, of every kind, with few and small files.
FONTS = (
    "fonts-allerta", "fonts-b612", "fonts-bebas-neue", "fonts-comfortaa", "fonts-dosis",
    "fonts-karla", "fonts-liberation", "fonts-oxygen", "fonts-quicksand", "fonts-league-spartan",
    "fonts-arapey", "fonts-quattrocento", "fonts-goudybookletter", "fonts-vollkorn",
    "fonts-dancingscript", "fonts-kaushanscript", "fonts-lobster", "fonts-courier-prime",
    "fonts-inconsolata", "fonts-comic-neue",
)  # fmt: skip
WORDS = "wamerican"
#: What the whole may weigh, in MiB.
MOST = 40


def main() -> int:
    """Make the bundle and print what is in it; 1 where it is too large."""
    parser = argparse.ArgumentParser(description="A bundle for gpu_suite.py --bundle.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "gpu-bundle")
    parser.add_argument("--fonts", type=int, default=len(FONTS), help="so many font packages")
    parser.add_argument("--build", action="store_true", help="build the library with nvcc")
    parser.add_argument("--library", type=Path, help="a library that was built already")
    given = parser.parse_args()
    folder = given.folder.resolve()
    if folder.exists() and not (folder / "contents.json").is_file() and any(folder.iterdir()):
        parser.error(f"{folder} is there and is no bundle")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    contents: dict[str, Any] = {"python": "3.12, x86-64"}
    contents["wheels"] = wheels(folder / "wheels")
    contents["fonts"], contents["words"] = from_debian(folder, FONTS[: given.fonts])
    library = built() if given.build else given.library
    if library is not None:
        shutil.copy(library, folder / LIBRARY)
        contents["library"] = {"sources": sources(), "bytes": library.stat().st_size}
    (folder / "contents.json").write_text(json.dumps(contents, indent=1) + "\n", "utf-8")
    return said(folder, contents)


def wheels(folder: Path) -> list[str]:
    """Download the wheels; their names."""
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    command = [
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
        "--python-version", "3.12", "--implementation", "cp", *platforms, "-d", str(folder),
    ]  # fmt: skip
    subprocess.run([*command, *PACKAGES], check=True)
    return sorted(path.name for path in folder.glob("*.whl"))


def from_debian(folder: Path, fonts: tuple[str, ...]) -> tuple[list[dict[str, Any]], str]:
    """Type faces with their licences, and the word list, from Debian's packages."""
    listed = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for package in (*fonts, WORDS):
            ran = subprocess.run(
                ["apt-get", "download", "-q", package], cwd=place, capture_output=True, text=True
            )
            if ran.returncode:
                raise SystemExit(f"{package} cannot be had from Debian: {ran.stderr.strip()}")
        for archive in sorted(place.glob("*.deb")):
            package = archive.name.partition("_")[0]
            unpacked = place / package
            subprocess.run(["dpkg", "-x", str(archive), str(unpacked)], check=True)
            if package == WORDS:
                shutil.copy(unpacked / "usr/share/dict/american-english", folder / "words.txt")
                licence(unpacked, package, folder / "words.copyright")
                continue
            target = folder / "fonts" / package
            target.mkdir(parents=True)
            faces = [p for p in sorted(unpacked.rglob("*")) if p.suffix.lower() in (".ttf", ".otf")]
            for face in (p for p in faces if p.is_file() and not p.is_symlink()):
                shutil.copy(face, target / face.name)
            named = licence(unpacked, package, target / "copyright")
            listed.append({"package": archive.name, "faces": len(faces), "licences": named})
    return listed, f"Debian's {WORDS}: American English, one word a line; words.copyright"


def licence(unpacked: Path, package: str, target: Path) -> list[str]:
    """Copy a package's terms; the names that they have in it."""
    source = unpacked / "usr/share/doc" / package / "copyright"
    if not source.is_file():
        # Its documentation is a link to that of another package of the same source.
        return ["see the package"]
    shutil.copy(source, target)
    lines = source.read_text("utf-8", errors="replace").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("License:")]
    return sorted(set(filter(None, names))) or ["see copyright"]


def built() -> Path:
    """Build the library with CUDA, away from the objects of this machine's own."""
    make: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    # Functions read the module's own names.
    names = make["make_library"].__globals__
    names["OBJECTS"] = ROOT / "build" / "gpu-library"
    names["os"].environ["LEMMA_FAST_CUDA"] = "1"
    remark = make["make_library"]()
    if remark:
        raise SystemExit(remark)
    return names["OBJECTS"] / LIBRARY


def said(folder: Path, contents: dict[str, Any]) -> int:
    """Print what is there; 1 where it is more than may travel."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    for name in contents["wheels"]:
        print(f"  {name}")
    for entry in contents["fonts"]:
        print(f"  {entry['package']}: {entry['faces']} faces, {', '.join(entry['licences'])}")
    print(f"  words.txt: {contents['words']}")
    print(f"  {LIBRARY}: {'there' if 'library' in contents else 'not there, it will be built'}")
    print(f"{folder}: {size:.1f} MiB of at most {MOST}")
    return int(size > MOST)


if __name__ == "__main__":
    sys.exit(main())
