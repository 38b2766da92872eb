"""RCAN, SAN and C3-STISR against the published modules' numbers.

RCAN and SAN take a second a crop, so that one is evaluated, and a step's gradients are compared in
fp32, where they may differ by ten times what the published code's own do. In fp64 they were
compared once: docs/log.md.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from baseline_fill import Step, assert_near, check_fill, golden, in_training, published_state
from recognizer_fill import images
from recognizer_fill import published_state as recognizer_state
from torch import Tensor, nn

from lemma_fast.baselines import build_baseline, from_published
from lemma_fast.baselines.san import covariance, square_root
from lemma_fast.checkpoint.files import load_strictly
from lemma_fast.checkpoint.published import published_name
from lemma_fast.recognizers import CRNN

pytestmark = pytest.mark.slow

C3 = "c3stisr"
# Outputs of modules, by the names of the stored arrays.
MODULES = {
    "rcan": {
        "rcab0_c8": "groups.0.blocks.0",
        "ca0": "groups.0.blocks.0.gate",
        "group0_c8": "groups.0",
        "group9_c8": "groups.9",
        "body_c8": "tail",
    },
    "san": {
        "nonlocal_first_c8": "regions",
        "soca_gate": "groups.0.gate",
        "rb9_c8": "groups.0.blocks.9",
        "group0_c8": "groups.0",
        "group19_c8": "groups.19",
    },
    C3: {
        "down_conv_c4": "clues.centre",
        "dcn_rec": "clues.recognition_attention.deform",
        "dsta_rec_c4": "clues.recognition_attention",
        "dsta_ling_c4": "clues.linguistic_attention",
        "gated_c4": "clues.fusion",
        "block2_c8": "blocks.0",
        "block6_c8": "blocks.4",
    },
}


def record(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What the modules return in the passes to come, the first time."""
    seen: dict[str, Tensor] = {}

    def watch(array: str, module: nn.Module) -> None:
        def hook(_module: nn.Module, _inputs: object, out: Tensor) -> None:
            seen.setdefault(array, out.detach())

        module.register_forward_hook(hook)

    for array, module in MODULES[name].items():
        watch(array, model.get_submodule(module))
    return seen


def assert_seen(seen: dict[str, Tensor], name: str) -> None:
    assert set(seen) == set(MODULES[name])
    for array, got in seen.items():
        every = {"c8": 8, "c4": 4}.get(array[-2:], 1)
        stored = golden(f"{name}_seed1")[array].shape[1]
        assert_near(got[:, ::every][:, :stored], name, array)


@pytest.mark.parametrize("name", MODULES)
def test_fill_rule_is_the_one_of_the_goldens(name):
    check_fill(name)


@pytest.mark.parametrize("name", ["rcan", "san"])
def test_one_crop(name):
    model = from_published(published_state(name))
    seen = record(model, name)
    with torch.no_grad():
        assert_near(model(images("lr")[:1, :3]), name, "sr")
    assert_seen(seen, name)
    if name == "san":
        with torch.no_grad():
            correlation = covariance(model.groups[0].blocks(seen["nonlocal_first_c8"]))
        assert_near(correlation[:, ::8], name, "cov_r8")
        assert_near(square_root(correlation)[:, ::8], name, "sqrt_r8")


def test_rcan_with_a_mask_has_no_mean_shift():
    model = from_published(published_state("rcan", channels=4))
    assert model.config.in_channels == 4
    with torch.no_grad():
        assert_near(model(images("lr")[:1]), "rcan", "sr_c4_noshift")


@pytest.mark.parametrize("name", ["rcan", "san"])
def test_a_training_step(name):
    stored = golden(f"{name}_train_seed1")
    model = from_published(published_state(name))
    model.train()
    loss = F.l1_loss(model(images("lr")[:2, :3]), images("hr")[:2, :3])
    loss.backward()
    assert loss.item() == pytest.approx(float(stored["loss"]), rel=1e-6)
    names = model.published.names(model.config)
    actual = {published_name(n, names): p.grad for n, p in model.named_parameters()}
    zero, none = set(stored["zero_grad"].tolist()), set(stored["none_grad"].tolist())
    keys = stored["param_keys"].tolist()
    assert set(actual) == set(keys) - none
    assert all(model.published.is_unused(key) for key in none)
    rows = zip(keys, stored["grad_norm"], stored["fp32_grad_rel_noise"], strict=True)
    for key, norm, noise in rows:
        if key in none:
            continue
        got = float(actual[key].norm())
        if key in zero:
            assert got < 1e-4, key
        else:
            assert got == pytest.approx(norm, rel=max(1e-4, 10 * float(noise))), key


@pytest.fixture(scope="module")
def reader() -> CRNN:
    crnn = CRNN()
    load_strictly(crnn, recognizer_state("crnn", 1), "state")
    return crnn.eval()


def clues(model: nn.Module, read: Tensor) -> Tensor:
    """What is read and what is spelled, [2, N, 26, 37]."""
    return torch.stack([read, model.clues.spell(read).softmax(2)])


def stored_prior() -> Tensor:
    return torch.from_numpy(golden(f"{C3}_seed1")["prior"]).squeeze(2).transpose(1, 2)


@torch.no_grad()
def test_c3stisr(reader):
    model = from_published(published_state(C3), reader=reader)
    lr, prior = images("lr")[:2], stored_prior()
    seen = record(model, C3)
    assert_near(model.clues.spell(prior), C3, "lm_logits")
    assert_near(model.restore(lr, clues(model, prior)), C3, "sr")
    assert_seen(seen, C3)
    assert_near(model(lr), C3, "sr_crnn")


@torch.no_grad()
def test_c3stisr_as_committed(reader):
    fused = from_published(published_state(C3), reader=reader)
    model = build_baseline(dataclasses.replace(fused.config, committed=True))
    model.load_state_dict(fused.state_dict())
    prior = clues(model.eval(), stored_prior()[:1])
    assert_near(model.restore(images("lr")[:1], prior), C3, "sr_committed")


def test_a_training_step_of_c3stisr():
    network, lr, hr, seen = in_training(C3, CRNN().eval(), 2)
    network.reader.requires_grad_(False)
    sr = network.restore(lr, clues(network, stored_prior().double()))
    loss = (sr - hr).square().mean()
    loss.backward()
    Step(network, sr.detach(), loss.detach(), seen).check(golden(f"{C3}_train_seed1"))
