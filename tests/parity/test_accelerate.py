"""`accelerate` against the reference: every output, every way of computing, every ablation."""

import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from closeness import FORWARD, assert_close
from tiny_network import lived_in
from torch import Tensor, nn

from lemma_fast import LEMMA, LemmaConfig, PriorConfig, accelerate
from lemma_fast.acceleration import accelerated, folding
from lemma_fast.ops import extension

HALF = 2e-2
TINY_PRIOR = PriorConfig(
    stem_width=16,
    widths=(16, 16, 24, 24, 32),
    depths=(1, 1, 2, 1, 1),
    heads=4,
    feedforward=48,
    encoder_layers=1,
    key_width=16,
    language_layers=2,
)


@pytest.fixture(scope="module")
def small() -> LEMMA:
    return lived_in(LemmaConfig.small())


@pytest.fixture(scope="module")
def tiny() -> LEMMA:
    return lived_in(dataclasses.replace(LemmaConfig.small(), num_blocks=1, prior=TINY_PRIOR))


def crops(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 4, 16, 64, generator=generator, dtype=torch.float64).to(dtype)


def outputs(network: nn.Module, lr: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        sr, prior = network(lr)
    return {"sr": sr, **prior._asdict()}


def assert_outputs_close(network: nn.Module, model: nn.Module, lr: Tensor, limit: float) -> None:
    got, expected = outputs(network, lr), outputs(model, lr)
    assert list(got) == list(expected)
    assert torch.equal(got.pop("pt_lengths"), expected.pop("pt_lengths"))
    for name, value in got.items():
        assert value.is_contiguous() or not expected[name].is_contiguous(), name
        assert_close(value, expected[name], limit)


def selections(network: nn.Module, model: LEMMA, lr: Tensor) -> tuple[Tensor, Tensor]:
    """The positions [N, K] that either of them selects."""
    chosen = {}
    guidance, folded = model.guidance, network.network.guidance
    original, select = guidance.compress_select, folded._select

    def reference(*args):
        score, chosen["reference"] = original(*args)
        return score, chosen["reference"]

    def fast(*args):
        score, chosen["fast"], order = select(*args)
        return score, chosen["fast"], order

    guidance.compress_select, folded._select = reference, fast
    try:
        outputs(network, lr), outputs(model, lr)
    finally:
        guidance.compress_select, folded._select = original, select
    return chosen["fast"], chosen["reference"]


def without_extension(monkeypatch) -> None:
    monkeypatch.setattr(extension, "missing", lambda: "it was left out")


def without_packing(monkeypatch) -> None:
    without_extension(monkeypatch)
    monkeypatch.setattr(accelerated, "can_pack", lambda device, dtype: False)


@pytest.mark.parametrize(
    "without", [None, without_extension, without_packing], ids=["all", "no C++", "plain"]
)
def test_fp32_is_the_reference_to_rounding_and_selects_the_same(small, monkeypatch, without):
    if without is not None:
        without(monkeypatch)
    fast = accelerate(small)
    assert_outputs_close(fast, small, crops(3), FORWARD)
    assert torch.equal(*selections(fast, small, crops(3)))
    if without is not None:
        assert fast.describe()["not used"] == "it was left out"


def test_folding_is_exact(tiny):
    model = copy.deepcopy(tiny).double()
    fast = accelerate(model)
    assert fast.dtype == torch.float64
    assert_outputs_close(fast, model, crops(2, torch.float64), 1e-12)


ABLATIONS = {
    "all selected": {"feature_selection": False},
    "few selected": {"num_selected": 7},
    "no location": {"location_enhancement": False},
    "no attention": {"character_attention": False},
    "no expansion": {"expansion": False},
    "no region": {"pixel_to_region": False},
    "no text": {"multimodal_alignment": False},
    "no alignment": {"alignment": "none"},
    "one way": {"alignment": "unidirectional"},
    "concatenation": {"adaptive_fusion": False},
    "crnn": {"text_prior": "crnn"},
    "other size": {"height": 8, "width": 32, "num_selected": 100},
}


@pytest.mark.parametrize("switches", ABLATIONS.values(), ids=ABLATIONS)
def test_every_configuration_has_a_fast_form(switches):
    config = dataclasses.replace(LemmaConfig.small(), num_blocks=1, prior=TINY_PRIOR, **switches)
    model = lived_in(config)
    lr = crops(2)[:, :, : config.height, : config.width]
    assert_outputs_close(accelerate(model), model, lr, FORWARD)


def test_bf16_is_near_and_selects_nearly_the_same(small):
    fast = accelerate(small, torch.bfloat16)
    got, expected = outputs(fast, crops(3)), outputs(small, crops(3))
    for name in ("sr", "attn_map", "img_logits", "text_logits"):
        assert got[name].dtype == torch.float32
        assert_close(got[name], expected[name], HALF)
    chosen, wanted = selections(fast, small, crops(3))
    shared = (chosen[:, :, None] == wanted[:, None]).any(dim=2).float().mean()
    assert shared >= 0.98


@pytest.mark.parametrize("count", [1, 9, 11])
def test_a_batch_is_its_images(tiny, count):
    together = outputs(accelerate(tiny), crops(count))
    expected = outputs(tiny, crops(count))
    for name, value in together.items():
        assert_close(value, expected[name], FORWARD)
    by_threes = outputs(accelerate(tiny, max_batch=3), crops(count))
    for name, value in by_threes.items():
        assert_close(value, together[name], FORWARD)


def test_an_empty_batch_has_empty_outputs(tiny):
    full, empty = outputs(accelerate(tiny), crops(1)), outputs(accelerate(tiny), crops(0))
    for name, value in empty.items():
        assert value.shape == (0, *full[name].shape[1:])
        assert value.dtype == full[name].dtype


def test_nan_stays_in_its_image(tiny):
    lr = crops(3)
    lr[1, 0, 3, 5] = torch.nan
    got, clean = outputs(accelerate(tiny), lr), outputs(accelerate(tiny), crops(3))
    assert got["sr"][1].isnan().any()
    for kept in (0, 2):
        assert_close(got["sr"][kept], clean["sr"][kept], FORWARD)


def test_any_layout_of_the_input_will_do(tiny):
    fast = accelerate(tiny)
    wanted = outputs(fast, crops(2))["sr"]
    last = crops(2).contiguous(memory_format=torch.channels_last)
    wide = torch.cat([crops(2), crops(2)], dim=3)[:, :, :, :64]
    for lr in (last, wide):
        assert_close(outputs(fast, lr)["sr"], wanted, FORWARD)


def test_threads_share_one(tiny):
    fast = accelerate(tiny)
    wanted = [outputs(fast, crops(1 + i))["sr"] for i in range(4)]
    gate = threading.Barrier(4)

    def work(i):
        if i < 4:
            gate.wait(timeout=20)
        return torch.equal(outputs(fast, crops(1 + i % 4))["sr"], wanted[i % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(12)))


@pytest.mark.parametrize("training", [False, True])
def test_the_original_is_left_alone_and_forgotten(tiny, training):
    model = copy.deepcopy(tiny).train(training)
    before = copy.deepcopy(model.state_dict())
    fast = accelerate(model)
    wanted = outputs(tiny, crops(1))["sr"]
    assert_close(outputs(fast, crops(1))["sr"], wanted, FORWARD)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(module.training == training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(outputs(fast, crops(1))["sr"], wanted, FORWARD)


def test_no_gradient_no_autocast_no_inference_tensors(tiny):
    with torch.inference_mode():
        fast = accelerate(tiny)
    sr, prior = fast(crops(1).requires_grad_())
    assert not any(x.requires_grad or x.is_inference() for x in (sr, *prior))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(crops(1))[0], sr)
    with torch.inference_mode():
        assert torch.equal(fast(crops(1))[0], sr)


def test_without_attention_the_map_keeps_the_priors_size(tiny):
    got = outputs(accelerate(tiny, with_attention=False), crops(2))
    expected = outputs(tiny, crops(2))
    with torch.no_grad():
        assert_close(got["attn_map"], tiny.prior(crops(2)[:, :3])[1], FORWARD)
    assert_close(got["sr"], expected["sr"], FORWARD)


def test_wrapped_networks_are_recognised(tiny):
    for wrapped in (nn.DataParallel(tiny), torch.compile(tiny, backend="eager")):
        assert_outputs_close(accelerate(wrapped), tiny, crops(1), FORWARD)


def test_what_cannot_be_says_so(tiny):
    for thing in (nn.Linear(2, 2), "small"):
        with pytest.raises(TypeError, match="accelerate takes a LEMMA"):
            accelerate(thing)
    for arguments, why in (
        ({"dtype": torch.float16}, "float16 is for CUDA"),
        ({"dtype": torch.int8}, "dtype is"),
        ({"max_batch": 0}, "max_batch"),
        ({"graphs": True}, "for CUDA"),
        ({"reuse_output": True}, "for CUDA"),
    ):
        with pytest.raises(ValueError, match=why):
            accelerate(tiny, **arguments)
    fast = accelerate(tiny)
    with pytest.raises(ValueError, match=r"must be \[N, 4, 16, 64\]"):
        fast(torch.zeros(1, 3, 16, 64))
    with pytest.raises(ValueError, match="lr is on meta"):
        fast(torch.zeros(1, 4, 16, 64, device="meta"))
    with pytest.raises(RuntimeError, match="is for evaluation"):
        fast.train()
    with pytest.raises(RuntimeError, match="stays where it is"):
        fast.double()
    assert fast.eval() is fast


def test_a_norm_without_statistics_is_named(tiny):
    model = copy.deepcopy(tiny)
    model.tail.norm = nn.BatchNorm2d(64, track_running_stats=False)
    with pytest.raises(ValueError, match="can be folded"):
        accelerate(model)


@pytest.mark.parametrize("size", [1, 3, 5, 9])
@pytest.mark.parametrize("scale", [2, 3])
def test_a_convolution_moves_to_before_the_pixel_shuffle(size, scale):
    conv = nn.Conv2d(3, 2, size, padding=size // 2).double()
    x = torch.randn(2, 3 * scale**2, 4, 7, dtype=torch.float64)
    shuffle = nn.PixelShuffle(scale)
    weight, bias = folding.shuffled_conv(conv, scale)
    with torch.no_grad():
        moved = shuffle(nn.functional.conv2d(x, weight, bias, padding=weight.shape[2] // 2))
        assert_close(moved, conv(shuffle(x)), 1e-13)


def three_steps(model: LEMMA) -> list[Tensor]:
    """Losses of three optimiser steps on the same crops."""
    optimiser = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.5, 0.999))
    lr, losses = crops(3, torch.float64)[:, :, :8, :32], []
    for _ in range(3):
        optimiser.zero_grad()
        sr, prior = model(lr)
        loss = sr.square().mean() + 1e-3 * prior.text_logits.square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimiser.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
def test_three_training_steps_are_the_references():
    config = dataclasses.replace(
        LemmaConfig.small(),
        height=8,
        width=32,
        num_selected=100,
        num_blocks=1,
        dropout=0.0,
        prior=dataclasses.replace(TINY_PRIOR, dropout=0.0),
    )
    model = lived_in(config).double().train()
    fast = accelerate(model, training=True)
    assert fast.training
    assert fast.blocks[0].fusion.op is not model.blocks[0].fusion.op
    torch.testing.assert_close(three_steps(fast), three_steps(model), rtol=1e-9, atol=0)
    expected = model.state_dict()
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8, msg=name)


def test_training_takes_no_other_argument_and_says_what_it_needs(tiny, monkeypatch):
    with pytest.raises(ValueError, match="no other argument"):
        accelerate(tiny, torch.bfloat16, training=True)
    without_extension(monkeypatch)
    extension.load.cache_clear()
    with pytest.raises(ImportError, match="it was left out"):
        accelerate(tiny, training=True)
