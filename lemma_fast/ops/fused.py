"""The six operations as the fast path has them, under the reference's names and signatures.

Each loads its kernel when it is first called. `adafm`, `compress_select`, `gather_region` and
`location_enhance` are the reference's own: no kernel of theirs exists yet.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lemma_fast.ops.reference import adafm, compress_select, gather_region, location_enhance
from lemma_fast.ops.weights import BiGRUWeights, CrossAttentionWeights

__all__ = [
    "adafm",
    "bigru",
    "compress_select",
    "gather_region",
    "location_enhance",
    "sparse_cross_attention",
]


def bigru(features: Tensor, axis: int, weights: BiGRUWeights) -> Tensor:
    """Run `reference.bigru` in one launch; `kernels/bigru.py` says how and within what limits."""
    from lemma_fast.kernels import bigru as kernel

    return kernel.bigru(features, axis, weights)


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

    return kernel.sparse_cross_attention(
        text, selected, index, size, image_to_text, text_to_image, num_heads, dropout, seed
    )
