"""Training: settings, the order of crops, schedules, weights in and out, resumption, two ranks."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_training import write_config

import lemma_fast
from lemma_fast import LEMMA, checkpoint
from lemma_fast.recognizers import load_recognizer
from lemma_fast.training import curves, export, settings
from lemma_fast.training.batches import Batches, EncodedCrops, InOrder, split
from lemma_fast.training.data import TextZoomDataset
from lemma_fast.training.fit import AtomicCheckpoints, fit
from lemma_fast.training.module import LemmaStage, PriorStage, op_table, rate_factor
from lemma_fast.training.settings import OptimizerSettings, Settings, choose
from lemma_fast.training.typed import SettingsError

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread():
    # Sums come out the same in every process only if they are split the same way.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _stage(config, name, *overrides):
    (chosen,) = choose(config, name, overrides)
    return chosen


# Settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stepz=3", "unknown key run.stepz; did you mean steps"),
        ("colour=3", "unknown key colour"),
        ("run.steps=many", "run.steps is a whole number, not 'many'"),
        ("run.batch_size=true", "run.batch_size is a whole number"),
        ("ops=fast", "ops is one of reference, fused"),
        ("optimizer.betas=[0.5]", "optimizer.betas has 2 entries"),
        ("data=3", "data is a table"),
        ("model.blocks=3", "model: unknown entries in LemmaConfig: blocks"),
        ("run.epochs=2", "one of run.steps and run.epochs"),
        ("run.steps", "is not KEY=VALUE"),
        ("stages.lama.seed=1", "stages.prior"),
        ("data.selection=test", "data.test names no set"),
        ("select.metric=accuracy", "select.recognizer"),
        ("loss.weights.text_focus=1", "loss.recognizer names no checkpoint"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, override, message):
    config = write_config(tmp_path)
    with pytest.raises(SettingsError, match=message):
        choose(config, "lemma", [override])


def test_overrides_reach_one_stage_or_all(tmp_path):
    config = write_config(tmp_path)
    given = ["stages.prior.run.steps=7", "seed=5", "optimizer.learning_rate=1e-3"]
    found = {chosen.stage: chosen for chosen in choose(config, "all", given)}
    assert list(found) == ["prior", "text_focus", "crnn", "lemma"]
    assert found["prior"].run.steps == 7
    assert found["lemma"].run.steps == 12
    assert {chosen.seed for chosen in found.values()} == {5}
    assert found["crnn"].optimizer.learning_rate == 1e-3


def test_shown_settings_are_a_config(tmp_path):
    config = write_config(tmp_path)
    chosen = choose(config)
    shown = tmp_path / "shown.yaml"
    shown.write_text(settings.as_yaml(chosen))
    assert choose(shown) == chosen


def test_a_base_is_changed_entry_by_entry(tmp_path):
    write_config(tmp_path)
    other = tmp_path / "other.yaml"
    other.write_text("base: tiny.yaml\nmodel: {num_blocks: 2}\nrun: {steps: 5}\n")
    chosen = _stage(other, "lemma")
    assert chosen.lemma_config().num_blocks == 2
    assert chosen.lemma_config().text_layers == 1
    assert (chosen.run.steps, chosen.run.batch_size) == (5, 4)


@pytest.mark.parametrize("name", settings.packaged())
def test_packaged_configs_are_valid(name):
    chosen = choose(name)
    assert chosen[-1].stage == "lemma"
    if name.startswith(("table", "supplement")):
        base = _stage("textzoom", "lemma")
        assert chosen[-1].lemma_config() != base.lemma_config()
        same = dataclasses.replace(chosen[-1], model=base.model, output=base.output)
        assert same == base


def test_the_paper_is_the_base_config():
    chosen = _stage("textzoom", "lemma")
    assert chosen.lemma_config() == lemma_fast.LemmaConfig.base()
    assert (chosen.run.epochs, chosen.run.batch_size, chosen.loss.scale) == (500, 64, 100)
    assert chosen.optimizer == OptimizerSettings()
    assert chosen.loss.weights == settings.LossSettings().weights
    assert chosen.data.selection == "held_out"
    assert _stage("published-selection", "lemma").data.selection == "test"


def test_fused_operations_that_are_missing_are_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "lemma_fast.ops.fused", None)
    with pytest.raises(SettingsError, match="write ops: reference"):
        op_table("fused")


# Batches


def test_an_epoch_shows_each_crop_once_and_the_next_another_order():
    batches = list(Batches(21, 4, seed=3, first=0, last=10))
    first, second = list(chain(*batches[:5])), list(chain(*batches[5:]))
    assert len(set(first)) == len(set(second)) == 20
    assert first != second
    assert list(Batches(21, 4, seed=4, first=0, last=5)) != batches[:5]


def test_a_run_goes_on_in_the_middle_of_an_epoch():
    whole = list(Batches(21, 4, seed=3, first=0, last=12))
    assert list(Batches(21, 4, seed=3, first=7, last=12)) == whole[7:]


def test_ranks_share_the_batches_of_one_device():
    whole = list(Batches(21, 4, seed=3, first=2, last=9))
    parts = [list(Batches(21, 4, 3, 2, 9, rank, 2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(b) for b in whole]
    assert {len(batch) for part in parts for batch in part} == {2}
    judged = [list(InOrder(7, 2, rank, 2)) for rank in range(2)]
    assert sorted(chain(*chain(*judged))) == list(range(7))


def test_batches_that_cannot_be_made_are_refused():
    with pytest.raises(SettingsError, match="there are 3 training crops"):
        Batches(3, 4, 0, 0, 1)
    with pytest.raises(SettingsError, match="not divisible by 3 devices"):
        Batches(9, 4, 0, 0, 1, ranks=3)


def test_validation_is_held_out_of_the_training_data(tmp_path):
    data = _stage(write_config(tmp_path), "lemma").data
    train, chosen, left_out = split(data)
    assert not left_out
    assert (len(train), len(chosen)) == (16, 4)
    assert not set(train.indices) & set(chosen.indices)
    _, fewer, _ = split(dataclasses.replace(data, validation_crops=2))
    assert set(fewer.indices) < set(chosen.indices)


def test_a_batch_is_of_the_crops_asked_for(tmp_path):
    data = _stage(write_config(tmp_path), "lemma").data
    train, _, _ = split(data)
    batch = EncodedCrops(train, 26).__getitems__([3, 0])
    whole = TextZoomDataset(*data.train)
    for place, position in enumerate((3, 0)):
        crop = whole[train.indices[position]]
        torch.testing.assert_close(batch.hr[place].float() / 255, crop.hr[:3])
        assert batch.labels[place] == crop.label
    assert batch.prior_ids.shape == (2, 26) == batch.focus.inputs.shape


# The schedule


def test_the_paper_halves_its_rate_after_epoch_400():
    paper = OptimizerSettings()
    factors = [rate_factor(paper, step, 271, 500 * 271) for step in (0, 400 * 271 - 1, 400 * 271)]
    assert factors == [1, 1, 0.5]


def test_a_cosine_warms_up_and_ends_at_nothing():
    cosine = OptimizerSettings(schedule="cosine", warm_up=10)
    assert rate_factor(cosine, 0, 5, 100) == pytest.approx(0.1)
    assert rate_factor(cosine, 50, 5, 100) == pytest.approx(0.5)
    assert rate_factor(cosine, 100, 5, 100) == pytest.approx(0)


def test_the_prior_has_a_rate_of_its_own(tmp_path):
    module = LemmaStage(_stage(write_config(tmp_path), "lemma"), 10, 5)
    (rest, fast), (prior, slow) = module.parameter_groups()
    assert (fast, slow) == (1e-3, 1e-4)
    assert {id(p) for p in prior} == {id(p) for p in module.network.prior.parameters()}
    assert len(rest) + len(prior) == len(list(module.network.parameters()))


def test_the_average_follows_the_weights_and_gives_them_back(tmp_path):
    module = LemmaStage(_stage(write_config(tmp_path), "lemma", "run.ema=0.75"), 10, 5)
    network = module.network
    weight, norm = network.stem.weight, network.tail.norm
    first = weight.detach().clone()
    module.average = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        weight.add_(1)
        norm.num_batches_tracked.add_(3)
    module.update_average(0)
    # At first it follows faster than it is told to: 1 / 10 of the old is kept.
    torch.testing.assert_close(module.average["stem.weight"], first + 0.9)
    module.update_average(1000)
    torch.testing.assert_close(module.average["stem.weight"], first + 0.9 + 0.25 * 0.1)
    with module.averaged():
        torch.testing.assert_close(weight.detach(), first + 0.925)
        assert norm.num_batches_tracked == 3
    torch.testing.assert_close(weight.detach(), first + 1)


# Weights in and out


def test_half_storage_leaves_buffers_alone(tmp_path):
    config = write_config(tmp_path)
    network = LEMMA(_stage(config, "lemma", "model.rectification=true").lemma_config())
    with torch.no_grad():
        network.stem.weight[0, 0, 0, 0] = 1 / 3
    export.save_lemma(network, tmp_path / "half.safetensors", {"seed": "7"}, "float16")
    state = load_file(tmp_path / "half.safetensors")
    parameters = dict(network.named_parameters())
    for name, tensor in state.items():
        half = name in parameters
        assert tensor.dtype == (torch.float16 if half else network.state_dict()[name].dtype), name
    loaded = lemma_fast.load(tmp_path / "half.safetensors")
    assert loaded.stem.weight.dtype == torch.float32
    assert loaded.stem.weight[0, 0, 0, 0].item() == torch.tensor(1 / 3).half().item()
    torch.testing.assert_close(loaded.guidance.positions, network.guidance.positions)
    assert parameters["stem.weight"].dtype == torch.float32
    with torch.no_grad():
        network.stem.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="stem.weight does not fit"):
        export.save_lemma(network, tmp_path / "half.safetensors", {}, "float16")


def test_a_prior_starts_a_network(tmp_path):
    config = write_config(tmp_path)
    prior = PriorStage(_stage(config, "prior"), 1, 1).network
    (tmp_path / "run" / "prior").mkdir(parents=True)
    export.save_prior(prior, tmp_path / "run" / "prior" / "best.safetensors", {}, "float32")
    module = LemmaStage(_stage(config, "lemma", "start.prior=stage:prior"), 1, 1)
    torch.testing.assert_close(module.network.prior.state_dict(), prior.state_dict())

    whole = tmp_path / "whole.safetensors"
    checkpoint.save(module.network, whole)
    again = LemmaStage(_stage(config, "lemma", f"start.prior={whole}"), 1, 1)
    torch.testing.assert_close(again.network.prior.state_dict(), prior.state_dict())

    published = tmp_path / "published.pth"
    names = checkpoint.to_published(module.network)
    head = "position_prior."
    ours = {n.removeprefix(head): t for n, t in names.items() if n.startswith(head)}
    torch.save({"model": ours}, published)
    again = LemmaStage(_stage(config, "lemma", f"start.prior={published}"), 1, 1)
    torch.testing.assert_close(again.network.prior.state_dict(), prior.state_dict())

    wider = _stage(config, "lemma", "start.prior=stage:prior", "model.prior.key_width=12")
    with pytest.raises(SettingsError, match="prior of other sizes"):
        LemmaStage(wider, 1, 1)
    with pytest.raises(SettingsError, match="train the stage before"):
        LemmaStage(_stage(config, "lemma", "start.prior=stage:crnn"), 1, 1)


def test_a_checkpoint_replaces_the_one_before_only_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"step": 1}, path)

    def torn(content, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpoints().save_checkpoint({"step": 2}, path)
    assert torch.load(path) == {"step": 1}


# Runs


def _weights(folder, name="last.safetensors"):
    return load_file(folder / name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All four stages, trained without a break; LEMMA uses what the others made."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder)
    overrides = [
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
    for stage in ("prior", "text_focus", "crnn"):
        shutil.copytree(config.parent / "run" / stage, tmp_path / "run" / stage)
    return config, [*overrides, f"output={tmp_path / 'run'}"]


_KILLED = """
import os, signal, sys, torch
from lightning.pytorch.callbacks import Callback
from lemma_fast.training.fit import fit
from lemma_fast.training.settings import choose

class Killer(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 11:
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)
fit(choose(sys.argv[1], "lemma", sys.argv[2:])[0], callbacks=[Killer()])
"""


def test_a_killed_run_goes_on_to_the_same_numbers(whole, tmp_path):
    config, overrides = _begin_again(whole, tmp_path)
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(config), *overrides], capture_output=True, text=True
    )
    assert killed.returncode == -9, killed.stderr
    folder = tmp_path / "run" / "lemma"
    # Step 9, in the third epoch of four steps, was the last to be saved; 10 is in the curves.
    assert torch.load(folder / "last.ckpt")["global_step"] == 9
    assert curves.read(folder / "metrics.csv")[-1][0] == 10
    assert not (folder / "result.json").exists()

    outcome = fit(_stage(config, "lemma", *overrides))
    assert outcome.finished
    unbroken = config.parent / "run" / "lemma"
    assert (folder / "metrics.csv").read_text() == (unbroken / "metrics.csv").read_text()
    for name in ("last.safetensors", "best.safetensors"):
        torch.testing.assert_close(_weights(folder, name), _weights(unbroken, name), rtol=0, atol=0)
    ours, theirs = (torch.load(place / "last.ckpt") for place in (folder, unbroken))
    for part in ("optimizer_states", "lr_schedulers", "average", "state_dict"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)


def test_chunks_make_the_same_run(whole, tmp_path):
    config, overrides = _begin_again(whole, tmp_path)
    chosen = _stage(config, "lemma", *overrides)
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


def test_a_spent_budget_stops_after_a_step(whole, tmp_path):
    config, overrides = _begin_again(whole, tmp_path)
    outcome = fit(_stage(config, "lemma", *overrides), minutes=0)
    assert (outcome.step, outcome.finished) == (1, False)
    assert (outcome.folder / "last.ckpt").is_file()


def test_changed_settings_do_not_go_on_unasked(whole, tmp_path):
    config, overrides = _begin_again(whole, tmp_path)
    fit(_stage(config, "lemma", *overrides), steps=1)
    changed = _stage(config, "lemma", *overrides, "optimizer.learning_rate=0.01")
    with pytest.raises(SettingsError, match=r"optimizer.learning_rate was 0.001, is 0.01"):
        fit(changed)
    assert fit(changed, steps=1, accept_changes=True).step == 2
    assert fit(changed, steps=1, restart=True).step == 1
    workers = _stage(config, "lemma", *overrides, "optimizer.learning_rate=0.01", "data.workers=1")
    assert fit(workers, steps=1).step == 2


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
    rows = curves.read(whole[0].parent / "run" / "lemma" / "metrics.csv")
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
    rows = curves.read(folder / "metrics.csv")
    pixels = [value for _, name, value in rows if name == "train/pixel"]
    assert pixels[-1] < pixels[0]
    psnr = {value: step for step, name, value in rows if name == "validation/psnr"}
    best = json.loads((folder / "result.json").read_text())["best"]
    assert best["psnr"] == max(psnr)
    assert best["step"] == psnr[max(psnr)]
    assert sorted(psnr.values()) == [4, 8, 12]


def test_bfloat16_and_tensorboard(tmp_path):
    chosen = _stage(
        write_config(tmp_path),
        "lemma",
        "run.precision=bfloat16",
        "run.tensorboard=true",
        "run.steps=2",
    )
    assert fit(chosen).finished
    assert list((chosen.folder / "tensorboard").glob("events.*"))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    chosen = _stage(write_config(tmp_path), "lemma", "optimizer.learning_rate=1e30")
    with pytest.raises(FloatingPointError, match="the loss is"):
        fit(chosen)


@pytest.mark.slow
def test_two_ranks_train_one_network(tmp_path):
    config = write_config(tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "lemma_fast.cli", "train", str(config), "--stage", "lemma", "run.steps=4"]
    options = ["run.devices=2", "run.accelerator=cpu", "run.ema=null", "export=float32"]
    ran = subprocess.run(
        [*launch, *command, *options],
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
    chosen = _stage(config, "lemma")
    _, judged, _ = split(chosen.data)
    whole = EncodedCrops(judged, 26).__getitems__(range(len(judged)))
    module = LemmaStage(chosen, 1, 1)
    module.network = lemma_fast.load(folder / "last.safetensors")
    with torch.no_grad():
        expected = module.scores(whole)["psnr"].mean().item()
    assert result["last"]["psnr"] == pytest.approx(expected, abs=1e-4)


def test_settings_of_a_stage_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings("lemma").seed = 3
