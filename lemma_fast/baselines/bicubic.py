"""Bicubic interpolation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lemma_fast.baselines.base import Baseline
from lemma_fast.baselines.config import BaselineConfig


class Bicubic(Baseline):
    """Bicubic interpolation, that of the published tables (torch's, `align_corners=False`)."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        # What tells the device of a network without parameters.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def upscale(self, lr: Tensor) -> Tensor:
        return enlarge(lr)


def enlarge(lr: Tensor) -> Tensor:
    """Double [N, C, H, W] by bicubic interpolation, not clamped."""
    return F.interpolate(lr, scale_factor=2, mode="bicubic", align_corners=False)
