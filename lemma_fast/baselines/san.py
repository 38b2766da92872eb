"""SAN: Dai et al., Second-order Attention Network for Single Image Super-Resolution.

The network as PCAN's repository has it for TextZoom: the authors' own also moves colours by the
mean of their photographs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.baselines.base import Baseline
from lemma_fast.baselines.config import BaselineConfig
from lemma_fast.baselines.published import Published
from lemma_fast.baselines.rcan import ChannelGate
from lemma_fast.checkpoint.published import Shapes

_SQUARE_ROOT_STEPS = 5


def _sizes(shapes: Shapes) -> dict[str, float]:
    channels, in_channels = shapes.of("head.0.weight", 2)[:2]
    return {
        "in_channels": in_channels,
        "channels": channels,
        "groups": shapes.count("RG.{}.conv_last.weight"),
        "blocks": shapes.count("RG.0.rcab.{}.conv_first.0.weight"),
    }


class Block(nn.Module):
    """conv3x3, ReLU, conv3x3, and the sum with the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.conv2(F.relu(self.conv1(features)))


class SourceGroup(nn.Module):
    """Blocks, second-order channel attention, a convolution, and the sum with the input (LSRAG)."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(blocks)))
        self.gate = ChannelGate(channels)
        self.tail = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        deep = self.blocks(features)
        correlation = square_root(covariance(deep)).mean(1)[:, :, None, None]
        return features + self.tail(deep * self.gate(correlation))


class RegionAttention(nn.Module):
    """Non-local attention within each quarter of the map (RL-NL); it starts as the identity.

    `subsample` halves keys and values by max pooling, as the published code does although its
    constructor asks for the opposite.
    """

    def __init__(self, channels: int, subsample: bool) -> None:
        super().__init__()
        inner = channels // 8
        self.subsample = subsample
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1)
        nn.init.zeros_(self.out.weight)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        top, left = (side // 2 for side in features.shape[2:])
        rows = [
            torch.cat([self.attend(half[..., :left]), self.attend(half[..., left:])], dim=3)
            for half in (features[:, :, :top], features[:, :, top:])
        ]
        return torch.cat(rows, dim=2)

    def attend(self, region: Tensor) -> Tensor:
        """One quarter [N, C, H, W], every place of which looks at all of it."""
        key, value = self.key(region), self.value(region)
        if self.subsample:
            key, value = F.max_pool2d(key, 2), F.max_pool2d(value, 2)
        scores = self.query(region).flatten(2).transpose(1, 2) @ key.flatten(2)
        mixed = value.flatten(2) @ scores.softmax(2).transpose(1, 2)
        return region + self.out(mixed.unflatten(2, region.shape[2:]))


class SAN(Baseline):
    """SAN, 20 groups of 10 blocks: no prior, no batch norm, no bounds on what comes out.

    Each group's output is added to `gamma` times the first attention's, one number that starts at
    0. `config.corrected` leaves the sub-sampling of RegionAttention out.
    """

    published: ClassVar[Published] = Published(
        repository="github.com/Shualite/PCAN",
        signature="non_local.non_local.theta.weight",
        modules="""
head                           head.0
gamma                          gamma
regions.query                  non_local.non_local.theta
regions.key                    non_local.non_local.phi.0
regions.value                  non_local.non_local.g.0
regions.out                    non_local.non_local.W
groups.<g>.blocks.<b>.conv1    RG.<g>.rcab.<b>.conv_first.0
groups.<g>.blocks.<b>.conv2    RG.<g>.rcab.<b>.conv_first.2
groups.<g>.gate.reduce         RG.<g>.soca.conv_du.0
groups.<g>.gate.restore        RG.<g>.soca.conv_du.2
groups.<g>.tail                RG.<g>.conv_last
expand                         tail.0.0
project                        tail.1
""",
        sizes=_sizes,
        unused=r"((sub|add)_mean|conv_last|non_local\.soca)\..*|RG\.\d+\.gamma",
    )

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        channels, inputs = config.channels, config.in_channels
        self.head = nn.Conv2d(inputs, channels, 3, padding=1)
        self.regions = RegionAttention(channels, subsample=not config.corrected)
        groups = (SourceGroup(channels, config.blocks) for _ in range(config.groups))
        self.groups = nn.ModuleList(groups)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.expand = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.project = nn.Conv2d(channels, inputs, 3, padding=1)

    def upscale(self, lr: Tensor) -> Tensor:
        shallow = self.head(lr)
        source = features = self.regions(shallow)
        for group in self.groups:
            features = group(features) + self.gamma * source
        return self.project(self.shuffle(self.expand(shallow + self.regions(features))))


def covariance(features: Tensor) -> Tensor:
    """The biased covariance [N, C, C] of the channels of [N, C, H, W] over all places."""
    flat = features.flatten(2)
    centred = flat - flat.mean(2, keepdim=True)
    return centred @ centred.transpose(1, 2) / flat.shape[2]


def square_root(matrices: Tensor) -> Tensor:
    """The square root of covariances [N, C, C] by five steps of Newton and Schulz."""
    trace = matrices.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    three = 3 * torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    root = matrices / trace
    step = (three - root) / 2
    root, inverse = root @ step, step
    for _ in range(_SQUARE_ROOT_STEPS - 2):
        step = (three - inverse @ root) / 2
        root, inverse = root @ step, step @ inverse
    return root @ (three - inverse @ root) / 2 * trace.sqrt()
