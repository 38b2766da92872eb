"""nvcc compiles AdaFM's CUDA source for every architecture we name, within a thread's means."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted(ROOT.glob("csrc/**/*.cu"))
    if "__global__" in path.read_text(encoding="utf-8")
]
ARCHITECTURES = ["80", "90a", "120"]
# Registers a thread at most, where 64 are not enough: one block to a multiprocessor's 65536.
REGISTERS = {"pool_kernel": 216, "fuse_kernel": 240, "conv_kernel": 160}
# What a block may have without asking for more at the launch.
SHARED = 48 * 1024

NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
)
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, of the CUDA toolkit")


class Kernel(NamedTuple):
    """What ptxas says that one kernel needs: bytes on the stack count spills, too."""

    name: str
    stack: int
    registers: int
    shared: int


def compile_kernels(source: str, architecture: str, folder: Path) -> list[Kernel]:
    command = [NVCC, "-cubin", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v"]
    command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-o", str(folder / "kernels.cubin"), str(ROOT / source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        done.stdout + done.stderr,
        re.DOTALL,
    )
    kernels = []
    for mangled, stack, stores, loads, registers, rest in found:
        name = re.findall(r"\d([a-z_]+_kernel)", mangled)[-1]
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(
                name,
                int(stack) + int(stores) + int(loads),
                int(registers),
                int(shared.group(1)) if shared else 0,
            )
        )
    return kernels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_fit(source, architecture, tmp_path):
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout
    if f"compute_{architecture.rstrip('a')}" not in known.split():
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    kernels = compile_kernels(source, architecture, tmp_path)
    text = (ROOT / source).read_text(encoding="utf-8")
    assert len(kernels) >= text.count("__global__")
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        assert kernel.registers <= REGISTERS.get(kernel.name, 64), kernel
        assert kernel.shared <= SHARED, kernel
