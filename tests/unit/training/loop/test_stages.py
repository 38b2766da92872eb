"""Stages: operations, schedule, the average of the weights, and weights in and out."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import READING, stage_of, write_config

import lemma_fast
from lemma_fast import LEMMA, checkpoint
from lemma_fast.ops import cpu, extension, fused, reference
from lemma_fast.training.data.batches import EncodedCrops
from lemma_fast.training.data.labels import encode_prior_labels
from lemma_fast.training.data.pairs import TextZoomDataset
from lemma_fast.training.loop import weights
from lemma_fast.training.loop.average import Average
from lemma_fast.training.loop.fit import fit, rate_factor
from lemma_fast.training.loop.stages import (
    LanguageStage,
    PriorStage,
    RestorationStage,
    op_table,
)
from lemma_fast.training.losses.lemma import IGNORED, without_padding
from lemma_fast.training.losses.prior import reading_loss, simulated_reading
from lemma_fast.training.settings.schema import OptimizerSettings
from lemma_fast.training.settings.values import SettingsError

# Networks this small only lose by more.
pytestmark = pytest.mark.usefixtures("one_thread")


def test_fused_operations_that_are_missing_are_one_sentence(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(SettingsError, match="triton.*write ops: reference"):
        op_table("fused")


@pytest.mark.skipif(not cpu.available(), reason=str(extension.missing()))
def test_native_operations_are_the_reference_but_for_the_fusion():
    table = op_table("native")
    assert table.adafm is fused.adafm
    others = set(reference.__all__) - {"adafm"}
    assert all(getattr(table, name) is getattr(reference, name) for name in others)


def test_native_operations_without_a_compiler_are_one_sentence(monkeypatch):
    extension.load.cache_clear()
    monkeypatch.setattr(extension, "missing", lambda: "the extension was not built")
    with pytest.raises(SettingsError, match="ops: native cannot be used.*not built"):
        op_table("native")


def test_a_prior_of_rate_zero_stays_as_it_is(tmp_path):
    settings = stage_of(write_config(tmp_path), "lemma", "optimizer.prior_learning_rate=0")
    module = RestorationStage(settings)
    before = {name: tensor.clone() for name, tensor in module.network.prior.state_dict().items()}
    for _ in range(2):
        sr, _ = module.network(torch.rand(2, 4, 16, 64))
        sr.mean().backward()
        # as after a validation
        module.eval()
        module.train()
    assert module.network.stem.weight.grad is not None
    assert all(parameter.grad is None for parameter in module.network.prior.parameters())
    torch.testing.assert_close(module.network.prior.state_dict(), before, atol=0, rtol=0)


def test_the_loss_of_reading_is_the_priors_opinion(tmp_path):
    prior = PriorStage(stage_of(write_config(tmp_path), "prior")).network.eval()
    generator = torch.Generator().manual_seed(4)
    sr, hr = torch.rand(2, 2, 3, 32, 128, generator=generator).unbind()
    ids = encode_prior_labels(["lid", "a"], prior.config.max_length)
    places = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    (seen, _), (_, there) = prior(sr), prior(hr)
    expected = 0.0
    for n, t in places:
        expected -= seen.img_logits[n, t].log_softmax(-1)[ids[n, t]] / len(places)
        expected += (prior(sr)[1][n, t] - there[n, t]).abs().sum() / len(places)
    torch.testing.assert_close(reading_loss(prior, sr, hr, ids), expected)


def test_the_loss_of_reading_teaches_the_network_and_not_the_prior(tmp_path):
    config = write_config(tmp_path)
    module = RestorationStage(stage_of(config, "lemma", *READING))
    crops = EncodedCrops(TextZoomDataset(tmp_path / "train.lmdb"), 26)
    terms = module._forward(crops.__getitems__([0, 3]))[-1]
    torch.testing.assert_close(terms["loss"], terms["pixel"] + 0.25 * terms["reading"])
    terms["reading"].backward()
    assert module.network.stem.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in module.network.prior.parameters())


def test_a_simulated_reading_errs_within_words_alone():
    ids = encode_prior_labels(["lemma", "a"] * 500, 8)
    read = simulated_reading(ids, torch.Generator().manual_seed(1))
    torch.testing.assert_close(read.sum(-1), torch.ones(ids.shape))
    assert read.min() >= 0
    word = without_padding(ids) != IGNORED
    wrong = read.argmax(-1) != ids
    # 20 % are replaced, and a few of the right ones lose to a doubt
    assert 0.17 < wrong[word].float().mean() < 0.25
    assert wrong[~word].float().mean() < 0.05
    again = simulated_reading(ids, torch.Generator().manual_seed(1))
    assert torch.equal(read, again)


@pytest.mark.parametrize("words", [None, "builtin"])
def test_the_language_part_learns_to_spell_alone(tmp_path, words):
    config = write_config(tmp_path)
    overrides = [f"data.words={words or 'null'}", "run.steps=60", "optimizer.learning_rate=1e-2"]
    chosen = stage_of(config, "language", *overrides)
    module = LanguageStage(chosen)
    assert not any(parameter.requires_grad for parameter in module.network.vision.parameters())
    before = {name: tensor.clone() for name, tensor in module.network.state_dict().items()}
    crops = EncodedCrops(TextZoomDataset(tmp_path / "train.lmdb"), 26)
    batch = crops.__getitems__(range(len(crops)))
    first = module.scores(batch)["loss"].mean()
    assert fit(chosen).best["loss"] < 0.8 * first
    after = load_file(chosen.folder / "best.safetensors")
    for name, tensor in before.items():
        learned = name.startswith("language.") and "positions" not in name
        assert torch.equal(after[name], tensor) != learned, name
    prior = stage_of(config, "prior", "start.weights=stage:language")
    torch.testing.assert_close(dict(PriorStage(prior).network.state_dict()), after, rtol=0, atol=0)


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
    module = RestorationStage(stage_of(write_config(tmp_path), "lemma"))
    (rest, fast), (prior, slow) = module.parameter_groups()
    assert (fast, slow) == (1e-3, 1e-4)
    assert {id(p) for p in prior} == {id(p) for p in module.network.prior.parameters()}
    assert len(rest) + len(prior) == len(list(module.network.parameters()))


def test_the_average_follows_the_weights_and_gives_them_back(tmp_path):
    network = RestorationStage(stage_of(write_config(tmp_path), "lemma")).network
    weight, norm = network.stem.weight, network.tail.norm
    first = weight.detach().clone()
    average = Average(network, 0.75)
    with torch.no_grad():
        weight.add_(1)
        norm.num_batches_tracked.add_(3)
    average.update(0)
    # At first it follows faster than it is told to: 1 / 10 of the old is kept.
    torch.testing.assert_close(average.state["stem.weight"], first + 0.9)
    average.update(1000)
    torch.testing.assert_close(average.state["stem.weight"], first + 0.9 + 0.25 * 0.1)
    with average.in_place():
        torch.testing.assert_close(weight.detach(), first + 0.925)
        assert norm.num_batches_tracked == 3
    torch.testing.assert_close(weight.detach(), first + 1)


def test_half_storage_leaves_buffers_alone(tmp_path):
    config = write_config(tmp_path)
    network = LEMMA(stage_of(config, "lemma", "model.rectification=true").lemma_config())
    with torch.no_grad():
        network.stem.weight[0, 0, 0, 0] = 1 / 3
    weights.save(network, tmp_path / "half.safetensors", {"seed": "7"}, "float16")
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
        weights.save(network, tmp_path / "half.safetensors", {}, "float16")


def test_a_prior_starts_a_network(tmp_path):
    config = write_config(tmp_path)
    prior = PriorStage(stage_of(config, "prior")).network
    (tmp_path / "run" / "prior").mkdir(parents=True)
    weights.save(prior, tmp_path / "run" / "prior" / "best.safetensors", {}, "float32")
    module = RestorationStage(stage_of(config, "lemma", "start.prior=stage:prior"))
    torch.testing.assert_close(module.network.prior.state_dict(), prior.state_dict())

    whole = tmp_path / "whole.safetensors"
    checkpoint.save(module.network, whole)
    again = RestorationStage(stage_of(config, "lemma", f"start.prior={whole}"))
    torch.testing.assert_close(again.network.prior.state_dict(), prior.state_dict())

    published = tmp_path / "published.pth"
    names = checkpoint.to_published(module.network)
    head = "position_prior."
    ours = {n.removeprefix(head): t for n, t in names.items() if n.startswith(head)}
    torch.save({"model": ours}, published)
    again = RestorationStage(stage_of(config, "lemma", f"start.prior={published}"))
    torch.testing.assert_close(again.network.prior.state_dict(), prior.state_dict())

    wider = stage_of(config, "lemma", "start.prior=stage:prior", "model.prior.key_width=12")
    with pytest.raises(SettingsError, match="prior of other sizes"):
        RestorationStage(wider)
    with pytest.raises(SettingsError, match="train the stage before"):
        RestorationStage(stage_of(config, "lemma", "start.prior=stage:crnn"))
