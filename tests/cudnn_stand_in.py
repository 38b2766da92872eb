"""cuDNN's convolution with a sum and ReLU, for where there is no cuDNN.

PyTorch has `aten::cudnn_convolution_add_relu` for CUDA alone. Importing this module registers the
same schema for the CPU, computed as ATen asks it of cuDNN (fp32 inside, rounded once), and for
FakeTensors. The dispatcher compares the schemas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "cudnn_convolution_add_relu"


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def convolution_add_relu(
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    alpha: float | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return relu(conv(x) + alpha z + bias), channels-last."""
    last = torch.channels_last
    for name, tensor in (("x", x), ("weight", weight), ("z", z)):
        # Else ATen copies it.
        assert tensor.is_contiguous(memory_format=last), f"{name} is not channels-last"
        assert tensor.dtype == x.dtype, f"{name} is {tensor.dtype}, x {x.dtype}"
    bias = None if bias is None else _wide(bias)
    y = F.conv2d(_wide(x), _wide(weight), bias, stride, padding, dilation, groups)
    assert z.shape == y.shape, f"z is {[*z.shape]}, the result {[*y.shape]}"
    out = (y + (1.0 if alpha is None else alpha) * _wide(z)).relu()
    return out.to(x.dtype).contiguous(memory_format=last)


def _meta(x: Tensor, weight: Tensor, z: Tensor, *rest: object) -> Tensor:
    assert x.dtype == weight.dtype == z.dtype
    return torch.empty_like(z, memory_format=torch.channels_last)


_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl(NAME, convolution_add_relu, "CPU")
_LIBRARY.impl(NAME, _meta, "Meta")
