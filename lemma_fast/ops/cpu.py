"""Operations in C++ for inference on the CPU, in fp32: csrc/ has the code, this module calls it.

The module is a table of the six operations, `LEMMA(config, ops=cpu)`, and offers what a prepared
model calls directly: operations that take weights packed once by a `pack_...` function. Nothing
here is differentiable; a tensor that requires a gradient is refused where autograd is on. Every
operation takes the widest vectors that the processor has; LEMMA_FAST_CPU=baseline or avx2 asks for
less.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lemma_fast.ops import Activation, extension
from lemma_fast.ops.fused import adafm
from lemma_fast.ops.layouts import empty_map
from lemma_fast.ops.reference import (
    compress_select,
    gather_region,
    location_enhance,
    sparse_cross_attention,
)
from lemma_fast.ops.weights import BiGRUWeights

__all__ = [
    "adafm",
    "available",
    "bigru",
    "bigru_packed",
    "compress_select",
    "gather_region",
    "load",
    "location_enhance",
    "pack_bigru",
    "pack_winograd",
    "sparse_cross_attention",
    "winograd",
]

_ACTIVATIONS: dict[Activation, int] = {"none": 0, "relu": 1, "mish": 2}

# Hidden units lie in blocks of this many, whatever the width of the machine's vectors.
_BLOCK = 16

# Winograd's G for results of 2 x 2 and of 4 x 4.
_TRANSFORMS = {
    2: [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    4: [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
}

_loaded = False


def available() -> bool:
    """Say whether the compiled operations are there; `extension.missing()` says why not."""
    return extension.missing() is None


# A traced program takes for granted that loading was done, while it was traced.
@torch.compiler.assume_constant_result
def load() -> bool:
    """Load the compiled operations, and tell tracing their shapes; ImportError where that fails."""
    global _loaded
    if not _loaded:
        extension.load()
        torch.library.register_fake("lemma_fast::bigru_cpu", _fake_bigru)
        torch.library.register_fake("lemma_fast::winograd_cpu", _fake_winograd)
        _loaded = True
    return True


def bigru(features: Tensor, axis: int, weights: BiGRUWeights) -> Tensor:
    """Run `reference.bigru` in C++, fp32 on the CPU; packs the weights at every call.

    The result lies in memory as `features` does, NCHW or channels-last (which is the faster).
    Raises ValueError or RuntimeError for what it cannot take.
    """
    _without_gradient("bigru", features, *weights)
    return bigru_packed(features, axis, pack_bigru(weights), weights.weight_hh.shape[1])


def pack_bigru(weights: BiGRUWeights) -> Tensor:
    """Lay the weights out for `bigru_packed`: fp32 [2, blocks, numbers of 16 hidden units].

    A block holds its biases (r and z summed, n of the input, n of the state), then for each input
    channel and each hidden unit a row for r, z and n. Raises ValueError for shapes that do not fit.
    """
    hidden = weights.weight_hh.shape[-1]
    channels = weights.weight_ih.shape[-1]
    rows = {"weight_ih": (3 * hidden, channels), "weight_hh": (3 * hidden, hidden)}
    for name, weight in weights._asdict().items():
        expected = rows.get(name.removesuffix("_reverse"), (3 * hidden,))
        if tuple(weight.shape) != expected:
            raise ValueError(f"{name} is {tuple(weight.shape)}, it must be {expected}")
    with torch.no_grad():
        forward = _pack_direction(*weights[:4])
        return torch.stack([forward, _pack_direction(*weights[4:])])


def _pack_direction(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    hidden = w_hh.shape[1]
    blocks = -(-hidden // _BLOCK)

    def in_blocks(x: Tensor) -> Tensor:
        """[G, hidden, K] to [blocks, K * G * 16]."""
        x = F.pad(x.float(), (0, 0, 0, blocks * _BLOCK - hidden))
        return x.unflatten(1, (blocks, _BLOCK)).permute(1, 3, 0, 2).reshape(blocks, -1)

    (r_ih, z_ih, n_ih), (r_hh, z_hh, n_hh) = b_ih.view(3, hidden), b_hh.view(3, hidden)
    biases = torch.stack([r_ih + r_hh, z_ih + z_hh, n_ih, n_hh])[:, :, None]
    products = [in_blocks(w.view(3, hidden, -1)) for w in (w_ih, w_hh)]
    return torch.cat([in_blocks(biases), *products], dim=1)


def bigru_packed(features: Tensor, axis: int, packed: Tensor, hidden: int) -> Tensor:
    """Run `reference.bigru` on weights from `pack_bigru`; all fp32 on the CPU.

    `features` [N, C, H, W] to [N, 2 * hidden, H, W], channels-last for channels-last, else NCHW.
    """
    load()
    _without_gradient("bigru_packed", features, packed)
    result: Tensor = torch.ops.lemma_fast.bigru_cpu(features, packed, hidden, axis)
    return result


def pack_winograd(weight: Tensor, tile: int = 4) -> Tensor:
    """Transform 3x3 weights [D, C, 3, 3] for `winograd`: fp32 [(tile + 2)^2, C, D].

    `tile` 4 multiplies a quarter as often as a plain convolution, with some ten times its rounding
    error; 2 multiplies 4 / 9 as often with the error of a plain one, and reads less than half the
    weights, which counts where there are few positions. Raises ValueError for other shapes.
    """
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"the weight is {tuple(weight.shape)}, not [D, C, 3, 3]")
    if tile not in _TRANSFORMS:
        raise ValueError(f"tile is {tile}; 2 and 4 are known")
    transform = torch.tensor(_TRANSFORMS[tile], dtype=torch.float64)
    spread = transform @ weight.detach().double() @ transform.T
    return spread.permute(2, 3, 1, 0).flatten(0, 1).float().contiguous()


def winograd(
    features: Tensor,
    packed: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    activation: Activation = "none",
) -> Tensor:
    """Convolve 3x3, stride 1, padding 1, then add `residual` and apply `activation`.

    `features` [N, C, H, W], `packed` from `pack_winograd`, `bias` [D], `residual` [N, D, H, W]; C
    and D are 16 or more, all fp32 on the CPU. Returns [N, D, H, W] channels-last; what comes in
    otherwise is copied. Raises ValueError or RuntimeError for what it cannot take.
    """
    load()
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, not one of {', '.join(_ACTIVATIONS)}")
    tensors = (features, packed, bias) if residual is None else (features, packed, bias, residual)
    _without_gradient("winograd", *tensors)
    code = _ACTIVATIONS[activation]
    result: Tensor = torch.ops.lemma_fast.winograd_cpu(features, packed, bias, residual, code)
    return result


def _without_gradient(name: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            f"{name} in C++ has no gradient: call it under torch.no_grad(), or use ops.reference"
        )


def _fake_bigru(features: Tensor, packed: Tensor, hidden: int, axis: int) -> Tensor:
    return empty_map(features, 2 * hidden)


def _fake_winograd(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    N, _, H, W = features.shape
    return features.new_empty(N, weight.shape[2], H, W).to(memory_format=torch.channels_last)
