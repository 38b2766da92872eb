"""Parameters of the operations as plain tensors: what the modules hand to either table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class BatchNormWeights(NamedTuple):
    """What `nn.BatchNorm2d` keeps, each [C]; eps 1e-5, momentum 0.1."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


class BranchWeights(NamedTuple):
    """conv1x1 -> BatchNorm -> PReLU -> conv1x1; matrices [C_out, C_in, 1, 1], `slope` [1]."""

    reduce_weight: Tensor
    reduce_bias: Tensor
    norm: BatchNormWeights
    slope: Tensor
    project_weight: Tensor
    project_bias: Tensor


class AdaFMWeights(NamedTuple):
    """Parameters of one adaptive fusion module (SPEC section 5)."""

    guidance_norm: BatchNormWeights
    branches: tuple[BranchWeights, BranchWeights, BranchWeights]
    global_conv: tuple[Tensor, Tensor]
    """Weight [C, 1, H, W] and bias [C] of the global depth-wise convolution (GDW)."""
    gate: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    """Weight [C, C, 1, 1] and bias [C] of the gate's three 1x1 convolutions in turn."""
    aggregate: BranchWeights
    out_norm: BatchNormWeights


class CrossAttentionWeights(NamedTuple):
    """One cross-attention layer; `in_proj` stacks query, key and value as PyTorch does."""

    in_proj_weight: Tensor
    in_proj_bias: Tensor
    out_proj_weight: Tensor
    out_proj_bias: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    linear1_weight: Tensor
    linear1_bias: Tensor
    linear2_weight: Tensor
    linear2_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor


class PackedLayers(tuple[CrossAttentionWeights, ...]):
    """Copies of cross-attention layers that lie end to end, as the fused operation reads them."""

    packed: Tensor
    """[layers, parameters of one]"""

    def __new__(cls, layers: Sequence[CrossAttentionWeights]) -> PackedLayers:
        packed = torch.cat([weight.flatten() for layer in layers for weight in layer])
        parts = iter(packed.split([weight.numel() for layer in layers for weight in layer]))
        views = [[next(parts).view_as(weight) for weight in layer] for layer in layers]
        self = super().__new__(cls, (CrossAttentionWeights(*layer) for layer in views))
        self.packed = packed.view(len(layers), -1)
        return self


class BiGRUWeights(NamedTuple):
    """What a bidirectional single-layer `nn.GRU` keeps, in its order; gates are (r, z, n)."""

    weight_ih: Tensor
    """[3 * hidden, C]"""
    weight_hh: Tensor
    """[3 * hidden, hidden]"""
    bias_ih: Tensor
    bias_hh: Tensor
    weight_ih_reverse: Tensor
    weight_hh_reverse: Tensor
    bias_ih_reverse: Tensor
    bias_hh_reverse: Tensor


def flat(weights: tuple[object, ...]) -> Iterator[Tensor]:
    """The tensors of such a tuple in turn, and of the tuples in it."""
    for part in weights:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, tuple):
            yield from flat(part)
