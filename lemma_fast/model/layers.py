"""Layers that several parts of the network share: convolutions, Transformer layers, positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.ops import Activation


def sinusoid(length: int, width: int) -> Tensor:
    """Position table [length, width] in fp32: sin in even columns, cos in odd ones.

    Machines disagree on the last bit of `exp`, which the angle of a far position multiplies up to
    1e-4; so modules keep their table as a buffer and a checkpoint's own is used.
    """
    position = torch.arange(length, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(1e4) / width))
    table = torch.empty(length, width)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)
    return table


class ConvNorm(nn.Module):
    """Convolution and batch norm, a sum and an activation; odd kernels keep the size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int | tuple[int, int] = 1,
        bias: bool = False,
        activation: Activation = "none",
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=bias)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = activation

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """`x` [N, C, H, W] to [N, D, H', W']; `add`, of that shape, comes before the activation."""
        x = self.norm(self.conv(x))
        if add is not None:
            x = add + x
        if self.activation == "none":
            return x
        return F.relu(x) if self.activation == "relu" else F.mish(x)


class Attention(nn.Module):
    """Multi-head attention on [N, L, C]; parameters are named as in `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from `query` [N, L, C] to `key` [N, S, C], which is the value too.

        `mask` is boolean, broadcast to [N, heads, L, S]; True takes part.
        """
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, key), weights, biases, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """`x = LN(x + MHA(x, memory)); x = LN(x + W2 relu(W1 x))`: self-attention without a memory."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        attended = self.attention(x, x if memory is None else memory, mask)
        x = self.norm1(x + self.dropout(attended))
        hidden = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm2(x + self.dropout(hidden))
