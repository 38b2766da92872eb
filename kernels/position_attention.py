"""The position attention of the text prior in one launch: keys, scores, softmax and the vectors.

    k = relu(keys + bias);   attention = softmax(queries k^T over the positions)
    vectors = attention values

A program owns one image and BLOCK_D columns of its vectors, and holds the scores of all T
characters at all P positions; the programs of an image compute the same scores, and the first of
them writes these. Scores, softmax and sums are fp32. The products' operands are the maps as they
are, of a half type, and two numbers of that type for each query and each attention: their sum keeps
16 bits (bf16) or 22 (fp16), because these are the scores that select. In fp32 the tiles would not
fit a device's registers. Inference alone: there is no gradient.

Bytes for N images at the paper's sizes (C 512, P 256, T 26, 16 bits): keys and values 2 (2 C P) and
what is written 2 T C + 4 T P = 0.58 MB an image, 37 MB at N = 64 (the programs of an image read
its keys once from memory, and again from the cache).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
MAX_POSITIONS, MAX_CHARACTERS = 256, 32
# Columns of keys a step and of vectors a program: chosen by shared memory, of which the smallest
# device has 99 KiB. Not measured on a GPU yet.
_BLOCK_C, _BLOCK_D = 64, 128


@triton.jit
def _position_attention(
    keys, bias, queries, values, vectors, attention, T, P, C,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = keys.dtype.element_ty
    t, p = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_P)
    rows = (n * P + p)[:, None] * C
    inside = (p < P)[:, None]
    # Positions are the rows of both products, so that each warp has some.
    scores = tl.zeros((BLOCK_P, BLOCK_T), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        live = (c < C)[None, :]
        k = tl.load(keys + rows + c[None, :], mask=inside & live, other=0.0).to(tl.float32)
        k += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        k = tl.where(k < 0, 0.0, k).to(dtype)
        at = queries + t[:, None] * C + c[None, :]
        for half in tl.static_range(2):
            q = tl.load(at + half * T * C, mask=(t < T)[:, None] & live, other=0.0)
            scores = tl.dot(k, tl.trans(q), scores)
    scores = tl.where(inside, scores, float("-inf"))
    power = tl.exp(scores - tl.max(scores, 0)[None, :])
    power = power / tl.sum(power, 0)[None, :]
    # The first program of an image writes them.
    known = inside & (t < tl.where(tl.program_id(1) == 0, T, 0))[None, :]
    tl.store(attention + (n * T + t)[None, :] * P + p[:, None], power, mask=known)

    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = (d < C)[None, :]
    v = tl.load(values + rows + d[None, :], mask=inside & columns, other=0.0)
    high = power.to(dtype)
    total = tl.dot(tl.trans(v), high)
    total = tl.dot(tl.trans(v), (power - high.to(tl.float32)).to(dtype), total)
    at = vectors + (n * T + t)[None, :] * C + d[:, None]
    tl.store(at, total.to(dtype), mask=(t < T)[None, :] & (d < C)[:, None])


def split(queries: Tensor, dtype: torch.dtype) -> Tensor:
    """Queries [T, C] in fp32 as what `position_attention` takes: [2, T, C] whose sum they are."""
    high = queries.to(dtype)
    return torch.stack([high, (queries - high).to(dtype)])


@torch.library.custom_op("lemma_fast::position_attention", mutates_args=())
def _op(keys: Tensor, bias: Tensor, queries: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    N, P, C = keys.shape
    T = queries.shape[1]
    vectors = keys.new_empty(N, T, C)
    attention = keys.new_empty(N, T, P, dtype=torch.float32)
    block_t, block_p = (max(16, triton.next_power_of_2(size)) for size in (T, P))
    block_d = min(_BLOCK_D, max(16, triton.next_power_of_2(C)))
    if N:
        with torch.cuda.device_of(keys):
            _position_attention[N, triton.cdiv(C, block_d)](
                keys, bias, queries, values, vectors, attention, T, P, C,
                block_t, block_p, _BLOCK_C, block_d, num_warps=8,
            )  # fmt: skip
    return vectors, attention


@_op.register_fake
def _(keys: Tensor, bias: Tensor, queries: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    N, P, C = keys.shape
    T = queries.shape[1]
    return keys.new_empty(N, T, C), keys.new_empty(N, T, P, dtype=torch.float32)


def position_attention(
    keys: Tensor, bias: Tensor, queries: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Return vectors [N, T, C] and their attention [N, T, P], fp32.

    `keys` and `values` [N, P, C] are contiguous, in fp16 or bf16, P at most 256; `bias` [C] belongs
    to the keys, before their ReLU; `queries` is what `split` makes of [T, C], scaled already, T at
    most 32. Raises ValueError for anything else.
    """
    N, P, C = keys.shape
    T = queries.shape[1]
    if keys.dtype not in DTYPES or not 1 <= P <= MAX_POSITIONS or not 1 <= T <= MAX_CHARACTERS:
        raise ValueError(
            f"position_attention takes up to {MAX_POSITIONS} positions and {MAX_CHARACTERS} "
            f"characters in fp16 or bf16, not {P} and {T} in {keys.dtype}"
        )
    expected = [(C,), (2, T, C), (N, P, C)]
    given = (bias, queries, values)
    if [x.shape for x in given] != expected or any(x.dtype != keys.dtype for x in given):
        raise ValueError(
            f"keys {[*keys.shape]} {keys.dtype} need {expected} of that type, "
            f"got {[(tuple(x.shape), x.dtype) for x in given]}"
        )
    if not all(x.is_contiguous() for x in (keys, *given)):
        raise ValueError("position_attention takes contiguous tensors")
    return _op(keys, bias, queries, values)
