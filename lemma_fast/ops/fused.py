"""The six operations as the fast path has them, under the reference's names and signatures.

Each loads its kernel when it is first called. Not fused yet: adafm, bigru, sparse_cross_attention,
which are the reference's own.
"""

from __future__ import annotations

import os

from torch import Tensor

from lemma_fast.ops.reference import adafm, bigru, sparse_cross_attention

__all__ = [
    "adafm",
    "bigru",
    "compress_select",
    "gather_region",
    "location_enhance",
    "sparse_cross_attention",
]


def compress_select(
    h_attn: Tensor, lengths: Tensor, num_selected: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Run `reference.compress_select` in two launches; `kernels/compress_select.py` says how."""
    from lemma_fast.kernels import compress_select as kernel

    _require_gpu("compress_select", h_attn)
    return kernel.compress_select(h_attn, lengths, num_selected, size)


def gather_region(
    features: Tensor, index: Tensor, weight: Tensor, bias: Tensor, positions: Tensor
) -> Tensor:
    """Run `reference.gather_region` at the selected positions; see `kernels/gather_region.py`."""
    from lemma_fast.kernels import gather_region as kernel

    _require_gpu("gather_region", features)
    return kernel.gather_region(features, index, weight, bias, positions)


def location_enhance(logits: Tensor, features: Tensor, eps: float = 1e-5) -> Tensor:
    """Run `reference.location_enhance` in one launch; see `kernels/location_enhance.py`."""
    from lemma_fast.kernels import location_enhance as kernel

    _require_gpu("location_enhance", features)
    return kernel.location_enhance(logits, features, eps)


def _require_gpu(name: str, x: Tensor) -> None:
    """Triton runs on CUDA devices, and elsewhere only in its interpreter."""
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"the fused {name} needs a CUDA device, its input is on {x.device}: move it there or "
            "use ops.reference (TRITON_INTERPRET=1 interprets the kernel, slowly, for tests)"
        )
