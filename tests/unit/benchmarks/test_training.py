"""The suite's training run, two steps of it, with fonts and words from a bundle."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import gpu_bundle
import pytest
from safetensors import safe_open
from suite import build, bundle, records, tools, training
from suite.bundle import Bundle

from lemma_fast.training.synthesis.faces import packages

ROOT = Path(__file__).resolve().parents[3]
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


def test_the_digest_of_the_sources_covers_every_folder(tmp_path, monkeypatch):
    deep = tmp_path / "csrc" / "adafm" / "cuda" / "inference.cu"
    deep.parent.mkdir(parents=True)
    deep.write_text("one")
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    before = bundle.sources()
    deep.write_text("another")
    assert bundle.sources() != before


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


def test_faces_of_a_bundle_are_for_training_alone():
    assert set(gpu_bundle.FONTS) <= set(packages("train"))
    assert not set(gpu_bundle.FONTS) & set(packages("test"))


def test_a_bundle_names_the_terms_of_its_fonts(tmp_path):
    source = tmp_path / "usr/share/doc/fonts-a/copyright"
    source.parent.mkdir(parents=True)
    source.write_text("License: OFL-1.1\n  text\nLicense: GPL-2+\nLicense: OFL-1.1\n")
    target = tmp_path / "copyright"
    assert gpu_bundle.licence(tmp_path, "fonts-a", target) == ["GPL-2+", "OFL-1.1"]
    assert target.read_text() == source.read_text()


def test_a_bundle_that_is_too_large_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "words.txt").write_bytes(bytes(2 << 20))
    contents = {"wheels": ["a.whl"], "fonts": [], "words": "some"}
    assert gpu_bundle.said(tmp_path, contents) == 0
    monkeypatch.setattr(gpu_bundle, "MOST", 1)
    assert gpu_bundle.said(tmp_path, contents) == 1
    assert "2.0 MiB of at most 1" in capsys.readouterr().out


def test_what_sanitizers_and_ncu_say_is_read():
    assert tools.errors("========= ERROR SUMMARY: 3 errors\n") == 3
    raced = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    assert tools.errors(raced) == 2
    assert tools.errors("killed") is None
    said = (
        "==PROF== Connected\n"
        '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","1","_bigru","Duration","us","12.5"\n'
        '"0","1","_bigru","Registers Per Thread","register/thread","70"\n'
        '"1","1","fuse_kernel","Duration","us","9"\n'
        "called adafm\n"
    )
    first, second = tools.counters(said)
    assert first["kernel"] == "_bigru"
    assert first["Duration"] == "12.5 us"
    assert first["Registers Per Thread"] == "70 register/thread"
    assert second == {"kernel": "fuse_kernel", "Duration": "9 us"}
    assert tools.counters("nothing") == []
