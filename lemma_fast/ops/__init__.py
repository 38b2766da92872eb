"""The fused operations' two tables, `reference` and `fused`: the same names, the same signatures.

Import the one you need: `from lemma_fast.ops import reference`. A model takes a table as `ops`; any
object with the six functions will do, so a table can be mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor

#: What may follow a convolution.
Activation = Literal["none", "relu", "mish"]


class Operations(Protocol):
    """What a table has to offer; `reference` holds the signatures and what they mean."""

    @property
    def adafm(self) -> Callable[..., Tensor]: ...
    @property
    def bigru(self) -> Callable[..., Tensor]: ...
    @property
    def compress_select(self) -> Callable[..., tuple[Tensor, Tensor]]: ...
    @property
    def gather_region(self) -> Callable[..., Tensor]: ...
    @property
    def location_enhance(self) -> Callable[..., Tensor]: ...
    @property
    def sparse_cross_attention(self) -> Callable[..., Tensor]: ...
