"""`accelerate` of Table 3's networks against the networks themselves."""

import pytest
import torch
from baseline_sizes import SMALL
from closeness import FORWARD, assert_close
from torch import nn

from lemma_fast import accelerate
from lemma_fast.acceleration.blocks import FoldedBiGRU, FoldedUpsampler
from lemma_fast.acceleration.layers import Conv
from lemma_fast.baselines import Baseline, create_baseline
from lemma_fast.model.layers import DeviationNorm
from lemma_fast.ops import extension

HALF = 2e-2
# As wide as the C++ convolutions want it.
SIZES = {
    name: {key: 2 if key == "blocks" else size for key, size in sizes.items()} | {"channels": 16}
    for name, sizes in SMALL.items()
    if name != "bicubic"
} | {"bicubic": {}}
pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def lived_in(name: str, **changes) -> Baseline:
    """A network whose norms, slopes and biases are not what they start as."""
    torch.manual_seed(0)
    model = create_baseline(name, **SIZES[name], **changes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
        elif isinstance(module, DeviationNorm):
            module.scale.uniform_(0.5, 1.5)
            module.shift.normal_(0, 0.1)
        elif isinstance(module, nn.PReLU):
            module.weight.uniform_(0.1, 0.4)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.normal_(0, 0.1)
    return model


def crops(model: Baseline, count: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    shape = (count, model.config.in_channels, *model.config.size)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("name", SIZES)
def test_the_same_images(name):
    model = lived_in(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = accelerate(model)
    model.eval()
    lr = crops(model, 9)
    assert_close(fast(lr), model(lr), FORWARD)
    assert fast(lr[:0]).shape == (0, model.config.in_channels, 32, 128)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", SIZES)
def test_half_types(name):
    model = lived_in(name).eval()
    lr = crops(model, 2)
    got = accelerate(model, torch.bfloat16)(lr)
    assert_close(got, model(lr), HALF)


@torch.no_grad()
def test_a_crop_of_tatt_is_what_it_is_in_its_batch():
    published = lived_in("tatt").eval()
    lr = crops(published, 3)
    fast = accelerate(published)
    assert (fast(lr)[:1] - fast(lr[:1])).abs().max() > 1e-6
    assert fast.describe()["batches"] == "whole"
    for options in ({"max_batch": 2}, {"max_batch": 2, "dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match="results that do not depend on the batch"):
            accelerate(published, **options)
    corrected = lived_in("tatt", corrected=True).eval()
    fast = accelerate(corrected, max_batch=2)
    assert_close(fast(lr), corrected(lr), FORWARD)
    assert_close(fast(lr[:1]), corrected(lr)[:1], FORWARD)


@pytest.mark.parametrize("name", ["tg", "tbsrn", "tatt", "pcan", "c3-stisr", "rcan"])
def test_what_is_folded_and_what_runs_it(name):
    fast = accelerate(lived_in(name))
    modules = dict(fast.network.named_modules())
    recurrent = [m for m in modules.values() if isinstance(m, FoldedBiGRU)]
    assert len(recurrent) == (0 if name in ("tbsrn", "rcan") else 4)
    # They are in the GRUs; TATT's and C3-STISR's first one adds width.
    before = [k for k, m in modules.items() if ".before_" in k and isinstance(m, Conv)]
    assert len(before) == (2 if name in ("tatt", "c3-stisr") else 0)
    inexact = {k: m for k, m in modules.items() if not k.startswith(("reader.", "clues."))}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in inexact.values())
    if name != "rcan":
        assert any(isinstance(m, FoldedUpsampler) for m in modules.values())
    said = fast.describe()
    assert "adaptive fusion" not in said
    if extension.missing() is None:
        assert said["recurrences"] == "C++"
        assert any(isinstance(m, Conv) and m.winograd for m in modules.values())


def test_what_cannot_be_done():
    with pytest.raises(TypeError, match="training is for a LEMMA"):
        accelerate(lived_in("tg"), training=True)
    fast = accelerate(lived_in("tg"))
    with pytest.raises(ValueError, match=r"lr must be \[N, 3, 16, 64\]"):
        fast(torch.rand(1, 4, 16, 64))
