"""Build lemma-fast: the folder map and the C++/CUDA extension. Metadata is in pyproject.toml.

The extension is one library without Python in it, `lemma_fast/_C.abi3.so`, on PyTorch's stable ABI:
one file serves every Python, and torch from the release in TORCH_TARGET on. Every .cpp below csrc/
goes into it, and every .cu where nvcc and a CUDA build of torch are there. A file named *.simd.cpp
is compiled once for each of LEVELS; csrc/simd/dispatch.h chooses one at run time.

An install never fails for want of a compiler: it says why in one sentence, leaves that sentence in
`lemma_fast/_C.missing.txt` and goes on without the extension. `python setup.py library` does fail;
it builds the extension alone, into lemma_fast/, and needs no setuptools, as does `build_in_place`
for who loads this file with `runpy.run_path("setup.py")`. Environment: CXX, CXXFLAGS, CUDA_HOME,
TORCH_CUDA_ARCH_LIST, MAX_JOBS, LEMMA_FAST_CUDA (1: with CUDA or not at all, 0: without).
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

FOLDERS = {
    "lemma_fast": "lemma_fast",
    "lemma_fast.kernels": "kernels",
    "lemma_fast.training": "training",
}
ROOT = Path(__file__).resolve().parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.cpp"))
CUDA_SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.cu"))
OBJECTS = ROOT / "build" / "csrc"
LIBRARY, MISSING = "_C.abi3.so", "_C.missing.txt"

TORCH_TARGET = "0x020b000000000000"
CXX_FLAGS = ["-O3", "-Wall", "-Wextra", "-Wno-psabi"]
# What the sources rely on comes after the flags of the environment, of which the last one counts.
NEEDED_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-fast-math"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
}
ARCHITECTURES = "8.0;9.0a;12.0+PTX"
# The first that knows pyproject.toml's license expression; pyproject.toml asks for it too.
OLDEST_SETUPTOOLS = 77


class BuildError(Exception):
    """One sentence that says what is missing or wrong, and what to do."""


class Step(NamedTuple):
    """A command that makes `output`; a compilation notes the headers it read in `output`.d."""

    output: str
    inputs: list[str]
    command: list[str]


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


def cuda_runtime(compiler: str) -> list[str]:
    """Return what links CUDA's runtime: the static one of nvcc's toolkit, or else torch's own."""
    homes = [Path(compiler).parents[1], Path(os.path.realpath(compiler)).parents[1]]
    for home in [*homes, Path("/usr/local/cuda")]:
        for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
            if (home / name / "libcudart_static.a").is_file():
                return [f"-L{home / name}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    torch, version = torch_folder()
    shared = f"libcudart.so.{str(version.get('cuda')).partition('.')[0]}"
    for folder in [torch / "lib", *sorted(torch.parent.glob("nvidia/*/lib"))]:
        if (folder / shared).is_file():
            # Torch loads it before ours. With "defs" a function it lacks is an error of the build.
            return [f"-L{folder}", f"-l:{shared}", "-Wl,-z,defs"]
    raise BuildError(
        f"CUDA's runtime is neither beside {compiler} (libcudart_static.a) nor in torch's folders "
        f"({shared}): set CUDA_HOME to the folder of a whole CUDA toolkit"
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


def object_file(source: str, level: str = "") -> str:
    """Name what is compiled from a source, for a level of instructions where it has some."""
    name = Path(source).relative_to("csrc").as_posix().replace("/", "_")
    return str(OBJECTS / ".".join(filter(None, [name, level, "o"])))


def plan(with_cuda: bool) -> list[Step]:
    """Lay out the compilations and, last, the linking."""
    torch, version = torch_folder()
    cxx = shlex.split(compiler())
    flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *NEEDED_FLAGS]
    include = [
        "-Icsrc",
        "-isystem",
        str(torch / "include"),
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
    ]
    info = {"torch": version["__version__"], "flags": shlex.join(flags), "cuda": None}
    link = ["-shared", f"-L{torch / 'lib'}"]
    steps, runtime = [], []
    if with_cuda:
        info["cuda"] = " ".join(flag.rpartition("code=")[2] for flag in architecture_flags())
        cuda = nvcc()
        runtime = cuda_runtime(cuda)
        include.append("-DLEMMA_FAST_CUDA")
        for source in CUDA_SOURCES:
            output = object_file(source)
            command = [cuda, *NVCC_FLAGS, "-Icsrc", f"-ccbin={cxx[0]}", *architecture_flags()]
            command += ["-MD", "-MF", f"{output}.d", "-c", source, "-o", output]
            steps.append(Step(output, [source], command))
    about = f"-DLEMMA_FAST_BUILD_INFO={json.dumps(json.dumps(info))}"
    intel = platform.machine().lower() in ("x86_64", "amd64")
    for source in SOURCES:
        levels = list(LEVELS if intel else ["baseline"]) if source.endswith(".simd.cpp") else [""]
        for level in levels:
            output = object_file(source, level)
            special = [*LEVELS[level], f"-DSIMD_LEVEL={level}"] if level else []
            special = [*special, about] if Path(source).stem == "library" else special
            command = [*cxx, *flags, *special, *include, "-MMD", "-MF", f"{output}.d"]
            steps.append(Step(output, [source], [*command, "-c", source, "-o", output]))
    target = str(OBJECTS / LIBRARY)
    # A CUDA build of torch keeps its half in a library that only -ltorch, unused itself, loads.
    link += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"]
    link += runtime
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


def build_into(folder: Path) -> None:
    """Build the library into a folder of the package, and say what is to be said about it."""
    remark = make_library()
    if remark:
        sys.stderr.write(f"lemma-fast: {remark}\n")
    # A process may have the old library open: it is replaced, never written into.
    shutil.copy(OBJECTS / LIBRARY, folder / f"{LIBRARY}.new")
    (folder / f"{LIBRARY}.new").replace(folder / LIBRARY)
    (folder / MISSING).unlink(missing_ok=True)


def build_in_place() -> None:
    """Build the library into lemma_fast/; needs no setuptools. Raises BuildError."""
    build_into(ROOT / "lemma_fast")


def run_setuptools() -> None:
    """Give setuptools the folder map, and a build_ext that makes the library or says why not."""
    import setuptools

    if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"lemma-fast: setuptools is {setuptools.__version__}, an installation needs "
            f"{OLDEST_SETUPTOOLS} or later: run `pip install --upgrade setuptools` (the C++ "
            "extension alone needs none: `python setup.py library`)"
        )
    from setuptools.command.build_ext import build_ext

    class BuildLibrary(build_ext):
        def run(self) -> None:
            asked = self.inplace and not self.editable_mode
            base = ROOT if self.inplace else Path(self.build_lib)
            folder = base / "lemma_fast"
            folder.mkdir(parents=True, exist_ok=True)
            try:
                build_into(folder)
            except BuildError as error:
                if asked or os.environ.get("LEMMA_FAST_CUDA") == "1":
                    raise SystemExit(f"lemma-fast: {error}") from None
                (folder / LIBRARY).unlink(missing_ok=True)
                (folder / MISSING).write_text(f"{error}\n")
                sys.stderr.write(f"lemma-fast is installed without its C++ extension: {error}\n")

        def get_ext_filename(self, fullname: str) -> str:
            return str(Path(*fullname.split(".")).with_name(LIBRARY))

    # Every package below the three folders, so that a new sub-package is never forgotten.
    packages = list(FOLDERS)
    for package, folder in FOLDERS.items():
        packages += [f"{package}.{child}" for child in setuptools.find_packages(folder)]
    sources = [*SOURCES, *CUDA_SOURCES]
    extension = setuptools.Extension("lemma_fast._C", sources, py_limited_api=True)
    setuptools.setup(
        packages=packages,
        package_dir=FOLDERS,
        ext_modules=[extension] if SOURCES else [],
        cmdclass={"build_ext": BuildLibrary},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if SOURCES else {},
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["library"]:
        try:
            build_in_place()
        except BuildError as error:
            raise SystemExit(f"lemma-fast: {error}") from None
    else:
        run_setuptools()
