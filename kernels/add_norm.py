"""A residual and the LayerNorm after it in one pass.

    out[m] = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias,    s = y[m] + residual[m % R]

Rows lie side by side. A program owns BLOCK_M whole rows; sum, statistics and norm are fp32, and the
result is rounded once. The residual may have fewer rows, R, which then repeat: one for all images.
Inference alone: there is no gradient.

Bytes for M rows of C numbers of 16 bits: 6 M C here; 10 M C as an addition and a norm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_COLUMNS = 4096
# Numbers of a program: 16 a thread. Chosen by resources, not measured on a GPU yet.
_NUMBERS = 2048


@triton.jit
def _add_norm(
    y, residual, weight, bias, out, M, R, eps, C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    columns = c < C
    inside = (m < M)[:, None] & columns[None, :]
    at = m[:, None] * C + c[None, :]
    s = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    at_residual = (m % R)[:, None] * C + c[None, :]
    s += tl.load(residual + at_residual, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(columns[None, :], s - (tl.sum(s, 1) / C)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    scale = tl.load(weight + c, mask=columns, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=columns, other=0.0).to(tl.float32)
    normal = centred * rstd[:, None] * scale[None, :] + shift[None, :]
    tl.store(out + at, normal.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("lemma_fast::add_norm", mutates_args=())
def _op(y: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(y)
    C = y.shape[-1]
    M, R = y.numel() // C, residual.numel() // C
    if not M:
        return out
    block_c = max(32, triton.next_power_of_2(C))
    block_m = max(1, _NUMBERS // block_c)
    with torch.cuda.device_of(y):
        _add_norm[(triton.cdiv(M, block_m),)](
            y, residual, weight, bias, out, M, R, eps, C, block_m, block_c, num_warps=4
        )
    return out


@_op.register_fake
def _(y: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(y)


def add_norm(
    y: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """Return `LayerNorm(y + residual)` over the last axis.

    `y` [..., C] is contiguous, fp32, fp16 or bf16, C at most 4096; `residual` is of y's shape, or
    of that of its last axes, and then serves all; `weight` and `bias` [C]. Raises ValueError for
    anything else.
    """
    C = y.shape[-1]
    if y.dtype not in DTYPES or not 1 <= C <= MAX_COLUMNS:
        raise ValueError(
            f"add_norm takes rows of 1 to {MAX_COLUMNS} in fp32, fp16 or bf16, not {C} in {y.dtype}"
        )
    if residual.shape != y.shape[y.dim() - residual.dim() :] or residual.dtype != y.dtype:
        raise ValueError(
            f"y is {[*y.shape]} {y.dtype}, the residual {[*residual.shape]} {residual.dtype}"
        )
    if not y.is_contiguous() or not residual.is_contiguous():
        raise ValueError("add_norm takes contiguous rows")
    if weight.shape != (C,) or bias.shape != (C,):
        raise ValueError(f"rows have {C} numbers, weight {[*weight.shape]}, bias {[*bias.shape]}")
    return _op(y, residual, weight, bias, eps)
