"""Pieces of one cross-attention layer that the forward and the backward kernel share.

    x = LN(q + MHA(q, k, v)); x = LN(x + W2 relu(W1 x))

A layer's parameters lie end to end in the order of `CrossAttentionWeights`. Heads are not cut out
of a row: a query row stands BLOCK_HEADS times in a block, each time with one head's columns and
zeros elsewhere, so that every product keeps the full width and any head size will do.

A program has BLOCK_L slots for query rows. With ZERO_ROW the first is the row of zeros that stands
for all unselected positions; every program carries it and answers for a share of those positions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matrix(pointer, ROWS, COLUMNS, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
           DOT: tl.constexpr):  # fmt: skip
    """Load [ROWS, COLUMNS], zeros outside."""
    i = tl.arange(0, BLOCK_ROWS)[:, None]
    j = tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (i < ROWS) & (j < COLUMNS)
    return tl.load(pointer + i * COLUMNS + j, mask=inside, other=0.0).to(DOT)


@triton.jit
def vector(pointer, SIZE, BLOCK: tl.constexpr):
    """Load [1, SIZE] in fp32, zeros outside."""
    j = tl.arange(0, BLOCK)[None, :]
    return tl.load(pointer + j, mask=j < SIZE, other=0.0).to(tl.float32)


@triton.jit
def linear(x, weight, bias, INPUTS, OUTPUTS, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
           DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Compute x W^T + b in fp32."""
    i = tl.arange(0, BLOCK_IN)[:, None]
    j = tl.arange(0, BLOCK_OUT)[None, :]
    inside = (i < INPUTS) & (j < OUTPUTS)
    transposed = tl.load(weight + j * INPUTS + i, mask=inside, other=0.0).to(DOT)
    product = tl.dot(x.to(DOT), transposed, input_precision=PRECISION)
    return product + vector(bias, OUTPUTS, BLOCK_OUT)


@triton.jit
def normalise(x, C: tl.constexpr):
    """Return x with mean 0 and variance 1 in each row, and the reciprocal deviations."""
    inside = tl.arange(0, x.shape[1])[None, :] < C
    centred = tl.where(inside, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + 1e-5)
    return centred * scale[:, None], scale[:, None]


@triton.jit
def own_columns(C: tl.constexpr, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
                BLOCK_C: tl.constexpr):  # fmt: skip
    """Return which columns a head has, [BLOCK_HEADS, 1, BLOCK_C]."""
    head = tl.arange(0, BLOCK_HEADS)[:, None, None]
    c = tl.arange(0, BLOCK_C)[None, None, :]
    return (head == c // (C // HEADS)) & (c < C)


@triton.jit
def by_head(x, own, BLOCK_HEADS: tl.constexpr):
    """Repeat the rows for each head with only its columns: [L, C] to [BLOCK_HEADS * L, C]."""
    spread = tl.where(own, x[None, :, :], 0.0)
    return tl.reshape(spread, [BLOCK_HEADS * x.shape[0], x.shape[1]])


@triton.jit
def merge_heads(rows, own, BLOCK_HEADS: tl.constexpr):
    """Take each head's columns from its rows: [BLOCK_HEADS * L, C] to [L, C]."""
    apart = tl.reshape(rows, [BLOCK_HEADS, rows.shape[0] // BLOCK_HEADS, rows.shape[1]])
    return tl.sum(tl.where(own, apart, 0.0), 0)


@triton.jit
def dropout(seed, site, n, counter, p):
    """Return 0 with probability `p`, else 1 / (1 - p), for each `counter`; see ops/philox.py."""
    zero = counter * 0
    bits, _, _, _ = tl.philox(seed, counter, zero + n.to(tl.int32), zero + site, zero)
    return tl.where(tl.uint_to_uniform_float(bits) >= p, 1 / (1 - p), 0.0)


@triton.jit
def attention_counter(row, s, S, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """Number the attention weights of rows by head [BLOCK_HEADS * L] and keys `s`."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    numbers = tl.reshape(row[None, :] * HEADS + head, [BLOCK_HEADS * row.shape[0]])
    return numbers[:, None] * S + s[None, :]


@triton.jit
def key_rows(source, n, s, strides, weight, bias, S, C: tl.constexpr, BLOCK_C: tl.constexpr,
             DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Project the rows `s` of `source` to keys or values, in the type of the products."""
    c = tl.arange(0, BLOCK_C)[None, :].to(tl.int64)
    at = source + n * strides[0] + s[:, None].to(tl.int64) * strides[1] + c * strides[2]
    rows = tl.load(at, mask=(s < S)[:, None] & (c < C), other=0.0)
    return linear(rows, weight, bias, C, C, BLOCK_C, BLOCK_C, DOT, PRECISION).to(DOT)


@triton.jit
def attend(q_rows, n, row, key, value, key_strides, value_strides, weight, bias, seed, site, p,
           S: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, DROPOUT: tl.constexpr,
           BLOCK_HEADS: tl.constexpr, BLOCK_S: tl.constexpr, DOT: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """Attend with online softmax; return the context by head and the logarithms of the sums."""
    BLOCK_C: tl.constexpr = q_rows.shape[1]
    largest = tl.full([q_rows.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q_rows.shape[0]], tl.float32)
    context = tl.zeros([q_rows.shape[0], BLOCK_C], tl.float32)
    for start in tl.range(0, S, BLOCK_S, num_stages=1):
        s = start + tl.arange(0, BLOCK_S)
        # Zero, but the compiler does not know: it would take these matrices out of the loop and
        # spill them, where the cache serves as well.
        keys = weight + C * C + start // S
        values = keys + C * C
        k = key_rows(key, n, s, key_strides, keys, bias + C, S, C, BLOCK_C, DOT, PRECISION)
        v = key_rows(value, n, s, value_strides, values, bias + 2 * C, S, C, BLOCK_C, DOT,
                     PRECISION)  # fmt: skip
        scores = tl.dot(q_rows, tl.trans(k), input_precision=PRECISION)
        scores = tl.where((s < S)[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - larger[:, None])
        shrink = tl.exp(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            counter = attention_counter(row, s, S, HEADS, BLOCK_HEADS)
            weights *= dropout(seed, site, n, counter, p)
        context = tl.dot(weights.to(DOT), v, context * shrink[:, None], input_precision=PRECISION)
        largest = larger
    return context / total[:, None], largest + tl.log(total)


@triton.jit
def unselected(p, index, K: tl.constexpr, P, stop):
    """Tell which positions of the map `p` no row of `index` names, up to `stop`."""
    BLOCK_K: tl.constexpr = 64
    taken = tl.zeros([p.shape[0]], tl.int32)
    for start in tl.range(0, K, BLOCK_K, num_stages=1):
        k = start + tl.arange(0, BLOCK_K)
        chosen = tl.load(index + k, mask=k < K, other=-1)
        taken += tl.sum((p[:, None] == chosen[None, :]).to(tl.int32), 1)
    return (taken == 0) & (p < P) & (p < stop)
