"""Bidirectional GRU along one axis of a map: input projection, recurrence and layout in one launch.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)        z likewise
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))     h' = (1 - z) n + z h

A program owns BLOCK_S sequences and one direction, keeps the weight matrices on the chip (those too
large for that come from the cache at each step) and walks the steps; it reads and writes the maps
by their strides, so nothing is permuted. Only the input and the output are kept for backward:
`bigru_backward.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemma_fast.kernels.bigru_backward import bigru_backward
from lemma_fast.kernels.bigru_step import (
    SEQUENCES,
    WARPS,
    compute_gates,
    load_biases,
    load_matrices,
    sizes_and_blocks,
    strides_along,
)
from lemma_fast.ops.layouts import empty_map
from lemma_fast.ops.weights import BiGRUWeights


@triton.jit
def _forward(features, add, out, ih0, hh0, bih0, bhh0, ih1, hh1, bih1, bhh1, S, lines, strides,
             add_strides, out_strides, C, H: tl.constexpr, L: tl.constexpr, BLOCK_S: tl.constexpr,
             BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
             KEEP: tl.constexpr):  # fmt: skip
    DOT: tl.constexpr = features.dtype.element_ty
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    reverse = tl.program_id(1)
    if reverse == 1:
        ih0, hh0, bih0, bhh0 = ih1, hh1, bih1, bhh1
    biases = load_biases(bih0, bhh0, H, BLOCK_H)
    kept = load_matrices(ih0, hh0, C, H, BLOCK_C, BLOCK_H, DOT) if KEEP else None
    c = tl.arange(0, BLOCK_C)[None, :].to(tl.int64)
    j = tl.arange(0, BLOCK_H)[None, :].to(tl.int64)
    n, line = (s // lines)[:, None].to(tl.int64), (s % lines)[:, None].to(tl.int64)
    source = features + n * strides[0] + c * strides[1] + line * strides[2]
    target = out + n * out_strides[0] + (reverse * H + j) * out_strides[1] + line * out_strides[2]
    inside = (s < S)[:, None]
    if add is not None:
        summand = add + n * add_strides[0] + line * add_strides[2]
        summand += (reverse * H + j) * add_strides[1]
    first, last = (L - 1) * reverse, (L - 1) * (1 - reverse)
    # +1 or -1: the way a direction walks the axis
    step = 1 - 2 * reverse
    h = tl.zeros([BLOCK_S, BLOCK_H], tl.float32)
    x = tl.load(source + first * strides[3], mask=inside & (c < C), other=0.0).to(DOT)
    for i in tl.range(L, num_stages=1):
        t = first + step * i
        # The next input is asked for before this one is used.
        more = (s < tl.where(t == last, 0, S))[:, None] & (c < C)
        x_next = tl.load(source + (t + step) * strides[3], mask=more, other=0.0).to(DOT)
        if add is not None:
            addend = tl.load(summand + t * add_strides[3], mask=inside & (j < H), other=0.0)
        _, z, candidate, _ = compute_gates(x, h, kept, ih0, hh0, biases, i // (L + S), C, H,
                                           BLOCK_C, BLOCK_H, PRECISION, KEEP)  # fmt: skip
        h = (1 - z) * candidate + z * h
        value = h
        if add is not None:
            value += addend.to(tl.float32)
        tl.store(target + t * out_strides[3], value, mask=inside & (j < H))
        x = x_next


@torch.library.custom_op("lemma_fast::bigru", mutates_args=())
def _bigru(features: Tensor, axis: int, weights: list[Tensor]) -> Tensor:
    return _run(features, None, axis, weights)


@_bigru.register_fake
def _(features: Tensor, axis: int, weights: list[Tensor]) -> Tensor:
    return empty_map(features, 2 * weights[1].shape[1])


@torch.library.custom_op("lemma_fast::bigru_add", mutates_args=())
def _bigru_add(features: Tensor, add: Tensor, axis: int, weights: list[Tensor]) -> Tensor:
    return _run(features, add, axis, weights)


@_bigru_add.register_fake
def _(features: Tensor, add: Tensor, axis: int, weights: list[Tensor]) -> Tensor:
    return empty_map(features, 2 * weights[1].shape[1])


def _run(features: Tensor, add: Tensor | None, axis: int, weights: list[Tensor]) -> Tensor:
    out = empty_map(features, 2 * weights[1].shape[1])
    S, sizes, blocks, keep = sizes_and_blocks(features, axis, weights)
    weights = [weight.contiguous() for weight in weights]
    add_strides = None if add is None else strides_along(add, axis)
    with torch.cuda.device_of(features):
        _forward[triton.cdiv(S, SEQUENCES), 2](
            features, add, out, *weights, S, features.shape[5 - axis],
            strides_along(features, axis), add_strides, strides_along(out, axis), *sizes, *blocks,
            keep, num_warps=WARPS[features.itemsize],
        )  # fmt: skip
    return out


def _setup_context(ctx, inputs, output) -> None:
    features, axis, weights = inputs
    ctx.save_for_backward(features, output, *weights)
    ctx.axis = axis


def _backward(ctx, grad_out):
    features, out, *weights = ctx.saved_tensors
    grad_features, shares = bigru_backward(grad_out, features, out, ctx.axis, weights)
    grads = []
    for direction in range(2):
        of_direction = weights[4 * direction : 4 * direction + 4]
        parts = shares[direction].split([weight.numel() for weight in of_direction])
        grads += [
            part.view(weight.shape).to(weight.dtype)
            for part, weight in zip(parts, of_direction, strict=True)
        ]
    return grad_features, None, grads


_bigru.register_autograd(_backward, setup_context=_setup_context)


def bigru(features: Tensor, axis: int, weights: BiGRUWeights) -> Tensor:
    """Run `ops.reference.bigru`'s recurrence; the result is laid out in memory as `features` is.

    `features` [N, C, H, W] in fp32, fp16 or bf16 with any strides; any length. C up to 128 and
    hidden up to 64, which fit the 99 KiB of shared memory of the smallest device (sm_120); near
    these, and in fp32 beyond 64 and 32, registers spill: right, but slow. Parameters may be of
    another type. State and sums are fp32; products of fp32 maps are of full precision unless
    `torch.backends.cuda.matmul` allows TF32. Deterministic. Under CUDA autocast the features
    are cast, as cuDNN's are. Raises ValueError otherwise.
    """
    _check(features, axis, weights)
    if features.is_cuda and torch.is_autocast_enabled("cuda"):
        features = features.to(torch.get_autocast_dtype("cuda"))
    return _bigru(features, axis, list(weights))


def _check(features: Tensor, axis: int, weights: BiGRUWeights) -> None:
    if axis not in (2, 3):
        raise ValueError(f"axis is {axis}; 2 runs along the height, 3 along the width")
    if features.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"features are {features.dtype}; the fused GRU takes fp32, fp16 and bf16")
    C, hidden = weights.weight_ih.shape[1], weights.weight_hh.shape[1]
    if features.dim() != 4 or features.shape[1] != C:
        raise ValueError(f"features are {[*features.shape]}, the weights take [N, {C}, H, W]")
    if C > 128 or hidden > 64:
        raise ValueError(
            f"C = {C}, hidden = {hidden}: the fused GRU takes up to 128 and 64 in {features.dtype} "
            "(more do not fit a device's registers and shared memory); use ops.reference"
        )


def bigru_add(features: Tensor, add: Tensor, axis: int, weights: BiGRUWeights) -> Tensor:
    """Return `add` + `bigru(features, axis, weights)`, the sum made at the store in fp32.

    `add` [N, 2 * hidden, H, W] is of the features' type, with any strides. There is no gradient,
    and no autocast. Raises ValueError for what does not fit.
    """
    N, _, H, W = features.shape
    shape = (N, 2 * weights.weight_hh.shape[1], H, W)
    if add.shape != shape or add.dtype != features.dtype:
        raise ValueError(
            f"add is {[*add.shape]} {add.dtype}, the result {[*shape]} {features.dtype}"
        )
    _check(features, axis, weights)
    return _bigru_add(features, add, axis, list(weights))
