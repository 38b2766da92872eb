"""How the C++ extension is built, and what is said where it cannot be: no compiler is run here."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lemma_fast.cli import doctor
from lemma_fast.ops import extension, fused

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def build(monkeypatch, tmp_path):
    """setup.py as a module, with its objects and its sources in a folder of the test's own."""
    spec = importlib.util.spec_from_file_location("setup_of_lemma_fast", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.cpp").write_text("int one();\n")
    (tmp_path / "csrc" / "kernel.cu").write_text("int two();\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "OBJECTS", tmp_path / "build" / "csrc")
    monkeypatch.setattr(module, "SOURCES", ["csrc/library.cpp"])
    monkeypatch.setattr(module, "CUDA_SOURCES", ["csrc/kernel.cu"])
    for name in ("CXX", "CXXFLAGS", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LEMMA_FAST_CUDA", "0")
    return module


def script(path, text):
    path.write_text(f"#!{sys.executable}\nimport sys\n{text}\n")
    path.chmod(0o755)
    return str(path)


# A compiler that makes the files it is told to, each with the command that made it.
GOOD = """
if "-MF" in sys.argv:
    open(sys.argv[sys.argv.index("-MF") + 1], "w").write(sys.argv[-1] + ":\\n")
open(sys.argv[-1], "w").write(" ".join(sys.argv))
"""
BAD = "print('csrc/library.cpp:1:1: error: no such thing'); print('a' * 9000); sys.exit(1)"


def test_architectures_are_those_asked_for(build, monkeypatch):
    assert build.architecture_flags() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 10.0+PTX")
    assert build.architecture_flags()[1:] == [
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build.BuildError, match="'Hopper'"):
        build.architecture_flags()


def test_kernels_are_compiled_for_every_level(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", GOOD))
    monkeypatch.setattr(build, "SOURCES", ["csrc/gru/binding.cpp", "csrc/gru/layer.simd.cpp"])
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    *steps, link = build.plan(with_cuda=False)
    flags = [
        [flag for flag in step.command if flag.startswith(("-mavx", "-DSIMD"))] for step in steps
    ]
    assert flags[0] == []
    assert flags[1] == ["-DSIMD_LEVEL=baseline"]
    assert {"-mavx2", "-DSIMD_LEVEL=avx2"} == set(flags[2])
    assert {"-mavx512f", "-DSIMD_LEVEL=avx512"} <= set(flags[3])
    assert link.inputs == [step.output for step in steps]
    assert len(set(link.inputs)) == 4
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    *steps, _ = build.plan(with_cuda=False)
    assert len(steps) == 2
    assert not any(flag.startswith("-mavx") for step in steps for flag in step.command)


def test_sources_of_every_folder_are_compiled():
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.c*")}
    spec = importlib.util.spec_from_file_location("setup_of_lemma_fast", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    headers = {name for name in there if name.endswith(".cuh")}
    assert there - headers == {*module.SOURCES, *module.CUDA_SOURCES}
    assert any("/" in name.removeprefix("csrc/") for name in module.CUDA_SOURCES)


@pytest.mark.parametrize(
    ("variable", "flags"),
    [
        # What conda's compilers set, and others that would change what is built.
        ("CXXFLAGS", "-fvisibility-inlines-hidden -std=c++17 -O2"),
        ("CXXFLAGS", "-std=gnu++14 -fno-PIC -fvisibility=default"),
        ("CXXFLAGS", "-ffast-math"),
        ("CXXFLAGS", "-Ofast -ffinite-math-only"),
        ("CXX", "c++ -std=c++11"),
    ],
)
def test_flags_of_the_environment_take_nothing_that_is_needed(
    build, monkeypatch, tmp_path, variable, flags
):
    if not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv(variable, flags)
    command = build.plan(with_cuda=False)[0].command
    asked = flags.split()[-1]
    assert asked in command
    source = tmp_path / "csrc" / "library.cpp"
    source.write_text(
        "static_assert(__cplusplus >= 202002L);\n"
        "#if defined(__FAST_MATH__) || __FINITE_MATH_ONLY__ || !defined(__PIC__)\n"
        "#error flags\n"
        "#endif\n"
        "int one() { return 1; }\n"
    )
    monkeypatch.chdir(tmp_path)
    command[command.index("-MF") + 1], command[-1] = str(tmp_path / "d"), str(tmp_path / "o")
    subprocess.run(command, check=True)


@pytest.mark.parametrize("ninja", [True, False])
def test_a_working_compiler_makes_the_library(build, monkeypatch, tmp_path, ninja):
    if not ninja:
        which = {"ninja": None}
        monkeypatch.setattr(build.shutil, "which", lambda name, path=None: which.get(name, name))
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", GOOD))
    assert build.make_library() == ""
    assert "-shared" in (build.OBJECTS / build.LIBRARY).read_text()
    assert "TORCH_TARGET_VERSION" in (build.OBJECTS / "library.cpp.o").read_text()


def test_a_failing_compiler_is_one_sentence(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", BAD))
    with pytest.raises(build.BuildError) as failure:
        build.make_library()
    sentence = str(failure.value)
    assert "error: no such thing" in sentence
    assert len(sentence) < 500
    assert "a" * 9000 in (build.OBJECTS / "compile.log").read_text()


def test_no_compiler_no_nvcc_and_no_torch_say_what_to_do(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler.*apt-get install g\\+\\+"):
        build.make_library()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match="set CUDA_HOME"):
        build.nvcc()
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="no-build-isolation"):
        build.make_library()


def test_cuda_is_left_out_aloud_or_demanded(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", GOOD))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    release = (tmp_path, {"__version__": "9", "cuda": "13"})
    monkeypatch.setattr(build, "torch_folder", lambda: release)
    monkeypatch.setenv("LEMMA_FAST_CUDA", "auto")
    assert "for the CPU alone" in build.make_library()
    monkeypatch.setenv("LEMMA_FAST_CUDA", "1")
    with pytest.raises(build.BuildError, match="nvcc"):
        build.make_library()
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "nvcc", GOOD)
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcudart_static.a").touch()
    assert build.make_library() == ""
    assert "-DLEMMA_FAST_CUDA" in (build.OBJECTS / "library.cpp.o").read_text()
    assert "code=sm_90a" in (build.OBJECTS / "kernel.cu.o").read_text()


def test_torchs_own_cuda_runtime_is_linked_where_the_toolkit_has_none(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "Path", lambda path: Path(str(path).replace("/usr/local", "/none")))
    torch = tmp_path / "site-packages" / "torch"
    monkeypatch.setattr(build, "torch_folder", lambda: (torch, {"cuda": "13.0"}))
    nvcc = str(tmp_path / "toolkit" / "bin" / "nvcc")
    runtimes = tmp_path / "site-packages" / "nvidia" / "cu13" / "lib"
    runtimes.mkdir(parents=True)
    (runtimes / "libcudart.so.12").touch()
    with pytest.raises(build.BuildError, match="libcudart.so.13.*set CUDA_HOME"):
        build.cuda_runtime(nvcc)
    (runtimes / "libcudart.so.13").touch()
    assert build.cuda_runtime(nvcc)[:2] == [f"-L{runtimes}", "-l:libcudart.so.13"]
    static = tmp_path / "toolkit" / "lib64" / "libcudart_static.a"
    static.parent.mkdir(parents=True)
    static.touch()
    assert build.cuda_runtime(nvcc)[:2] == [f"-L{static.parent}", "-lcudart_static"]


@pytest.fixture
def command(tmp_path):
    """The command `python setup.py`, on a copy of the project with one source file."""
    copy = tmp_path / "copy"
    for folder in ("csrc", "lemma_fast", "kernels", "training", "modules"):
        (copy / folder).mkdir(parents=True)
    (copy / "csrc" / "library.cpp").write_text("int one();\n")
    for folder in ("lemma_fast", "kernels", "training"):
        (copy / folder / "__init__.py").touch()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())

    def run(*arguments, cxx, setuptools=None):
        if setuptools is not None:
            (copy / "modules" / "setuptools.py").write_text(setuptools)
        environment = {"CXX": cxx, "LEMMA_FAST_CUDA": "0", "PYTHONPATH": str(copy / "modules")}
        return subprocess.run(
            [sys.executable, "setup.py", *arguments],
            cwd=copy,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )

    return run, copy


def test_an_install_without_a_compiler_goes_on_and_a_build_does_not(command):
    run, copy = command
    for arguments in (["-q", "build_ext", "--inplace"], ["library"]):
        ran = run(*arguments, cxx="no-such-compiler")
        assert ran.returncode == 1
        assert ran.stderr.splitlines()[-1].startswith("lemma-fast: there is no C++ compiler")
    ran = run("-q", "build", "--build-lib", "out", cxx="no-such-compiler")
    assert ran.returncode == 0, ran.stderr
    assert "installed without its C++ extension" in ran.stderr
    note = copy / "out" / "lemma_fast" / "_C.missing.txt"
    assert note.read_text().startswith("there is no C++ compiler")


def test_the_library_is_built_without_setuptools(command, tmp_path):
    run, copy = command
    (copy / "lemma_fast" / "_C.missing.txt").touch()
    cxx = script(tmp_path / "cxx", GOOD)
    ran = run("library", cxx=cxx, setuptools="raise ImportError('setuptools is hidden')")
    assert ran.returncode == 0, ran.stderr
    assert [path.name for path in (copy / "lemma_fast").glob("_C.*")] == ["_C.abi3.so"]
    ran = run("build_ext", "--inplace", cxx=cxx)
    assert "setuptools is hidden" in ran.stderr


def test_an_old_setuptools_is_named(command):
    run, _ = command
    ran = run("build_ext", "--inplace", cxx="c++", setuptools="__version__ = '65.5.0.post1'")
    assert ran.returncode == 1
    assert "65.5.0.post1, an installation needs 77 or later" in ran.stderr.splitlines()[-1]


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A package folder without a library."""
    monkeypatch.setattr(extension, "_FOLDER", tmp_path)
    for cached in (extension.load, extension.library):
        cached.cache_clear()
    yield tmp_path
    for cached in (extension.load, extension.library):
        cached.cache_clear()


def test_the_reason_of_the_build_is_the_message_at_run_time(elsewhere, monkeypatch):
    monkeypatch.delitem(sys.modules, "lemma_fast.ops.adafm", raising=False)
    monkeypatch.delattr("lemma_fast.ops.adafm", raising=False)
    with pytest.raises(ImportError, match="is not built.*no-build-isolation.*ops.reference"):
        extension.load()
    (elsewhere / "_C.missing.txt").write_text("there is no C++ compiler\n")
    with pytest.raises(ImportError, match="was not built: there is no C\\+\\+ compiler"):
        fused.adafm(torch.zeros(1), torch.zeros(1), None, False)
    assert extension.missing() in dict(line[:2] for line in doctor.lines())["extension"]


def test_a_library_that_does_not_load_is_reported(elsewhere):
    (elsewhere / "_C.abi3.so").write_bytes(b"nothing")
    with pytest.raises(ImportError, match="does not load with torch"):
        extension.load()
    finding, in_order = doctor._extension()
    assert "does not load" in finding
    assert not in_order


def test_an_older_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert "needs torch 2.11 or later, this is 2.9.1" in extension.missing()
