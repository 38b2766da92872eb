"""TSRN, which TG (Text Gestalt) takes as it is and teaches otherwise."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lemma_fast.baselines.config import BaselineConfig
from lemma_fast.baselines.frame import CONVOLUTIONS, GRUS, Frame
from lemma_fast.baselines.published import Published, frame_sizes
from lemma_fast.checkpoint.published import FRAME
from lemma_fast.model.blocks import BiGRU
from lemma_fast.model.layers import ConvNorm
from lemma_fast.ops import Operations


class SequentialBlock(nn.Module):
    """TSRN's sequential residual block: LEMMA's without fusion and the norm after the sum.

    A conv1x1 comes before each GRU, as in the published code. `guided` channels of guidance are
    concatenated to the residual, before the first of them.
    """

    def __init__(self, channels: int, ops: Operations, guided: int = 0) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3, bias=True, activation="mish")
        self.conv2 = ConvNorm(channels, channels, 3, bias=True)
        self.before_vertical = nn.Conv2d(channels + guided, channels, 1)
        self.vertical = BiGRU(channels, 2, ops)
        self.before_horizontal = nn.Conv2d(channels, channels, 1)
        self.horizontal = BiGRU(channels, 3, ops)

    def forward(self, features: Tensor, guidance: Tensor | None = None) -> Tensor:
        residual = self.conv2(self.conv1(features))
        if guidance is not None:
            residual = torch.cat([residual, guidance], dim=1)
        residual = self.vertical(self.before_vertical(residual))
        return self.horizontal(self.before_horizontal(features + residual))


class TSRN(Frame):
    """TSRN: Wang et al., Scene Text Image Super-Resolution in the Wild, section 4 (Method).

    Five sequential residual blocks between LEMMA's stem and upsampler, no guidance. In training
    the crop is rectified first (central alignment), which pairs that are aligned do without. TG's
    code aligns at 16x64, as here, TextZoom's at 32x64.
    """

    published: ClassVar[Published] = Published(
        repository="github.com/FudanVI/FudanOCR (text-gestalt)",
        signature="block2.gru1.conv1.weight",
        modules=FRAME + CONVOLUTIONS + GRUS,
        sizes=frame_sizes,
    )

    def __init__(self, config: BaselineConfig, ops: Operations) -> None:
        super().__init__(config, lambda _: SequentialBlock(config.channels, ops))
