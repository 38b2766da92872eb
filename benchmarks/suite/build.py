"""The compiled operations: those that are there, those of the bundle, or a build."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from suite.bundle import LIBRARY, SOURCES
from suite.plan import ROOT
from suite.records import here

_LOADS = "from lemma_fast.ops import extension as e; e.load(); print(e.build_info()['cuda'])"


def build() -> int:
    """Have a library with CUDA (without, where LEMMA_FAST_CUDA is 0) that loads; 1 where not."""
    target = ROOT / "lemma_fast" / LIBRARY
    carried = os.environ.get(SOURCES)
    wanted = os.environ.get("LEMMA_FAST_CUDA") != "0"
    if carried is not None:
        place(Path(carried), target)
        if loads(wanted):
            return done("carried")
    settings = {"LEMMA_FAST_CUDA": "1" if wanted else "0"}
    architecture = machine_architecture() if wanted else None
    settings |= {"TORCH_CUDA_ARCH_LIST": architecture} if architecture else {}
    os.environ.update(settings)
    make: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    make["build_in_place"]()
    return done("built") if loads(wanted) else 1


def done(how: str) -> int:
    """Record where the library came from."""
    print(f"the library is {how}")
    records = here()
    if records is not None:
        records.add("build", {"name": "build", "how": how})
    return 0


def place(library: Path, target: Path) -> None:
    """Put a library where the package looks for it; a process may have the old one open."""
    partial = target.with_name(f"{target.name}.new")
    shutil.copy(library, partial)
    partial.replace(target)


def loads(cuda: bool) -> bool:
    """Whether the package's library loads, in a process of its own, and has CUDA if it should."""
    ran = subprocess.run(
        [sys.executable, "-c", _LOADS], capture_output=True, text=True, check=False
    )
    sys.stdout.write(ran.stdout + ran.stderr)
    return ran.returncode == 0 and (not cuda or ran.stdout.strip() != "None")


def machine_architecture() -> str | None:
    """The first device's architecture as nvcc names it, 9.0a for a Hopper: one is built sooner."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    found = ran.stdout.strip().partition("\n")[0]
    return f"{found}a" if found == "9.0" else found or None
