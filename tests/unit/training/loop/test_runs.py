"""Runs: killed, in chunks, on two ranks, to the same numbers; and what they leave behind."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_training import READING, stage_of, write_config

import lemma_fast
from lemma_fast.recognizers import load_recognizer
from lemma_fast.training.data.batches import EncodedCrops, split
from lemma_fast.training.loop.curves import read_curves
from lemma_fast.training.loop.fit import fit
from lemma_fast.training.loop.folder import write_checkpoint
from lemma_fast.training.loop.stages import RestorationStage
from lemma_fast.training.settings.schema import choose
from lemma_fast.training.settings.values import SettingsError

# Sums come out the same in every process only if they are split the same way.
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_checkpoint_replaces_the_one_before_only_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, {"step": 1})

    def torn(content, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(path, {"step": 2})
    assert torch.load(path) == {"step": 1}


def _weights(folder, name="last.safetensors"):
    return load_file(folder / name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All five stages, trained without a break; LEMMA uses what the others made."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder)
    overrides = [
        "stages.language.data.words=builtin",
        "stages.prior.start.weights=stage:language",
        "stages.lemma.start.prior=stage:prior",
        "stages.lemma.loss.recognizer=stage:text_focus",
        "stages.lemma.loss.weights.text_focus=0.5",
        "stages.lemma.loss.pixel_steps=3",
        "stages.lemma.select.recognizer=stage:crnn",
    ]
    outcomes = [fit(chosen) for chosen in choose(config, "all", overrides)]
    assert all(outcome.finished for outcome in outcomes)
    torch.set_num_threads(threads)
    return config, overrides


def _begin_again(whole, tmp_path):
    """The other stages of a whole run, and the settings of LEMMA in a folder of its own."""
    config, overrides = whole
    for stage in ("language", "prior", "text_focus", "crnn"):
        shutil.copytree(config.parent / "run" / stage, tmp_path / "run" / stage)
    return config, [*overrides, f"output={tmp_path / 'run'}"]


# A process of its own, as a user's is: rounding may depend on what ran in a process before.
_LEMMA = """
import os, signal, sys, torch
from lemma_fast.training.loop.fit import Run, fit
from lemma_fast.training.settings.schema import choose

last, config, *overrides = sys.argv[1:]
make_step = Run.make_step

def stopping(self, batch):
    make_step(self, batch)
    if self.step == int(last):
        os.kill(os.getpid(), signal.SIGKILL)

Run.make_step = stopping
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)
assert fit(choose(config, "lemma", overrides)[0]).finished
"""


def _lemma(begun, last=0):
    """Train LEMMA in a process that is killed after step `last`; its exit code."""
    config, overrides = begun
    command = [sys.executable, "-c", _LEMMA, str(last), str(config), *overrides]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode in (0, -9), ran.stderr
    return ran.returncode


def test_a_killed_run_goes_on_to_the_same_numbers(whole, tmp_path):
    unbroken = tmp_path / "unbroken" / "run" / "lemma"
    assert _lemma(_begin_again(whole, tmp_path / "unbroken")) == 0
    again = _begin_again(whole, tmp_path)
    assert _lemma(again, last=11) == -9
    folder = tmp_path / "run" / "lemma"
    # Step 9, in the third epoch of four steps, was the last to be saved; 10 is in the curves.
    assert torch.load(folder / "last.ckpt")["global_step"] == 9
    assert read_curves(folder / "metrics.csv")[-1][0] == 10
    assert not (folder / "result.json").exists()

    assert _lemma(again) == 0
    assert (folder / "metrics.csv").read_text() == (unbroken / "metrics.csv").read_text()
    for name in ("last.safetensors", "best.safetensors"):
        torch.testing.assert_close(_weights(folder, name), _weights(unbroken, name), rtol=0, atol=0)
    ours, theirs = (torch.load(place / "last.ckpt") for place in (folder, unbroken))
    for part in ("optimizer_states", "lr_schedulers", "average", "state_dict"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)


def test_chunks_make_the_same_run(whole, tmp_path):
    config, overrides = _begin_again(whole, tmp_path)
    chosen = stage_of(config, "lemma", *overrides)
    steps = []
    for _ in range(3):
        outcome = fit(chosen, steps=5)
        steps.append(outcome.step)
    assert steps == [5, 10, 12]
    unbroken = config.parent / "run" / "lemma"
    assert (chosen.folder / "metrics.csv").read_text() == (unbroken / "metrics.csv").read_text()
    torch.testing.assert_close(_weights(chosen.folder), _weights(unbroken), rtol=0, atol=0)
    # There is nothing left to do, and that takes no step.
    assert fit(chosen, steps=5) == outcome


def test_chunks_spell_the_same_words(whole, tmp_path):
    config, overrides = whole
    chosen = stage_of(config, "language", *overrides, f"output={tmp_path}")
    for _ in range(3):
        fit(chosen, steps=5)
    unbroken = config.parent / "run" / "language"
    torch.testing.assert_close(_weights(chosen.folder), _weights(unbroken), rtol=0, atol=0)


def test_a_spent_budget_stops_after_a_step(whole, tmp_path):
    config, overrides = _begin_again(whole, tmp_path)
    outcome = fit(stage_of(config, "lemma", *overrides), minutes=0)
    assert (outcome.step, outcome.finished) == (1, False)
    assert (outcome.folder / "last.ckpt").is_file()


def test_changed_settings_do_not_go_on_unasked(whole, tmp_path):
    config, overrides = _begin_again(whole, tmp_path)
    fit(stage_of(config, "lemma", *overrides), steps=1)
    changed = stage_of(config, "lemma", *overrides, "optimizer.learning_rate=0.01")
    with pytest.raises(SettingsError, match=r"optimizer.learning_rate was 0.001, is 0.01"):
        fit(changed)
    assert fit(changed, steps=1, accept_changes=True).step == 2
    assert fit(changed, steps=1, restart=True).step == 1
    workers = stage_of(
        config, "lemma", *overrides, "optimizer.learning_rate=0.01", "data.workers=1"
    )
    assert fit(workers, steps=1).step == 2


def test_a_run_of_an_earlier_version_goes_on(whole, tmp_path):
    config, overrides = _begin_again(whole, tmp_path)
    chosen = stage_of(config, "lemma", *overrides)
    fit(chosen, steps=1)
    path = chosen.folder / "last.ckpt"
    saved = torch.load(path)
    # Words that are not there stand for what the defaults are.
    del saved["settings"]["loss"]["gradient_profile"]
    # These four were the state of a callback.
    names = ("best", "latest", "seconds", "settings")
    saved["callbacks"] = {"Keeper": {name: saved.pop(name) for name in names}}
    torch.save(saved, path)
    changed = stage_of(config, "lemma", *overrides, "loss.gradient_profile=0.1")
    with pytest.raises(SettingsError, match=r"loss.gradient_profile was 0.0, is 0.1"):
        fit(changed)
    assert fit(chosen, steps=1).step == 2


def test_weights_say_where_they_come_from(whole):
    folder = whole[0].parent / "run" / "lemma"
    with safe_open(folder / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    best = json.loads((folder / "result.json").read_text())["best"]
    assert int(metadata["steps"]) == best["step"]
    assert json.loads(metadata["validation"])["psnr"] == best["psnr"]
    assert metadata["seed"] == "0"
    assert "held out" in metadata["selection"]
    assert json.loads(metadata["settings"])["stage"] == "lemma"
    assert json.loads(metadata["versions"])["torch"] == str(torch.__version__)
    assert "CPU" in metadata["device"]
    assert lemma_fast.load(folder / "best.safetensors").config.num_blocks == 1


def test_pixels_come_first(whole):
    rows = read_curves(whole[0].parent / "run" / "lemma" / "metrics.csv")
    attention = {step: value for step, name, value in rows if name == "train/attention"}
    # Of the steps 3 and 4 the second one is past the warm-up of three.
    assert attention[2] == 0
    assert attention[4] > 0


def test_trained_recognisers_open(whole):
    run = whole[0].parent / "run"
    for name in ("crnn", "text_focus"):
        reader = load_recognizer(name, run / name / "best.safetensors", device="cpu")
        assert len(reader.read(torch.rand(2, 3, 32, 128))) == 2


def test_the_best_validation_is_kept(whole):
    folder = whole[0].parent / "run" / "lemma"
    rows = read_curves(folder / "metrics.csv")
    pixels = [value for _, name, value in rows if name == "train/pixel"]
    assert pixels[-1] < pixels[0]
    psnr = {value: step for step, name, value in rows if name == "validation/psnr"}
    best = json.loads((folder / "result.json").read_text())["best"]
    assert best["psnr"] == max(psnr)
    assert best["step"] == psnr[max(psnr)]
    assert sorted(psnr.values()) == [4, 8, 12]


@pytest.mark.parametrize("stage", ["language", "lemma"])
def test_bfloat16_and_tensorboard(tmp_path, stage):
    chosen = stage_of(
        write_config(tmp_path),
        stage,
        *(READING if stage == "lemma" else ()),
        "run.precision=bfloat16",
        "run.tensorboard=true",
        "run.steps=2",
    )
    assert fit(chosen).finished
    assert list((chosen.folder / "tensorboard").glob("events.*"))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    chosen = stage_of(write_config(tmp_path), "lemma", "optimizer.learning_rate=1e30")
    with pytest.raises(FloatingPointError, match="the loss is"):
        fit(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [(), READING, ("loss.weights.fine_tune=0",)])
def test_two_ranks_train_one_network(tmp_path, changes):
    config = write_config(tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "lemma_fast.cli", "train", str(config), "--stage", "lemma", "run.steps=4"]
    options = ["run.devices=2", "run.accelerator=cpu", "run.ema=null", "export=float32"]
    ran = subprocess.run(
        [*launch, *command, *options, *changes],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("finished") == 1
    folder = tmp_path / "run" / "lemma"
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 4
    assert result["device"].startswith("2 x ")

    # Validation saw every crop once: the mean is that of one process over all of them.
    chosen = stage_of(config, "lemma", *changes)
    _, judged, _ = split(chosen.data)
    whole = EncodedCrops(judged, 26).__getitems__(range(len(judged)))
    module = RestorationStage(chosen)
    module.network = lemma_fast.load(folder / "last.safetensors")
    with torch.no_grad():
        expected = module.scores(whole)["psnr"].mean().item()
    assert result["last"]["psnr"] == pytest.approx(expected, abs=1e-4)
