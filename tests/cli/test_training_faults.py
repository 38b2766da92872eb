"""`lemma-fast train` and `evaluate` when something is wrong: signals, ranks, files, names."""

import csv
import errno
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_training import WORDS, stage_of, write_config, write_set

from lemma_fast import LEMMA, checkpoint
from lemma_fast.training.evaluation import evaluate
from lemma_fast.training.loop.fit import Run, fit
from lemma_fast.training.settings import SettingsError

# Networks this small only lose by more.
pytestmark = pytest.mark.usefixtures("one_thread")

_COMMAND = [sys.executable, "-m", "lemma_fast.cli"]
_ENDLESS = (
    "run.steps=1000000",
    "run.save_every=1000000",
    "run.validate_every=1000000",
    "run.log_every=2",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("faults"))


def _started(*arguments):
    return subprocess.Popen(
        [*_COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _until(there, process, seconds=120):
    end = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def _logged(folder):
    path = folder / "metrics.csv"
    return path.is_file() and path.read_text().count("train/loss") > 0


# Signals


@pytest.mark.parametrize(
    ("number", "name", "stage", "workers"),
    [(signal.SIGTERM, "SIGTERM", "crnn", 1), (signal.SIGINT, "Ctrl-C", "language", 0)],
)
def test_a_signal_saves_the_step_and_the_same_command_goes_on(
    config, tmp_path, number, name, stage, workers
):
    overrides = [*_ENDLESS, f"output={tmp_path}", f"data.workers={workers}"]
    process = _started("train", config, "--stage", stage, *overrides)
    folder = tmp_path / stage
    _until(lambda: _logged(folder), process)
    with pytest.raises(SettingsError, match="another run is training in"):
        fit(stage_of(config, stage, *overrides), steps=1)
    # As a terminal and a supervisor do: to all processes, those that load data too.
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    step = torch.load(folder / "last.ckpt")["global_step"]
    assert step >= 2
    expected = f"{stage}: step {step} of 1000000: stopped by {name}; the same command goes on"
    assert out.startswith(expected)
    assert f"{name}: stopping after this step" in err
    assert "Traceback" not in err
    assert fit(stage_of(config, stage, *overrides), steps=1).step == step + 1


def test_a_signal_before_the_first_step_is_one_sentence(config, tmp_path, run, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr("lemma_fast.training.loop.fit.split", interrupted)
    ran = run("train", config, "--stage", "crnn", f"output={tmp_path}")
    assert ran.code == 143
    assert ran.err == "SIGTERM: stopped; the same command goes on from what was saved"
    # The handlers of the process are as before.
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("moment", ["make_step", "save"])
def test_a_signal_at_the_last_step_does_not_let_the_next_stage_begin(
    run, config, tmp_path, monkeypatch, moment
):
    act = getattr(Run, moment)

    def interrupted(self, *batch):
        act(self, *batch)
        if self.step == self.total:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, moment, interrupted)
    ran = run("train", config, f"output={tmp_path}", "run.steps=2")
    assert ran.code == 143
    assert ran.out.startswith(b"language: step 2 of 2, best loss")
    assert ran.out.count(b"finished") == 1
    assert not (tmp_path / "prior").exists()


def test_who_ignores_a_signal_goes_on_ignoring_it(config, tmp_path, monkeypatch):
    make_step = Run.make_step

    def interrupted(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        make_step(self, batch)

    monkeypatch.setattr(Run, "make_step", interrupted)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outcome = fit(stage_of(config, "crnn", f"output={tmp_path}", "run.steps=2"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.finished
    assert outcome.signal is None


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C"), (signal.SIGHUP, "SIGHUP")],
)
def test_a_signal_in_an_evaluation_keeps_what_was_read(
    run, tmp_path, weights, monkeypatch, number, name
):
    sets = [write_set(tmp_path / f"{n}.lmdb", n) for n in (3, 5)]
    read = evaluate.PriorReader.read

    def interrupted(self, images):
        if len(images) == 5:
            os.kill(os.getpid(), number)
            time.sleep(60)
        return read(self, images)

    monkeypatch.setattr(evaluate.PriorReader, "read", interrupted)
    ran = run("evaluate", *sets, "--model", weights)
    assert ran.code == 128 + number
    assert ran.err.startswith(f"{name}: stopped; what recognisers have read is kept")
    (kept,) = (tmp_path / "cache" / "lemma-fast" / "readings").iterdir()
    assert len(json.loads(kept.read_text())["texts"]["HR"]) == 3


# Ranks and devices


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"LOCAL_RANK": "1", "SLURM_PROCID": "1"},
    ],
)
def test_a_rank_in_the_environment_does_not_silence_one_device(config, tmp_path, variables):
    command = ["train", str(config), "--stage", "crnn", f"output={tmp_path}", "--max-steps", "2"]
    ran = subprocess.run(
        [*_COMMAND, *command], env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("crnn: step 2 of 12")
    assert (tmp_path / "crnn" / "settings.json").is_file()
    assert _logged(tmp_path / "crnn")


_SLURM = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "t", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0",
          "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "override", "message"),
    [
        (_SLURM, "run.devices=1", "--ntasks-per-node=2"),
        ({**_SLURM, "SLURM_NTASKS_PER_NODE": "2"}, "run.devices=3", "--ntasks-per-node=2"),
        ({"LOCAL_RANK": "1", "RANK": "1"}, "run.devices=2", "run.devices=2"),
        (
            {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"},
            "run.devices=1",
            "torchrun has started 2 processes",
        ),
        pytest.param(
            {},
            "run.accelerator=gpu",
            "run.accelerator=gpu run.devices=1 run.nodes=1 cannot be had",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_devices_that_are_not_there_are_one_sentence(
    run, config, tmp_path, monkeypatch, variables, override, message
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "RANK" in variables:
        monkeypatch.setenv("MASTER_PORT", "nowhere")
    cpu = () if "gpu" in override else ("run.accelerator=cpu",)
    ran = run("train", config, "--stage", "crnn", f"output={tmp_path}", override, *cpu)
    assert ran.code == 2
    assert ran.raw.startswith(("error: run.accelerator=", "error: torchrun"))
    assert ran.raw.count("\n") == 1
    assert message in ran.raw


# Damaged files


@pytest.fixture(scope="module")
def begun(config, tmp_path_factory):
    """A run of which two steps of four are made."""
    folder = tmp_path_factory.mktemp("begun")
    fit(stage_of(config, "crnn", f"output={folder}", "run.steps=4", "run.log_every=1"), steps=2)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "way_out"),
    [
        ("metrics.csv", b"step,name,value\nxx,yy\n", "line 2"),
        ("metrics.csv", b"step,name,value\n1,train/loss,many\n", "without the file the run goes"),
        ("metrics.csv", b"\xff\n", "without the file the run goes on"),
        ("result.json", b"", "without it the same command makes it anew"),
        ("result.json", b"[]", "without it the same command makes it anew"),
        ("result.json", b'{"settings": {}, "steps": null, "best": 3}', "without it"),
        ("last.ckpt", b"", "--restart begins anew"),
        ("last.ckpt", b"not a checkpoint", "--restart begins anew"),
        ("last.ckpt", 0.5, "--restart begins anew"),
        ("last.ckpt", 0.99, "--restart begins anew"),
        ("last.ckpt", [1, 2], "--restart begins anew"),
        ("last.ckpt", {"global_step": 1}, "--restart begins anew"),
        ("last.ckpt", "other network", "--restart begins anew"),
    ],
)
def test_a_damaged_file_of_a_run_is_named_with_a_way_out(
    run, config, begun, tmp_path, name, content, way_out
):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "crnn" / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, float):
        whole = path.read_bytes()
        path.write_bytes(whole[: round(content * len(whole))])
    elif content == "other network":
        torch.save({**torch.load(path), "state_dict": {}}, path)
    else:
        torch.save(content, path)
    command = ["train", config, "--stage", "crnn", f"output={tmp_path}", "run.steps=4"]
    command += ["run.log_every=1"]
    ran = run(*command)
    assert ran.code == 2
    assert ran.raw.startswith(f"error: {path} ")
    assert ran.raw.count("\n") == 1
    assert way_out in ran.raw
    if name != "last.ckpt":
        path.unlink()
    went_on = run(*command, *(["--restart"] if name == "last.ckpt" else []))
    assert went_on.code == 0, went_on.err
    assert b"crnn: step 4 of 4" in went_on.out


# Outputs, recognisers, the home folder


@pytest.fixture(scope="module")
def weights(config):
    torch.manual_seed(0)
    network = LEMMA(stage_of(config, "lemma").lemma_config())
    checkpoint.save(network, config.parent / "fresh.safetensors")
    return config.parent / "fresh.safetensors"


@pytest.fixture
def crops(tmp_path):
    return write_set(tmp_path / "crops.lmdb", 2)


@pytest.fixture
def no_work(monkeypatch):
    """Fail where an evaluation gets as far as a crop."""
    monkeypatch.setattr(evaluate, "measure", None)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("kind", ["file", "below a file", "folder in place of a file", "full"])
def test_an_output_that_cannot_be_written_is_said_before_the_work(
    run, tmp_path, crops, weights, monkeypatch, kind
):
    out = tmp_path / "out"
    if "below" in kind or kind == "file":
        out.write_text("")
    if kind == "below a file":
        out = out / "folder"
    if kind == "folder in place of a file":
        (out / "evaluation.md").mkdir(parents=True)
    if kind == "full":

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("tempfile.TemporaryFile", full)
    ran = run("evaluate", crops, "--model", weights, "-o", out)
    assert ran.code == 2
    assert ran.raw.startswith("error: ")
    assert str(out) in ran.raw or kind == "full"
    assert ran.raw.count("\n") == 1


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'Error opening data file eng.traineddata' >&2; exit 1", "Error opening data file"),
        ("echo nonsense", "recogniser tesseract"),
        ("printf 'level\tpage_num\ttext\tconf\n'", "answered for 0 of 1 crops"),
    ],
)
def test_a_reader_that_cannot_read_is_said_before_the_work(
    run, tmp_path, crops, weights, monkeypatch, script, message
):
    _install(tmp_path, monkeypatch, script)
    ran = run("evaluate", crops, "--model", weights, "--recognizer", "tesseract")
    assert ran.code == 2
    assert ran.raw.startswith("error: recogniser tesseract: ")
    assert ran.raw.count("\n") == 1
    assert message in ran.raw


def test_a_reader_that_fails_later_is_one_sentence(run, tmp_path, crops, weights, monkeypatch):
    # It answers for one crop, the trial, and not for two.
    answer = "printf 'level\tpage_num\ttext\tconf\n1\t1\t\t-1\n'"
    _install(tmp_path, monkeypatch, answer)
    ran = run("evaluate", crops, "--model", weights, "--recognizer", "tesseract,prior")
    assert ran.code == 2
    assert ran.raw == "error: recogniser tesseract: tesseract answered for 1 of 2 crops\n"


def _install(folder, monkeypatch, script):
    program = folder / "bin" / "tesseract"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncase "$1" in --*) exit 0;; esac\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.mark.parametrize("home", [None, ""])
def test_without_a_home_readings_are_not_kept(run, tmp_path, crops, weights, monkeypatch, home):
    def unknown(_):
        raise KeyError("no such user")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    before = sorted(tmp_path.iterdir())
    ran = run("evaluate", crops, "--model", weights, "--json")
    assert ran.code == 0, ran.err
    assert "there is no home folder" in ran.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("no_work")
def test_weights_that_are_no_numbers_are_said_by_evaluate(run, tmp_path, crops, weights):
    network = checkpoint.load(weights)
    with torch.no_grad():
        network.stem.weight[0] = float("nan")
    checkpoint.save(network, tmp_path / "nan.safetensors")
    ran = run("evaluate", crops, "--model", tmp_path / "nan.safetensors")
    assert ran.code == 2
    assert "nan.safetensors: 1 of its" in ran.err
    assert "stem.weight" in ran.err


# Names


_NAMES = ["[bold]", "o[/x]", ":smile: a|b", os.fsdecode(b"caf\xe9")]


@pytest.mark.parametrize("name", _NAMES)
def test_names_are_shown_as_they_are(run, config, tmp_path, weights, name):
    shown = name.replace("\udce9", "\\xe9")
    folder = tmp_path / name
    command = ["train", config, "--stage", "crnn", "run.steps=1", "run.tensorboard=true"]
    ran = run(*command, f"output={folder}" if "\udce9" in name else f"output='{folder}'")
    assert ran.code == 0, ran.err
    assert ran.out.decode() == (
        f"crnn: step 1 of 1, best loss {_best(folder):.4g} at step 1: finished "
        f"({tmp_path}/{shown}/crnn)\n"
    )
    crops = _folder_of_crops(folder / "crops" / name)
    out = folder / "evaluation"
    ran = run("evaluate", crops, "--model", weights, "--recognizer", "", "-o", out)
    assert ran.code == 0, ran.err
    table = ran.out.decode()
    shown_set = Path(shown).name
    assert f"│ {shown_set} (2) " in table
    assert f"wrote {tmp_path}/{shown}/evaluation/evaluation.json\n" in ran.raw
    assert json.loads((out / "evaluation.json").read_text())["crops"] == {shown_set: 2}
    assert f"| {shown_set} (2) |".replace("a|b", "a\\|b") in (out / "evaluation.md").read_text()


def _best(folder):
    return json.loads((folder / "crnn" / "result.json").read_text())["best"]["loss"]


def _folder_of_crops(folder):
    folder.mkdir(parents=True)
    with Path(folder, "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file", "label"))
        for number, word in enumerate(WORDS[:2]):
            Image.effect_noise((128, 32), 60).convert("RGB").save(folder / f"{number}.png")
            table.writerow((f"{number}.png", word))
    return folder
