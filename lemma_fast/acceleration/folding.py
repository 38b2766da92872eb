"""What evaluation makes constant: batch norms folded into their neighbours, matrices of resizes.

Everything is computed in fp64 and rounded once, by the layer that keeps it. SPEC section 7 lists
the identities; each is exact except for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.ops.weights import AdaFMWeights, BatchNormWeights, BiGRUWeights, BranchWeights


class Affine(NamedTuple):
    """Weight and bias, fp64: of a convolution [D, C, kh, kw] or a product [D, C]."""

    weight: Tensor
    bias: Tensor


class FoldedAdaFM(NamedTuple):
    """Adaptive fusion of C channels at P positions, with every batch norm folded; fp64."""

    features: Tensor
    """[3C, C], the features' half of the three branches' first convolutions."""
    guidance: Affine
    """[3C, C] and [3C], the guidance's half, its own batch norm included."""
    slopes: Tensor
    """[3C], of the branches' PReLUs."""
    global_weight: Tensor
    """[C, P], of the global depth-wise convolution."""
    gate_mix: Tensor
    """[C, C]: branch 1's second convolution, applied after the reduction over positions."""
    gate_bias: Tensor
    """[C]"""
    gate: tuple[Affine, Affine, Affine]
    """The gate's MLP."""
    aggregate: Affine
    """[C, C], the aggregation's first convolution."""
    branch2: Affine
    """Branch 2's second convolution, which the gate scales."""
    aggregate_slope: Tensor
    """[C]"""
    output: Affine
    """[C, 2C]: branch 3's second convolution beside the aggregation's, the last batch norm in."""


def wide(x: Tensor) -> Tensor:
    """A copy of a parameter in fp64, on the CPU."""
    return x.detach().cpu().double()


def conv(convolution: nn.Conv2d, norm: nn.Module | None = None) -> Affine:
    """Fold the batch norm that follows a convolution into it."""
    weight = wide(convolution.weight)
    bias = torch.zeros(len(weight), dtype=torch.float64)
    if convolution.bias is not None:
        bias = wide(convolution.bias)
    if norm is None:
        return Affine(weight, bias)
    scale, shift = norm_affine(norm)
    return Affine(weight * scale[:, None, None, None], bias * scale + shift)


def linear(layer: nn.Linear) -> Affine:
    """Parameters of a linear layer; zeros for a bias that it lacks."""
    weight, bias = wide(layer.weight), dict(layer.named_parameters()).get("bias")
    return Affine(weight, weight.new_zeros(len(weight)) if bias is None else wide(bias))


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies by and adds in evaluation, each [C] in fp64.

    Raises ValueError for one that has no statistics to fold.
    """
    complete = isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.track_running_stats
    if not isinstance(norm, nn.BatchNorm2d) or not complete:
        raise ValueError(f"only a complete nn.BatchNorm2d can be folded, not {norm}")
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(wide(norm.running_var) + norm.eps) * wide(norm.weight)
    return scale, wide(norm.bias) - wide(norm.running_mean) * scale


def adafm(weights: AdaFMWeights) -> FoldedAdaFM:
    """Fold the eight batch norms of one adaptive fusion."""
    C = len(weights.out_norm.weight)
    guidance_scale, guidance_shift = _scale_shift(weights.guidance_norm)
    out_scale, out_shift = _scale_shift(weights.out_norm)
    first = [_reduce(branch) for branch in weights.branches]
    both = torch.cat([reduce.weight for reduce in first])
    bias = torch.cat([reduce.bias for reduce in first]) + both[:, C:] @ guidance_shift
    global_weight = wide(weights.global_conv[0]).flatten(1)
    mix1, mix2, mix3 = (_project(branch) for branch in weights.branches)
    aggregate = _project(weights.aggregate)
    gate_bias = wide(weights.global_conv[1]) + mix1.bias * global_weight.sum(dim=1)
    gate = [Affine(wide(weights.gate[i]).flatten(1), wide(weights.gate[i + 1])) for i in (0, 2, 4)]
    output = torch.cat([mix3.weight, aggregate.weight], dim=1) * out_scale[:, None]
    return FoldedAdaFM(
        features=both[:, :C],
        guidance=Affine(both[:, C:] * guidance_scale, bias),
        slopes=torch.cat([wide(b.slope).expand(C) for b in weights.branches]),
        global_weight=global_weight,
        gate_mix=mix1.weight,
        gate_bias=gate_bias,
        gate=(gate[0], gate[1], gate[2]),
        aggregate=_reduce(weights.aggregate),
        branch2=mix2,
        aggregate_slope=wide(weights.aggregate.slope).expand(C),
        output=Affine(output, (mix3.bias + aggregate.bias) * out_scale + out_shift),
    )


def shifted(weights: AdaFMWeights, shift: Tensor) -> AdaFMWeights:
    """Adaptive fusion that adds `shift` [C] to its features, in the branches' first biases."""

    def branch(old: BranchWeights) -> BranchWeights:
        reduce = wide(old.reduce_weight).flatten(1)[:, : len(shift)]
        return old._replace(reduce_bias=wide(old.reduce_bias) + reduce @ shift)

    first, second, third = weights.branches
    return weights._replace(branches=(branch(first), branch(second), branch(third)))


def bigru(weights: BiGRUWeights, norm: nn.Module | None = None) -> BiGRUWeights:
    """Fold the batch norm before a GRU into its input products; fp64."""
    exact = BiGRUWeights(*(wide(w) for w in weights))
    if norm is None:
        return exact
    scale, shift = norm_affine(norm)
    return exact._replace(
        weight_ih=exact.weight_ih * scale,
        bias_ih=exact.bias_ih + exact.weight_ih @ shift,
        weight_ih_reverse=exact.weight_ih_reverse * scale,
        bias_ih_reverse=exact.bias_ih_reverse + exact.weight_ih_reverse @ shift,
    )


def shuffled_conv(convolution: nn.Conv2d, scale: int) -> Affine:
    """Take a convolution after PixelShuffle(scale) to the small map before it.

    Kernel k of `convolution` [D, C, k, k] (odd, padded by k // 2) becomes one on C * scale^2
    channels to D * scale^2, whose result PixelShuffle(scale) turns into the convolution's. Its
    kernel is odd again, padded by half; zeros fill the taps that a sub-position does not have.
    """
    weight, bias = conv(convolution)
    D, C, size, _ = weight.shape
    half = size // 2
    reach = -(-half // scale)
    small = weight.new_zeros(D, scale, scale, C, scale, scale, 2 * reach + 1, 2 * reach + 1)
    steps = range(scale)
    for dy, dx, sy, sx in (
        (a, b, c, d) for a in steps for b in steps for c in steps for d in steps
    ):
        for i in range(-reach, reach + 1):
            for j in range(-reach, reach + 1):
                y, x = scale * i + sy - dy + half, scale * j + sx - dx + half
                if 0 <= y < size and 0 <= x < size:
                    small[:, dy, dx, :, sy, sx, i + reach, j + reach] = weight[:, :, y, x]
    small = small.reshape(D * scale**2, C * scale**2, 2 * reach + 1, 2 * reach + 1)
    return Affine(small, bias.repeat_interleave(scale**2))


def resize_matrix(source: int, target: int) -> Tensor:
    """[target, source] fp64: bicubic resize of a line, align_corners=True."""
    lines = torch.eye(source, dtype=torch.float64).view(1, source, source, 1)
    size = (target, 1)
    return F.interpolate(lines, size=size, mode="bicubic", align_corners=True)[0, :, :, 0].T


def stack(parts: Sequence[Affine]) -> Affine:
    """Several products of one input as one."""
    return Affine(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))


def _scale_shift(norm: BatchNormWeights) -> tuple[Tensor, Tensor]:
    weight, bias, mean, variance = (wide(w) for w in norm)
    scale = weight * torch.rsqrt(variance + 1e-5)
    return scale, bias - mean * scale


def _reduce(branch: BranchWeights) -> Affine:
    scale, shift = _scale_shift(branch.norm)
    weight = wide(branch.reduce_weight).flatten(1)
    return Affine(weight * scale[:, None], wide(branch.reduce_bias) * scale + shift)


def _project(branch: BranchWeights) -> Affine:
    return Affine(wide(branch.project_weight).flatten(1), wide(branch.project_bias))
