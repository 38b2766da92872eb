"""The cloze network's attention: each character looks at all others within the length.

    out[n, t] = softmax over s (q[n, t] k[n, s] / sqrt(D),  s < lengths[n] and s != t) v[n]

A program owns one head of one image: T characters of D numbers fit one tile, and the mask is made
where it is used. Scores, softmax and sums are fp32. A character that may look at none gets zeros.
fp32 products are TF32 where cuBLAS's may be, else three TF32 ones. Inference alone: no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemma_fast.ops.precision import products_allow_tf32

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CHARACTERS, MAX_WIDTH = 64, 128


@triton.jit
def _cloze_attention(
    q, q_strides, k, k_strides, v, v_strides, lengths, out, T, D, scale,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dtype: tl.constexpr = out.dtype.element_ty
    t, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    inside = (t < T)[:, None] & (d < D)[None, :]
    column = head * D + d[None, :]
    at = n * q_strides[0] + t[:, None].to(tl.int64) * q_strides[1] + column
    query = tl.load(q + at, mask=inside, other=0.0)
    at = n * k_strides[0] + t[:, None].to(tl.int64) * k_strides[1] + column
    key = tl.load(k + at, mask=inside, other=0.0)
    at = n * v_strides[0] + t[:, None].to(tl.int64) * v_strides[1] + column
    value = tl.load(v + at, mask=inside, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    live = (t[None, :] < tl.minimum(tl.load(lengths + n), T)) & (t[:, None] != t[None, :])
    scores = tl.where(live, scores, float("-inf"))
    most = tl.max(scores, 1)
    power = tl.exp(scores - tl.where(most == float("-inf"), 0.0, most)[:, None])
    total = tl.sum(power, 1)
    power = (power / tl.where(total == 0, 1.0, total)[:, None]).to(dtype)
    result = tl.dot(power, value, input_precision=PRECISION)
    at = ((n * T + t)[:, None] * tl.num_programs(1) + head) * D + d[None, :]
    tl.store(out + at, result.to(dtype), mask=inside)


@torch.library.custom_op("lemma_fast::cloze_attention", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, heads: int) -> Tensor:
    N, T, C = k.shape
    out = k.new_empty(N, T, C)
    D = C // heads
    block_t, block_d = (max(16, triton.next_power_of_2(size)) for size in (T, D))
    precision = "tf32" if products_allow_tf32() else "tf32x3"
    if N:
        with torch.cuda.device_of(k):
            _cloze_attention[N, heads](
                q, q.stride()[:2], k, k.stride()[:2], v, v.stride()[:2], lengths, out, T, D,
                D**-0.5, block_t, block_d, precision, num_warps=4,
            )  # fmt: skip
    return out


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, heads: int) -> Tensor:
    return k.new_empty(k.shape)


def cloze_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, heads: int) -> Tensor:
    """Return what T characters see of each other, [N, T, C].

    `q`, `k` and `v` [N, T, C] are fp32, fp16 or bf16 with any strides but 1 along C; T at most 64,
    C / heads at most 128; `lengths` [N] int64. Raises ValueError for anything else.
    """
    N, T, C = k.shape
    width = C // heads
    if k.dtype not in DTYPES or not 1 <= T <= MAX_CHARACTERS or width > MAX_WIDTH or C % heads:
        raise ValueError(
            f"cloze_attention takes fp32, fp16 or bf16, up to {MAX_CHARACTERS} characters and "
            f"{MAX_WIDTH} numbers a head; got {k.dtype}, {T} and {C} in {heads} heads"
        )
    for name, x in (("q", q), ("v", v)):
        if x.shape != k.shape or x.dtype != k.dtype:
            raise ValueError(f"k is {[*k.shape]} {k.dtype}, {name} {[*x.shape]} {x.dtype}")
    if any(x.stride(2) != 1 for x in (q, k, v)):
        raise ValueError("cloze_attention takes rows whose numbers lie side by side")
    if lengths.shape != (N,) or lengths.dtype != torch.int64:
        raise ValueError(f"k has {N} images, lengths {[*lengths.shape]} {lengths.dtype}")
    return _op(q, k, v, lengths, heads)
