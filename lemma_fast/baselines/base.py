"""What every baseline is: one call from small crops to large ones."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from lemma_fast.baselines.config import BaselineConfig
from lemma_fast.baselines.published import Published


class Baseline(nn.Module):
    """A network of Table 3; its forward pass returns the image alone."""

    #: How its published checkpoints are named, where there may be any.
    published: ClassVar[Published | None] = None

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, lr: Tensor) -> Tensor:
        """Double `lr` [N, C, 16, 64] in [0, 1] to [N, C, 32, 128], not clamped.

        C is `config.in_channels`. Raises ValueError for another shape.
        """
        expected = (self.config.in_channels, *self.config.size)
        if lr.dim() != 4 or lr.shape[1:] != expected:
            raise ValueError(f"lr must be [N, {', '.join(map(str, expected))}], got {[*lr.shape]}")
        return self.upscale(lr)

    @abstractmethod
    def upscale(self, lr: Tensor) -> Tensor:
        """The forward pass on a checked input."""
