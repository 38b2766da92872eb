"""Convolve 3x3 at the selected positions only, and add their position rows (eq. 5, its gather).

    out[n, k] = bias + positions[n, p] + sum_tap weight[:, :, tap] features[n, :, p + tap],
    p = index[n, k]

An implicit product: a program owns BLOCK_ROW selected positions and BLOCK_OUT results and walks
over nine taps by C channels, zeros outside the map; position rows are added in its epilogue. The
backward pass is `gather_region_backward.py`; both are deterministic always. Only the gradient of
`positions`, where one is wanted, is torch's scatter_add, which heeds
`torch.use_deterministic_algorithms` (and varies only where a position repeats).

Products are of the output's dtype (features', or autocast's) and add in fp32; fp32 ones are TF32
where cuDNN's convolutions may be, else three TF32 products, near fp32. The weights are packed
[9, C, D] first: a copy, unless they are a permuted view of that in the right dtype.

Bytes for N images at the paper's sizes (C = D 64, P 1024, K 500, fp32), except for the weights (147
kB) and the position rows that all images share (262 kB):
    here       4 (C P + K D + K) = 0.39 MB an image, 25.1 MB at N = 64; 2.4 GFLOP there
    reference  4 (C P + P D) (convolution) + 8 P D (add) + 8 K D + 20 K = 1.31 MB an image,
               84.1 MB at N = 64; 4.8 GFLOP there

C, D, H, W, K and N are limited by memory alone; positions out of range read zeros.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemma_fast.kernels.gather_region_backward import (
    gather_region_backward,
    launch,
    offset,
    on_map,
    packed,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _gather(
    features, features_strides, index, index_strides, weight, bias, bias_stride,
    positions, positions_strides, out, C, D, H, W, K, BLOCK_ROW: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    d = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    dtype: tl.constexpr = out.dtype.element_ty
    chosen = index + n * index_strides[0] + k.to(tl.int64) * index_strides[1]
    p = tl.load(chosen, mask=k < K, other=-1).to(tl.int32)
    total = tl.zeros((BLOCK_OUT, BLOCK_ROW), tl.float32)
    blocks = tl.cdiv(C, BLOCK_IN)
    for step in range(9 * blocks):
        tap = step // blocks
        c = (step % blocks) * BLOCK_IN + tl.arange(0, BLOCK_IN)
        valid, y, x = on_map(p, tap // 3 - 1, tap % 3 - 1, H, W)
        at = (
            n * features_strides[0]
            + offset(y, features_strides[2])
            + offset(x, features_strides[3])
        )
        at = at[None, :] + offset(c, features_strides[1])[:, None]
        taps = tl.load(features + at, mask=valid[None, :] & (c < C)[:, None], other=0.0)
        at = (tap * C + c[None, :]) * D + d[:, None]
        matrix = tl.load(weight + at, mask=(d < D)[:, None] & (c < C)[None, :], other=0.0)
        total = tl.dot(matrix.to(dtype), taps.to(dtype), total, input_precision=PRECISION)
    inside = (d < D)[:, None] & (k < K)[None, :]
    total += tl.load(bias + d * bias_stride, mask=d < D, other=0.0).to(tl.float32)[:, None]
    at = n * positions_strides[0] + p[None, :].to(tl.int64) * positions_strides[1]
    at += d[:, None] * positions_strides[2]
    known = inside & ((p >= 0) & (p < H * W))[None, :]
    total += tl.load(positions + at, mask=known, other=0.0).to(tl.float32)
    tl.store(out + (n * K + k[None, :]) * D + d[:, None], total.to(dtype), mask=inside)


@torch.library.custom_op("lemma_fast::gather_region", mutates_args=())
def _gather_region(
    features: Tensor, index: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    (N, C, H, W), K, D = features.shape, index.shape[1], weight.shape[0]
    out = features.new_empty(N, K, D, dtype=dtype)
    grid, blocks = launch(N, K, D, C, dtype)
    with torch.cuda.device_of(features):
        _gather[grid](
            features, features.stride(), index, index.stride(), packed(weight, dtype),
            bias, bias.stride(0), rows, rows.stride(), out, C, D, H, W, K, **blocks,
        )  # fmt: skip
    return out


@_gather_region.register_fake
def _(
    features: Tensor, index: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    return features.new_empty(*index.shape, weight.shape[0], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, positions, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.positions = positions.shape, positions.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, index, weight, bias = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 6
    if any(ctx.needs_input_grad[:4]):
        grads[0], *grads[2:4] = gather_region_backward(grad, features, index, weight, bias)
    if ctx.needs_input_grad[4]:
        shape, dtype = ctx.positions
        rows = index.long()[:, :, None].expand(-1, -1, shape[2])
        grads[4] = grad.new_zeros(shape, dtype=dtype).scatter_add(1, rows, grad.to(dtype))
    return tuple(grads)


_gather_region.register_autograd(_backward, setup_context=_setup_context)


def gather_region(
    features: Tensor, index: Tensor, weight: Tensor, bias: Tensor, positions: Tensor
) -> Tensor:
    """Run `reference.gather_region` on fp32, bf16 or fp16, mixed as autocast mixes them."""
    (N, C, H, W), D, device = features.shape, weight.shape[0], features.device.type
    expected = [(N, index.shape[1]), (D, C, 3, 3), (D,), (N, H * W, D)]
    if (got := [tuple(x.shape) for x in (index, weight, bias, positions)]) != expected:
        raise ValueError(f"features {[*features.shape]} need {expected}, got {got}")
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else features.dtype
    if not autocast and not dtype == weight.dtype == bias.dtype:
        raise ValueError(f"features are {dtype}, weight {weight.dtype}, bias {bias.dtype}")
    if any(x.dtype not in DTYPES for x in (features, weight, bias, positions)):
        raise ValueError("the fused gather_region takes fp32, bf16 and fp16; use ops.reference")
    return _gather_region(features, index, weight, bias, positions, dtype)
