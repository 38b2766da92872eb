"""Try README's commands with each Python that is here, and print a table: `make matrix`.

For each release of Python that pyproject.toml names, the newest that is found (pyenv's, or on the
PATH), in a clean clone of HEAD: `make demo`, then `make TARGET`. Variables given to `make matrix`
reach these too, such as `make matrix MATRIX_TARGET=check TORCH=torch==2.11.0 CONSTRAINTS=`.

Logs are written to build/matrix/, a folder for each run. The clones lie in a temporary folder
(TMPDIR; up to 6 GB each with a CUDA build of PyTorch), and one where something failed is kept. The
exit code is 1 where something failed, 2 where nothing could be tried.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = {"PyTorch": "torch", "NumPy": "numpy", "Triton": "triton", "mypy": "mypy"}
# A torch knows its build (2.13.0+cu130), its package may not.
ASK_VERSIONS = f"""
import importlib.metadata, torch
for name in {[*VERSIONS.values()]}:
    try:
        print(torch.__version__ if name == "torch" else importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print("none")
"""
# Without these `make` would say that it cannot make a virtual environment.
ASK_PYTHON = "import sys, ensurepip, venv; print(*sys.version_info[:3], sys.executable)"
# What would lead a clone back to this tree's environment.
FOREIGN = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "MAKELEVEL", "GIT_DIR", "GIT_WORK_TREE")

Release = tuple[int, int]


class Python(NamedTuple):
    """An interpreter that can make virtual environments."""

    version: tuple[int, int, int]
    path: str

    @property
    def name(self) -> str:
        return ".".join(map(str, self.version))


class Outcome(NamedTuple):
    """How one command of make went; `counts` is how pytest's last run summed itself up."""

    code: int
    seconds: float
    counts: str

    def __str__(self) -> str:
        words = [f"**failed ({self.code})**" if self.code else "", self.counts]
        return ", ".join([*filter(None, words), f"{self.seconds:.0f} s"])


def supported(metadata: str) -> list[Release]:
    """Return the releases of Python that the classifiers in pyproject.toml name."""
    found = re.findall(r'"Programming Language :: Python :: (\d+)\.(\d+)"', metadata)
    return [(int(major), int(minor)) for major, minor in found]


def candidates(releases: Iterable[Release]) -> Iterator[str]:
    """Yield paths of what may be Pythons."""
    home = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, home.glob("versions/*/bin/python3"))
    for major, minor in releases:
        yield from filter(None, [shutil.which(f"python{major}.{minor}")])
    yield from filter(None, [shutil.which("python3")])


def ask(path: str) -> Python | None:
    """Ask an interpreter for its version; None where it does not run or makes no environments."""
    try:
        asked = subprocess.run([path, "-c", ASK_PYTHON], capture_output=True, text=True)
    except OSError:
        return None
    if asked.returncode:
        return None
    major, minor, patch, executable = asked.stdout.strip().split(" ", 3)
    return Python((int(major), int(minor), int(patch)), executable)


def find(releases: list[Release], wanted: list[str]) -> list[Python]:
    """Return the newest Python of each release; of those that `wanted` names, where it does.

    `wanted` has releases (3.12) and paths. Raises LookupError where one of them is not there.
    """
    pythons = filter(None, map(ask, candidates(releases)))
    newest = {python.version[:2]: python for python in sorted(pythons)}
    if not wanted:
        return [newest[release] for release in releases if release in newest]
    named = {f"{major}.{minor}": python for (major, minor), python in newest.items()}
    chosen = []
    for name in wanted:
        python = ask(name) if "/" in name else named.get(name)
        if python is None:
            raise LookupError(f"there is no Python {name} with venv (found: {', '.join(named)})")
        chosen.append(python)
    return chosen


def counts(log: str) -> str:
    """Return what pytest counted last, such as "2 failed, 9 passed"; empty if it did not run."""
    found = re.findall(r"^(?:=+ )?((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s\b", log, re.MULTILINE)
    return found[-1] if found else ""


def make(target: str, python: Python, clone: Path, log: Path) -> Outcome:
    """Run a target in a clone; all that it says goes into the log."""
    environment = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    command = ["make", target, f"PYTHON={python.path}", "VENV=.venv"]
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            command, cwd=clone, env=environment, stdin=subprocess.DEVNULL,
            stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip
    said = log.read_text("utf-8", errors="replace")
    return Outcome(done.returncode, time.monotonic() - start, counts(said))


def versions(clone: Path) -> list[str]:
    """Return the versions of what was installed in a clone, in the table's order."""
    command = [str(clone / ".venv" / "bin" / "python"), "-W", "ignore", "-c", ASK_VERSIONS]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return ["none"] * len(VERSIONS)


def row(cells: Iterable[object]) -> str:
    """Lay out a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def tried(python: Python, target: str, root: Path, logs: Path) -> tuple[str, bool]:
    """Try one Python; return its row and whether all went well."""
    folder = Path(tempfile.mkdtemp(prefix=f"lemma-fast-{python.name}-"))
    clone, kept = folder / "lemma-fast", False
    outcomes = []
    try:
        subprocess.run(["git", "clone", "--quiet", str(root), str(clone)], check=True)
        for command in ("demo", target):
            log = logs / f"{python.name}-{command}.log"
            print(f"Python {python.name}: make {command}, log in {log}", file=sys.stderr)
            outcomes.append(make(command, python, clone, log))
            if outcomes[-1].code:
                kept = True
                print(f"It failed. The clone is kept: {clone}", file=sys.stderr)
                break
        found = versions(clone)
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
    cells = [*outcomes, "not run"][:2]
    return row([python.name, *found, *cells]), not kept


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", help="what is made after demo, such as test or check")
    parser.add_argument("pythons", nargs="*", help="releases, such as 3.12, or paths; all if none")
    given = parser.parse_args(arguments)
    releases = supported((root / "pyproject.toml").read_text("utf-8"))
    try:
        pythons = find(releases, given.pythons)
    except LookupError as error:
        print(f"matrix: {error}", file=sys.stderr)
        return 2
    if not pythons:
        print("matrix: none of these Pythons is here:", *releases, file=sys.stderr)
        return 2
    logs = root / "build" / "matrix" / time.strftime("%Y-%m-%d-%H%M%S")
    logs.mkdir(parents=True, exist_ok=True)
    head = ["Python", *VERSIONS, "make demo", f"make {given.target}"]
    print(row(head), row(["---"] * len(head)), sep="\n", flush=True)
    sound = True
    for python in pythons:
        line, well = tried(python, given.target, root, logs)
        sound = sound and well
        print(line, flush=True)
    return not sound


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
