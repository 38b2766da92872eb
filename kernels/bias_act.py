"""What follows a convolution in one pass: bias, a sum, an activation, nearest upsampling.

    out = act(y + bias + add)                  or, with `add_last`,  act(y + bias) + add

y is a channels-last map, so its numbers lie as rows [N * H * W, D]. A program owns BLOCK numbers
of the result. fp32 inside; the result is rounded once. With a `size`, each result reads the
position that `F.interpolate` would (a whole multiple of the height and of the width, so the
quotient of positions is exact). Inference alone: there is no gradient.

Bytes: y and `add` are read once, the result is written once; PyTorch's kernels for a bias, a sum
and a ReLU would read y three times and write it three times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemma_fast.ops import Activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CODES: dict[Activation, int] = {"none": 0, "relu": 1, "mish": 2}
_PRELU = 3
# Numbers of a program: 8 or 16 a thread. Chosen by resources, not measured on a GPU yet.
_BLOCK = {2: 2048, 4: 1024}


@triton.jit
def _activated(x, slope, ACT: tl.constexpr):
    """The activation of fp32 numbers. NaN stays NaN in each."""
    if ACT == 1:
        x = tl.where(x < 0, 0.0, x)
    if ACT == 2:
        # tanh(softplus(x)) by one exponential: with e = exp(x), e (e + 2) / (e (e + 2) + 2).
        e = tl.exp(tl.minimum(x, 20.0))
        e = e * (e + 2)
        x = x * (e / (e + 2))
    if ACT == 3:
        x = tl.where(x < 0, x * slope, x)
    return x


@triton.jit
def _bias_act(
    y, bias, add, slope, out, SIZE, H, W, H2, W2, D: tl.constexpr, ACT: tl.constexpr,
    ADD_LAST: tl.constexpr, RESIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    d = i % D
    at = i
    if RESIZE:
        row = i // D
        w, h, n = row % W2, row // W2 % H2, row // W2 // H2
        at = ((n * H + h * H // H2) * W + w * W // W2) * D + d
    x = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    if add is not None:
        more = tl.load(add + at, mask=inside, other=0.0).to(tl.float32)
    if add is not None and not ADD_LAST:
        x += more
    if slope is not None:
        x = _activated(x, tl.load(slope).to(tl.float32), ACT)
    else:
        x = _activated(x, 0.0, ACT)
    if add is not None and ADD_LAST:
        x += more
    tl.store(out + i, x.to(out.dtype.element_ty), mask=inside)


def _empty(y: Tensor, height: int, width: int) -> Tensor:
    N, D = y.shape[:2]
    return y.new_empty(N, height, width, D).permute(0, 3, 1, 2)


@torch.library.custom_op("lemma_fast::bias_act", mutates_args=())
def _op(
    y: Tensor, bias: Tensor | None, add: Tensor | None, slope: Tensor | None, act: int,
    add_last: bool, height: int, width: int,
) -> Tensor:  # fmt: skip
    _, D, H, W = y.shape
    out = _empty(y, height, width)
    if not out.numel():
        return out
    block = _BLOCK[y.itemsize]
    with torch.cuda.device_of(y):
        _bias_act[(triton.cdiv(out.numel(), block),)](
            y, bias, add, slope, out, out.numel(), H, W, height, width, D, act, add_last,
            (height, width) != (H, W), block, num_warps=4,
        )  # fmt: skip
    return out


@_op.register_fake
def _(
    y: Tensor, bias: Tensor | None, add: Tensor | None, slope: Tensor | None, act: int,
    add_last: bool, height: int, width: int,
) -> Tensor:  # fmt: skip
    return _empty(y, height, width)


def bias_act(
    y: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    activation: Activation = "none",
    slope: Tensor | None = None,
    add_last: bool = False,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Return `act(y + bias + add)`, or `act(y + bias) + add`, as a channels-last map.

    `y` [N, D, H, W] is channels-last, fp32, fp16 or bf16; `bias` [D]; `add` is of y's shape, type
    and layout; `slope` [1] is a PReLU's, which is then the activation. With a `size`, height and
    width that H and W divide, the result [N, D, *size] is upsampled to the nearest. Raises
    ValueError for anything else.
    """
    if y.dtype not in DTYPES or y.dim() != 4:
        raise ValueError(f"bias_act takes maps in fp32, fp16 or bf16, not {y.dim()}-d {y.dtype}")
    for name, x in (("y", y), ("add", add)):
        if x is None:
            continue
        if not x.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"bias_act takes channels-last maps, {name} has strides {x.stride()}")
        if x.shape != y.shape or x.dtype != y.dtype:
            raise ValueError(f"y is {[*y.shape]} {y.dtype}, {name} {[*x.shape]} {x.dtype}")
    if bias is not None and bias.shape != y.shape[1:2]:
        raise ValueError(f"y has {y.shape[1]} channels, the bias is {[*bias.shape]}")
    if slope is not None and (slope.numel() != 1 or activation != "none"):
        raise ValueError(
            f"a PReLU has one slope and no other activation; got {[*slope.shape]}, {activation!r}"
        )
    height, width = size or y.shape[2:]
    if height % y.shape[2] or width % y.shape[3]:
        raise ValueError(f"{height} x {width} is no multiple of {y.shape[2]} x {y.shape[3]}")
    act = _CODES[activation] if slope is None else _PRELU
    return _op(y, bias, add, slope, act, add_last, height, width)
