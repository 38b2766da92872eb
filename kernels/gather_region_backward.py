"""Gradients of `gather_region`: features, weights and bias.

    dfeatures[n, :, q] = sum_tap weight[:, :, tap]^T sum of grad[n, k] with index[n, k] = q - tap
    dweight[:, :, tap] = sum_n,k grad[n, k] features[n, :, index[n, k] + tap]^T

`_features_backward` gathers in the other direction: a program owns positions of the map and looks
up the rows selected a tap away through the inverse of `index` that `_invert` makes: `order`, rows
by position, and `starts`, where a position's rows begin (positions may repeat, in any order).
`_weight_backward` gives a program one tap and _SHARE of the N K rows; torch adds the shares. Every
sum has one owner and one order, without atomics, so the results are deterministic always.

Bytes at the paper's sizes (fp32): 4 (2 C P + 2 K D) = 0.78 MB an image, 49.9 MB at N = 64, and
147 kB a share of the weights; the features' product covers the whole map: 4.8 + 2.4 GFLOP there.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemma_fast.ops.precision import convolutions_allow_tf32

# Rows whose weight gradient one program sums.
_SHARE = 512


def launch(
    N: int, rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and blocks; few rows get small blocks.

    Chosen by resources from ahead-of-time compilation; not measured on a GPU yet.
    """
    row = 16 if N * rows <= 8192 else 64
    out = max(16, min(64, triton.next_power_of_2(outputs)))
    summed = max(16, min(64 if dtype.itemsize == 2 else 32, triton.next_power_of_2(inputs)))
    precision = "tf32" if convolutions_allow_tf32() else "tf32x3"
    blocks = {"BLOCK_ROW": row, "BLOCK_OUT": out, "BLOCK_IN": summed, "PRECISION": precision}
    # Three products a product take more registers than four warps have for the larger block.
    blocks["num_warps"] = 8 if row == 64 and dtype.itemsize == 4 else 4
    return (N, triton.cdiv(rows, row), triton.cdiv(outputs, out)), blocks


def packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Lay weights [D, C, 3, 3] out as [3, 3, C, D]; no copy where they lie so already."""
    return weight.permute(2, 3, 1, 0).to(dtype).contiguous()


@triton.jit
def offset(i, stride):
    """Stride along one axis, in 64 bits before it can overflow."""
    return i.to(tl.int64) * stride


@triton.jit
def on_map(p, dy, dx, H, W):
    """Whether position p + (dy, dx) is on the map, and its row and column."""
    y = p // W + dy
    x = p % W + dx
    return (p >= 0) & (p < H * W) & (y >= 0) & (y < H) & (x >= 0) & (x < W), y, x


@triton.jit
def _invert(index, index_strides, order, starts, K, P, BLOCK: tl.constexpr):
    """Rank rows by position, then by row, and count the rows before each position."""
    n = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # The first K entries are rows; the others are positions 0 to P, before any row of theirs.
    row = e < K
    index += n * index_strides[0]
    own = tl.load(index + e.to(tl.int64) * index_strides[1], mask=row, other=0).to(tl.int32)
    own = tl.where(row, own, e - K)
    turn = tl.where(row, e, 0)
    before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        at = k.to(tl.int64) * index_strides[1]
        other = tl.load(index + at, mask=k < K, other=0x7FFFFFFF).to(tl.int32)[None, :]
        earlier = (other == own[:, None]) & (k[None, :] < turn[:, None])
        before += tl.sum(((other < own[:, None]) | earlier).to(tl.int32), 1)
    tl.store(order + n * K + before, e, mask=row)
    tl.store(starts + n * (P + 1) + e - K, before, mask=(e >= K) & (e <= K + P))


@triton.jit
def _rows_at(grad, grad_strides, order, starts, n, p, known, d, D, K, P):
    """Sum of the gradient rows selected at positions p, [d, p]; nearly always one or none."""
    first = tl.load(starts + n * (P + 1) + p, mask=known, other=0)
    last = tl.load(starts + n * (P + 1) + p + 1, mask=known, other=0)
    total = tl.zeros((d.shape[0], p.shape[0]), tl.float32)
    for i in range(tl.max(last - first, 0)):
        there = first + i < last
        k = tl.load(order + n * K + first + i, mask=there, other=0)
        at = n * grad_strides[0] + k[None, :].to(tl.int64) * grad_strides[1]
        at += d[:, None] * grad_strides[2]
        rows = tl.load(grad + at, mask=there[None, :] & (d < D)[:, None], other=0.0)
        total += rows.to(tl.float32)
    return total


@triton.jit
def _features_backward(
    grad, grad_strides, order, starts, weight, out, out_strides, C, D, H, W, K,
    BLOCK_ROW: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    c = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    dtype: tl.constexpr = grad.dtype.element_ty
    total = tl.zeros((BLOCK_OUT, BLOCK_ROW), tl.float32)
    blocks = tl.cdiv(D, BLOCK_IN)
    for step in range(9 * blocks):
        tap = step // blocks
        d = (step % blocks) * BLOCK_IN + tl.arange(0, BLOCK_IN)
        known, y, x = on_map(p, 1 - tap // 3, 1 - tap % 3, H, W)
        q = y * W + x
        rows = _rows_at(grad, grad_strides, order, starts, n, q, known, d, D, K, H * W)
        at = (tap * C + c[:, None]) * D + d[None, :]
        matrix = tl.load(weight + at, mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        total = tl.dot(matrix.to(dtype), rows.to(dtype), total, input_precision=PRECISION)
    at = n * out_strides[0] + c[:, None].to(tl.int64) * out_strides[1]
    at += (p // W).to(tl.int64)[None, :] * out_strides[2] + (p % W)[None, :] * out_strides[3]
    inside = (c < C)[:, None] & (p < H * W)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight_backward(
    grad, grad_strides, features, features_strides, index, index_strides,
    weight_shares, bias_shares, C, D, H, W, K, ROWS, SHARE, BLOCK_ROW: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tap = tl.program_id(0) % 9
    share = tl.program_id(0) // 9
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    c = tl.program_id(2) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    dtype: tl.constexpr = grad.dtype.element_ty
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    total_bias = tl.zeros((BLOCK_OUT,), tl.float32)
    for first in range(share * SHARE, tl.minimum(share * SHARE + SHARE, ROWS), BLOCK_ROW):
        row = first + tl.arange(0, BLOCK_ROW).to(tl.int64)
        n = row // K
        k = row % K
        inside = row < ROWS
        p = tl.load(index + n * index_strides[0] + k * index_strides[1], mask=inside, other=-1)
        at = n * grad_strides[0] + k * grad_strides[1]
        at = at[None, :] + d[:, None] * grad_strides[2]
        rows = tl.load(grad + at, mask=inside[None, :] & (d < D)[:, None], other=0.0)
        valid, y, x = on_map(p.to(tl.int32), tap // 3 - 1, tap % 3 - 1, H, W)
        at = n * features_strides[0] + y * features_strides[2] + x * features_strides[3]
        at = at[:, None] + c[None, :].to(tl.int64) * features_strides[1]
        taps = tl.load(features + at, mask=valid[:, None] & (c < C)[None, :], other=0.0)
        total = tl.dot(rows, taps.to(dtype), total, input_precision=PRECISION)
        total_bias += tl.sum(rows.to(tl.float32), 1)
    at = ((share.to(tl.int64) * 9 + tap) * D + d[:, None]) * C + c[None, :]
    tl.store(weight_shares + at, total, mask=(d < D)[:, None] & (c < C)[None, :])
    if tap == 4:
        tl.store(bias_shares + share * D + d, total_bias, mask=d < D)


@torch.library.custom_op("lemma_fast::gather_region_backward", mutates_args=())
def gather_region_backward(
    grad: Tensor, features: Tensor, index: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, weight and bias for `grad` [N, K, D]; three kernels and two sums."""
    (N, C, H, W), K, D = features.shape, index.shape[1], weight.shape[0]
    P = H * W
    order = index.new_empty(N, K, dtype=torch.int32)
    starts = index.new_empty(N, P + 1, dtype=torch.int32)
    grad_features = torch.empty_like(features)
    shares = triton.cdiv(N * K, _SHARE)
    by_share = grad.new_empty(shares, 3, 3, D, C, dtype=torch.float32)
    bias_by_share = grad.new_empty(shares, D, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        _invert[N, triton.cdiv(K + P + 1, 64)](index, index.stride(), order, starts, K, P, BLOCK=64)
        grid, blocks = launch(N, P, C, D, grad.dtype)
        # Given the choice, ptxas of Triton 3.7 spills these two on sm_120 for one more block.
        of_features, of_weight = (255, None) if grad.itemsize == 2 else (None, 255)
        _features_backward[grid](
            grad, grad.stride(), order, starts, packed(weight, grad.dtype), grad_features,
            grad_features.stride(), C, D, H, W, K, **blocks, maxnreg=of_features,
        )  # fmt: skip
        _, blocks = launch(N, K, D, C, grad.dtype)
        blocks |= {"BLOCK_ROW": 32, "BLOCK_IN": min(32, blocks["BLOCK_IN"]), "num_warps": 4}
        grid = 9 * shares, triton.cdiv(D, blocks["BLOCK_OUT"]), triton.cdiv(C, blocks["BLOCK_IN"])
        _weight_backward[grid](
            grad, grad.stride(), features, features.stride(), index, index.stride(),
            by_share, bias_by_share, C, D, H, W, K, N * K, _SHARE, **blocks, maxnreg=of_weight,
        )  # fmt: skip
    grad_weight = by_share.sum(0).permute(2, 3, 0, 1).to(weight.dtype).contiguous()
    return grad_features, grad_weight, bias_by_share.sum(0).to(bias.dtype)


@gather_region_backward.register_fake
def _(
    grad: Tensor, features: Tensor, index: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(features), weight.new_empty(weight.shape), bias.new_empty(bias.shape)
