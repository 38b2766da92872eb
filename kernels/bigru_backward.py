"""Gradients of `bigru`, from its input and its output: the gates are computed again.

`_backward` walks the steps back and leaves the gradients before the gates' nonlinearities, for each
direction and position [r, z, n of the input, n of the state]. `_inputs` turns these into the
features' gradient; `_sums` gives a program one gate and a share of the positions, and torch adds
the shares in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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

# Positions a tile of the reductions, their warps, and the shares for each gate and direction.
_BLOCK_P = {2: 32, 4: 16}
_WARPS_SUMS = 4
_SHARES = 64


@triton.jit
def _backward(features, out, grad_out, gates, ih0, hh0, bih0, bhh0, ih1, hh1, bih1, bhh1, S, lines,
              strides, out_strides, grad_strides, gates_strides, C, H: tl.constexpr,
              L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
              PRECISION: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """Walk the steps backwards; store the gradients before the gates' nonlinearities."""
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
    inside = (s < S)[:, None]
    inputs, live = inside & (c < C), inside & (j < H)
    channel = reverse * H + j
    source = features + n * strides[0] + c * strides[1] + line * strides[2]
    state = out + n * out_strides[0] + channel * out_strides[1] + line * out_strides[2]
    above = grad_out + n * grad_strides[0] + channel * grad_strides[1] + line * grad_strides[2]
    target = gates + reverse * gates_strides[0] + n * gates_strides[1] + line * gates_strides[2] + j
    first = (L - 1) * reverse
    step = 1 - 2 * reverse
    k = tl.arange(0, BLOCK_H)[:, None]
    recurrent_weights = hh0 + k * H + j
    matrix = (k < H) & (j < H)
    d_h = tl.zeros([BLOCK_S, BLOCK_H], tl.float32)
    for i in tl.range(L, num_stages=1):
        t = first + step * (L - 1 - i)
        x = tl.load(source + t * strides[3], mask=inputs, other=0.0).to(DOT)
        later = (s < tl.where(t == first, 0, S))[:, None] & (j < H)
        h = tl.load(state + (t - step) * out_strides[3], mask=later, other=0.0).to(DOT)
        d_h += tl.load(above + t * grad_strides[3], mask=live, other=0.0).to(tl.float32)
        r, z, candidate, recurrent = compute_gates(x, h, kept, ih0, hh0, biases, i // (L + S), C,
                                                   H, BLOCK_C, BLOCK_H, PRECISION,
                                                   KEEP)  # fmt: skip
        # `n` is a sum of two products and has a gradient for each.
        g_in = d_h * (1 - z) * (1 - candidate * candidate)
        g_hn = g_in * r
        g_r = g_hn * recurrent * (1 - r)
        g_z = d_h * (h.to(tl.float32) - candidate) * z * (1 - z)
        at = target + t * gates_strides[3]
        tl.store(at, g_r, mask=live)
        tl.store(at + H, g_z, mask=live)
        tl.store(at + 2 * H, g_in, mask=live)
        tl.store(at + 3 * H, g_hn, mask=live)
        # These matrices come from the cache at every step: kept, they would crowd out the others.
        w_hr = tl.load(recurrent_weights, mask=matrix, other=0.0).to(DOT)
        w_hz = tl.load(recurrent_weights + H * H, mask=matrix, other=0.0).to(DOT)
        w_hn = tl.load(recurrent_weights + 2 * H * H, mask=matrix, other=0.0).to(DOT)
        d_h = tl.dot(g_r.to(DOT), w_hr, d_h * z, input_precision=PRECISION)
        d_h = tl.dot(g_z.to(DOT), w_hz, d_h, input_precision=PRECISION)
        d_h = tl.dot(g_hn.to(DOT), w_hn, d_h, input_precision=PRECISION)


@triton.jit
def _place(p, height, width):
    """Image, row and column of raster positions, ready to be multiplied by strides."""
    row = p // width
    return (row // height).to(tl.int64), (row % height).to(tl.int64), (p % width).to(tl.int64)


@triton.jit
def _inputs(gates, grad_features, ih0, ih1, positions, height, width, strides, C,
            H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Turn both directions' gates' gradients into the features'."""
    DOT: tl.constexpr = gates.dtype.element_ty
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    j = tl.arange(0, BLOCK_H)
    inside = (p < positions)[:, None]
    matrix = (j < H)[:, None] & (c < C)[None, :]
    d_x = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for part in range(6):
        gate = part % 3
        weight = (ih1 if part >= 3 else ih0) + (gate * H + j)[:, None] * C + c[None, :]
        weight = tl.load(weight, mask=matrix, other=0.0).to(DOT)
        at = ((part // 3) * positions + p).to(tl.int64) * (4 * H) + gate * H
        g = tl.load(gates + at[:, None] + j[None, :], mask=inside & (j < H)[None, :], other=0.0)
        d_x = tl.dot(g.to(DOT), weight, d_x, input_precision=PRECISION)
    n, row, column = _place(p, height, width)
    at = n * strides[0] + row * strides[2] + column * strides[3]
    at = at[:, None] + c[None, :] * strides[1]
    tl.store(grad_features + at, d_x, mask=inside & (c < C)[None, :])


@triton.jit
def _sums(features, out, gates, shares, positions, height, width, strides, out_strides, C,
          AXIS: tl.constexpr, H: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr,
          BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Sum one share of the gradients of one gate's parameters, in one direction."""
    DOT: tl.constexpr = features.dtype.element_ty
    gate, reverse = tl.program_id(1) % 3, tl.program_id(1) // 3
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    j = tl.arange(0, BLOCK_H).to(tl.int64)
    d_ih = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    d_hh = tl.zeros([BLOCK_H, BLOCK_H], tl.float32)
    b_ih = tl.zeros([BLOCK_H], tl.float32)
    b_hh = tl.zeros([BLOCK_H], tl.float32)
    for tile in tl.range(TILES, num_stages=1):
        p = (tl.program_id(0) * TILES + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        n, row, column = _place(p, height, width)
        inside = p < positions
        source = features + n * strides[0] + row * strides[2] + column * strides[3]
        keep = inside[:, None] & (c < C)[None, :]
        x = tl.load(source[:, None] + c[None, :] * strides[1], mask=keep, other=0.0).to(DOT)
        # The state before: one step back along the axis, zero where the sequence starts.
        t, length, stride = row, height, out_strides[2]
        if AXIS == 3:
            t, length, stride = column, width, out_strides[3]
        later = inside & (t != (length - 1) * reverse)
        before = out + n * out_strides[0] + row * out_strides[2] + column * out_strides[3]
        before = (before - (1 - 2 * reverse) * stride)[:, None]
        before += (reverse * H + j)[None, :] * out_strides[1]
        h = tl.load(before, mask=later[:, None] & (j < H)[None, :], other=0.0).to(DOT)
        # The last gate has one gradient for its input's product, one for its state's.
        at = (reverse * positions + p).to(tl.int64) * (4 * H) + gate * H
        at = gates + at[:, None] + j[None, :]
        keep = inside[:, None] & (j < H)[None, :]
        g_ih = tl.load(at, mask=keep, other=0.0)
        g_hh = tl.load(at + (gate // 2) * H, mask=keep, other=0.0)
        b_ih += tl.sum(g_ih.to(tl.float32), 0)
        b_hh += tl.sum(g_hh.to(tl.float32), 0)
        d_ih = tl.dot(tl.trans(g_ih).to(DOT), x, d_ih, input_precision=PRECISION)
        d_hh = tl.dot(tl.trans(g_hh).to(DOT), h, d_hh, input_precision=PRECISION)
    # A share holds weight_ih, weight_hh, bias_ih, bias_hh in turn.
    shares += (reverse * tl.num_programs(0).to(tl.int64) + tl.program_id(0)) * (3 * H * (C + H + 2))
    row = (gate * H + j)[:, None]
    rows = (j < H)[:, None]
    tl.store(shares + row * C + c[None, :], d_ih, mask=rows & (c < C)[None, :])
    shares += 3 * H * C
    tl.store(shares + row * H + j[None, :], d_hh, mask=rows & (j < H)[None, :])
    shares += 3 * H * H + gate * H
    tl.store(shares + j, b_ih, mask=j < H)
    tl.store(shares + 3 * H + j, b_hh, mask=j < H)


@torch.library.custom_op("lemma_fast::bigru_backward", mutates_args=())
def bigru_backward(
    grad_out: Tensor, features: Tensor, out: Tensor, axis: int, weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the features' gradient and both directions' parameters' [2, 3 * H * (C + H + 2)]."""
    S, (C, H, L), blocks, keep = sizes_and_blocks(features, axis, weights)
    N, _, height, width = features.shape
    weights = [weight.contiguous() for weight in weights]
    gates = features.new_empty(2, N, height, width, 4 * H)
    gates_strides = gates.stride(0), gates.stride(1), gates.stride(5 - axis), gates.stride(axis)
    block_p = _BLOCK_P[features.itemsize]
    tiles = triton.cdiv(S * L, block_p)
    # A power of two, so that few batch sizes need a compilation of their own.
    walked = triton.next_power_of_2(max(1, triton.cdiv(tiles, _SHARES)))
    programs = triton.cdiv(tiles, walked)
    grad_features = empty_map(features, C)
    shares = features.new_empty(2, programs, 3 * H * (C + H + 2), dtype=torch.float32)
    with torch.cuda.device_of(features):
        _backward[triton.cdiv(S, SEQUENCES), 2](
            features, out, grad_out, gates, *weights, S, features.shape[5 - axis],
            *(strides_along(x, axis) for x in (features, out, grad_out)), gates_strides,
            C, H, L, *blocks, keep, num_warps=WARPS[features.itemsize],
        )  # fmt: skip
        _inputs[(tiles,)](
            gates, grad_features, weights[0], weights[4], S * L, height, width,
            grad_features.stride(), C, H, block_p, *blocks[1:], num_warps=_WARPS_SUMS,
        )  # fmt: skip
        _sums[programs, 6](
            features, out, gates, shares, S * L, height, width, features.stride(), out.stride(),
            C, axis, H, walked, block_p, *blocks[1:], num_warps=_WARPS_SUMS,
        )  # fmt: skip
    return grad_features, shares.sum(1)


@bigru_backward.register_fake
def _(
    grad_out: Tensor, features: Tensor, out: Tensor, axis: int, weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    C, H = features.shape[1], weights[1].shape[1]
    shares = features.new_empty(2, 3 * H * (C + H + 2), dtype=torch.float32)
    return empty_map(features, C), shares
