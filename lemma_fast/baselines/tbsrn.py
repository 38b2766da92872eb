"""TBSRN, the network of Scene Text Telescope."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.baselines.config import BaselineConfig
from lemma_fast.baselines.frame import CONVOLUTIONS, Frame
from lemma_fast.baselines.published import Published, frame_sizes
from lemma_fast.checkpoint.published import FRAME
from lemma_fast.model.layers import ConvNorm, DeviationNorm, MappedAttention, sinusoid
from lemma_fast.ops import Operations

HEADS = 4


class Enhancer(nn.Module):
    """Self-attention over all positions of a map [N, C, H, W], and an MLP; returns such a map.

    A position is a row of 2C numbers: the features, then a fixed table of where it lies.
    """

    positions: Tensor

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        channels, width = config.channels, 2 * config.channels
        self.attention = MappedAttention(width, HEADS, config.dropout)
        self.norm1 = DeviationNorm(width)
        self.expand = nn.Linear(width, width)
        self.contract = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.norm2 = DeviationNorm(width)
        self.linear = nn.Linear(width, channels)
        self.register_buffer("positions", plane(*config.size, channels), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        rows = features.flatten(2).transpose(1, 2)
        table = self.positions.to(rows.dtype).expand(len(rows), -1, -1)
        rows = torch.cat([rows, table], dim=2)
        rows = self.norm1(rows + self.attention.mix(rows, self.attention.memory(rows)))
        rows = self.norm2(rows + self.contract(self.dropout(F.relu(self.expand(rows)))))
        enhanced: Tensor = self.linear(rows)
        return enhanced.transpose(1, 2).unflatten(2, features.shape[2:])


class TransformerBlock(nn.Module):
    """Two convolutions, the enhancer, and the sum with the input."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv1 = ConvNorm(channels, channels, 3, bias=True, activation="mish")
        self.conv2 = ConvNorm(channels, channels, 3, bias=True)
        self.enhancer = Enhancer(config)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.enhancer(self.conv2(self.conv1(features)))


class TBSRN(Frame):
    """TBSRN: Chen et al., Scene Text Telescope: Text-Focused Scene Image Super-Resolution.

    TSRN's frame with self-attention in the GRUs' place. Dropout is on the attention's weights and
    in the MLP. The published network owns GRUs, a convolution and a norm that it never calls.
    """

    published: ClassVar[Published] = Published(
        repository="github.com/FudanVI/FudanOCR (scene-text-telescope)",
        signature="block2.feature_enhancer.linear.weight",
        modules=FRAME
        + CONVOLUTIONS
        + """
blocks.<b>.enhancer.attention.query  block<b+2>.feature_enhancer.multihead.linears.0
blocks.<b>.enhancer.attention.key    block<b+2>.feature_enhancer.multihead.linears.1
blocks.<b>.enhancer.attention.value  block<b+2>.feature_enhancer.multihead.linears.2
blocks.<b>.enhancer.attention.out    block<b+2>.feature_enhancer.multihead.linears.3
blocks.<b>.enhancer.norm1.scale      block<b+2>.feature_enhancer.mul_layernorm1.a_2
blocks.<b>.enhancer.norm1.shift      block<b+2>.feature_enhancer.mul_layernorm1.b_2
blocks.<b>.enhancer.expand           block<b+2>.feature_enhancer.pff.w_1
blocks.<b>.enhancer.contract         block<b+2>.feature_enhancer.pff.w_2
blocks.<b>.enhancer.norm2.scale      block<b+2>.feature_enhancer.mul_layernorm3.a_2
blocks.<b>.enhancer.norm2.shift      block<b+2>.feature_enhancer.mul_layernorm3.b_2
blocks.<b>.enhancer.linear           block<b+2>.feature_enhancer.linear
""",
        sizes=frame_sizes,
        unused=r"(conv|bn)\..*|block\d+\.gru[12]\..*|.*\.compress_attention_linear\..*",
    )

    def __init__(self, config: BaselineConfig, ops: Operations) -> None:
        super().__init__(config, lambda _: TransformerBlock(config))


def plane(height: int, width: int, channels: int) -> Tensor:
    """Where each position lies [H * W, C]: a sinusoid of its column, then one of its row."""
    half = channels // 2
    columns = sinusoid(width, half).expand(height, -1, -1)
    rows = sinusoid(height, half)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)
