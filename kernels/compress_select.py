"""Resize the attention maps, take their maximum over the live characters, and select the top K.

    score[n, p] = max_t (t < lengths[n] ? bicubic(h_attn[n, t])[p] : 0)        (eqs. 1, 4)
    index[n]    = the K positions with the largest scores, ascending; ties: the lower one

`_score` gives a program BLOCK positions of one image and walks over T. `_select` gives a program
one image: two bits of the K-th largest score a step, by counting keys (fp32 as ordered integers)
against three candidates at once, then one prefix sum places the rows. `_score_backward` gives a
program one character: U_y^T G U_x, where G is the gradient at the positions that the character won
and the U are the resize as matrices (a NaN in the gradient fills its character's map).
No sort, no atomics, no host synchronisation; both directions are deterministic.

Bytes for N images at the paper's sizes (T 26, 8x32 to 16x64, K 500, fp32):
    here       4 T h w + 4 P (score) + 2 P (winner) + 4 P (score, read by _select) + 4 K
               = 38.9 kB an image, 2.49 MB at N = 64
    reference  4 (T h w + T P) (resize) + 8 T P (mask) + 4 T P + 12 P (max) + 16 P + 36 K (the
               sorts, if each read and wrote once) = 499 kB an image, 32.0 MB at N = 64
Backward: 4 P + 2 P (by T programs, from cache) + 4 T h w = 32.8 kB an image, 2.1 MB at N = 64.

Limits: H * W <= 8192 (a program holds an image's scores), T <= 32767.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_POSITIONS, MAX_CHARACTERS = 8192, 32767
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Chosen by resources from ahead-of-time compilation; not measured on a GPU yet.
_BLOCK, _BLOCK_SY, _BLOCK_SX = 128, 16, 32


@triton.jit
def _taps(target, scale, size):
    """Source indices and weights of bicubic interpolation (A = -0.75, align_corners=True)."""
    at = target.to(tl.float32) * scale
    first = tl.minimum(tl.floor(at).to(tl.int32), size - 1)
    t = tl.minimum(tl.maximum(at - first.to(tl.float32), 0.0), 1.0)
    u = 1.0 - t
    second, third = tl.minimum(first + 1, size - 1), tl.minimum(first + 2, size - 1)
    indices = (tl.maximum(first - 1, 0), first, second, third)
    weights = (
        ((-0.75 * (t + 1.0) + 3.75) * (t + 1.0) - 6.0) * (t + 1.0) + 3.0,
        (1.25 * t - 2.25) * t * t + 1.0,
        (1.25 * u - 2.25) * u * u + 1.0,
        ((-0.75 * (u + 1.0) + 3.75) * (u + 1.0) - 6.0) * (u + 1.0) + 3.0,
    )
    return indices, weights


@triton.jit
def _score(
    h_attn, h_attn_strides, lengths, lengths_stride, score, winner,
    T, h, w, W, P, scale_y, scale_x, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = p < P
    live = tl.minimum(tl.load(lengths + n * lengths_stride), T).to(tl.int32)
    ys, weights_y = _taps(p // W, scale_y, h)
    xs, weights_x = _taps(p % W, scale_x, w)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    first = tl.full((BLOCK,), -1, tl.int32)
    character = h_attn + n * h_attn_strides[0]
    for t in range(live):
        value = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(4):
            line = character + ys[i].to(tl.int64) * h_attn_strides[2]
            row = tl.zeros((BLOCK,), tl.float32)
            for j in tl.static_range(4):
                at = line + xs[j].to(tl.int64) * h_attn_strides[3]
                row += tl.load(at, mask=inside, other=0.0).to(tl.float32) * weights_x[j]
            value += row * weights_y[i]
        larger = ((value > best) | (value != value)) & (best == best) | (first < 0)
        best = tl.where(larger, value, best)
        first = tl.where(larger, t, first)
        character += h_attn_strides[1]
    # Characters past the length are zeros that come after every live one.
    dead = (live < T) & ((best < 0.0) | (first < 0))
    tl.store(score + n * P + p, tl.where(dead, 0.0, best), mask=inside)
    tl.store(winner + n * P + p, tl.where(dead, -1, first).to(tl.int16), mask=inside)


@triton.jit
def _select(score, index, P, K, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK)
    inside = p < P
    value = tl.load(score + n * P + p, mask=inside, other=0.0)
    # Integers in the order of the floats; -0.0 is 0.0, NaN is above everything.
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(value != value, 0x7FFFFFFF, key)

    # The largest threshold that at least K keys reach, two bits a step. Three counts share one
    # sum; a field of 20 bits holds any of them.
    low = tl.full((), -0x80000000, tl.int64)
    for step in tl.static_range(16):
        digit = 1 << (30 - 2 * step)
        one = inside & (key >= (low + digit).to(tl.int32))
        two = inside & (key >= (low + 2 * digit).to(tl.int32))
        three = inside & (key >= (low + 3 * digit).to(tl.int32))
        packed = one.to(tl.int64) + (two.to(tl.int64) << 20) + (three.to(tl.int64) << 40)
        counts = tl.sum(packed)
        low += tl.where((counts & 0xFFFFF) >= K, digit, 0)
        low += tl.where(((counts >> 20) & 0xFFFFF) >= K, digit, 0)
        low += tl.where((counts >> 40) >= K, digit, 0)
    threshold = low.to(tl.int32)

    above = (inside & (key > threshold)).to(tl.int32)
    tied = (inside & (key == threshold)).to(tl.int32)
    # Both prefix sums in one: positions are fewer than 2^15, their counts at most 2^14.
    sums = tl.cumsum(above + (tied << 15), 0)
    above_before = (sums & 0x7FFF) - above
    tied_before = (sums >> 15) - tied
    wanted = K - tl.sum(above)
    keep = (above == 1) | ((tied == 1) & (tied_before < wanted))
    slot = above_before + tl.minimum(tied_before, wanted)
    tl.store(index + n * K + slot, p, mask=keep)


@triton.jit
def _matrix(target, source, scale, size):
    """The resize as a matrix, [targets, sources]: what one axis of `_score` does."""
    indices, weights = _taps(target, scale, size)
    matrix = tl.zeros((target.shape[0], source.shape[0]), tl.float32)
    for i in tl.static_range(4):
        matrix += tl.where(indices[i][:, None] == source[None, :], weights[i][:, None], 0.0)
    return matrix


@triton.jit
def _score_backward(
    grad, grad_strides, winner, out, T, h, w, H, W, scale_y, scale_x,
    BLOCK_SY: tl.constexpr, BLOCK_SX: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // T).to(tl.int64)
    t = tl.program_id(0) % T
    source_y = tl.program_id(1) * BLOCK_SY + tl.arange(0, BLOCK_SY)
    source_x = tl.program_id(2) * BLOCK_SX + tl.arange(0, BLOCK_SX)
    total = tl.zeros((BLOCK_SY, BLOCK_SX), tl.float32)
    for first_y in range(0, H, BLOCK_Y):
        y = first_y + tl.arange(0, BLOCK_Y)
        lines = tl.zeros((BLOCK_Y, BLOCK_SX), tl.float32)
        for first_x in range(0, W, BLOCK_X):
            x = first_x + tl.arange(0, BLOCK_X)
            inside = (y[:, None] < H) & (x[None, :] < W)
            at = y[:, None].to(tl.int64) * grad_strides[1] + x[None, :] * grad_strides[2]
            value = tl.load(grad + n * grad_strides[0] + at, mask=inside, other=0.0)
            at = (n * H + y[:, None]) * W + x[None, :]
            won = tl.load(winner + at, mask=inside, other=-1) == t
            value = tl.where(won, value.to(tl.float32), 0.0)
            resize = _matrix(x, source_x, scale_x, w)
            lines = tl.dot(value, resize, lines, input_precision="ieee")
        resize = tl.trans(_matrix(y, source_y, scale_y, h))
        total = tl.dot(resize, lines, total, input_precision="ieee")
    inside = (source_y[:, None] < h) & (source_x[None, :] < w)
    at = ((n * T + t) * h + source_y[:, None]) * w + source_x[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def _scale(source: int, target: int) -> float:
    return (source - 1) / (target - 1) if target > 1 else 0.0


@torch.library.custom_op("lemma_fast::compress_select", mutates_args=())
def _compress_select(
    h_attn: Tensor, lengths: Tensor, num_selected: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    N, T, h, w = h_attn.shape
    P = height * width
    score = h_attn.new_empty(N, height, width, dtype=torch.float32)
    winner = h_attn.new_empty(N, height, width, dtype=torch.int16)
    index = h_attn.new_empty(N, num_selected, dtype=torch.int32)
    block = max(16, triton.next_power_of_2(P))
    warps = min(16, max(1, block // 256))
    with torch.cuda.device_of(h_attn):
        _score[N, triton.cdiv(P, _BLOCK)](
            h_attn, h_attn.stride(), lengths, lengths.stride(0), score, winner, T, h, w, width, P,
            _scale(h, height), _scale(w, width), BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
        _select[N,](score, index, P, num_selected, BLOCK=block, num_warps=warps)
    return score, index, winner


@_compress_select.register_fake
def _(
    h_attn: Tensor, lengths: Tensor, num_selected: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    score = h_attn.new_empty(h_attn.shape[0], height, width, dtype=torch.float32)
    index = h_attn.new_empty(h_attn.shape[0], num_selected, dtype=torch.int32)
    return score, index, torch.empty_like(score, dtype=torch.int16)


@torch.library.custom_op("lemma_fast::compress_select_backward", mutates_args=())
def _compress_select_backward(
    grad: Tensor, winner: Tensor, shape: list[int], dtype: torch.dtype
) -> Tensor:
    N, T, h, w = shape
    _, H, W = grad.shape
    out = grad.new_empty(shape, dtype=dtype)
    with torch.cuda.device_of(grad):
        _score_backward[N * T, triton.cdiv(h, _BLOCK_SY), triton.cdiv(w, _BLOCK_SX)](
            grad, grad.stride(), winner, out, T, h, w, H, W, _scale(h, H), _scale(w, W),
            BLOCK_SY=_BLOCK_SY, BLOCK_SX=_BLOCK_SX, BLOCK_Y=16, BLOCK_X=64, num_warps=4,
        )  # fmt: skip
    return out


@_compress_select_backward.register_fake
def _(grad: Tensor, winner: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return grad.new_empty(shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    (winner,) = ctx.saved_tensors
    return _compress_select_backward(grad, winner, ctx.shape, ctx.dtype), None, None, None, None


_compress_select.register_autograd(_backward, setup_context=_setup_context)


def compress_select(
    h_attn: Tensor, lengths: Tensor, num_selected: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Run `reference.compress_select` in two launches; `h_attn` is fp32, bf16 or fp16."""
    (N, T, _, _), (H, W) = h_attn.shape, size
    if not 1 <= num_selected <= H * W:
        raise ValueError(f"num_selected is {num_selected}, the map has {H * W} positions")
    if lengths.shape != (N,):
        raise ValueError(f"h_attn has {N} images, lengths is {[*lengths.shape]}")
    if H * W > MAX_POSITIONS or not 1 <= T <= MAX_CHARACTERS or h_attn.dtype not in DTYPES:
        raise ValueError(
            f"the fused compress_select takes up to {MAX_POSITIONS} positions, 1 to "
            f"{MAX_CHARACTERS} characters and fp32, bf16 or fp16; got {H} x {W}, {T} and "
            f"{h_attn.dtype}: use ops.reference"
        )
    score, index, _ = _compress_select(h_attn, lengths, num_selected, H, W)
    return score, index
