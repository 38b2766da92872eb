"""Weigh instance-normalised features by the location attention, each row in one pass.

    out[n, c, p] = (x - mean) / sqrt(var + eps) * exp(l - max) / sum(exp(l - max))    (eqs. 2, 3)

x = features[n, c] and l = logits[n, c] (or logits[n, 0]), statistics and softmax over the P = H * W
positions, all in fp32. A program owns BLOCK_C whole rows, so nothing is read twice: one row where
positions lie side by side in memory, several where channels do (channels-last). Backward reads
features, logits and the gradient, recomputes both factors, and with y = (x - mean) * rstd, s the
softmax and g the gradient writes

    dx = rstd * (g s - mean(g s) - y mean(g s y))
    dl = s * (g y - sum(g y s))

Logits that all channels share get their gradient by channel in fp32, summed afterwards. No atomics:
both directions are deterministic.

Bytes for N images at the paper's sizes (C 64, P 1024, fp32):
    here       4 C P (3) = 0.79 MB an image, 50.3 MB at N = 64; backward 4 C P (5), 83.9 MB
    reference  4 C P (1 statistics, 4 difference and scale, 2 softmax, 3 product) = 4 C P (10),
               168 MB at N = 64

Limits: P <= 4096, since a program holds whole rows; an image spans less than 2^31 elements.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_POSITIONS = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _launch(features: Tensor) -> dict[str, int]:
    """Rows a program and warps: chosen by resources from ahead-of-time compilation.

    Not measured on a GPU yet. Channels that lie side by side are taken eight at a time, a sector
    of memory or half of one.
    """
    block = max(32, triton.next_power_of_2(features.shape[2] * features.shape[3]))
    rows = 8 if features.stride(1) == 1 and features.shape[1] > 1 else 1
    rows = rows if block <= 1024 else max(1, min(rows, 4096 // block))
    sizes = ((256, 1), (1024, 4), (4096, 8), (8192, 16))
    warps = next(warps for most, warps in sizes if rows * block <= most)
    return {"BLOCK_C": rows, "BLOCK": block, "num_warps": warps}


@triton.jit
def _at(strides, n, c, p, W):
    """Where positions p of channels c are, [BLOCK_C, BLOCK]; 32 bits reach over one image."""
    position = (p // W) * strides[2] + (p % W) * strides[3]
    return n * strides[0] + ((c * strides[1])[:, None] + position[None, :])


@triton.jit
def _normalise(x, inside, P, eps):
    """Instance norm of rows held whole: the result, 0 outside, and the inverse deviation."""
    centred = tl.where(inside, x - (tl.sum(x, 1) / P)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / P + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def _softmax(logits, inside):
    logits = tl.where(inside, logits, float("-inf"))
    power = tl.exp(logits - tl.max(logits, 1)[:, None])
    return power / tl.sum(power, 1)[:, None]


@triton.jit
def _enhance(
    logits, logits_strides, features, features_strides, out, out_strides, C, P, eps,
    W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK)
    inside = (c < C)[:, None] & (p < P)[None, :]
    x = tl.load(features + _at(features_strides, n, c, p, W), mask=inside, other=0.0)
    at = _at(logits_strides, n, c, p, W)
    attention = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    normal, _ = _normalise(x.to(tl.float32), inside, P, eps)
    value = normal * _softmax(attention, (p < P)[None, :])
    tl.store(out + _at(out_strides, n, c, p, W), value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _enhance_backward(
    grad, grad_strides, logits, logits_strides, features, features_strides,
    grad_logits, grad_logits_strides, grad_features, grad_features_strides, C, P, eps,
    W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK)
    inside = (c < C)[:, None] & (p < P)[None, :]
    x = tl.load(features + _at(features_strides, n, c, p, W), mask=inside, other=0.0)
    at = _at(logits_strides, n, c, p, W)
    attention = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + _at(grad_strides, n, c, p, W), mask=inside, other=0.0).to(tl.float32)
    y, rstd = _normalise(x.to(tl.float32), inside, P, eps)
    s = _softmax(attention, (p < P)[None, :])

    weighted = g * s
    slope = (tl.sum(weighted * y, 1) / P)[:, None]
    dx = rstd[:, None] * (weighted - (tl.sum(weighted, 1) / P)[:, None] - y * slope)
    dl = s * (g * y - slope * P)
    at = _at(grad_features_strides, n, c, p, W)
    tl.store(grad_features + at, dx.to(grad_features.dtype.element_ty), mask=inside)
    at = _at(grad_logits_strides, n, c, p, W)
    tl.store(grad_logits + at, dl.to(grad_logits.dtype.element_ty), mask=inside)


def _shared_strides(logits: Tensor) -> tuple[int, ...]:
    """One map for all channels is a channel stride of 0."""
    strides = logits.stride()
    return strides if logits.shape[1] > 1 else (strides[0], 0, *strides[2:])


@torch.library.custom_op("lemma_fast::location_enhance", mutates_args=())
def _location_enhance(logits: Tensor, features: Tensor, eps: float) -> Tensor:
    N, C, H, W = features.shape
    out = torch.empty_like(features)
    launch = _launch(features)
    with torch.cuda.device_of(features):
        _enhance[N, triton.cdiv(C, launch["BLOCK_C"])](
            logits, _shared_strides(logits), features, features.stride(), out, out.stride(),
            C, H * W, eps, W=W, **launch,
        )  # fmt: skip
    return out


@_location_enhance.register_fake
def _(logits: Tensor, features: Tensor, eps: float) -> Tensor:
    return torch.empty_like(features)


@torch.library.custom_op("lemma_fast::location_enhance_backward", mutates_args=())
def _location_enhance_backward(
    grad: Tensor, logits: Tensor, features: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    N, C, H, W = features.shape
    shared = logits.shape[1] < C
    grad_features = torch.empty_like(features)
    by_channel = torch.empty_like(features, dtype=torch.float32 if shared else logits.dtype)
    launch = _launch(features)
    with torch.cuda.device_of(features):
        _enhance_backward[N, triton.cdiv(C, launch["BLOCK_C"])](
            grad, grad.stride(), logits, _shared_strides(logits), features, features.stride(),
            by_channel, by_channel.stride(), grad_features, grad_features.stride(),
            C, H * W, eps, W=W, **launch,
        )  # fmt: skip
    if shared:
        by_channel = by_channel.sum(1, keepdim=True).to(logits.dtype)
    return by_channel, grad_features


@_location_enhance_backward.register_fake
def _(grad: Tensor, logits: Tensor, features: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    by_channel = torch.empty_like(features, dtype=logits.dtype)
    if logits.shape[1] < features.shape[1]:
        by_channel = by_channel.sum(1, keepdim=True)
    return by_channel, torch.empty_like(features)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, features, ctx.eps = inputs
    ctx.save_for_backward(logits, features)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_location_enhance_backward(grad, *ctx.saved_tensors, ctx.eps), None


_location_enhance.register_autograd(_backward, setup_context=_setup_context)


def location_enhance(logits: Tensor, features: Tensor, eps: float = 1e-5) -> Tensor:
    """Run `reference.location_enhance` in one launch; each input is fp32, bf16 or fp16."""
    N, C, H, W = features.shape
    if logits.shape not in ((N, C, H, W), (N, 1, H, W)):
        raise ValueError(f"features are {[*features.shape]}, logits {[*logits.shape]}")
    if H * W > MAX_POSITIONS:
        raise ValueError(
            f"the fused location_enhance takes up to {MAX_POSITIONS} positions, got {H} x {W}; "
            "use ops.reference"
        )
    if logits.dtype not in DTYPES or features.dtype not in DTYPES:
        raise ValueError(
            f"the fused location_enhance takes no {logits.dtype} with {features.dtype}; "
            "use ops.reference"
        )
    return _location_enhance(logits, features, eps)
