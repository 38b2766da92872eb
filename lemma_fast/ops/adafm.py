"""AdaFM compiled: what PyTorch has to know of `torch.ops.lemma_fast.adafm*`, and a call.

The library that `csrc/` makes holds the schemas and the code for CPU and CUDA; here are the shapes
of the results, the gradients, and the function that `ops.fused` offers. Importing this module loads
the library: ImportError where there is none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lemma_fast.ops import extension
from lemma_fast.ops.layouts import empty_map
from lemma_fast.ops.precision import convolutions_allow_tf32
from lemma_fast.ops.weights import AdaFMWeights, flat

extension.load()

# 64, of csrc/adafm/cuda/passes.h: a thread's registers hold its share of so many channels.
MAX_CUDA_CHANNELS: int = extension.library().lemma_fast_adafm_max_cuda_channels()
_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def adafm(features: Tensor, guidance: Tensor, weights: AdaFMWeights, training: bool) -> Tensor:
    """Run `ops.reference.adafm` in compiled code; the result lies in memory as `features` does.

    `features` and `guidance` [N, C, H, W] with any strides; on the CPU any C, on CUDA up to
    `MAX_CUDA_CHANNELS` in every type. fp32, fp16 and bf16, with fp32 sums and parameters of any of
    these; fp64 on the CPU alone. On CUDA fp32 products are TF32 where cuDNN's convolutions may be,
    else three TF32 products, near fp32. Without gradients and in evaluation the norms are folded
    into the convolutions. In training the running statistics are updated in place, as
    `nn.BatchNorm2d` does. Under autocast both maps are cast, as the reference's convolutions cast
    theirs. Raises ValueError for what does not fit.
    """
    device = features.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        features, guidance = features.to(dtype), guidance.to(dtype)
    elif features.dtype != guidance.dtype:
        dtype = torch.promote_types(features.dtype, guidance.dtype)
        features, guidance = features.to(dtype), guidance.to(dtype)
    _check(features, guidance, weights, training)
    # An empty batch has no statistics to add.
    training = training and features.shape[0] > 0
    tensors = list(flat(weights))
    compute = _computing(features.dtype)
    plain = [tensor if tensor.dtype == compute else tensor.to(compute) for tensor in tensors]
    tf32 = convolutions_allow_tf32()
    ops = torch.ops.lemma_fast
    if not training and not (
        torch.is_grad_enabled() and any(x.requires_grad for x in (features, guidance, *plain))
    ):
        folded = ops.adafm_fold(plain, features.dtype)
        return ops.adafm_inference(features, guidance, folded, tf32)
    out, _, shares = ops.adafm(features, guidance, plain, training, tf32)
    if training:
        running = [tensors[norm + i] for norm in _NORMS for i in (2, 3)]
        with torch.no_grad():
            torch._foreach_mul_(running, 1 - 0.1)
            torch._foreach_add_(running, [share.to(compute) for share in shares.flatten(0, 1)])
    return out


# Where each norm is among the 52 tensors, in the order of csrc/adafm/math.h: its weight and bias,
# then its running mean and variance.
_NORMS = (0, 6, 15, 24, 41, 48)
_WEIGHTS = 52
_TRAINED = [i for i in range(_WEIGHTS) if not any(i in (norm + 2, norm + 3) for norm in _NORMS)]


def _computing(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(features: Tensor, guidance: Tensor, weights: AdaFMWeights, training: bool) -> None:
    """Refuse what the maps have wrong; the parameters' own sizes are checked in C++."""
    if features.dim() != 4 or features.shape != guidance.shape:
        raise ValueError(
            f"features are {[*features.shape]} and guidance {[*guidance.shape]}; "
            "both must be [N, C, H, W] and alike"
        )
    global_weight = weights.global_conv[0]
    if features.shape[2:] != global_weight.shape[2:]:
        raise ValueError(
            f"features are {tuple(features.shape[2:])} in height and width, the global convolution "
            f"is {tuple(global_weight.shape[2:])}"
        )
    N, C, H, W = features.shape
    if global_weight.shape[0] != C:
        raise ValueError(f"features have {C} channels, the weights take {global_weight.shape[0]}")
    if not features.device == guidance.device == global_weight.device:
        raise ValueError(
            f"features are on {features.device}, guidance on {guidance.device} and the weights on "
            f"{global_weight.device}: move all to one device"
        )
    if features.device.type not in ("cpu", "cuda"):
        raise ValueError(f"the fused AdaFM runs on CPU and CUDA, not on {features.device}")
    if features.dtype not in _TYPES:
        raise ValueError(f"features are {features.dtype}; AdaFM takes fp32, fp16, bf16 and fp64")
    if features.is_cuda:
        if features.dtype == torch.float64:
            raise ValueError("features are torch.float64; on CUDA use ops.reference for fp64")
        if C > MAX_CUDA_CHANNELS:
            raise ValueError(
                f"features have {C} channels in {features.dtype}: on CUDA the fused AdaFM takes up "
                f"to {MAX_CUDA_CHANNELS}; use ops.reference"
            )
    if training and N * H * W == 1:
        raise ValueError(f"batch statistics need more than one position, got {[*features.shape]}")


@torch.library.register_fake("lemma_fast::adafm_fold")
def _(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    C, _, H, W = weights[31].shape
    size = _folded_bytes(weights[0].device.type, C, H * W, dtype)
    return weights[0].new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("lemma_fast::adafm_inference")
def _(features: Tensor, guidance: Tensor, folded: Tensor, tf32: bool) -> Tensor:
    return empty_map(features, features.shape[1])


@torch.library.register_fake("lemma_fast::adafm")
def _(
    features: Tensor, guidance: Tensor, weights: Sequence[Tensor], training: bool, tf32: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, C, H, W = features.shape
    size = _saved_bytes(features.device.type, N, C, H * W, features.dtype)
    saved = features.new_empty(size, dtype=torch.uint8)
    norms = len(_NORMS) if training else 0
    shares = features.new_empty(norms, 2, C, dtype=_computing(features.dtype))
    return empty_map(features, features.shape[1]), saved, shares


@torch.library.register_fake("lemma_fast::adafm_backward")
def _(
    grad_out: Tensor,
    features: Tensor,
    guidance: Tensor,
    weights: Sequence[Tensor],
    saved: Tensor,
    training: bool,
    tf32: bool,
) -> list[Tensor]:
    grads = [weight.new_empty(weight.shape) for weight in weights]
    return [empty_map(features, features.shape[1]), empty_map(guidance, guidance.shape[1]), *grads]


def _bytes(device: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Sizes of the folded parameters and of what is kept for the backward pass.

    `device` is "cpu" or "cuda", `shape` the images, channels and positions of maps of `dtype`.
    """
    call = getattr(extension.library(), f"lemma_fast_adafm_{device}_bytes", None)
    if call is None:
        raise NotImplementedError(f"the C++ extension was built without AdaFM for {device}")
    folded, saved = ctypes.c_int64(), ctypes.c_int64()
    sizes = [ctypes.c_int64(size) for size in (*shape, dtype.itemsize)]
    call(*sizes, ctypes.byref(folded), ctypes.byref(saved))
    return folded.value, saved.value


def _folded_bytes(device: str, C: int, P: int, dtype: torch.dtype) -> int:
    """Size of what `adafm_fold` makes."""
    return _bytes(device, (0, int(C), int(P)), dtype)[0]


def _saved_bytes(device: str, N: int, C: int, P: int, dtype: torch.dtype) -> int:
    """Size of what a forward pass keeps, which is linear in N: N may be a symbol."""
    none, one = (_bytes(device, (n, int(C), int(P)), dtype)[1] for n in (0, 1))
    return none + N * (one - none)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    features, guidance, weights, ctx.training, ctx.tf32 = inputs
    _, saved, shares = output
    # The running statistics are about to be updated, and are not needed.
    ctx.save_for_backward(features, guidance, saved, *(weights[i] for i in _TRAINED))
    ctx.mark_non_differentiable(saved, shares)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *_: object) -> tuple[Any, ...]:
    if grad_out is None:
        return None, None, None, None, None
    features, guidance, saved, *trained = ctx.saved_tensors
    grad_features, grad_guidance, *rest = torch.ops.lemma_fast.adafm_backward(
        grad_out, features, guidance, trained, saved, ctx.training, ctx.tf32
    )
    grads: list[Tensor | None] = [None] * _WEIGHTS
    for i, grad in zip(_TRAINED, rest, strict=True):
        grads[i] = grad
    return grad_features, grad_guidance, grads, None, None


torch.library.register_autograd("lemma_fast::adafm", _backward, setup_context=_setup_context)
