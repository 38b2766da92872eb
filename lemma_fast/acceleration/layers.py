"""Convolutions and products of the accelerated network, in the form its device runs best.

What follows a convolution or a product (a bias, a sum, an activation, a norm) is done while its
result is at hand. On the CPU in fp32 weights are packed once into oneDNN's layout. On CUDA cuDNN
and cuBLAS take what they can into the same kernel, and one pass does the rest: docs/kernels.md says
which. Feature maps are channels-last, so that a map [N, C, H, W] is rows [N, H * W, C] without a
copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.acceleration.folding import Affine, conv, linear, wide
from lemma_fast.model.layers import Attention, ConvNorm, TransformerLayer
from lemma_fast.ops import Activation, cpu
from lemma_fast.ops.precision import tensor_cores

SMALLEST_WINOGRAD = 16
# From this many channels on, for few positions what counts is how many weights are read: those
# of 2 x 2 results are less than half of those of 4 x 4.
LARGE_WINOGRAD = 256
FEW_POSITIONS = 2 * 256
# cuDNN's fused kernels read 16 bytes at a time: eight channels of 16 bits.
ALIGNED = 8
# Up to here PyTorch's fused attention on the CPU takes longer than its parts.
FEW_KEYS = 32


@dataclass(frozen=True)
class Plan:
    """What the parts of an accelerated network are made for."""

    device: torch.device
    dtype: torch.dtype
    packed: bool
    """oneDNN's packed weights."""
    cpp: bool
    """The C++ operations of the CPU."""
    fused: bool
    """The Triton kernels of `ops.fused`."""
    compiled: bool
    """The C++ or CUDA code of the adaptive fusion."""
    cudnn: bool = False
    """cuDNN's convolution with a sum and a ReLU in it."""

    @property
    def wide(self) -> torch.dtype:
        """What scores, sums and outputs are in, whatever the products are: fp32 (fp64 for fp64)."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def keep(self, x: Tensor) -> Tensor:
        """A constant as the network's products take it."""
        return x.to(self.device, self.dtype, copy=True).contiguous()

    def exact(self) -> AbstractContextManager[None]:
        """Keep fp32 products in fp32, whatever PyTorch's setting."""
        return tensor_cores(False) if self.device.type == "cuda" else nullcontext()

    def keep_exact(self, x: Tensor) -> Tensor:
        """A constant of the score maps, which stay in fp32 (fp64 for fp64)."""
        return x.to(self.device, self.wide, copy=True).contiguous()


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch has oneDNN's fused convolutions and products for these tensors."""
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    names = ("_convolution_pointwise", "_linear_pointwise", "_reorder_convolution_weight")
    return all(hasattr(torch.ops.mkldnn, name) for name in (*names, "_reorder_linear_weight"))


class Conv(nn.Module):
    """Convolution that keeps the size, or divides it by `stride`, an activation and a sum.

    `mish`, a PReLU's `slope`, and a 1x1 kernel without a stride are only for where there is no sum.
    Where it is not `biased`, somebody else adds the bias.
    """

    def __init__(
        self,
        affine: Affine,
        plan: Plan,
        stride: int | tuple[int, int] = 1,
        activation: Activation = "none",
        slope: Tensor | None = None,
        biased: bool = True,
    ) -> None:
        super().__init__()
        D, C, height, width = affine.weight.shape
        self.stride = [stride, stride] if isinstance(stride, int) else list(stride)
        self.padding = [height // 2, width // 2]
        self.activation = activation
        self.slope = None if slope is None else plan.keep(wide(slope))
        self.bias = plan.keep(affine.bias) if biased else None
        self.packed, self.fused = plan.packed, plan.fused
        self.cudnn = plan.cudnn and activation == "relu" and C % ALIGNED == D % ALIGNED == 0
        self.few: Tensor | None = None
        self.product: Product | None = None
        self.winograd = (
            plan.cpp
            and (height, width, *self.stride) == (3, 3, 1, 1)
            and min(C, D) >= SMALLEST_WINOGRAD
        )
        if self.winograd:
            self.weight = cpu.pack_winograd(affine.weight)
            if min(C, D) >= LARGE_WINOGRAD:
                self.few = cpu.pack_winograd(affine.weight, tile=2)
            return
        # oneDNN's 1x1 convolution takes fourteen times as long for one size; its product never. On
        # CUDA a product has the ReLU in it, but heeds another setting of TF32 than a convolution.
        pointwise = (height, width, *self.stride) == (1, 1, 1, 1)
        as_product = plan.packed or (plan.fused and plan.dtype != torch.float32)
        if as_product and pointwise and activation != "mish" and slope is None:
            rows = Affine(affine.weight.flatten(1), affine.bias)
            self.product = Product(rows, plan, activation == "relu", biased)
            return
        self.weight = plan.keep(affine.weight).contiguous(memory_format=torch.channels_last)
        if plan.packed:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, [1, 1], 1, [1, C, 16, 64]
            )

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Convolve `x`; `add`, of the result's shape, is added before the activation."""
        if self.winograd:
            weight = self.weight
            if self.few is not None and x.numel() <= FEW_POSITIONS * x.shape[1]:
                weight = self.few
            assert self.bias is not None
            return self._sloped(cpu.winograd(x, weight, self.bias, add, self.activation))
        if self.product is not None:
            assert add is None
            return self.product(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.packed:
            return self._sloped(self._packed(x, add))
        if self.fused:
            return self._fused(x, add)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        if add is not None:
            x = x.add_(add)
        return self._sloped(activate(x, self.activation))

    def _sloped(self, x: Tensor) -> Tensor:
        return x if self.slope is None else F.prelu(x, self.slope)

    def convolve(self, x: Tensor) -> Tensor:
        """Convolve on CUDA, without what follows; channels-last, as `bias_act` takes it."""
        x = F.conv2d(x, self.weight, None, self.stride, self.padding)
        # A copy only where cuDNN is switched off.
        return x.contiguous(memory_format=torch.channels_last)

    def upsampled(self, x: Tensor, size: Sequence[int], add: Tensor | None = None) -> Tensor:
        """With the fused kernels: activation(conv(x)) + `add`, to the nearest in `size`."""
        from lemma_fast.kernels.bias_act import bias_act

        x, (height, width) = self.convolve(x), size
        rest = (self.bias, add, self.activation, self.slope, True)
        if height % x.shape[2] or width % x.shape[3]:
            # The nearest depend on how a quotient rounds.
            return F.interpolate(bias_act(x, *rest), size=(height, width))
        return bias_act(x, *rest, (height, width))

    def _fused(self, x: Tensor, add: Tensor | None) -> Tensor:
        from lemma_fast.kernels.bias_act import bias_act

        if add is not None and self.cudnn:
            # Not `cudnn_convolution_relu`, also where there is no sum: it hands cuDNN its result,
            # not yet written, as a summand times zero, and what lies there may be NaN.
            where = (self.stride, self.padding, [1, 1], 1)
            return torch.cudnn_convolution_add_relu(x, self.weight, add, 1.0, self.bias, *where)
        x = self.convolve(x)
        if (self.bias, add, self.slope) == (None, None, None) and self.activation == "none":
            return x
        return bias_act(x, self.bias, add, self.activation, self.slope)

    def _packed(self, x: Tensor, add: Tensor | None) -> Tensor:
        relu = self.activation == "relu"
        arguments = (self.weight, self.bias, self.padding, self.stride, [1, 1], 1)
        ops = torch.ops.mkldnn._convolution_pointwise
        if add is not None:
            last = "relu" if relu else None
            return ops.binary(x, add, *arguments, "add", 1.0, last, [], None)
        x = ops(x, *arguments, "relu" if relu else "none", [], "")
        return mish(x) if self.activation == "mish" else x


def conv_norm(module: ConvNorm, plan: Plan) -> Conv:
    """A convolution of the network with its batch norm, its sum and its activation in one."""
    return Conv(conv(module.conv, module.norm), plan, stride(module), module.activation)


def stride(module: ConvNorm) -> tuple[int, int]:
    """By height and by width."""
    height, width = module.conv.stride
    return height, width


class Product(nn.Module):
    """`x W^T + b` on rows [..., C]; ReLU and a sum on request."""

    def __init__(self, affine: Affine, plan: Plan, relu: bool = False, biased: bool = True) -> None:
        super().__init__()
        self.relu = relu
        self.packed, self.fused = plan.packed, plan.fused
        self.bias = plan.keep(affine.bias) if biased else None
        self.weight = plan.keep(affine.weight)
        if plan.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Multiply; `add`, of the result's shape, is added where there is no ReLU."""
        if not self.packed:
            if self.fused and self.relu and self.bias is not None and x.numel():
                rows = x.reshape(-1, x.shape[-1])
                rows = torch._addmm_activation(self.bias, rows, self.weight.T)
                return rows.view(*x.shape[:-1], -1)
            x = F.linear(x, self.weight, self.bias)
            x = x.relu_() if self.relu else x
            return x if add is None else x.add_(add)
        ops = torch.ops.mkldnn._linear_pointwise
        if add is None:
            return ops(x, self.weight, self.bias, "relu" if self.relu else "none", [], "")
        return ops.binary(x, add, self.weight, self.bias, "add")


class Heads(nn.Module):
    """The part of a Transformer layer after its projections: attention, output, MLP, both norms."""

    def __init__(self, layer: TransformerLayer, plan: Plan) -> None:
        super().__init__()
        self.heads, self.fused = layer.attention.heads, plan.fused
        self.out = Product(linear(layer.attention.out_proj), plan)
        self.hidden = Product(linear(layer.linear1), plan, relu=True)
        self.back = Product(linear(layer.linear2), plan)
        self.norms = [
            (
                norm.normalized_shape,
                plan.keep(wide(norm.weight)),
                plan.keep(wide(norm.bias)),
                norm.eps,
            )
            for norm in (layer.norm1, layer.norm2)
        ]

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """`x` [N, L, C] is the query before its projection `q`; `k` and `v` are [N, S, C]."""
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        if mask is None and k.shape[2] <= FEW_KEYS and k.device.type == "cpu":
            scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
            attended = scores.softmax(dim=3) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.finish(x, attended.transpose(1, 2).flatten(2))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """From `x` and what its queries saw [N, L, C] to the layer's result [N, L, C].

        With the fused kernels `x` may be [L, C], the same for all images.
        """
        x = self._normed(0, self.out, attended, x)
        return self._normed(1, self.back, self.hidden(x), x)

    def _normed(self, number: int, product: Product, rows: Tensor, x: Tensor) -> Tensor:
        """A product of `rows` plus `x`, normed."""
        if not self.fused:
            return F.layer_norm(product(rows, add=x), *self.norms[number])
        from lemma_fast.kernels.add_norm import add_norm

        return add_norm(product(rows), x, *self.norms[number][1:])


class SelfAttention(nn.Module):
    """A Transformer layer on its own rows, its three projections in one product."""

    def __init__(self, layer: TransformerLayer, plan: Plan) -> None:
        super().__init__()
        self.project = Product(_in_proj(layer.attention, 0, 3), plan)
        self.rest = Heads(layer, plan)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(x, *self.project(x).chunk(3, dim=2))


def projections(layer: nn.Module, first: int, last: int) -> Affine:
    """Of a Transformer layer's input projections (query, key, value), those in [first, last)."""
    assert isinstance(layer, TransformerLayer)
    return _in_proj(layer.attention, first, last)


def _in_proj(attention: Attention, first: int, last: int) -> Affine:
    weight, bias = wide(attention.in_proj_weight), attention.in_proj_bias
    rows = slice(first * len(weight) // 3, last * len(weight) // 3)
    return Affine(weight[rows], wide(bias)[rows])


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply an activation to `x`, which it may overwrite."""
    if activation == "mish":
        return mish(x)
    return x.relu_() if activation == "relu" else x


def mish(x: Tensor) -> Tensor:
    """`x tanh(softplus(x))` by one exponential: with e = exp(x), tanh is e(e + 2) / (e(e + 2) + 2).

    From 20 on the factor is 1 in fp64 too, and the exponential would overflow later.
    """
    if x.device.type != "cpu":
        return F.mish(x)
    e = x.clamp(max=20).exp_()
    e = torch.addcmul(2 * e, e, e)
    return x.mul(e.div_(e + 2))
