"""PCAN: TSRN's frame with parallel GRUs, dense connections and attention to high frequencies."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.baselines.config import BaselineConfig
from lemma_fast.baselines.frame import Frame
from lemma_fast.baselines.published import Published, frame_sizes
from lemma_fast.checkpoint.published import FRAME
from lemma_fast.model.blocks import BiGRU
from lemma_fast.model.layers import ConvNorm
from lemma_fast.ops import Operations

DILATIONS = (1, 2, 3)
_REDUCTION = 16


class ChannelGate(nn.Module):
    """Weighs the channels of [N, C, H, W] by an MLP of their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // _REDUCTION)
        self.reduce = nn.Linear(channels, hidden, bias=False)
        self.expand = nn.Linear(hidden, channels, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(features.mean(dim=(2, 3))))).sigmoid()
        return features * gate[:, :, None, None]


class ParallelBlock(nn.Module):
    """Parallel contextual attention block: [N, K * C, H, W] to [N, C, H, W], without a residual.

    One GRU runs along the height and one along the width, side by side.
    """

    def __init__(self, inputs: int, channels: int, ops: Operations) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, channels, 1)
        self.conv1 = ConvNorm(channels, channels, 3, bias=True, activation="mish")
        self.conv_width = ConvNorm(channels, channels, 3, bias=True)
        self.conv_height = ConvNorm(channels, channels, 3, bias=True)
        self.before_horizontal = nn.Conv2d(channels, channels, 1)
        self.horizontal = BiGRU(channels, 3, ops)
        self.before_vertical = nn.Conv2d(channels, channels, 1)
        self.vertical = BiGRU(channels, 2, ops)
        self.gate = ChannelGate(2 * channels)
        self.conv3 = ConvNorm(2 * channels, channels, 3, bias=True, activation="mish")

    def forward(self, features: Tensor) -> Tensor:
        features = self.reduce(features)
        hidden = self.conv1(features)
        along_width = self.before_horizontal(features + self.conv_width(hidden))
        along_height = self.before_vertical(features + self.conv_height(hidden))
        both = [self.vertical(along_height), self.horizontal(along_width)]
        return self.conv3(self.gate(torch.cat(both, dim=1)))


class FrequencyAttention(nn.Module):
    """HOTA: weighs [N, C, H, W] by strips along the height and the width at three dilations.

    The strips of one direction share their kernel, which starts as standard normal draws.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 4)
        strips = 2 * len(DILATIONS) * inner
        self.reduce = nn.Conv2d(channels, inner, 1)
        self.vertical_weight = nn.Parameter(torch.randn(inner, inner, 3, 1))
        self.vertical_bias = nn.Parameter(torch.randn(inner))
        self.horizontal_weight = nn.Parameter(torch.randn(inner, inner, 1, 3))
        self.horizontal_bias = nn.Parameter(torch.randn(inner))
        self.gate = ChannelGate(strips)
        self.mix = nn.Conv2d(strips, inner, 3, padding=1)
        self.pooled = nn.Conv2d(inner, inner, 3, padding=1)
        self.middle = nn.Conv2d(inner, inner, 3, padding=1)
        self.last = nn.Conv2d(inner, inner, 3, padding=1)
        self.skip = nn.Conv2d(inner, inner, 1)
        self.expand = nn.Conv2d(inner, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        inner = self.reduce(features)
        strips = [
            F.conv2d(inner, self.vertical_weight, self.vertical_bias, 2, (d, 0), d)
            for d in DILATIONS
        ] + [
            F.conv2d(inner, self.horizontal_weight, self.horizontal_bias, 2, (0, d), d)
            for d in DILATIONS
        ]
        coarse = F.max_pool2d(self.mix(self.gate(torch.cat(strips, dim=1))), 8, 4)
        coarse = self.last(F.relu(self.middle(F.relu(self.pooled(coarse)))))
        fine = F.interpolate(coarse, features.shape[2:], mode="bilinear", align_corners=False)
        return features * self.expand(fine + self.skip(inner)).sigmoid()


class PCAN(Frame):
    """PCAN: Zhao et al., Scene Text Image Super-Resolution via Parallelly Contextual [...], 2021.

    Each block sees the stem and all blocks before it. The published code aligns crops at 32x64, as
    TextZoom's does; `config.corrected` aligns them as they are, like the other networks.
    """

    published: ClassVar[Published] = Published(
        repository="github.com/Shualite/PCAN",
        signature="spatial_attention.vertical_conv_weight",
        modules=FRAME
        + """
blocks.<b>.reduce             block<b+2>.conv_reduce
blocks.<b>.conv1.conv         block<b+2>.conv1
blocks.<b>.conv1.norm         block<b+2>.bn1
blocks.<b>.conv_width.conv    block<b+2>.conv2_w
blocks.<b>.conv_width.norm    block<b+2>.bn2_w
blocks.<b>.conv_height.conv   block<b+2>.conv2_h
blocks.<b>.conv_height.norm   block<b+2>.bn2_h
blocks.<b>.before_horizontal  block<b+2>.gru1.conv1
blocks.<b>.horizontal         block<b+2>.gru1.gru@gru
blocks.<b>.before_vertical    block<b+2>.gru2.conv1
blocks.<b>.vertical           block<b+2>.gru2.gru@gru
blocks.<b>.gate.reduce        block<b+2>.fs.fc.0
blocks.<b>.gate.expand        block<b+2>.fs.fc.2
blocks.<b>.conv3.conv         block<b+2>.conv3
blocks.<b>.conv3.norm         block<b+2>.bn3
attention.reduce              spatial_attention.conv1
attention.vertical_weight     spatial_attention.vertical_conv_weight
attention.vertical_bias       spatial_attention.vertical_conv_bias
attention.horizontal_weight   spatial_attention.horizontal_conv_weight
attention.horizontal_bias     spatial_attention.horizontal_conv_bias
attention.gate.reduce         spatial_attention.se.fc.0
attention.gate.expand         spatial_attention.se.fc.2
attention.mix                 spatial_attention.conv_reduce
attention.pooled              spatial_attention.conv_max
attention.middle              spatial_attention.conv3
attention.last                spatial_attention.conv3_
attention.skip                spatial_attention.conv_f
attention.expand              spatial_attention.conv4
""",
        sizes=frame_sizes,
    )

    def __init__(self, config: BaselineConfig, ops: Operations) -> None:
        channels, dense = config.channels, config.channels * config.blocks
        super().__init__(
            config,
            lambda number: ParallelBlock((number + 1) * channels, channels, ops),
            deep=dense,
            tall=not config.corrected,
        )
        self.attention = FrequencyAttention(dense)

    def deepen(self, shallow: Tensor, prior: Tensor | None) -> Tensor:
        seen = [shallow]
        for block in self.blocks:
            seen.append(block(torch.cat(seen, dim=1)))
        out: Tensor = self.attention(torch.cat(seen[1:], dim=1))
        return out
