"""The baselines of Table 3: shapes, the papers' counts of parameters, weights in and out."""

import json

import pytest
import torch
import torch.nn.functional as F
from baseline_sizes import SMALL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_training import stage_of, write_baselines, write_config, write_set
from typer.testing import CliRunner

from lemma_fast import LEMMA, CheckpointError, checkpoint
from lemma_fast.baselines import (
    BaselineConfig,
    create_baseline,
    list_baselines,
    load_baseline,
    open_network,
    save_baseline,
)
from lemma_fast.devices import device_of
from lemma_fast.training.cli import app
from lemma_fast.training.data.batches import EncodedCrops, split
from lemma_fast.training.data.pairs import TextZoomDataset
from lemma_fast.training.evaluation.contact_sheet import contact_sheet
from lemma_fast.training.evaluation.evaluate import measure, open_readers
from lemma_fast.training.loop.curves import read_curves
from lemma_fast.training.loop.fit import fit
from lemma_fast.training.loop.stages import RestorationStage
from lemma_fast.training.losses.lemma import gradient_profile, gradient_profile_loss
from lemma_fast.training.networks import super_resolve

# Networks this small only lose by more.
pytestmark = pytest.mark.usefixtures("one_thread")


def _parameters(name, weights_only=False, **changes):
    named = create_baseline(name, **changes).named_parameters()
    return sum(p.numel() for key, p in named if not weights_only or key.endswith(".weight"))


def _state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("in_channels", [3, 4])
@pytest.mark.parametrize("name", SMALL)
def test_both_sides_are_doubled(name, in_channels):
    model = create_baseline(name, in_channels=in_channels, **SMALL[name])
    lr = torch.rand(3, in_channels, 16, 64)
    for training in (True, False):
        assert model.train(training)(lr).shape == (3, in_channels, 32, 128)
    alone = torch.cat([model(crop[None]) for crop in lr])
    torch.testing.assert_close(model(lr), alone)
    with pytest.raises(ValueError, match=rf"lr must be \[N, {in_channels}, 16, 64\], got \[3, 5,"):
        model(torch.rand(3, 5, 16, 64))
    assert device_of(model) == torch.device("cpu")


def test_the_papers_counts():
    # SRCNN: 8,032 weights on luminance; they are linear in the number of channels.
    three, four = (_parameters("srcnn", True, in_channels=n) for n in (3, 4))
    assert three - 2 * (four - three) == 8032
    # SRResNet: 1.5 M with the second sub-pixel convolution, which makes the size four times.
    second = 64 * 256 * 9 + 256 + 1
    assert round((_parameters("srresnet", in_channels=3) + second) / 1e6, 2) == 1.55
    # TSRN: 2.68 M with the alignment that it has in training, 0.83 M without.
    assert round(_parameters("tsrn") / 1e6, 2) == 2.68
    assert round(_parameters("tsrn", rectification=False) / 1e6, 2) == 0.83
    assert _parameters("bicubic") == 0


def test_bicubic_is_that_of_the_published_tables():
    lr = torch.rand(2, 4, 16, 64)
    expected = F.interpolate(lr, (32, 128), mode="bicubic", align_corners=False)
    torch.testing.assert_close(create_baseline("bicubic")(lr), expected)


def test_tsrn_is_rectified_in_training_alone():
    model = create_baseline("tsrn", **SMALL["tsrn"])
    calls = []
    model.rectifier.register_forward_hook(lambda *_: calls.append(1))
    model.eval()(torch.rand(2, 4, 16, 64))
    assert not calls
    model.train()(torch.rand(2, 4, 16, 64))
    assert calls
    assert create_baseline("tsrn", **SMALL["tsrn"], rectification=False).rectifier is None


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="no baseline 'edsr'; there are bicubic, srcnn, srresnet"):
        create_baseline("edsr")
    assert list_baselines() == list(SMALL)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("srcnn", {"in_channels": 1}, "3 .RGB. or 4"),
        ("srcnn", {"blocks": 2}, "srcnn has no blocks"),
        ("srresnet", {"blocks": 0}, "at least 1 block"),
        ("srresnet", {"rectification": True}, "no rectification"),
        ("tsrn", {"channels": 7}, "even number"),
        ("tsrn", {"width": 7}, "unknown entries in BaselineConfig: width"),
    ],
)
def test_sizes_that_a_baseline_has_not(name, changes, message):
    with pytest.raises(ValueError, match=message):
        BaselineConfig.paper(name, **changes)


@pytest.mark.parametrize(
    ("name", "rate", "changes"),
    [
        ("srcnn", 1e-2, {"channels": 32}),
        ("srresnet", 5e-3, {"channels": 16, "blocks": 1}),
        ("tsrn", 3e-3, {"channels": 16, "blocks": 1, "rectification": False}),
    ],
)
def test_a_tiny_batch_is_learnt_beyond_bicubic(tmp_path, name, rate, changes):
    torch.manual_seed(0)
    lr, hr, _, _ = TextZoomDataset(write_set(tmp_path / "set.lmdb", 1)).raw([0])
    # Grey, far from where tanh is flat; and what is to be doubled is too dark besides.
    lr, hr = lr / 850, hr / 510
    model = create_baseline(name, in_channels=3, **changes)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(50):
        optimizer.zero_grad()
        F.mse_loss(model(lr), hr).backward()
        optimizer.step()
    with torch.no_grad():
        learnt, bicubic = (
            F.mse_loss(network(lr), hr)
            for network in (model.eval(), create_baseline("bicubic", in_channels=3))
        )
    assert learnt < bicubic / 2


# Weights in and out


@pytest.mark.parametrize("name", SMALL)
def test_weights_come_back(tmp_path, name):
    torch.manual_seed(0)
    model = create_baseline(name, **SMALL[name]).eval()
    path = tmp_path / "model.safetensors"
    save_baseline(model, path, {"seed": "7"})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["seed"] == "7"
    assert json.loads(metadata["config"])["name"] == name
    loaded = open_network(path)
    assert not loaded.training
    assert loaded.config == model.config
    lr = torch.rand(2, model.config.in_channels, 16, 64)
    torch.testing.assert_close(loaded(lr), model(lr), rtol=0, atol=0)


def test_one_call_opens_both_kinds(tmp_path):
    lemma = LEMMA(stage_of(write_config(tmp_path), "lemma").lemma_config())
    checkpoint.save(lemma, tmp_path / "lemma.safetensors")
    lr = torch.rand(2, 4, 16, 64)
    opened = open_network(tmp_path / "lemma.safetensors")
    sr, prior = super_resolve(opened, lr)
    torch.testing.assert_close(sr, lemma.eval()(lr)[0])
    assert prior is not None
    three = create_baseline("srcnn", in_channels=3, channels=8)
    sr, prior = super_resolve(three, lr)
    torch.testing.assert_close(sr, three(lr[:, :3]))
    assert prior is None
    assert super_resolve(open_network("bicubic"), lr)[0].shape == (2, 4, 32, 128)


def test_files_that_are_no_baseline(tmp_path):
    path = tmp_path / "model.safetensors"
    save_baseline(create_baseline("srcnn", channels=8), path)
    with pytest.raises(CheckpointError, match="its format is 'lemma-fast baseline 1'"):
        checkpoint.load(path)
    state = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for changes, tensors, message in (
        ({}, {**state, "map.bias": state["map.bias"] + 1}, "damaged"),
        ({"config": '{"name": "srcnn", "channels": 7}'}, state, "its config cannot be used: chan"),
        ({"config": '{"name": "srcnn", "depth": 7}'}, state, "its config cannot be used"),
        ({"config": "[]"}, state, "its config cannot be used"),
        ({"config": '{"name": "srcnn", "crnn": {"depth": 7}}'}, state, "its config cannot be used"),
        ({"config": '{"name": "srcnn"}'}, state, "does not fit SRCNN.*misshapen"),
        ({"format": "another"}, state, "its format is 'another'"),
    ):
        save_file(tensors, path, {**metadata, **changes})
        with pytest.raises(CheckpointError, match=message):
            load_baseline(path)
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        open_network(tmp_path / "torn.safetensors")


def test_names_without_weights():
    with pytest.raises(CheckpointError, match="srresnet comes without weights: train it"):
        open_network("srresnet")
    with pytest.raises(CheckpointError, match="TATT comes without weights: .* --stage tatt"):
        open_network("TATT")
    with pytest.raises(CheckpointError, match="no weights named 'edsr'"):
        open_network("edsr")


# Training


def test_the_stage_trains_what_its_settings_say(tmp_path):
    config = write_baselines(tmp_path)
    network = RestorationStage(stage_of(config, "tsrn")).network
    assert network.config == BaselineConfig("tsrn", 4, 8, 1, False)
    (tmp_path / "run" / "tsrn").mkdir(parents=True)
    save_baseline(network, tmp_path / "run" / "tsrn" / "best.safetensors")
    again = RestorationStage(stage_of(config, "tsrn", "start.weights=stage:tsrn")).network
    torch.testing.assert_close(_state(again), _state(network))
    with pytest.raises(ValueError, match="does not fit TSRN"):
        RestorationStage(stage_of(config, "tsrn", "start.weights=stage:tsrn", "baseline.blocks=2"))


def test_gradient_profiles():
    ramp = torch.arange(8.0).expand(1, 3, 4, 8) / 10
    flat = torch.zeros(1, 3, 4, 8)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    # A slope of 0.1 a pixel, and next to nothing where there is none.
    slope = gradient_profile(ramp)[inner]
    torch.testing.assert_close(slope, torch.full((1, 3, 2, 6), 0.1), atol=1e-4, rtol=0)
    torch.testing.assert_close(gradient_profile(flat), torch.full((1, 3, 4, 8), 1e-3))
    assert gradient_profile_loss(ramp, ramp) == 0
    assert gradient_profile_loss(ramp, flat) > 0.09


def test_all_stages_of_a_config_are_trained(tmp_path):
    config = write_baselines(tmp_path)
    for name in ("srcnn", "srresnet", "tsrn"):
        outcome = fit(stage_of(config, name))
        assert outcome.finished
        assert set(outcome.best) >= {"psnr", "ssim", "loss", "step"}
        network = open_network(outcome.folder / "best.safetensors")
        assert network.config == stage_of(config, name).baseline_config()
        with safe_open(outcome.folder / "best.safetensors", "pt") as file:
            assert json.loads(file.metadata()["settings"])["stage"] == name
        rows = read_curves(outcome.folder / "metrics.csv")
        profiles = [value for _, term, value in rows if term == "train/gradient_profile"]
        assert bool(profiles) == (name == "tsrn")
    # The weight of the profile is in the objective.
    batch = EncodedCrops(split(stage_of(config, "tsrn").data)[0], 26).__getitems__([0, 1])
    stage = RestorationStage(stage_of(config, "tsrn", "loss.gradient_profile=0.5"))
    terms = stage.scores(batch)
    expected = terms["pixel"] + 0.5 * terms["gradient_profile"]
    torch.testing.assert_close(terms["loss"], expected)


# Evaluation


def test_a_baseline_is_evaluated_like_lemma(tmp_path):
    crops = TextZoomDataset(write_set(tmp_path / "set.lmdb", 6))
    bicubic = measure(open_network("bicubic"), "set", crops, {}, batch_size=4)
    assert bicubic.rows["SR"].psnr == pytest.approx(bicubic.rows["bicubic"].psnr)
    assert abs(bicubic.gain).max() < 1e-5
    model = create_baseline("srcnn", channels=8, in_channels=3)
    subset = measure(model, "set", crops, {})
    assert subset.rows["SR"].psnr != pytest.approx(subset.rows["bicubic"].psnr)
    sheet = contact_sheet(model, [subset], [crops], {})
    lemma = LEMMA(stage_of(write_config(tmp_path), "lemma").lemma_config())
    theirs = contact_sheet(lemma, [measure(lemma, "set", crops, {})], [crops], {})
    # One column, the attention, is LEMMA's alone.
    assert sheet.height == theirs.height
    assert sheet.width < theirs.width
    with pytest.raises(ValueError, match="srcnn has no prior that reads"):
        open_readers("prior", model, "cpu")


def test_the_command_evaluates_a_baseline(tmp_path):
    test = write_set(tmp_path / "test_easy.lmdb", 4)
    weights = tmp_path / "srcnn.safetensors"
    save_baseline(create_baseline("srcnn", channels=8), weights)
    for name in (weights, "bicubic"):
        ran = CliRunner().invoke(
            app, ["evaluate", str(test), "--model", str(name), "--recognizer", "", "--json"]
        )
        assert ran.exit_code == 0, ran.output
        assert set(json.loads(ran.stdout)["results"]["easy"]) == {"bicubic", "SR", "HR"}
    for name, message in (("edsr", "no weights named"), ("tsrn", "comes without weights")):
        ran = CliRunner().invoke(app, ["evaluate", str(test), "--model", name])
        assert ran.exit_code == 2
        assert message in ran.stderr
    ran = CliRunner().invoke(app, ["evaluate", str(test), "--model", "bicubic"])
    assert ran.exit_code == 2
    assert "bicubic has no prior that reads" in ran.stderr


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_baseline_is_saved_as_itself(tmp_path, wrap):
    plain = create_baseline("srcnn", channels=8)
    save_baseline(wrap(plain), tmp_path / "a.safetensors")
    opened = open_network(tmp_path / "a.safetensors")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, opened.state_dict()[name])
