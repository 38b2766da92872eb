"""Build lemma-fast: the folder map and the C++/CUDA extension. Metadata is in pyproject.toml.

The extension is one library without Python in it, `lemma_fast/_C.abi3.so`, on PyTorch's stable ABI:
one file serves every Python, and torch from the release in TORCH_TARGET on. All of csrc/*.cpp goes
into it, and csrc/*.cu where nvcc and a CUDA build of torch are there. A file whose name ends in
_avx2 or _avx512 is compiled for those instructions; who calls it asks the processor first.

An install never fails for want of a compiler: it says why in one sentence, leaves that sentence in
`lemma_fast/_C.missing.txt` and goes on without the extension. `python setup.py build_ext --inplace`
does fail. Environment: CXX, CXXFLAGS, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, LEMMA_FAST_CUDA
(1: with CUDA or not at all, 0: without).
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

FOLDERS = {
    "lemma_fast": "lemma_fast",
    "lemma_fast.kernels": "kernels",
    "lemma_fast.training": "training",
}
ROOT = Path(__file__).resolve().parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.cpp"))
CUDA_SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.cu"))
OBJECTS = ROOT / "build" / "csrc"
LIBRARY, MISSING = "_C.abi3.so", "_C.missing.txt"

TORCH_TARGET = "0x020b000000000000"
CXX_FLAGS = ["-O3", "-Wall", "-Wextra", "-Wno-psabi"]
# What the sources rely on comes after the flags of the environment, of which the last one counts.
NEEDED_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-fast-math"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
INSTRUCTIONS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
ARCHITECTURES = "8.0;9.0a;12.0+PTX"


class BuildError(Exception):
    """One sentence that says what is missing or wrong, and what to do."""


class Step(NamedTuple):
    """A command that makes `output`; a compilation notes the headers it read in `output`.d."""

    output: str
    inputs: list[str]
    command: list[str]


def packages() -> list[str]:
    """Name every package below the three folders, so that a new sub-package is never forgotten."""
    names = list(FOLDERS)
    for package, folder in FOLDERS.items():
        names += [f"{package}.{child}" for child in find_packages(folder)]
    return names


def torch_folder() -> tuple[Path, dict[str, Any]]:
    """Return where torch lies and its version module, without the seconds that importing takes."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise BuildError(
            "torch is not installed where lemma-fast is built: install it first, then lemma-fast "
            "with pip's --no-build-isolation"
        )
    folder = Path(found.origin).parent
    return folder, runpy.run_path(str(folder / "version.py"))


def compiler() -> str:
    """Return the C++ compiler that CXX names, or the first usual one that is there."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError(
        f"there is no C++ compiler ({named or 'c++'} is not found): install one, on Debian and "
        "Ubuntu with `sudo apt-get install g++`, and install lemma-fast again"
    )


def nvcc() -> str:
    """Return CUDA's compiler: in CUDA_HOME, on the PATH, or in the usual folder."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    for folder in folders:
        path = shutil.which("nvcc", path=folder)
        if path:
            return path
    raise BuildError("CUDA's compiler nvcc is not there: set CUDA_HOME to CUDA's folder")


def cuda_libraries(compiler: str) -> Path:
    """Return the folder of CUDA's static runtime: beside nvcc, or in the usual place."""
    homes = [Path(compiler).parents[1], Path(os.path.realpath(compiler)).parents[1]]
    for home in [*homes, Path("/usr/local/cuda")]:
        for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
            if (home / name / "libcudart_static.a").is_file():
                return home / name
    raise BuildError(
        f"CUDA's static runtime libcudart_static.a is not beside {compiler}: set CUDA_HOME to the "
        "folder of a whole CUDA toolkit"
    )


def architecture_flags() -> list[str]:
    """Turn TORCH_CUDA_ARCH_LIST, such as "8.0;9.0a;12.0+PTX", into nvcc's flags."""
    flags = []
    names = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    for name in names.replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        if not number[:1].isdigit():
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST names {name!r}: write numbers, such as {ARCHITECTURES!r}"
            )
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def plan(with_cuda: bool) -> list[Step]:
    """Lay out the compilations and, last, the linking."""
    torch, version = torch_folder()
    cxx = shlex.split(compiler())
    flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *NEEDED_FLAGS]
    include = ["-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    info = {"torch": version["__version__"], "flags": shlex.join(flags), "cuda": None}
    link = ["-shared", f"-L{torch / 'lib'}"]
    steps = []
    if with_cuda:
        info["cuda"] = " ".join(flag.rpartition("code=")[2] for flag in architecture_flags())
        cuda = nvcc()
        include.append("-DLEMMA_FAST_CUDA")
        link.append(f"-L{cuda_libraries(cuda)}")
        for source in CUDA_SOURCES:
            output = str(OBJECTS / f"{Path(source).name}.o")
            command = [cuda, *NVCC_FLAGS, f"-ccbin={cxx[0]}", *architecture_flags()]
            command += ["-MD", "-MF", f"{output}.d", "-c", source, "-o", output]
            steps.append(Step(output, [source], command))
    about = f"-DLEMMA_FAST_BUILD_INFO={json.dumps(json.dumps(info))}"
    intel = platform.machine().lower() in ("x86_64", "amd64")
    for source in SOURCES:
        output = str(OBJECTS / f"{Path(source).name}.o")
        level = "_" + Path(source).stem.rpartition("_")[2]
        special = INSTRUCTIONS.get(level, []) if intel else []
        special = [*special, about] if Path(source).stem == "library" else special
        command = [*cxx, *flags, *special, *include, "-MMD", "-MF", f"{output}.d"]
        steps.append(Step(output, [source], [*command, "-c", source, "-o", output]))
    target = str(OBJECTS / LIBRARY)
    # A CUDA build of torch keeps its half in a library that only -ltorch, unused itself, loads.
    link += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"]
    link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"] if with_cuda else []
    objects = [step.output for step in steps]
    return [*steps, Step(target, objects, [*cxx, *objects, *link, "-o", target])]


def run(steps: list[Step]) -> None:
    """Run the steps: what has changed where ninja is there, all of them otherwise."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    ninja = shutil.which("ninja", path=scripts)
    if ninja:
        (OBJECTS / "build.ninja").write_text(ninja_file(steps))
        commands = [[ninja, f"-j{jobs}", "-f", str(OBJECTS / "build.ninja")]]
    else:
        commands = [step.command for step in steps[:-1]]

    def call(command: list[str]) -> tuple[int, str]:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return done.returncode, done.stdout

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(call, commands))
    if not ninja and not any(code for code, _ in results):
        results.append(call(steps[-1].command))
    output = "".join(text for _, text in results)
    log = OBJECTS / "compile.log"
    log.write_text(output)
    if any(code for code, _ in results):
        lines = [line.strip() for line in output.splitlines()]
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
        raise BuildError(f"the compiler failed ({errors[0]}); all it said is in {log}")


def ninja_file(steps: list[Step]) -> str:
    """Write the steps in ninja's language; `deps = gcc` makes it read the lists of headers."""

    def path(name: str) -> str:
        return name.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [f"builddir = {path(str(OBJECTS))}"]
    for number, (output, inputs, command) in enumerate(steps):
        lines += [f"rule step{number}", "  command = " + shlex.join(command).replace("$", "$$")]
        if number < len(steps) - 1:
            lines += ["  deps = gcc", f"  depfile = {path(output)}.d"]
        lines.append(f"build {path(output)}: step{number} {' '.join(map(path, inputs))}")
    return "\n".join(lines) + "\n"


def make_library() -> str:
    """Build the library in the folder of objects; return what is to be said about it, if any."""
    wish = os.environ.get("LEMMA_FAST_CUDA", "auto")
    cuda = wish == "1" or (wish != "0" and torch_folder()[1].get("cuda") is not None)
    if not (cuda and CUDA_SOURCES):
        run(plan(with_cuda=False))
        return ""
    try:
        run(plan(with_cuda=True))
    except BuildError as error:
        if wish == "1":
            raise
        run(plan(with_cuda=False))
        return f"built for the CPU alone: {error}"
    return ""


class BuildLibrary(build_ext):
    """Make the library and put it where setuptools would, or say why there is none."""

    def run(self) -> None:
        asked = self.inplace and not self.editable_mode
        base = ROOT if self.inplace else Path(self.build_lib)
        folder = base / "lemma_fast"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            remark = make_library()
        except BuildError as error:
            if asked or os.environ.get("LEMMA_FAST_CUDA") == "1":
                raise SystemExit(f"lemma-fast: {error}") from None
            (folder / LIBRARY).unlink(missing_ok=True)
            (folder / MISSING).write_text(f"{error}\n")
            sys.stderr.write(f"lemma-fast is installed without its C++ extension: {error}\n")
            return
        if remark:
            sys.stderr.write(f"lemma-fast: {remark}\n")
        # A process may have the old library open: it is replaced, never written into.
        shutil.copy(OBJECTS / LIBRARY, folder / f"{LIBRARY}.new")
        (folder / f"{LIBRARY}.new").replace(folder / LIBRARY)
        (folder / MISSING).unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_name(LIBRARY))


if __name__ == "__main__":
    extension = Extension("lemma_fast._C", [*SOURCES, *CUDA_SOURCES], py_limited_api=True)
    setup(
        packages=packages(),
        package_dir=FOLDERS,
        ext_modules=[extension] if SOURCES else [],
        cmdclass={"build_ext": BuildLibrary},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if SOURCES else {},
    )
