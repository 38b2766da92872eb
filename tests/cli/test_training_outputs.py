"""What `train` and `evaluate` write, leave out, and say where memory or a process is lost."""

import json
import os
import signal

import pytest
import torch
from PIL import Image
from tiny_sets import claiming, textzoom_entries, write_lmdb
from tiny_training import stage_of, write_config, write_set
from torch.utils.data import get_worker_info

from lemma_fast import LEMMA, checkpoint
from lemma_fast.training.data.batches import EncodedCrops
from lemma_fast.training.data.lmdb import RecordError
from lemma_fast.training.evaluation import evaluate
from lemma_fast.training.loop.fit import Run

pytestmark = pytest.mark.usefixtures("one_thread")

_FILES = ("evaluation.json", "evaluation.md", "crops.png", "lengths.png")
_ASKED = ("--model", "bicubic", "--recognizer", "")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def crops(tmp_path):
    return write_set(tmp_path / "crops.lmdb", 3)


def damaged(root, count, broken):
    entries = textzoom_entries(count)
    for n in broken:
        entries[f"image_hr-{n:09d}"] = claiming(30000, 30000) if n % 2 else b"no picture"
    return write_lmdb(root, entries)


def test_evaluate_names_and_counts_what_it_leaves_out(run, tmp_path):
    root, out = damaged(tmp_path / "set.lmdb", 6, (2, 5)), tmp_path / "out"
    ran = run("evaluate", root, *_ASKED, "-o", out)
    assert ran.code == 1
    shown = " ".join(ran.out.decode().split())
    assert "2 damaged records left out (set.lmdb#000000002, set.lmdb#000000005)." in shown
    content = json.loads((out / "evaluation.json").read_text())
    assert content["skipped"] == {"set": 2}
    assert [record["id"] for record in content["left_out"]["set"]] == [
        f"{root}#{n:09d}" for n in (2, 5)
    ]
    written = (out / "evaluation.md").read_text()
    for record in content["left_out"]["set"]:
        line = f"{record['id']}: {record['reason']}"
        assert f"skipped {line}\n" in ran.raw
        assert f"- {line}\n" in written


def test_of_many_records_the_first_are_named_and_all_counted(run, tmp_path):
    root = damaged(tmp_path / "set.lmdb", 30, range(2, 31))
    ran = run("evaluate", root, *_ASKED)
    assert ran.code == 1
    shown = " ".join(ran.out.decode().split())
    assert "29 damaged records left out (set.lmdb#000000002, " in shown
    assert "set.lmdb#000000006, and 24 more)." in shown
    assert ran.raw.count("skipped ") == 20
    assert "and 9 more (--json and -o list all)" in ran.raw
    listed = json.loads(run("evaluate", root, *_ASKED, "--json").out)
    assert len(listed["left_out"]["set"]) == listed["skipped"]["set"] == 29
    whole = run("evaluate", write_set(tmp_path / "whole.lmdb", 2), *_ASKED, "--json")
    assert whole.code == 0
    assert json.loads(whole.out)["left_out"] == {"whole": []}


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("kind", ["file", "link", "broken link", "folder"])
def test_results_replace_nothing_that_is_not_theirs(run, tmp_path, crops, monkeypatch, name, kind):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine").write_text("# mine")
    if kind == "file" and name.endswith("png"):
        Image.new("RGB", (3, 3)).save(out / name)
    elif kind == "file":
        (out / name).write_text("[1]" if name.endswith("json") else "# My evaluation")
    elif kind == "folder":
        (out / name).mkdir()
    else:
        (out / name).symlink_to(tmp_path / "mine" if kind == "link" else "nowhere")
    before = [(p.name, p.lstat().st_mtime_ns, p.lstat().st_ino) for p in out.iterdir()]
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "measure", None)
        ran = run("evaluate", crops, *_ASKED, "-o", out)
    assert ran.code == 2
    assert f"error: -o {out / name} " in ran.raw
    assert [(p.name, p.lstat().st_mtime_ns, p.lstat().st_ino) for p in out.iterdir()] == before
    ran = run("evaluate", crops, *_ASKED, "-o", out, "--overwrite")
    assert ran.code == (2 if kind == "folder" else 0)
    assert (tmp_path / "mine").read_text() == "# mine"


def test_results_replace_earlier_ones_and_no_input(run, tmp_path, crops, weights):
    out = tmp_path / "deep" / "out"
    for limit in (1, 2):
        ran = run("evaluate", crops, "--model", weights, "-o", out, "--limit", limit)
        assert ran.code == 0, ran.err
        assert json.loads((out / _FILES[0]).read_text())["crops"] == {"crops": limit}
    assert sorted(path.name for path in out.iterdir()) == sorted(_FILES)
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (9, 9), (9, 99, 200)).save(folder / "crops.png")
    (folder / "labels.csv").write_text("file,label\ncrops.png,a\n")
    ran = run("evaluate", folder, *_ASKED, "-o", folder, "--overwrite")
    assert ran.code == 2
    assert "would replace an input" in ran.err
    assert sorted(path.name for path in folder.iterdir()) == ["crops.png", "labels.csv"]


def test_an_evaluation_that_fails_leaves_no_folder(run, tmp_path, crops, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(evaluate, "views", full)
    assert run("evaluate", crops, *_ASKED, "-o", tmp_path / "a" / "out").code == 2
    assert not (tmp_path / "a").exists()


def test_a_place_for_readings_that_cannot_be_had_is_said_before_the_work(run, tmp_path, crops):
    (tmp_path / "file").write_text("")
    ran = run("evaluate", crops, *_ASKED, "--cache", tmp_path / "file" / "below")
    assert ran.code == 2
    assert ran.raw.startswith("error: cannot write to --cache ")


# What a run of `train` replaces


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def weights(config):
    torch.manual_seed(0)
    network = LEMMA(stage_of(config, "lemma").lemma_config())
    checkpoint.save(network, config.parent / "fresh.safetensors")
    return config.parent / "fresh.safetensors"


@pytest.mark.parametrize("restart", [(), ("--restart",)])
@pytest.mark.parametrize(
    "name", ["settings.json", "metrics.csv", "best.safetensors", "last.safetensors", "records.json"]
)
def test_a_run_replaces_only_what_a_run_wrote(run, tmp_path, config, weights, name, restart):
    folder = tmp_path / "mine" / "crnn"
    folder.mkdir(parents=True)
    content = weights.read_bytes() if name.endswith("tensors") else b'{"mine": 1}\n'
    (folder / name).write_bytes(content)
    ran = run("train", config, "--stage", "crnn", f"output={tmp_path / 'mine'}", *restart)
    assert ran.code == 2
    assert ran.raw.startswith(f"error: {folder / name} exists; no run has written it")
    assert (folder / name).read_bytes() == content
    assert [path.name for path in folder.iterdir()] == [name]


def test_a_restart_clears_what_a_run_wrote_and_leaves_the_rest(run, tmp_path, config):
    command = ("train", config, "--stage", "crnn", f"output={tmp_path}", "run.tensorboard=true")
    assert run(*command).code == 0
    folder = tmp_path / "crnn"
    for kept in ("notes.txt", "tensorboard/notes.txt"):
        (folder / kept).write_text("mine")
    events = set((folder / "tensorboard").glob("events*"))
    ran = run(*command, "--restart", "--max-steps", "1")
    assert ran.code == 0, ran.err
    for kept in ("notes.txt", "tensorboard/notes.txt"):
        assert (folder / kept).read_text() == "mine"
    assert events
    assert not events & set((folder / "tensorboard").glob("events*"))
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize("kind", ["file", "below a file", "link"])
def test_a_place_that_is_no_folder_is_said(run, tmp_path, config, kind):
    out = tmp_path / "out"
    if kind == "link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.write_text("mine")
    ran = run("train", config, "--stage", "crnn", f"output={out / 'a' if 'below' in kind else out}")
    assert ran.code == 2
    assert ran.raw.startswith("error: cannot write to output ")
    assert ran.raw.count("\n") == 1


def test_what_stands_in_the_way_is_named_and_no_file_of_ours(run, tmp_path, config):
    command = ("train", config, "--stage", "crnn", f"output={tmp_path}", "--max-steps", "1")
    assert run(*command).code == 0
    curves = tmp_path / "crnn" / "metrics.csv"
    curves.unlink()
    curves.mkdir()
    ran = run(*command)
    assert ran.code == 2
    assert f"error: {curves}: Is a directory" in ran.raw


# Memory and processes


LACKS = {
    "gpu": (
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total"
        ),
        "the GPU has not enough memory (it was asked for 20.00 MiB more)",
    ),
    "driver": (
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        "the GPU has not enough memory",
    ),
    "cublas": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "the GPU has not enough memory",
    ),
    "torch": (None, "the machine has not enough memory (it was asked for "),
    "python": (MemoryError(), "the machine has not enough memory"),
}


def fails(kind):
    def failing(*_, **__):
        if (error := LACKS[kind][0]) is not None:
            raise error
        torch.empty(1 << 50)

    return failing


@pytest.mark.parametrize("kind", LACKS)
@pytest.mark.parametrize("where", ["network", "reader"])
def test_evaluate_says_what_to_lower(run, crops, weights, monkeypatch, kind, where):
    if where == "network":
        monkeypatch.setattr(evaluate, "views", fails(kind))
    else:
        monkeypatch.setattr(evaluate.PriorReader, "read", fails(kind))
    ran = run("evaluate", crops, "--model", weights)
    assert ran.code == 2
    assert ran.raw.startswith(f"error: {LACKS[kind][1]}")
    assert "lower --batch-size" in ran.raw
    assert ran.raw.count("\n") == 1


@pytest.mark.parametrize("kind", LACKS)
def test_train_says_what_to_lower_and_keeps_what_was_saved(
    run, tmp_path, config, monkeypatch, kind
):
    command = ("train", config, "--stage", "crnn", f"output={tmp_path}")
    assert run(*command, "--max-steps", "2").code == 0
    with monkeypatch.context() as patched:
        patched.setattr(Run, "make_step", fails(kind))
        ran = run(*command)
    assert ran.code == 2
    (said,) = [line for line in ran.raw.splitlines() if line.startswith("error: ")]
    assert said.startswith(f"error: {LACKS[kind][1]}")
    assert "lower run.batch_size" in said
    ran = run(*command)
    assert ran.code == 0
    assert "going on from step 2" in ran.err


def test_another_error_of_torch_is_not_taken_for_it(run, crops, weights, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(evaluate, "views", wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        run("evaluate", crops, "--model", weights)


@pytest.mark.parametrize("kind", ["killed", "damaged"])
def test_a_loading_process_that_fails_is_one_sentence(run, tmp_path, config, monkeypatch, kind):
    plain = EncodedCrops.__getitems__

    def failing(self, positions):
        if get_worker_info() is None:
            return plain(self, positions)
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RecordError("set.lmdb: image_hr-000000007 is missing")

    monkeypatch.setattr(EncodedCrops, "__getitems__", failing)
    ran = run("train", config, "--stage", "crnn", f"output={tmp_path}", "data.workers=1")
    assert ran.code == 2
    (said,) = [line for line in ran.raw.splitlines() if line.startswith("error: ")]
    if kind == "killed":
        assert "a process that loads crops was killed" in said
    else:
        assert said == "error: set.lmdb: image_hr-000000007 is missing"
