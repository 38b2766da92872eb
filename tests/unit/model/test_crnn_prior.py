"""CRNN in ABINet's place: its steps, where they look, its weights, and the network around it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recognizer_fill import DATA, images, published_state
from safetensors.torch import load_file
from tiny_training import write_config

import lemma_fast
from lemma_fast import LEMMA, CheckpointError, LemmaConfig, Upscaler, checkpoint
from lemma_fast.config import CRNNConfig
from lemma_fast.model.crnn_prior import CRNNPrior, step_maps
from lemma_fast.recognizers import CRNN
from lemma_fast.training.data.batches import Batch, EncodedCrops, split
from lemma_fast.training.evaluation.evaluate import PriorReader
from lemma_fast.training.loop.fit import fit
from lemma_fast.training.loop.stages import PriorStage, RestorationStage
from lemma_fast.training.losses.lemma import crnn_ctc_loss
from lemma_fast.training.settings.schema import Settings, choose
from lemma_fast.training.settings.values import SettingsError

SIZES = CRNNConfig((4, 4, 4, 4, 8, 8, 8), hidden=8, corrected=True)
TINY = replace(LemmaConfig.small(), num_blocks=1, text_prior="crnn", crnn=SIZES)


@pytest.fixture
def prior() -> CRNNPrior:
    torch.manual_seed(0)
    return CRNNPrior(TINY).eval()


def stepwise(text: str) -> torch.Tensor:
    """Logits [1, 26, 37] of steps spelled as `text`, "-" being the blank."""
    logits = torch.zeros(1, 26, 37)
    for step, character in enumerate(text.ljust(26, "-")):
        logits[0, step, 0 if character == "-" else TINY.charset.index(character) + 1] = 9.0
    return logits


@pytest.mark.parametrize(
    ("steps", "text", "length"),
    [
        ("-aa-a--b0", "aab0", 9),
        ("--------------------------", "", 2),
        ("a", "a", 2),
        ("-------------------------9", "9", 26),
    ],
)
def test_steps_make_a_text_and_a_length(prior, steps, text, length):
    logits = stepwise(steps)
    assert TINY.spell(logits[0].argmax(1).tolist()) == text
    assert prior.valid_lengths(logits).tolist() == [length]
    # ABINet's prior stops at the first 0, and knows repeats.
    assert LemmaConfig.small().spell([1, 1, 36, 0, 2]) == "aa0"


def test_the_distribution_is_that_of_the_published_network():
    """The recogniser's golden, in the prior's order of classes."""
    prior = CRNNPrior(replace(LemmaConfig.small(), text_prior="crnn", crnn=CRNNConfig())).eval()
    prior.network.load_state_dict(published_state("crnn", 1))
    batch = images("lr")[:, :3]
    with torch.no_grad():
        found, h_attn = prior(batch)
        steps = prior.network(prior.network.prepare(batch))
    assert torch.equal(prior.ctc_steps(found.text_logits), steps)
    assert found.img_logits is found.text_logits
    texts = [reading.text for reading in prior.network.read(batch)]
    assert texts == [reading.text for reading in PriorReader(prior).read(batch)]
    assert texts == golden_texts()
    assert h_attn.shape == (4, 26, 8, 32)
    assert found.attn_map.shape == (4, 26, 16, 64)


def golden_texts() -> list[str]:
    with np.load(DATA / "crnn_seed1.npz") as arrays:
        return arrays["text_lr"].tolist()


def test_steps_look_where_the_convolutions_do():
    """The middle of what a step's features depend on is at t / 25 of the width."""
    network = CRNN(SIZES).eval()
    strip = torch.zeros(1, 1, 32, 100).requires_grad_()
    for weights in network.cnn.parameters():
        torch.nn.init.constant_(weights, 0.1)
    # Maxima of equal numbers pass their gradient to one: by means nothing is hidden.
    x = strip
    for layer in network.cnn:
        if isinstance(layer, torch.nn.MaxPool2d):
            padding = layer.padding
            layer = torch.nn.AvgPool2d(layer.kernel_size, layer.stride, padding)
        x = layer(x)
    for step in range(8, 18):
        (gradient,) = torch.autograd.grad(x[0, 0, 0, step], strip, retain_graph=True)
        seen = gradient.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
        middle = (seen.min().item() + seen.max().item() + 1) / 2
        assert middle / 100 == pytest.approx(step / 25)


@pytest.mark.parametrize("size", [(8, 32), (8, 16)], ids=str)
def test_maps_follow_their_steps(size):
    maps = step_maps(*size)
    assert maps.shape == (26, *size)
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(26))
    places = (torch.arange(size[1]) + 0.5) / size[1]
    middle = (maps.sum(1) * places).sum(1)
    assert (middle[1:] > middle[:-1]).all()
    assert (middle[1:-1] - torch.linspace(0, 1, 26)[1:-1]).abs().max() < 0.5 / size[1]
    # Rows in the middle count most, as much above as below.
    assert (maps.sum(2).diff(dim=1)[:, : size[0] // 2 - 1] > 0).all()
    torch.testing.assert_close(maps, maps.flip(1))


def test_a_blank_step_looks_nowhere(prior, monkeypatch):
    logits = stepwise("---x----------------------") * 10
    monkeypatch.setattr(
        prior.network, "forward", lambda grey: prior.ctc_steps(logits), raising=True
    )
    _, h_attn = prior(torch.rand(1, 3, 16, 64))
    torch.testing.assert_close(h_attn[0, 3], prior.maps[3])
    assert h_attn[0].sum(dim=(1, 2)).round(decimals=4).tolist() == [0, 0, 0, 1] + 22 * [0]


def test_a_network_learns_through_it(tmp_path):
    torch.manual_seed(0)
    model = LEMMA(TINY)
    sr, _ = model(torch.rand(2, 4, 16, 64))
    assert sr.shape == (2, 4, 32, 128)
    sr.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.prior.network.cnn.conv0.weight.grad.abs().sum() > 0
    assert [name for name in model.state_dict() if name.startswith("prior.")] == [
        f"prior.network.{name}" for name in model.prior.network.state_dict()
    ]
    checkpoint.save(model, tmp_path / "model.safetensors")
    again = lemma_fast.load(tmp_path / "model.safetensors")
    assert again.config == TINY
    lr = torch.rand(2, 4, 16, 64)
    with torch.no_grad():
        assert torch.equal(again(lr)[0], model.eval()(lr)[0])
    with pytest.raises(CheckpointError, match="no place for .*prior.network"):
        checkpoint.convert(tmp_path / "model.safetensors", tmp_path / "model.pth")


def test_a_trained_crnn_starts_it(tmp_path):
    model, reader = LEMMA(TINY), CRNN(SIZES)
    reader.save(tmp_path / "crnn.safetensors")
    torch.save(reader.state_dict(), tmp_path / "crnn.pth")
    for name in ("crnn.safetensors", "crnn.pth"):
        with torch.no_grad():
            model.prior.network.cnn.conv0.weight.zero_()
        checkpoint.load_prior(model, tmp_path / name)
        for key, value in reader.state_dict().items():
            assert torch.equal(model.prior.network.state_dict()[key], value), key


def test_what_does_not_fit_the_crnn_is_named(tmp_path):
    model = LEMMA(TINY)
    other = CRNN(replace(SIZES, corrected=False))
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="other.safetensors: a CRNN of other sizes"):
        checkpoint.load_prior(model, tmp_path / "other.safetensors")
    torch.save(LEMMA(LemmaConfig.small()).prior.state_dict(), tmp_path / "abinet.pth")
    with pytest.raises(CheckpointError, match="abinet.pth does not fit CRNN: missing"):
        checkpoint.load_prior(model, tmp_path / "abinet.pth")
    with pytest.raises(CheckpointError, match="one file, not 2"):
        checkpoint.load_prior(model, tmp_path / "a.pth", Path("b.pth"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_prior": "aster"}, "text_prior 'aster' is not one of"),
        ({"text_prior": "crnn", "max_length": 20}, "in 26 steps, not .* in 20"),
        ({"text_prior": "crnn", "charset": "abc"}, "a CRNN reads '0123"),
        ({"crnn": {"channels": [4, 4]}}, "crnn.channels has 2 entries, not 7"),
        ({"crnn": {"width": 4}}, "unknown entries in CRNNConfig: width"),
        ({"crnn": 7}, "'crnn' must be a table"),
    ],
    ids=str,
)
def test_a_wrong_config_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        LemmaConfig.from_dict({**LemmaConfig.small().to_dict(), **changes})


def test_a_config_of_an_earlier_version_has_abinet():
    values = LemmaConfig.small().to_dict()
    del values["text_prior"], values["crnn"]
    assert LemmaConfig.from_dict(values) == LemmaConfig.small()
    assert LemmaConfig.from_dict(TINY.to_dict()) == TINY


def test_upscaling_names_what_the_steps_spell(prior, monkeypatch):
    model = LEMMA(TINY).eval()
    steps = stepwise("-w-oo-r-d")
    monkeypatch.setattr(
        model.prior.network, "forward", lambda grey: model.prior.ctc_steps(steps), raising=True
    )
    record = Upscaler(model, device="cpu").run(torch.rand(3, 16, 64))
    assert (record.text, record.length) == ("word", 9)


CHANGES = [
    "model.text_prior=crnn",
    "model.crnn.channels=[4, 4, 4, 4, 8, 8, 8]",
    "model.crnn.hidden=8",
    "run.steps=2",
    "run.validate_every=2",
]


def stage(folder: Path, name: str, *changes: str) -> Settings:
    path = folder / "tiny.yaml"
    (settings,) = choose(
        path if path.is_file() else write_config(folder), name, [*CHANGES, *changes]
    )
    return settings


def a_batch(settings: Settings) -> Batch:
    train, _, _ = split(settings.data)
    return EncodedCrops(train, settings.lemma_config().max_length).__getitems__([0, 1, 2])


def test_it_is_taught_by_ctc_as_the_recogniser_is(tmp_path):
    module = PriorStage(stage(tmp_path, "prior"))
    batch = a_batch(module.settings)
    network = module.network.network
    images = batch.hr.float() / 255
    torch.manual_seed(0)
    own = crnn_ctc_loss(network(network.prepare(images)), batch.ctc)
    module.settings = replace(module.settings, images="hr")
    torch.testing.assert_close(module.terms(batch, 0, 0)["loss"], own)

    lemma = RestorationStage(stage(tmp_path, "lemma", "loss.weights.fine_tune=1"))
    lemma.network.prior.load_state_dict(module.network.state_dict())
    network = lemma.network.prior.network.eval()
    lemma.network.eval()
    own = crnn_ctc_loss(network(network.prepare(batch.lr.float() / 255)), batch.ctc)
    with torch.no_grad():
        scores = lemma.scores(batch)
    torch.testing.assert_close(scores["fine_tune"][0], own)
    assert set(scores["prior_accuracy"].tolist()) <= {0.0, 1.0}


def test_both_stages_train(tmp_path):
    first = fit(stage(tmp_path, "prior"))
    assert first.finished
    settings = stage(tmp_path, "lemma", "start.prior=stage:prior", "select.metric=psnr")
    fresh = RestorationStage(settings)
    kept = load_file(tmp_path / "run" / "prior" / "best.safetensors")
    for name, value in fresh.network.prior.state_dict().items():
        assert torch.equal(value, kept[name]), name
    assert fit(settings).finished
    trained = lemma_fast.load(tmp_path / "run" / "lemma" / "best.safetensors")
    assert trained.config.text_prior == "crnn"
    assert not torch.equal(
        trained.prior.network.cnn.conv0.weight, kept["network.cnn.conv0.weight"].float()
    )
    wider = stage(tmp_path, "lemma", "start.prior=stage:prior", "model.crnn.hidden=12")
    with pytest.raises(SettingsError, match="prior of other sizes"):
        RestorationStage(wider)
    abinet = stage(tmp_path, "lemma", "start.prior=stage:prior", "model.text_prior=abinet")
    with pytest.raises(SettingsError, match="prior of other sizes"):
        RestorationStage(abinet)


def test_the_stage_of_the_recogniser_starts_it_too(tmp_path):
    reader = CRNN(CRNNConfig((4, 4, 4, 4, 8, 8, 8), hidden=8))
    (tmp_path / "run" / "crnn").mkdir(parents=True)
    reader.save(tmp_path / "run" / "crnn" / "best.safetensors")
    module = RestorationStage(stage(tmp_path, "lemma", "start.prior=stage:crnn"))
    weights = module.network.prior.network.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in reader.state_dict().items())


def test_the_packaged_config_is_the_paper_but_for_the_prior():
    (settings,) = choose("crnn-prior", "lemma")
    assert settings.lemma_config() == replace(LemmaConfig.base(), text_prior="crnn")
