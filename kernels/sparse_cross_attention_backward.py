"""Gradients of one direction of `sparse_cross_attention`: a launch for each layer, last first.

One launch brings the rows' gradients into their slots. Then a program for each tile of query rows
computes a layer again from its stored input and turns the gradients of the layer's rows into those
of its input. It leaves what the parameters' gradients are products of (row gradients and row
activations), its own sums for biases and norms, and its share of the keys' and values' gradients.
`direction_gradients` adds those up with plain matrix products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemma_fast.kernels.sparse_cross_attention_layer import (
    attend,
    attention_counter,
    dropout,
    key_rows,
    linear,
    matrix,
    normalise,
    unselected,
    vector,
)
from lemma_fast.ops.precision import products_allow_tf32


def block(size: int) -> int:
    """The block that a kernel takes for an axis."""
    return max(16, triton.next_power_of_2(size))


class Sizes(NamedTuple):
    """One direction's sizes and its launch table."""

    layers: int
    given: int
    """Query rows, without the row of zeros."""
    keys: int
    channels: int
    feedforward: int
    heads: int
    positions: int
    """Of the map that text to image writes; 0 for image to text, which has no row of zeros."""

    @property
    def zero_row(self) -> bool:
        return self.positions > 0

    @property
    def tiles(self) -> int:
        return triton.cdiv(self.given, _BLOCK_L - self.zero_row)

    @property
    def slots(self) -> int:
        """Slots for query rows of an image."""
        return self.tiles * _BLOCK_L

    def constants(self) -> tuple[int, ...]:
        """LAYERS, GIVEN, S, C, F, HEADS, P, SHARE, SITE, ZERO_ROW of the kernels."""
        share = triton.cdiv(self.positions, self.tiles)
        site = SITES if self.zero_row else 0
        return (*self, share, site, int(self.zero_row))

    def launch(self, itemsize: int) -> dict[str, int | str | None]:
        """Blocks, precision, warps and registers for rows of a type of that many bytes."""
        # Given the choice, ptxas spills a little of half types for one more block.
        keys, warps, registers = (16, 8, None) if itemsize == 4 else (32, 4, 255)
        return {
            "BLOCK_L": _BLOCK_L,
            "BLOCK_S": min(keys, block(self.keys)),
            "BLOCK_C": block(self.channels),
            "BLOCK_D": block(self.channels // self.heads),
            "BLOCK_F": block(self.feedforward),
            "PRECISION": "tf32" if products_allow_tf32() else "tf32x3",
            "num_warps": warps,
            "maxnreg": registers,
        }


# Query rows of a tile; `Sizes.launch` has its keys and warps. Chosen by compiled resources: nothing
# spills on sm_80, sm_90 and sm_120. Not run on a GPU, not tuned.
_BLOCK_L = 16
# Text to image's dropout sites follow those of image to text, four a layer.
SITES = 1 << 16


@triton.jit
def _norm_gradient(g, unit, scale, C: tl.constexpr):
    """Take the gradient through `normalise`; `g` is the gradient of the normalised rows."""
    inside = tl.arange(0, g.shape[1])[None, :] < C
    along = (tl.sum(g * unit, 1) / C)[:, None]
    return tl.where(inside, (g - (tl.sum(g, 1) / C)[:, None] - unit * along) * scale, 0.0)


@triton.jit
def _collect(index, grad_out, grad_rows, grad_strides, GIVEN: tl.constexpr, C: tl.constexpr,
             P: tl.constexpr, SHARE: tl.constexpr, ZERO_ROW: tl.constexpr, BLOCK_L: tl.constexpr,
             BLOCK_C: tl.constexpr):  # fmt: skip
    """Bring the gradients of the rows that left the last layer into their slots."""
    n = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    slot = tl.arange(0, BLOCK_L)
    row = tile * (BLOCK_L - ZERO_ROW) + slot - ZERO_ROW
    given = (slot >= ZERO_ROW) & (row < GIVEN)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    columns = (c < C)[None, :]
    inside = given[:, None] & columns
    source = grad_out + n * grad_strides[0] + c[None, :] * grad_strides[1]
    if ZERO_ROW:
        index += n * GIVEN
        position = tl.load(index + row, mask=given, other=0).to(tl.int64)
        g = tl.load(source + position[:, None] * grad_strides[2], mask=inside, other=0.0)
        g = g.to(tl.float32)
        zero = tl.zeros([BLOCK_C], tl.float32)
        BLOCK_P: tl.constexpr = 64
        for start in tl.range(0, SHARE, BLOCK_P, num_stages=1):
            place = tile * SHARE + start + tl.arange(0, BLOCK_P)
            free = unselected(place, index, GIVEN, P, (tile + 1) * SHARE)
            above = source + place[:, None].to(tl.int64) * grad_strides[2]
            free_grad = tl.load(above, mask=free[:, None] & columns, other=0.0)
            zero += tl.sum(free_grad.to(tl.float32), 0)
        g = tl.where((slot == 0)[:, None], zero[None, :], g)
    else:
        above = source + row[:, None].to(tl.int64) * grad_strides[2]
        g = tl.load(above, mask=inside, other=0.0).to(tl.float32)
    at = (n * tl.num_programs(1) + tile) * BLOCK_L + slot
    tl.store(grad_rows + at[:, None] * C + c[None, :], g, mask=columns)


# One compilation for all layers. They are not a loop: their addresses would be computed ahead of it
# and crowd out the rows.
@triton.jit(do_not_specialize=["layer"])
def _backward(key, value, parameters, seed, grad_rows, narrow, wide, vectors, grad_keys,
              key_strides, value_strides, p, layer, GIVEN: tl.constexpr, S: tl.constexpr,
              C: tl.constexpr, F: tl.constexpr, HEADS: tl.constexpr, SITE: tl.constexpr,
              ZERO_ROW: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_L: tl.constexpr,
              BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
              BLOCK_F: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Turn the gradients of one layer's rows, in their place, into those of its input."""
    DOT: tl.constexpr = narrow.dtype.element_ty
    D: tl.constexpr = C // HEADS
    n = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    slot = tl.arange(0, BLOCK_L)
    row = tile * (BLOCK_L - ZERO_ROW) + slot - ZERO_ROW
    row = tl.where(slot >= ZERO_ROW, row, GIVEN)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    columns, hiddens = (c < C)[None, :], (f < F)[None, :]
    own = tl.arange(0, BLOCK_D)
    # As many as the door lets through.
    heads = tl.arange(0, 8)[None, :]
    number = tl.load(seed) if DROPOUT else 0
    scaling = 1 / tl.sqrt(D * 1.0)
    by_c = row[:, None] * C + c[None, :].to(tl.int32)
    by_f = row[:, None] * F + f[None, :]
    N = tl.num_programs(0)
    slots = tl.num_programs(1).to(tl.int64) * BLOCK_L
    # Tensors of all rows lie one after the other in `narrow` and in `wide`.
    every = N * slots
    site = SITE + 4 * layer
    layer = layer.to(tl.int64)
    above = grad_rows + (n * slots + tile * BLOCK_L + slot)[:, None] * C + c[None, :]
    kept_rows = narrow + (layer * 6 * every + n * slots + tile * BLOCK_L + slot)[:, None] * C
    kept = kept_rows + c[None, :]
    at = (layer * 2 * every + n * slots + tile * BLOCK_L + slot)[:, None] * F + f[None, :]
    kept_wide = wide + at
    share = (layer * N + n) * tl.num_programs(1) + tile
    sums_row = vectors + share * (7 * C + F)
    sums = sums_row + c
    in_weight = parameters + layer * (4 * C * C + 2 * F * C + F + 9 * C)
    in_bias = in_weight + 3 * C * C
    out_weight = in_bias + 3 * C
    norm1 = out_weight + C * C + C
    weight1 = norm1 + 2 * C
    weight2 = weight1 + F * C + F
    norm2 = weight2 + F * C + C

    # Forward again. What a head leaves goes through memory: kept on the chip, it would crowd
    # out the products of the next.
    logsums = tl.zeros([BLOCK_L, 8], tl.float32)
    for head in tl.range(0, HEADS, num_stages=1):
        w, b = in_weight + head * D * C, in_bias + head * D
        rows = tl.load(kept, mask=columns, other=0.0)
        q = (linear(rows, w, b, C, D, BLOCK_C, BLOCK_D, DOT, PRECISION) * scaling).to(DOT)
        context, logsum = attend(q, n, row, head, key, value, key_strides, value_strides, w, b,
                                 number, site, p, S, C, HEADS, DROPOUT, BLOCK_S, BLOCK_C,
                                 PRECISION)  # fmt: skip
        logsums = tl.where(heads == head, logsum[:, None], logsums)
        tl.store(kept_rows + 2 * every * C + head * D + own[None, :], context,
                 mask=(own < D)[None, :])  # fmt: skip
    tl.debug_barrier()
    x = tl.load(kept, mask=columns, other=0.0).to(tl.float32)
    contexts = tl.load(kept + 2 * every * C, mask=columns, other=0.0)
    y = linear(contexts, out_weight, out_weight + C * C, C, C, BLOCK_C, BLOCK_C, DOT, PRECISION)
    if DROPOUT:
        y *= dropout(number, site + 1, n, by_c, p)
    unit1, scale1 = normalise(x + y, C)
    middle = unit1 * vector(norm1, C, BLOCK_C) + vector(norm1 + C, C, BLOCK_C)
    tl.store(kept + 4 * every * C, middle, mask=columns)
    hidden = linear(middle, weight1, weight1 + F * C, C, F, BLOCK_C, BLOCK_F, DOT, PRECISION)
    passed = tl.where(hidden > 0, 1.0, 0.0)
    hidden = tl.where(hidden <= 0, 0.0, hidden)
    if DROPOUT:
        hidden_mask = dropout(number, site + 2, n, by_f, p)
        hidden *= hidden_mask
        passed *= hidden_mask
    tl.store(kept_wide + every * F, hidden, mask=hiddens)
    y = linear(hidden, weight2, weight2 + F * C, F, C, BLOCK_F, BLOCK_C, DOT, PRECISION)
    if DROPOUT:
        y *= dropout(number, site + 3, n, by_c, p)
    unit2, scale2 = normalise(middle + y, C)

    # Back through the MLP.
    g = tl.load(above, mask=columns, other=0.0)
    tl.store(sums + 5 * C + F, tl.sum(g * unit2, 0), mask=c < C)
    tl.store(sums + 6 * C + F, tl.sum(g, 0), mask=c < C)
    g = _norm_gradient(g * vector(norm2, C, BLOCK_C), unit2, scale2, C)
    d = g
    if DROPOUT:
        d *= dropout(number, site + 3, n, by_c, p)
    tl.store(kept + 5 * every * C, d, mask=columns)
    tl.store(sums + 4 * C + F, tl.sum(d, 0), mask=c < C)
    m = matrix(weight2, F, C, F, BLOCK_C, BLOCK_F, DOT)
    d_hidden = tl.dot(d.to(DOT), m, input_precision=PRECISION) * passed
    tl.store(kept_wide, d_hidden, mask=hiddens)
    tl.store(sums_row + 4 * C + f, tl.sum(d_hidden, 0), mask=f < F)
    m = matrix(weight1, C, F, C, BLOCK_F, BLOCK_C, DOT)
    g = tl.dot(d_hidden.to(DOT), m, g, input_precision=PRECISION)

    # Back through the attention.
    tl.store(sums + 2 * C, tl.sum(g * unit1, 0), mask=c < C)
    tl.store(sums + 3 * C, tl.sum(g, 0), mask=c < C)
    g = _norm_gradient(g * vector(norm1, C, BLOCK_C), unit1, scale1, C)
    d = g
    if DROPOUT:
        d *= dropout(number, site + 1, n, by_c, p)
    tl.store(kept + 3 * every * C, d, mask=columns)
    tl.store(sums + C, tl.sum(d, 0), mask=c < C)
    m = matrix(out_weight, C, C, C, BLOCK_C, BLOCK_C, DOT)
    d = tl.dot(d.to(DOT), m, input_precision=PRECISION)
    tl.store(above, g, mask=columns)
    # The contexts' gradients wait where the queries' will lie.
    tl.store(kept + every * C, d, mask=columns)
    tl.debug_barrier()
    share *= 2 * S
    for head in tl.range(0, HEADS, num_stages=1):
        w, b = in_weight + head * D * C, in_bias + head * D
        mine = head * D + own[None, :]
        keep = (own < D)[None, :]
        rows = tl.load(kept, mask=columns, other=0.0)
        q = (linear(rows, w, b, C, D, BLOCK_C, BLOCK_D, DOT, PRECISION) * scaling).to(DOT)
        d_context = tl.load(kept_rows + every * C + mine, mask=keep, other=0.0)
        context = tl.load(kept_rows + 2 * every * C + mine, mask=keep, other=0.0)
        inner = tl.sum(d_context.to(tl.float32) * context.to(tl.float32), 1)
        logsum = tl.sum(tl.where(heads == head, logsums, 0.0), 1)
        d_q = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
        for start in tl.range(0, S, BLOCK_S, num_stages=1):
            s = start + tl.arange(0, BLOCK_S)
            # Zero to us, see `attend`.
            keys = w + C * C + start // S
            k = key_rows(key, n, s, key_strides, keys, b + C, S, C, D, BLOCK_C, BLOCK_D, DOT,
                         PRECISION)  # fmt: skip
            # Plus zero too: else they would lie ready for products all along.
            q_again = (q + start // S).to(DOT)
            d_again = (d_context + start // S).to(DOT)
            scores = tl.dot(q_again, tl.trans(k), input_precision=PRECISION)
            weights = tl.where((s < S)[None, :], tl.exp(scores - logsum[:, None]), 0.0)
            v = key_rows(value, n, s, value_strides, keys + C * C, b + 2 * C, S, C, D, BLOCK_C,
                         BLOCK_D, DOT, PRECISION)  # fmt: skip
            d_weights = tl.dot(d_again, tl.trans(v), input_precision=PRECISION)
            dropped = weights
            if DROPOUT:
                counter = attention_counter(row, head, s, S, HEADS)
                # Read anew: the generator's keys would lie ready all along.
                again = tl.load(seed + start // S)
                mask = dropout(again, site, n, counter, p)
                dropped *= mask
                d_weights *= mask
            d_scores = (weights * (d_weights - inner[:, None])).to(DOT)
            d_q = tl.dot(d_scores, k, d_q, input_precision=PRECISION)
            d_k = tl.dot(tl.trans(d_scores), q_again, input_precision=PRECISION)
            d_v = tl.dot(tl.trans(dropped.to(DOT)), d_again, input_precision=PRECISION)
            target = grad_keys + (share + s)[:, None] * C + mine
            tl.store(target, d_k, mask=(s < S)[:, None] & keep)
            tl.store(target + S * C, d_v, mask=(s < S)[:, None] & keep)
        d_q *= scaling
        tl.store(sums_row + head * D + own, tl.sum(d_q, 0), mask=own < D)
        tl.debug_barrier()
        tl.store(kept_rows + every * C + mine, d_q, mask=keep)
    tl.debug_barrier()
    m = matrix(in_weight, C, C, C, BLOCK_C, BLOCK_C, DOT)
    # Plus zero: else the addresses would be kept from above.
    at = (n * slots + tile * BLOCK_L + slot + tl.program_id(2))[:, None] * C + c[None, :]
    above = grad_rows + at
    d_queries = tl.load(narrow + (layer * 6 + 1) * every * C + at, mask=columns, other=0.0)
    g = tl.load(above, mask=columns, other=0.0)
    g = tl.dot(d_queries, m, g, input_precision=PRECISION)
    tl.store(above, g, mask=columns)


def direction_gradients(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, index: Tensor, parameters: Tensor,
    seed: Tensor | None, narrow: Tensor, sizes: Sizes, p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return gradients of query, key, value and parameters.

    `grad_out` [N, C, positions or rows] with any strides; `narrow` [layers, 6, N * slots, C] has
    each layer's input in its first sixth and is filled up here.
    """
    N, tiles = query.shape[0], sizes.tiles
    layers, given, S, C, F = sizes[:5]
    slots = N * sizes.slots
    grad_rows = query.new_empty(N, tiles, _BLOCK_L, C, dtype=torch.float32)
    wide = query.new_empty(layers, 2, slots, F)
    vectors = query.new_empty(layers, N * tiles, 7 * C + F, dtype=torch.float32)
    share_type = torch.float32 if tiles > 1 else query.dtype
    grad_keys = query.new_empty(layers, N, tiles, 2, S, C, dtype=share_type)
    launch = sizes.launch(query.itemsize)
    _, _, _, _, _, heads, positions, share, site, zero_row = sizes.constants()
    with torch.cuda.device_of(query):
        _collect[N, tiles](
            index, grad_out, grad_rows, grad_out.stride(), given, C, positions, share, zero_row,
            _BLOCK_L, launch["BLOCK_C"], num_warps=launch["num_warps"],
        )  # fmt: skip
        for layer in reversed(range(layers)):
            _backward[N, tiles](
                key, value, parameters, seed, grad_rows, narrow, wide, vectors, grad_keys,
                key.stride(), value.stride(), p, layer, given, S, C, F, heads, site, zero_row,
                DROPOUT=p > 0, **launch,
            )  # fmt: skip
    grad_query = grad_rows[:, :, zero_row:].reshape(N, -1, C)[:, :given].to(query.dtype)
    shares = grad_keys.sum(2) if tiles > 1 else grad_keys[:, :, 0]
    both = shares.to(query.dtype).transpose(1, 2).reshape(layers, 2, N * S, C)
    d_k, d_v = both.unbind(1)
    key_rows_, value_rows = key.reshape(N * S, C), value.reshape(N * S, C)
    in_weight = parameters[:, : 3 * C * C].view(layers, 3, C, C).to(query.dtype)
    grad_key = torch.einsum("lrd,ldc->rc", d_k, in_weight[:, 1]).view(N, S, C)
    grad_value = torch.einsum("lrd,ldc->rc", d_v, in_weight[:, 2]).view(N, S, C)
    x, d_q, context, d_out, middle, d_linear2 = narrow.unbind(1)
    d_linear1, hidden = wide.unbind(1)
    sums = vectors.sum(1)
    b_q, b_out, norm1, b_1, b_2, norm2 = sums.split((C, C, 2 * C, F, C, 2 * C), 1)
    keys_bias = shares.sum((1, 3), dtype=torch.float32).flatten(1)
    # In the order of CrossAttentionWeights.
    parts = (
        d_q.mT @ x, d_k.mT @ key_rows_, d_v.mT @ value_rows, b_q, keys_bias, d_out.mT @ context,
        b_out, norm1, d_linear1.mT @ middle, b_1, d_linear2.mT @ hidden, b_2, norm2,
    )  # fmt: skip
    grad_params = torch.cat([part.flatten(1).to(parameters.dtype) for part in parts], 1)
    return grad_query, grad_key, grad_value, grad_params
