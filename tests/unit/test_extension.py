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

ROOT = Path(__file__).resolve().parents[2]


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


def test_files_for_newer_processors_are_compiled_for_them(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", GOOD))
    monkeypatch.setattr(build, "SOURCES", ["csrc/adafm.cpp", "csrc/adafm_avx2.cpp"])
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    plain, newer, link = build.plan(with_cuda=False)
    assert "-mavx2" not in plain.command
    assert "-mavx2" in newer.command
    assert link.inputs == [plain.output, newer.output]
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert "-mavx2" not in build.plan(with_cuda=False)[1].command


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


def test_an_install_without_a_compiler_goes_on_and_a_build_does_not(tmp_path):
    """The commands themselves, on a copy with one source file."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.cpp").write_text("int one();\n")
    for folder in ("lemma_fast", "kernels", "training"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    environment = {**os.environ, "CXX": "no-such-compiler", "LEMMA_FAST_CUDA": "0"}

    def run(*command):
        return subprocess.run(
            [sys.executable, "setup.py", "-q", *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    ran = run("build_ext", "--inplace")
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith("lemma-fast: there is no C++ compiler")
    ran = run("build", "--build-lib", "out")
    assert ran.returncode == 0, ran.stderr
    assert "installed without its C++ extension" in ran.stderr
    note = tmp_path / "out" / "lemma_fast" / "_C.missing.txt"
    assert note.read_text().startswith("there is no C++ compiler")


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
