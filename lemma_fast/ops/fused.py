"""The six operations as the fast path has them, under the reference's names and signatures.

Each loads its kernel, or the compiled library, when it is first called.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from lemma_fast.ops.weights import AdaFMWeights, BiGRUWeights, CrossAttentionWeights

__all__ = [
    "adafm",
    "bigru",
    "compress_select",
    "gather_region",
    "location_enhance",
    "sparse_cross_attention",
]


def adafm(features: Tensor, guidance: Tensor, weights: AdaFMWeights, training: bool) -> Tensor:
    """Run `reference.adafm` in the compiled library; `ops/adafm.py` says within what limits."""
    from lemma_fast.ops import adafm as compiled

    return compiled.adafm(features, guidance, weights, training)


def bigru(features: Tensor, axis: int, weights: BiGRUWeights) -> Tensor:
    """Run `reference.bigru` in one launch; `kernels/bigru.py` says how and within what limits."""
    from lemma_fast.kernels import bigru as kernel

    _require_gpu("bigru", features)
    return kernel.bigru(features, axis, weights)


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


def sparse_cross_attention(
    text: Tensor,
    selected: Tensor,
    index: Tensor,
    size: tuple[int, int],
    image_to_text: Sequence[CrossAttentionWeights],
    text_to_image: Sequence[CrossAttentionWeights],
    num_heads: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Run `reference.sparse_cross_attention` in two launches, one for each direction.

    `kernels/sparse_cross_attention.py` says how and within what limits.
    """
    from lemma_fast.kernels import sparse_cross_attention as kernel

    _require_gpu("sparse_cross_attention", text)
    return kernel.sparse_cross_attention(
        text, selected, index, size, image_to_text, text_to_image, num_heads, dropout, seed
    )


def _require_gpu(name: str, x: Tensor) -> None:
    """Triton runs on CUDA devices, and elsewhere only in its interpreter."""
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"the fused {name} needs a CUDA device, its input is on {x.device}: move it there or "
            "use ops.reference (TRITON_INTERPRET=1 interprets the kernel, slowly, for tests)"
        )
