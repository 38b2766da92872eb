"""Gradients of one direction of `sparse_cross_attention`: all layers in one launch, last first.

A program owns a tile of query rows, computes a layer again from its stored input, and carries the
rows' gradient from layer to layer on the chip. It leaves what the parameters' gradients are
products of (row gradients and row activations), its own sums for biases and norms, and its share of
the keys' and values' gradients. `direction_gradients` adds those up with plain matrix products.
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
    by_head,
    dropout,
    key_rows,
    linear,
    matrix,
    merge_heads,
    normalise,
    own_columns,
    unselected,
    vector,
)


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

    def blocks(self) -> dict[str, int | str]:
        exact = torch.get_float32_matmul_precision() == "highest"
        return {
            "BLOCK_L": _BLOCK_L,
            "BLOCK_S": _BLOCK_S,
            "BLOCK_C": max(16, triton.next_power_of_2(self.channels)),
            "BLOCK_F": max(16, triton.next_power_of_2(self.feedforward)),
            "BLOCK_HEADS": triton.next_power_of_2(self.heads),
            "PRECISION": "tf32x3" if exact else "tf32",
        }


# The launch table: query rows and keys of a tile, by compiled resources. In bf16 forward spills
# nothing; backward nothing on sm_90, up to 72 bytes a thread on sm_80 and sm_120. fp32 spills, most
# with three-fold TF32 (backward a kilobyte). Not run on a GPU, not tuned.
_BLOCK_L = _BLOCK_S = 16
WARPS = 8
# Text to image's dropout sites follow those of image to text, four a layer.
SITES = 1 << 16


@triton.jit
def _norm_gradient(g, unit, scale, C: tl.constexpr):
    """Take the gradient through `normalise`; `g` is the gradient of the normalised rows."""
    inside = tl.arange(0, g.shape[1])[None, :] < C
    along = (tl.sum(g * unit, 1) / C)[:, None]
    return tl.where(inside, (g - (tl.sum(g, 1) / C)[:, None] - unit * along) * scale, 0.0)


@triton.jit
def _backward(query, key, value, index, params, seed, grad_out, grad_query, narrow, wide, vectors,
              grad_keys, key_strides, value_strides, grad_strides, p, LAYERS: tl.constexpr,
              GIVEN: tl.constexpr, S: tl.constexpr, C: tl.constexpr, F: tl.constexpr,
              HEADS: tl.constexpr, P: tl.constexpr, SHARE: tl.constexpr, SITE: tl.constexpr,
              ZERO_ROW: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_L: tl.constexpr,
              BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
              BLOCK_HEADS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    DOT: tl.constexpr = query.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    slot = tl.arange(0, BLOCK_L)
    row = tile * (BLOCK_L - ZERO_ROW) + slot - ZERO_ROW
    given = (slot >= ZERO_ROW) & (row < GIVEN)
    row = tl.where(slot >= ZERO_ROW, row, GIVEN)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    columns, hiddens = (c < C)[None, :], (f < F)[None, :]
    own = own_columns(C, HEADS, BLOCK_HEADS, BLOCK_C)
    number = tl.load(seed) if DROPOUT else 0
    scaling = 1 / tl.sqrt(C / HEADS * 1.0)
    by_c = row[:, None] * C + c[None, :].to(tl.int32)
    by_f = row[:, None] * F + f[None, :]

    # The gradient of the rows that left the last layer.
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

    N = tl.num_programs(0)
    slots = tl.num_programs(1).to(tl.int64) * BLOCK_L
    # Tensors of all rows lie one after the other in `narrow` and in `wide`.
    every = N * slots
    for back in tl.range(0, LAYERS, num_stages=1):
        layer = LAYERS - 1 - back
        site = SITE + 4 * layer
        at = (layer * 6 * every + n * slots + tile * BLOCK_L + slot)[:, None] * C + c[None, :]
        kept = narrow + at
        at = (layer * 2 * every + n * slots + tile * BLOCK_L + slot)[:, None] * F + f[None, :]
        kept_wide = wide + at
        share = (layer * N + n) * tl.num_programs(1) + tile
        sums = vectors + share * (7 * C + F) + c
        in_weight = params + layer * (4 * C * C + 2 * F * C + F + 9 * C)
        in_bias = in_weight + 3 * C * C
        out_weight = in_bias + 3 * C
        norm1 = out_weight + C * C + C
        weight1 = norm1 + 2 * C
        weight2 = weight1 + F * C + F
        norm2 = weight2 + F * C + C

        # Forward again.
        x = tl.load(kept, mask=columns, other=0.0).to(tl.float32)
        q = linear(x, in_weight, in_bias, C, C, BLOCK_C, BLOCK_C, DOT, PRECISION)
        q_rows = by_head(q * scaling, own, BLOCK_HEADS).to(DOT)
        context_rows, logsum = attend(q_rows, n, row, key, value, key_strides, value_strides,
                                      in_weight, in_bias, number, site, p, S, C, HEADS, DROPOUT,
                                      BLOCK_HEADS, BLOCK_S, DOT, PRECISION)  # fmt: skip
        context = merge_heads(context_rows, own, BLOCK_HEADS)
        tl.store(kept + 2 * every * C, context, mask=columns)
        y = linear(context, out_weight, out_weight + C * C, C, C, BLOCK_C, BLOCK_C, DOT, PRECISION)
        if DROPOUT:
            y *= dropout(number, site + 1, n, by_c, p)
        unit1, scale1 = normalise(x + y, C)
        gain1 = vector(norm1, C, BLOCK_C)
        middle = unit1 * gain1 + vector(norm1 + C, C, BLOCK_C)
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
        tl.store(sums + 5 * C + F, tl.sum(g * unit2, 0), mask=c < C)
        tl.store(sums + 6 * C + F, tl.sum(g, 0), mask=c < C)
        g = _norm_gradient(g * vector(norm2, C, BLOCK_C), unit2, scale2, C)
        d = g
        if DROPOUT:
            d *= dropout(number, site + 3, n, by_c, p)
        tl.store(kept + 5 * every * C, d, mask=columns)
        tl.store(sums + 4 * C + F, tl.sum(d, 0), mask=c < C)
        m = matrix(weight2, C, F, BLOCK_C, BLOCK_F, DOT)
        d_hidden = tl.dot(d.to(DOT), m, input_precision=PRECISION) * passed
        tl.store(kept_wide, d_hidden, mask=hiddens)
        tl.store(vectors + share * (7 * C + F) + 4 * C + f, tl.sum(d_hidden, 0), mask=f < F)
        m = matrix(weight1, F, C, BLOCK_F, BLOCK_C, DOT)
        g = tl.dot(d_hidden.to(DOT), m, g, input_precision=PRECISION)

        # Back through the attention.
        tl.store(sums + 2 * C, tl.sum(g * unit1, 0), mask=c < C)
        tl.store(sums + 3 * C, tl.sum(g, 0), mask=c < C)
        g = _norm_gradient(g * gain1, unit1, scale1, C)
        d = g
        if DROPOUT:
            d *= dropout(number, site + 1, n, by_c, p)
        tl.store(kept + 3 * every * C, d, mask=columns)
        tl.store(sums + C, tl.sum(d, 0), mask=c < C)
        m = matrix(out_weight, C, C, BLOCK_C, BLOCK_C, DOT)
        d = tl.dot(d.to(DOT), m, input_precision=PRECISION)
        d_rows = by_head(d, own, BLOCK_HEADS)
        inner = tl.sum(by_head(d * context, own, BLOCK_HEADS), 1)
        d_rows = d_rows.to(DOT)
        d_q = tl.zeros([BLOCK_HEADS * BLOCK_L, BLOCK_C], tl.float32)
        share = ((layer * 2 * N + n) * tl.num_programs(1) + tile) * S
        for start in tl.range(0, S, BLOCK_S, num_stages=1):
            s = start + tl.arange(0, BLOCK_S)
            k = key_rows(key, n, s, key_strides, in_weight + C * C, in_bias + C, S, C, BLOCK_C,
                         DOT, PRECISION)  # fmt: skip
            v = key_rows(value, n, s, value_strides, in_weight + 2 * C * C, in_bias + 2 * C, S, C,
                         BLOCK_C, DOT, PRECISION)  # fmt: skip
            scores = tl.dot(q_rows, tl.trans(k), input_precision=PRECISION)
            weights = tl.where((s < S)[None, :], tl.exp(scores - logsum[:, None]), 0.0)
            d_weights = tl.dot(d_rows, tl.trans(v), input_precision=PRECISION)
            dropped = weights
            if DROPOUT:
                counter = attention_counter(row, s, S, HEADS, BLOCK_HEADS)
                mask = dropout(number, site, n, counter, p)
                dropped *= mask
                d_weights *= mask
            d_scores = (weights * (d_weights - inner[:, None])).to(DOT)
            d_q = tl.dot(d_scores, k, d_q, input_precision=PRECISION)
            d_k = tl.dot(tl.trans(d_scores), q_rows, input_precision=PRECISION)
            d_v = tl.dot(tl.trans(dropped.to(DOT)), d_rows, input_precision=PRECISION)
            target = grad_keys + (share + s)[:, None] * C + c[None, :]
            keep = (s < S)[:, None] & columns
            tl.store(target, d_k, mask=keep)
            tl.store(target + N.to(tl.int64) * tl.num_programs(1) * S * C, d_v, mask=keep)
        d_q = merge_heads(d_q, own, BLOCK_HEADS) * scaling
        tl.store(kept + every * C, d_q, mask=columns)
        tl.store(sums, tl.sum(d_q, 0), mask=c < C)
        m = matrix(in_weight, C, C, BLOCK_C, BLOCK_C, DOT)
        g = tl.dot(d_q.to(DOT), m, g, input_precision=PRECISION)
    at = (n * GIVEN + row)[:, None] * C + c[None, :]
    tl.store(grad_query + at, g, mask=inside)


def direction_gradients(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, index: Tensor, params: Tensor,
    seed: Tensor | None, narrow: Tensor, sizes: Sizes, p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return gradients of query, key, value and parameters.

    `grad_out` [N, C, positions or rows] with any strides; `narrow` [layers, 6, N * slots, C] has
    each layer's input in its first sixth and is filled up here.
    """
    N, tiles = query.shape[0], sizes.tiles
    layers, given, S, C, F = sizes[:5]
    slots = N * sizes.slots
    grad_query = query.new_empty(N, given, C)
    wide = query.new_empty(layers, 2, slots, F)
    vectors = query.new_empty(layers, N * tiles, 7 * C + F, dtype=torch.float32)
    share_type = torch.float32 if tiles > 1 else query.dtype
    grad_keys = query.new_empty(layers, 2, N, tiles, S, C, dtype=share_type)
    with torch.cuda.device_of(query):
        _backward[N, tiles](
            query, key, value, index, params, seed, grad_out, grad_query, narrow, wide, vectors,
            grad_keys, key.stride(), value.stride(), grad_out.stride(), p, *sizes.constants(),
            DROPOUT=p > 0, num_warps=WARPS, **sizes.blocks(),
        )  # fmt: skip
    shares = grad_keys.sum(3) if tiles > 1 else grad_keys
    d_k, d_v = shares.to(query.dtype).view(layers, 2, N * S, C).unbind(1)
    key_rows_, value_rows = key.reshape(N * S, C), value.reshape(N * S, C)
    in_weight = params[:, : 3 * C * C].view(layers, 3, C, C).to(query.dtype)
    grad_key = torch.einsum("lrd,ldc->rc", d_k, in_weight[:, 1]).view(N, S, C)
    grad_value = torch.einsum("lrd,ldc->rc", d_v, in_weight[:, 2]).view(N, S, C)
    x, d_q, context, d_out, middle, d_linear2 = narrow.unbind(1)
    d_linear1, hidden = wide.unbind(1)
    sums = vectors.sum(1)
    b_q, b_out, norm1, b_1, b_2, norm2 = sums.split((C, C, 2 * C, F, C, 2 * C), 1)
    keys_bias = shares.view(layers, 2, N * S, C).sum(2, dtype=torch.float32).flatten(1)
    # In the order of CrossAttentionWeights.
    parts = (
        d_q.mT @ x, d_k.mT @ key_rows_, d_v.mT @ value_rows, b_q, keys_bias, d_out.mT @ context,
        b_out, norm1, d_linear1.mT @ middle, b_1, d_linear2.mT @ hidden, b_2, norm2,
    )  # fmt: skip
    grad_params = torch.cat([part.flatten(1).to(params.dtype) for part in parts], 1)
    return grad_query, grad_key, grad_value, grad_params
