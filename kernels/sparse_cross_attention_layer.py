"""Pieces of one cross-attention layer that the forward and the backward kernel share.

    x = LN(q + MHA(q, k, v)); x = LN(x + W2 relu(W1 x))

A layer's parameters lie end to end in the order of `CrossAttentionWeights`. Heads take turns: each
projects its own D columns of queries, keys and values, attends, and adds its part of the output
projection. So a program holds one head's columns at a time, and no product is wider than needed.

A program has BLOCK_L slots for query rows. With ZERO_ROW the first is the row of zeros that stands
for all unselected positions; every program carries it and answers for a share of those positions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matrix(pointer, STRIDE, ROWS, COLUMNS, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
           DOT: tl.constexpr):  # fmt: skip
    """Load [ROWS, COLUMNS] of a matrix with STRIDE columns, zeros outside."""
    i = tl.arange(0, BLOCK_ROWS)[:, None]
    j = tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (i < ROWS) & (j < COLUMNS)
    return tl.load(pointer + i * STRIDE + j, mask=inside, other=0.0).to(DOT)


@triton.jit
def vector(pointer, SIZE, BLOCK: tl.constexpr):
    """Load [1, SIZE] in fp32, zeros outside."""
    j = tl.arange(0, BLOCK)[None, :]
    return tl.load(pointer + j, mask=j < SIZE, other=0.0).to(tl.float32)


@triton.jit
def linear(x, weight, bias, INPUTS, OUTPUTS, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
           DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Compute x W^T + b in fp32."""
    rows = matrix(weight, INPUTS, OUTPUTS, INPUTS, BLOCK_OUT, BLOCK_IN, DOT)
    product = tl.dot(x.to(DOT), tl.trans(rows), input_precision=PRECISION)
    return product + vector(bias, OUTPUTS, BLOCK_OUT)


@triton.jit
def normalise(x, C: tl.constexpr):
    """Return x with mean 0 and variance 1 in each row, and the reciprocal deviations."""
    inside = tl.arange(0, x.shape[1])[None, :] < C
    centred = tl.where(inside, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + 1e-5)
    return centred * scale[:, None], scale[:, None]


@triton.jit
def dropout(seed, site, n, counter, p):
    """Return 0 with probability `p`, else 1 / (1 - p), for each `counter`; see ops/philox.py."""
    zero = counter * 0
    bits, _, _, _ = tl.philox(seed, counter, zero + n.to(tl.int32), zero + site, zero)
    return tl.where(tl.uint_to_uniform_float(bits) >= p, 1 / (1 - p), 0.0)


@triton.jit
def attention_counter(row, head, s, S: tl.constexpr, HEADS: tl.constexpr):
    """Number the weights that `row` gives the keys `s` in one head."""
    return (row * HEADS + head)[:, None] * S + s[None, :]


@triton.jit
def key_rows(source, n, s, strides, weight, bias, S, C: tl.constexpr, D: tl.constexpr,
             BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Project the rows `s` of `source` to a head's keys or values [S, D], in the products' type."""
    c = tl.arange(0, BLOCK_C)[None, :].to(tl.int64)
    at = source + n * strides[0] + s[:, None].to(tl.int64) * strides[1] + c * strides[2]
    rows = tl.load(at, mask=(s < S)[:, None] & (c < C), other=0.0)
    return linear(rows, weight, bias, C, D, BLOCK_C, BLOCK_D, DOT, PRECISION).to(DOT)


@triton.jit
def attend(q, n, row, head, key, value, key_strides, value_strides, weight, bias, seed, site, p,
           S: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, DROPOUT: tl.constexpr,
           BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Attend in one head with online softmax; return its context and the logarithms of the sums.

    `weight` and `bias` are the head's own rows of the queries' projection.
    """
    D: tl.constexpr = C // HEADS
    DOT: tl.constexpr = q.dtype
    largest = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    context = tl.zeros(q.shape, tl.float32)
    for start in tl.range(0, S, BLOCK_S, num_stages=1):
        s = start + tl.arange(0, BLOCK_S)
        # Zero, but the compiler does not know: it would take these matrices out of the loop and
        # spill them, where the cache serves as well.
        keys = weight + C * C + start // S
        values = keys + C * C
        k = key_rows(key, n, s, key_strides, keys, bias + C, S, C, D, BLOCK_C, q.shape[1], DOT,
                     PRECISION)  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where((s < S)[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - larger[:, None])
        shrink = tl.exp(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            counter = attention_counter(row, head, s, S, HEADS)
            weights *= dropout(seed, site, n, counter, p)
        v = key_rows(value, n, s, value_strides, values, bias + 2 * C, S, C, D, BLOCK_C, q.shape[1],
                     DOT, PRECISION)  # fmt: skip
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
