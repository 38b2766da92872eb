"""`make matrix`: which Pythons are tried, in what, and what its table and exit code say."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# A source distribution may be tested where it is not.
GIT = shutil.which("git")
MAKEFILE = """\
demo:
\t@echo "$(PYTHON) $$(cat committed) $(EXTRA)"
test:
\t@echo '== 3 passed, 1 skipped in 0.12s =='
\t@echo '====== 2 failed, 9 passed in 4.56s (0:00:04) ======'
\t@exit $(CODE)
"""


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("matrix", ROOT / ".ci" / "matrix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pythons(monkeypatch, tmp_path):
    """Interpreters of pyenv that answer as they are told; no other is on the PATH."""

    def install(**answers):
        for name, answer in answers.items():
            path = tmp_path / "pyenv" / "versions" / name / "bin" / "python3"
            path.parent.mkdir(parents=True)
            path.write_text(f"#!/bin/sh\n{answer.replace('{}', str(path))}\n")
            path.chmod(0o755)
        return tmp_path / "pyenv" / "versions"

    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    return install


@pytest.fixture
def tree(monkeypatch, tmp_path, pythons):
    """A repository with a file that was changed after its last commit, and two Pythons."""
    if GIT is None:
        pytest.skip("needs git")
    # The tests may have been started by `make -C`.
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    root = tmp_path / "tree"
    root.mkdir()
    (root / "Makefile").write_text(MAKEFILE)
    (root / "pyproject.toml").write_text(
        '"Programming Language :: Python :: 3.11"\n"Programming Language :: Python :: 3.12"\n'
    )
    (root / "committed").write_text("as committed")
    git = [GIT, "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "Begin"]):
        subprocess.run([*git, *command], check=True)
    (root / "committed").write_text("changed since")
    pythons(a="echo 3 11 2 {}", b="echo 3 12 9 {}")
    return root


def test_the_releases_are_those_of_the_metadata(matrix):
    releases = matrix.supported((ROOT / "pyproject.toml").read_text("utf-8"))
    assert releases == [(3, 10), (3, 11), (3, 12), (3, 13)]


def test_the_newest_of_each_release_is_found(matrix, pythons):
    folder = pythons(
        a="echo 3 9 20 {}", b="echo 3 12 9 {}", c="echo 3 12 10 {}", d="echo 3 11 2 {}", e="exit 1"
    )
    found = matrix.find([(3, 10), (3, 11), (3, 12)], [])
    assert [python.name for python in found] == ["3.11.2", "3.12.10"]
    assert found[1].path == str(folder / "c" / "bin" / "python3")
    named = matrix.find([(3, 12)], ["3.12", str(folder / "a" / "bin" / "python3")])
    assert [python.name for python in named] == ["3.12.10", "3.9.20"]
    for absent in ("3.10", str(folder / "e" / "bin" / "python3"), "/absent/python3"):
        with pytest.raises(LookupError, match=absent):
            matrix.find([(3, 12)], [absent])


def test_a_clean_clone_is_tried_with_each_and_removed(matrix, tree, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CODE", "0")
    monkeypatch.setenv("EXTRA", "variable")
    assert matrix.main(["test"], tree) == 0
    head, _, *rows = capfd.readouterr().out.splitlines()
    assert head == "| Python | PyTorch | NumPy | Triton | mypy | make demo | make test |"
    none = "| none | none | none | none | 0 s |"
    assert rows == [f"| {name} {none} 2 failed, 9 passed, 0 s |" for name in ("3.11.2", "3.12.9")]
    (log,) = tree.glob("build/matrix/*/3.12.9-demo.log")
    assert log.read_text() == f"{tmp_path}/pyenv/versions/b/bin/python3 as committed variable\n"
    assert not [*tmp_path.glob("lemma-fast-*")]


def test_a_failure_fails_and_keeps_the_clone(matrix, tree, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CODE", "3")
    assert matrix.main(["test", "3.11"], tree) == 1
    said = capfd.readouterr()
    assert said.out.splitlines()[-1].endswith("| **failed (2)**, 2 failed, 9 passed, 0 s |")
    (clone,) = tmp_path.glob("lemma-fast-3.11.2-*/lemma-fast")
    assert str(clone) in said.err
    assert matrix.main(["absent", "3.11"], tree) == 1
    assert "**failed (2)**, 0 s |" in capfd.readouterr().out
    assert matrix.main(["test", "3.13"], tree) == 2


def test_a_pin_serves_every_python_and_torch():
    """A build of torch names its own CUDA packages, Triton and setuptools."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    names = {line.partition("=")[0].rstrip("<") for line in lines if not line.startswith("#")}
    assert {"numpy", "mypy", "pytest", "ninja", "wheel", "mkdocs-material", "onnx"} <= names
    assert not [name for name in names if name == "torch" or name.startswith(("nvidia-", "cuda-"))]
    limits = [line.partition(" ")[0] for line in lines if "<=" in line.partition(" ")[0]]
    assert {limit.partition("<=")[0] for limit in limits} == {"setuptools", "triton"}
