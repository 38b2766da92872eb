"""SRCNN."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.baselines.base import Baseline
from lemma_fast.baselines.bicubic import enlarge
from lemma_fast.baselines.config import BaselineConfig


class SRCNN(Baseline):
    """SRCNN 9-1-5: Dong et al., Image Super-Resolution Using Deep Convolutional Networks, 3.1.

    Three convolutions on the bicubic enlargement; 64 and 32 features. Padded, where the paper
    shrinks the image, and on colour, where most of its experiments are on luminance. The start is
    PyTorch's, not the paper's Gaussian of deviation 0.001, which wants its far longer training.
    """

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        features, mapped = config.channels, config.channels // 2
        self.extract = nn.Conv2d(config.in_channels, features, 9, padding=4)
        self.map = nn.Conv2d(features, mapped, 1)
        self.rebuild = nn.Conv2d(mapped, config.in_channels, 5, padding=2)

    def upscale(self, lr: Tensor) -> Tensor:
        return self.rebuild(F.relu(self.map(F.relu(self.extract(enlarge(lr))))))
