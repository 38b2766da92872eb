"""Builds the CUDA source of AdaFM against the emulator of a CUDA device, and imports it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
NAME = "adafm_emulated"
FLAGS = (
    "-std=c++17 -O1 -fPIC -fvisibility=hidden -fno-strict-aliasing -DLEMMA_FAST_EMULATED "
    # The check would take a change of stacks for an error.
    "-U_FORTIFY_SOURCE -Wno-unknown-pragmas"
).split()


def missing() -> str | None:
    """What stands in the way of a build, if anything does."""
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11: pip install 'lemma-fast[dev]'"
    if shutil.which(compiler()[0]) is None:
        return f"needs a C++ compiler: {compiler()[0]} is not there"
    return None


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def load() -> ModuleType:
    """Import the module, which is built once for given sources, compiler and CXXFLAGS."""
    import pybind11

    here, kernels = ROOT / "tests" / "emulator", ROOT / "csrc" / "adafm"
    sources = sorted([*kernels.glob("cuda/*.cu"), *here.glob("*.cpp")])
    headers = sorted([*kernels.glob("cuda/*.cuh"), *kernels.rglob("*.h"), *here.glob("*.h")])
    includes = [pybind11.get_include(), sysconfig.get_path("include"), here, ROOT / "csrc"]
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    command = [*compiler(), *FLAGS, *extra, *(f"-I{folder}" for folder in includes)]
    digest = hashlib.sha256(repr(command).encode())
    for path in [*sources, *headers]:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / NAME / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{NAME}.so"
    # Parallel test workers build it once between them.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(command, sources, library, extra)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(command: list[str], sources: list[Path], library: Path, extra: list[str]) -> None:
    objects = []
    for source in sources:
        objects.append(str(library.with_name(f"{source.name}.o")))
        _run([*command, "-x", "c++", "-c", str(source), "-o", objects[-1]])
    unfinished = library.with_suffix(".part")
    _run([*compiler(), "-shared", *extra, *objects, "-o", str(unfinished)])
    unfinished.rename(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-4000:]}")
