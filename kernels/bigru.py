"""Bidirectional GRU along one axis of a map: input projection, recurrence and layout in one launch.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)        z likewise
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))     h' = (1 - z) n + z h

A program owns BLOCK_S sequences and one direction, keeps the weight matrices on the chip (those too
large for that come from the cache at each step) and walks the steps; it reads and writes the maps
by their strides, so nothing is permuted. Only the input and the output are kept for backward, which
computes the gates again: one launch walks the steps back and leaves the gates' gradients, one turns
them into the features' gradient, one into shares of the parameters' gradients, which are added in a
fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemma_fast.ops.precision import products_allow_tf32
from lemma_fast.ops.weights import BiGRUWeights

# The launch table, chosen by compiled resources (no spills). Not run on a GPU, not tuned.
# Sequences a program of the recurrences and their warps, for a two-byte and a four-byte type.
_BLOCK_S = 16
_WARPS = {2: 4, 4: 8}
# Positions a tile of the reductions, their warps, and the shares for each gate and direction.
_BLOCK_P = {2: 32, 4: 16}
_WARPS_SUMS = 4
_SHARES = 64
# Matrices up to this size are kept in shared memory, of which the smallest device has 99 KiB.
_KEPT_BYTES = {2: 64 * 1024, 4: 72 * 1024}


@triton.jit
def _matrix(pointer, gate, zero, INPUTS, H: tl.constexpr, BLOCK_IN: tl.constexpr,
            BLOCK_H: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Load one gate's matrix as [INPUTS, H]."""
    i = tl.arange(0, BLOCK_IN)[:, None] + zero
    j = tl.arange(0, BLOCK_H)[None, :] + zero
    inside = (i < INPUTS) & (j < H)
    return tl.load(pointer + (gate * H + j) * INPUTS + i, mask=inside, other=0.0).to(DOT)


@triton.jit
def _matrices(ih, hh, C, H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
              DOT: tl.constexpr):  # fmt: skip
    """Load one direction's matrices: for each gate the input's and the state's."""
    w_ir = _matrix(ih, 0, 0, C, H, BLOCK_C, BLOCK_H, DOT)
    w_hr = _matrix(hh, 0, 0, H, H, BLOCK_H, BLOCK_H, DOT)
    w_iz = _matrix(ih, 1, 0, C, H, BLOCK_C, BLOCK_H, DOT)
    w_hz = _matrix(hh, 1, 0, H, H, BLOCK_H, BLOCK_H, DOT)
    w_in = _matrix(ih, 2, 0, C, H, BLOCK_C, BLOCK_H, DOT)
    return w_ir, w_hr, w_iz, w_hz, w_in, _matrix(hh, 2, 0, H, H, BLOCK_H, BLOCK_H, DOT)


@triton.jit
def _biases(ih, hh, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load one direction's biases: of r, of z, and both of n."""
    j = tl.arange(0, BLOCK_H)[None, :]
    live = j < H
    r = tl.load(ih + j, mask=live, other=0.0).to(tl.float32)
    r += tl.load(hh + j, mask=live, other=0.0).to(tl.float32)
    z = tl.load(ih + H + j, mask=live, other=0.0).to(tl.float32)
    z += tl.load(hh + H + j, mask=live, other=0.0).to(tl.float32)
    n = tl.load(ih + 2 * H + j, mask=live, other=0.0).to(tl.float32)
    return r, z, n, tl.load(hh + 2 * H + j, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _gates(x, h, kept, ih, hh, biases, zero, C, H: tl.constexpr, BLOCK_C: tl.constexpr,
           BLOCK_H: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """Compute r, z, n and the recurrent part of n from `x` [S, C] and `h` [S, H].

    Without KEEP the matrices are read here; `zero` is unknown to the compiler, which would else
    read them ahead of the loop.
    """
    DOT: tl.constexpr = x.dtype
    b_r, b_z, b_in, b_hn = biases
    h = h.to(DOT)
    w = kept[0] if KEEP else _matrix(ih, 0, zero, C, H, BLOCK_C, BLOCK_H, DOT)
    r = tl.dot(x, w, input_precision=PRECISION)
    w = kept[1] if KEEP else _matrix(hh, 0, zero, H, H, BLOCK_H, BLOCK_H, DOT)
    r = tl.sigmoid(tl.dot(h, w, r, input_precision=PRECISION) + b_r)
    w = kept[2] if KEEP else _matrix(ih, 1, zero, C, H, BLOCK_C, BLOCK_H, DOT)
    z = tl.dot(x, w, input_precision=PRECISION)
    w = kept[3] if KEEP else _matrix(hh, 1, zero, H, H, BLOCK_H, BLOCK_H, DOT)
    z = tl.sigmoid(tl.dot(h, w, z, input_precision=PRECISION) + b_z)
    w = kept[4] if KEEP else _matrix(ih, 2, zero, C, H, BLOCK_C, BLOCK_H, DOT)
    n = tl.dot(x, w, input_precision=PRECISION)
    w = kept[5] if KEEP else _matrix(hh, 2, zero, H, H, BLOCK_H, BLOCK_H, DOT)
    recurrent = tl.dot(h, w, input_precision=PRECISION) + b_hn
    # tanh by way of exp, which is all that every backend and the interpreter have.
    n = 2 * tl.sigmoid(2 * (n + b_in + r * recurrent)) - 1
    return r, z, n, recurrent


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
    biases = _biases(bih0, bhh0, H, BLOCK_H)
    kept = _matrices(ih0, hh0, C, H, BLOCK_C, BLOCK_H, DOT) if KEEP else None
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
            more = tl.load(summand + t * add_strides[3], mask=inside & (j < H), other=0.0)
        _, z, candidate, _ = _gates(x, h, kept, ih0, hh0, biases, i // (L + S), C, H, BLOCK_C,
                                    BLOCK_H, PRECISION, KEEP)  # fmt: skip
        h = (1 - z) * candidate + z * h
        value = h
        if add is not None:
            value += more.to(tl.float32)
        tl.store(target + t * out_strides[3], value, mask=inside & (j < H))
        x = x_next


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
    biases = _biases(bih0, bhh0, H, BLOCK_H)
    kept = _matrices(ih0, hh0, C, H, BLOCK_C, BLOCK_H, DOT) if KEEP else None
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
        r, z, candidate, recurrent = _gates(x, h, kept, ih0, hh0, biases, i // (L + S), C, H,
                                            BLOCK_C, BLOCK_H, PRECISION, KEEP)  # fmt: skip
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


@torch.library.custom_op("lemma_fast::bigru", mutates_args=())
def _bigru(features: Tensor, axis: int, weights: list[Tensor]) -> Tensor:
    return _run(features, None, axis, weights)


@_bigru.register_fake
def _(features: Tensor, axis: int, weights: list[Tensor]) -> Tensor:
    return _empty_map(features, 2 * weights[1].shape[1])


@torch.library.custom_op("lemma_fast::bigru_add", mutates_args=())
def _bigru_add(features: Tensor, add: Tensor, axis: int, weights: list[Tensor]) -> Tensor:
    return _run(features, add, axis, weights)


@_bigru_add.register_fake
def _(features: Tensor, add: Tensor, axis: int, weights: list[Tensor]) -> Tensor:
    return _empty_map(features, 2 * weights[1].shape[1])


def _run(features: Tensor, add: Tensor | None, axis: int, weights: list[Tensor]) -> Tensor:
    out = _empty_map(features, 2 * weights[1].shape[1])
    S, sizes, blocks, keep = _sizes(features, axis, weights)
    weights = [weight.contiguous() for weight in weights]
    add_strides = None if add is None else _strides(add, axis)
    with torch.cuda.device_of(features):
        _forward[triton.cdiv(S, _BLOCK_S), 2](
            features, add, out, *weights, S, features.shape[5 - axis],
            _strides(features, axis), add_strides, _strides(out, axis), *sizes, *blocks, keep,
            num_warps=_WARPS[features.itemsize],
        )  # fmt: skip
    return out


@torch.library.custom_op("lemma_fast::bigru_backward", mutates_args=())
def _bigru_backward(
    grad_out: Tensor, features: Tensor, out: Tensor, axis: int, weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the features' gradient and both directions' parameters' [2, 3 * H * (C + H + 2)]."""
    S, (C, H, L), blocks, keep = _sizes(features, axis, weights)
    N, _, height, width = features.shape
    weights = [weight.contiguous() for weight in weights]
    gates = features.new_empty(2, N, height, width, 4 * H)
    gates_strides = (gates.stride(0), gates.stride(1), gates.stride(5 - axis), gates.stride(axis))
    block_p = _BLOCK_P[features.itemsize]
    tiles = triton.cdiv(S * L, block_p)
    # A power of two, so that few batch sizes need a compilation of their own.
    walked = triton.next_power_of_2(max(1, triton.cdiv(tiles, _SHARES)))
    programs = triton.cdiv(tiles, walked)
    grad_features = _empty_map(features, C)
    shares = features.new_empty(2, programs, 3 * H * (C + H + 2), dtype=torch.float32)
    with torch.cuda.device_of(features):
        _backward[triton.cdiv(S, _BLOCK_S), 2](
            features, out, grad_out, gates, *weights, S, features.shape[5 - axis],
            _strides(features, axis), _strides(out, axis), _strides(grad_out, axis), gates_strides,
            C, H, L, *blocks, keep, num_warps=_WARPS[features.itemsize],
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


@_bigru_backward.register_fake
def _(
    grad_out: Tensor, features: Tensor, out: Tensor, axis: int, weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    C, H = features.shape[1], weights[1].shape[1]
    shares = features.new_empty(2, 3 * H * (C + H + 2), dtype=torch.float32)
    return _empty_map(features, C), shares


def _setup_context(ctx, inputs, output) -> None:
    features, axis, weights = inputs
    ctx.save_for_backward(features, output, *weights)
    ctx.axis = axis


def _gradients(ctx, grad_out):
    features, out, *weights = ctx.saved_tensors
    grad_features, shares = _bigru_backward(grad_out, features, out, ctx.axis, weights)
    grads = []
    for direction in range(2):
        of_direction = weights[4 * direction : 4 * direction + 4]
        parts = shares[direction].split([weight.numel() for weight in of_direction])
        grads += [
            part.view(weight.shape).to(weight.dtype)
            for part, weight in zip(parts, of_direction, strict=True)
        ]
    return grad_features, None, grads


_bigru.register_autograd(_gradients, setup_context=_setup_context)


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


def _empty_map(features: Tensor, channels: int) -> Tensor:
    """Return an uninitialised map [N, channels, H, W] with the layout of `features`."""
    N, _, H, W = features.shape
    last = features.is_contiguous(memory_format=torch.channels_last)
    if last and not features.is_contiguous():
        return features.new_empty(N, H, W, channels).permute(0, 3, 1, 2)
    return features.new_empty(N, channels, H, W)


def _strides(x: Tensor, axis: int) -> tuple[int, int, int, int]:
    """Strides of images, channels, lines and steps."""
    return x.stride(0), x.stride(1), x.stride(5 - axis), x.stride(axis)


def _sizes(
    features: Tensor, axis: int, weights: list[Tensor]
) -> tuple[int, tuple[int, int, int], tuple[int, int, int, str], bool]:
    """Return the number of sequences; C, H and L; blocks and the products' precision; KEEP."""
    N, C = features.shape[:2]
    H = weights[1].shape[1]
    block_c, block_h = (max(16, triton.next_power_of_2(size)) for size in (C, H))
    exact = not products_allow_tf32()
    blocks = (_BLOCK_S, block_c, block_h, "tf32x3" if exact else "tf32")
    # Of full fp32 two TF32 parts are kept.
    parts = 2 if exact and features.itemsize == 4 else 1
    keep = (
        3 * (block_c + block_h) * block_h * features.itemsize * parts
        <= _KEPT_BYTES[features.itemsize]
    )
    return N * features.shape[5 - axis], (C, H, features.shape[axis]), blocks, keep
