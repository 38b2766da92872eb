"""`accelerate` of Table 3's networks against the networks themselves."""

import pytest
import torch
from closeness import FORWARD, assert_close
from torch import nn

from lemma_fast import accelerate
from lemma_fast.baselines import Baseline, create_baseline
from lemma_fast.config import CRNNConfig
from lemma_fast.model.layers import DeviationNorm

READER = CRNNConfig((8, 8, 8, 8, 16, 16, 16), hidden=16)
SIZES = {
    "bicubic": {},
    "srcnn": {"channels": 16},
    "srresnet": {"channels": 16, "blocks": 2},
    "tsrn": {"channels": 16, "blocks": 2},
    "tbsrn": {"channels": 16, "blocks": 2},
    "pcan": {"channels": 16, "blocks": 2},
    "tg": {"channels": 16, "blocks": 2},
    "tatt": {"channels": 16, "blocks": 2, "crnn": READER},
    "rcan": {"channels": 16, "groups": 2, "blocks": 2},
    "san": {"channels": 16, "groups": 2, "blocks": 2},
    "c3-stisr": {"channels": 16, "blocks": 2, "crnn": READER},
}
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
    assert_close(fast(lr), model(lr), 5 * FORWARD)
    assert fast(lr[:0]).shape == (0, model.config.in_channels, 32, 128)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
