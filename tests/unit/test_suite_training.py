"""The suite's training run, two steps of it, with fonts and words from a bundle."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open
from suite import build, bundle, records, training
from suite.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "lemma_fast" / "weights" / "small.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A bundle of one face, three words and a wheel with a module in it."""
    matplotlib = pytest.importorskip("matplotlib")
    made = tmp_path / "bundle"
    fonts = made / "fonts" / "fonts-dejavu-core"
    fonts.mkdir(parents=True)
    face = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    (fonts / face.name).write_bytes(face.read_bytes())
    (made / "words.txt").write_text("\n".join(["carried", "letters", "words", "harbor", "garden"]))
    (made / "wheels").mkdir()
    with zipfile.ZipFile(made / "wheels" / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "WHERE = __file__\n")
    (made / "contents.json").write_text("{}")
    return made


@pytest.mark.slow
def test_training_goes_on_from_the_packaged_weights(tmp_path, folder):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "benchmarks/gpu_suite.py",
        "--train",
        "500",
        "--dry-run",
        "--split",
        "15",
    ]
    ran = subprocess.run(
        [*command, "--out", out, "--bundle", folder], cwd=ROOT, capture_output=True, text=True
    )
    log = (out / "train.log").read_text()
    assert ran.returncode == 0, log + ran.stderr
    found = {r["name"]: r for r in records.read(out / records.NAME) if "name" in r}
    assert found["data"]["crops"] == 16
    assert found["train"]["status"] == "done"
    files = {"best.safetensors", "last.ckpt.00", "last.safetensors", "metrics.csv", "settings.json"}
    assert files <= set(found["train"]["files"])
    assert max(path.stat().st_size for path in (out / "lemma").iterdir()) <= 15 << 20
    settings = json.loads((out / "lemma" / "settings.json").read_text())
    assert settings["start"]["weights"] == str(WEIGHTS)
    with (
        safe_open(out / "lemma" / "last.safetensors", "pt") as taught,
        safe_open(WEIGHTS, "pt") as packaged,
    ):
        name = "stem.weight"
        before, after = packaged.get_tensor(name).float(), taught.get_tensor(name).float()
    assert 0 < (after - before).norm() < 0.1 * before.norm()


def test_large_files_are_left_in_pieces(tmp_path):
    (tmp_path / "large").write_bytes(b"abcdefgh")
    (tmp_path / "small").write_bytes(b"abc")
    training.split(tmp_path, 3)
    pieces = sorted(path.name for path in tmp_path.iterdir())
    assert pieces == ["large.00", "large.01", "large.02", "small"]
    assert b"".join((tmp_path / name).read_bytes() for name in pieces[:3]) == b"abcdefgh"


def test_wheels_are_unpacked_where_steps_find_them(tmp_path, folder):
    command = [sys.executable, "benchmarks/gpu_suite.py", "--bundle", folder, "--run"]
    code = "import carried; print(carried.WHERE)"
    ran = subprocess.run([*command, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip().endswith("site/carried.py"), ran.stderr


def test_a_library_is_taken_only_with_its_own_sources(folder):
    (folder / bundle.LIBRARY).write_bytes(b"")
    assert Bundle(folder).environment() == {}
    contents = {"library": {"sources": bundle.sources()}}
    (folder / "contents.json").write_text(json.dumps(contents))
    assert Bundle(folder).environment() == {bundle.SOURCES: str(folder / bundle.LIBRARY)}
    contents["library"]["sources"] = "of another commit"
    (folder / "contents.json").write_text(json.dumps(contents))
    assert Bundle(folder).environment() == {}


def test_a_library_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "new").write_bytes(b"new")
    target = tmp_path / "library"
    target.write_bytes(b"old")
    with target.open("rb") as opened:
        build.place(tmp_path / "new", target)
        assert opened.read() == b"old"
    assert target.read_bytes() == b"new"


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no bundle"):
        Bundle(tmp_path)
    assert Bundle().unpack(tmp_path / "site") == []
    assert Bundle().words() == "builtin"
