"""RCAN: Zhang et al., Image Super-Resolution Using Very Deep Residual Channel [...] Networks."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.baselines.base import Baseline
from lemma_fast.baselines.config import BaselineConfig
from lemma_fast.baselines.published import Published
from lemma_fast.checkpoint.published import Shapes

#: The mean colour of DIV2K, which the network works around.
MEAN_COLOUR = (0.4488, 0.4371, 0.4040)

#: Each gate squeezes the channels to one in so many.
REDUCTION = 16


def _sizes(shapes: Shapes) -> dict[str, float]:
    channels, in_channels = shapes.of("head.0.weight", 2)[:2]
    sizes: dict[str, float] = {
        "in_channels": in_channels,
        "channels": channels,
        "groups": shapes.count("body.{}.body.0.body.0.weight"),
        "blocks": shapes.count("body.0.body.{}.body.0.weight"),
    }
    # The authors trained it on colours of 0 to 255, which the mean colour tells.
    shift = shapes.state.get("add_mean.bias")
    if shift is not None and shift.float().mean() > 1:
        sizes["rgb_range"] = 255
    return sizes


class MeanShift(nn.Conv2d):
    """Colours moved by `sign` times the mean colour: a convolution 1x1, which training changes.

    The published code means to freeze it and does not, so that it is a parameter here too.
    """

    def __init__(self, sign: int, rgb_range: float) -> None:
        super().__init__(3, 3, 1)
        with torch.no_grad():
            self.weight.copy_(torch.eye(3)[:, :, None, None])
            assert self.bias is not None
            self.bias.copy_(sign * rgb_range * torch.tensor(MEAN_COLOUR))


class ChannelGate(nn.Module):
    """Squeeze and excitation: `summary` [N, C, 1, 1] of the features to a factor a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // REDUCTION, 1)
        self.restore = nn.Conv2d(channels // REDUCTION, channels, 1)

    def forward(self, summary: Tensor) -> Tensor:
        return self.restore(F.relu(self.reduce(summary))).sigmoid()


class AttentionBlock(nn.Module):
    """conv3x3, ReLU, conv3x3, a gate a channel by its mean, and the sum with the input (RCAB)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = ChannelGate(channels)

    def forward(self, features: Tensor) -> Tensor:
        residual = self.conv2(F.relu(self.conv1(features)))
        return features + residual * self.gate(residual.mean((2, 3), keepdim=True))


class ResidualGroup(nn.Module):
    """Blocks, a convolution, and the sum with the input."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(AttentionBlock(channels) for _ in range(blocks)))
        self.tail = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.tail(self.blocks(features))


class RCAN(Baseline):
    """RCAN, 10 groups of 20 blocks: no prior, no batch norm, no bounds on what comes out.

    Inside, colours are counted from 0 to `config.rgb_range`, in [0, 1] outside: 1 by default, 255
    for the authors' own weights. The mean shift is for three channels alone, as the authors have no
    mean of masks.
    """

    published: ClassVar[Published] = Published(
        repository="github.com/yulunzhang/RCAN",
        signature="body.0.body.0.body.3.conv_du.0.weight",
        modules="""
subtract_mean                        sub_mean
add_mean                             add_mean
head                                 head.0
groups.<g>.blocks.<b>.conv1          body.<g>.body.<b>.body.0
groups.<g>.blocks.<b>.conv2          body.<g>.body.<b>.body.2
groups.<g>.blocks.<b>.gate.reduce    body.<g>.body.<b>.body.3.conv_du.0
groups.<g>.blocks.<b>.gate.restore   body.<g>.body.<b>.body.3.conv_du.2
groups.<g>.tail                      body.<g>.body.<tail>
tail                                 body.<groups>
expand                               tail.0.0
project                              tail.1
""",
        sizes=_sizes,
    )

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        channels, inputs = config.channels, config.in_channels
        shifts = inputs == len(MEAN_COLOUR)
        self.subtract_mean = MeanShift(-1, config.rgb_range) if shifts else None
        self.add_mean = MeanShift(1, config.rgb_range) if shifts else None
        self.head = nn.Conv2d(inputs, channels, 3, padding=1)
        groups = (ResidualGroup(channels, config.blocks) for _ in range(config.groups))
        self.groups = nn.Sequential(*groups)
        self.tail = nn.Conv2d(channels, channels, 3, padding=1)
        self.expand = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.project = nn.Conv2d(channels, inputs, 3, padding=1)

    def upscale(self, lr: Tensor) -> Tensor:
        scaled = lr * self.config.rgb_range
        shallow = self.head(scaled if self.subtract_mean is None else self.subtract_mean(scaled))
        features = shallow + self.tail(self.groups(shallow))
        sr = self.project(self.shuffle(self.expand(features)))
        return (sr if self.add_mean is None else self.add_mean(sr)) / self.config.rgb_range
