"""The wheel holds what the tree holds and works without it; folders guard their names."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "lemma_fast": "lemma_fast",
    "kernels": "lemma_fast/kernels",
    "training": "lemma_fast/training",
}
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.so", "_C.missing.txt", ".*")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what the build reads: built in place, an old build/ would leak into it."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=NOT_SHIPPED)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(out)]
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *flags, str(tree)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_every_file_of_the_three_folders_and_nothing_else(tree, wheel):
    there = set()
    for folder, package in FOLDERS.items():
        for path in (tree / folder).rglob("*"):
            # The build leaves its own notes in the copy.
            if path.is_file() and "__pycache__" not in path.parts:
                there.add(f"{package}/{path.relative_to(tree / folder).as_posix()}")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == there
    assert "lemma_fast/py.typed" in packed


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = {Path(n).name: n for n in archive.namelist() if ".dist-info/" in n}
        metadata = Parser().parsestr(archive.read(info["METADATA"]).decode())
        scripts = archive.read(info["entry_points.txt"]).decode()
    assert metadata["Name"] == "lemma-fast"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"LICENSE", "NOTICE"} <= info.keys()
    assert "lemma-fast = lemma_fast.cli:main" in scripts
    core = {
        line.partition(">")[0]
        for line in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in line
    }
    assert core == {
        "torch",
        "numpy",
        "pillow",
        "safetensors",
        "huggingface_hub",
        "typer",
        "rich",
    }


def test_unpacked_wheel_imports_without_the_tree(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import lemma_fast, lemma_fast.kernels, lemma_fast.training as training\n"
        "print(lemma_fast.__file__, lemma_fast.kernels.__file__, training.__file__, sep='\\n')"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [
        str(tmp_path / package / "__init__.py") for package in FOLDERS.values()
    ]


@pytest.mark.parametrize("folder", ["kernels", "training"])
def test_folder_refuses_to_be_a_second_copy(folder, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ImportError, match=f"this folder is lemma_fast.{folder}"):
        importlib.import_module(folder)
    assert importlib.import_module(f"lemma_fast.{folder}").__name__ == f"lemma_fast.{folder}"


def _names(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def test_no_font_is_both_trained_on_and_reserved_for_testing():
    train = _names(ROOT / "training" / "fonts" / "train.txt")
    test = _names(ROOT / "training" / "fonts" / "test.txt")
    assert len({*train, *test}) == len(train) + len(test)
    # Relatives of reserved faces: of Lato, Cabin Sketch and Gentium Basic.
    assert not {"fonts-crosextra-carlito", "fonts-cabin", "fonts-sil-gentium"} & set(train)
    fonts = {name for name in _names(ROOT / "tests" / "apt-packages.txt") if "fonts-" in name}
    assert fonts <= {*train, *test}
    assert fonts & set(train)
    assert fonts & set(test)
