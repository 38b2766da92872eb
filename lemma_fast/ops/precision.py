"""TF32 of fp32 products and convolutions on CUDA: what PyTorch's settings allow, and setting them.

PyTorch has an old interface to these settings (`allow_tf32`, `set_float32_matmul_precision`) and a
new one (`fp32_precision`). The old one's getters raise RuntimeError after a use of the new one; the
new one's are right after a use of either. So only the new one is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CUDNN: Any = torch.backends.cudnn
_PARTS: tuple[Any, ...] = (torch.backends.cuda.matmul, _CUDNN.conv, _CUDNN.rnn)


# A compiled graph holds the answer; PyTorch compiles it again when the setting changes.
@torch.compiler.assume_constant_result
def convolutions_allow_tf32() -> bool:
    """Whether fp32 products that stand for convolutions may be TF32, as cuDNN's own would be."""
    return _allows(_CUDNN.conv)


def products_allow_tf32() -> bool:
    """Whether other fp32 products may be TF32, as cuBLAS's own would be."""
    return _allows(torch.backends.cuda.matmul)


@contextmanager
def tensor_cores(tf32: bool | None, old_interface: bool = False) -> Iterator[None]:
    """Let fp32 products, convolutions and recurrences on CUDA use TF32 or not.

    None leaves PyTorch's settings. They are global: other threads see the change meanwhile. With
    `old_interface` the old getters agree inside, which `torch.compile` calls when it autotunes.
    """
    if tf32 is None:
        yield
        return
    allowed = products_allow_tf32(), _allows(_CUDNN.conv)
    changed = [part for part in _PARTS if old_interface or _allows(part) != tf32]
    before = [_own(part) for part in changed]
    if old_interface:
        _set_old(tf32, tf32)
    for part in changed:
        part.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        if old_interface:
            _set_old(*allowed)
        for part, precision in zip(changed, before, strict=True):
            part.fp32_precision = precision


def _allows(part: Any) -> bool:
    precision: str = part.fp32_precision
    return precision == "tf32"


def _own(part: Any) -> str:
    """What brings a part's present setting back: "none" is to follow that of all of CUDA."""
    precision: str = part.fp32_precision
    return "none" if precision == _CUDNN.fp32_precision else precision


def _set_old(products: bool, convolutions: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = products
    _CUDNN.allow_tf32 = convolutions
