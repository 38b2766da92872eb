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


class DeviationNorm(nn.Module):
    """Layer normalisation by the unbiased deviation, with eps added to the deviation itself.

    Not nn.LayerNorm: that one divides by sqrt(biased variance + eps).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.scale * centred / (x.std(-1, keepdim=True) + 1e-6) + self.shift


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

    def forward(
        self, query: Tensor, key: Tensor, mask: Tensor | None = None, value: Tensor | None = None
    ) -> Tensor:
        """Attend from `query` [N, L, C] to `key` [N, S, C], which is the value unless one is given.

        `mask` is boolean, broadcast to [N, heads, L, S]; True takes part.
        """
        inputs = (query, key, key if value is None else value)
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class MappedAttention(nn.Module):
    """Multi-head attention that also returns its map, before dropout."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def split(self, x: Tensor) -> Tensor:
        """Turn (N, L, width) into (N, heads, L, width / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def memory(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of `tokens`, to be used for any number of queries."""
        return self.split(self.key(tokens)), self.split(self.value(tokens))

    def forward(
        self, x: Tensor, memory: tuple[Tensor, Tensor], visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend from `x` (N, T, width); `visible` (T, L) bool is what each row may see."""
        keys, values = memory
        query = self.split(self.query(x))
        scores = query @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        weights = scores.softmax(-1)
        mixed = (self.dropout(weights) @ values).transpose(1, 2).flatten(2)
        return self.out(mixed), weights

    def mix(self, x: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        """What `forward` returns first, without the map, for which there may be no memory."""
        keys, values = memory
        dropout = self.dropout.p if self.training else 0.0
        query = self.split(self.query(x))
        mixed = F.scaled_dot_product_attention(query, keys, values, dropout_p=dropout)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


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
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`positions` are added to the queries and to the keys, but not to the values."""
        memory = x if memory is None else memory
        if positions is None:
            attended = self.attention(x, memory, mask)
        else:
            query, key = x + positions[0], memory + positions[1]
            attended = self.attention(query, key, mask, value=memory)
        x = self.norm1(x + self.dropout(attended))
        hidden = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm2(x + self.dropout(hidden))
