"""The comparison that tests/gpu makes, on the CPU: right answers pass, wrong ones do not."""

import dataclasses

import pytest
import torch
from nearness import assert_gradients_near, assert_outputs_near, crops
from tiny_network import tiny_config

from lemma_fast import LEMMA, accelerate, load
from lemma_fast.ops import extension


class Off(torch.nn.Module):
    """A network whose images, or one of whose tensors of the prior, are `factor` times right."""

    def __init__(self, network, factor, images=slice(None), name=None):
        super().__init__()
        self.network, self.factor, self.images, self.name = network, factor, images, name

    def forward(self, lr):
        sr, prior = self.network(lr)
        if self.name is not None:
            value = getattr(prior, self.name)
            return sr, prior._replace(**{self.name: (value * self.factor).to(value.dtype)})
        sr = sr.clone()
        sr[self.images] *= self.factor
        return sr, prior


@pytest.fixture
def tiny() -> LEMMA:
    prior = dataclasses.replace(tiny_config().prior, dropout=0.0)
    return LEMMA(tiny_config(dropout=0.0, prior=prior)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_accelerated_network_is_near(dtype):
    model = load("small")
    assert_outputs_near(accelerate(model, dtype), model, crops(2), dtype)


def test_one_image_may_have_another_position_selected(tiny):
    assert_outputs_near(Off(tiny, 1.0005, images=2), tiny, crops(5))


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        ({"factor": 1.0005}, torch.float32),
        ({"factor": 1.002, "images": 2}, torch.float32),
        ({"factor": torch.nan, "images": 0}, torch.float32),
        ({"factor": 1.0002, "name": "attn_map"}, torch.float32),
        ({"factor": 2, "name": "pt_lengths"}, torch.float32),
        ({"factor": 1.2}, torch.bfloat16),
    ],
    ids=str,
)
def test_wrong_outputs_are_not_near(tiny, wrong, dtype):
    with pytest.raises(AssertionError):
        assert_outputs_near(Off(tiny, **wrong), tiny, crops(5), dtype)


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
def test_an_accelerated_step_is_near_and_a_wrong_one_is_not(tiny):
    reference = tiny.train()
    fast = accelerate(reference, training=True)
    assert_gradients_near(fast, reference, crops(2))
    with torch.no_grad():
        fast.blocks[0].fusion.global_conv.weight.mul_(1.1)
    with pytest.raises(AssertionError, match=r"blocks\.0\.fusion"):
        assert_gradients_near(fast, reference, crops(2))
