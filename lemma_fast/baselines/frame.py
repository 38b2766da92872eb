"""What TSRN and the networks that keep its frame share: TBSRN, TATT, C3-STISR and PCAN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lemma_fast.baselines.base import Baseline
from lemma_fast.baselines.config import BaselineConfig
from lemma_fast.model.blocks import Upsampler
from lemma_fast.model.layers import ConvNorm
from lemma_fast.model.rectify import Rectifier

#: Published names of a block's two convolutions, in every frame but PCAN's.
CONVOLUTIONS = """
blocks.<b>.conv1.conv         block<b+2>.conv1
blocks.<b>.conv1.norm         block<b+2>.bn1
blocks.<b>.conv2.conv         block<b+2>.conv2
blocks.<b>.conv2.norm         block<b+2>.bn2
"""
#: Those of a block's two GRUs, each behind a convolution.
GRUS = """
blocks.<b>.before_vertical    block<b+2>.gru1.conv1
blocks.<b>.vertical           block<b+2>.gru1.gru@gru
blocks.<b>.before_horizontal  block<b+2>.gru2.conv1
blocks.<b>.horizontal         block<b+2>.gru2.gru@gru
"""


class Frame(Baseline):
    """LEMMA's stem and upsampler around blocks of any kind, a skip around these, tanh at the end.

    In training crops are rectified first, where `config.rectification` is on; `tall` is
    `Rectifier`'s. `block` makes the block of a number; what all of them make of the stem's result
    has `deep` channels, `config.channels` where None.
    """

    def __init__(
        self,
        config: BaselineConfig,
        block: Callable[[int], nn.Module],
        deep: int | None = None,
        tall: bool = False,
    ) -> None:
        super().__init__(config)
        channels = config.channels
        self.rectifier = Rectifier(config.lemma, tall) if config.rectification else None
        self.stem = nn.Conv2d(config.in_channels, channels, 9, padding=4)
        self.stem_act = nn.PReLU()
        self.blocks = nn.Sequential(*(block(number) for number in range(config.blocks)))
        self.tail = ConvNorm(deep or channels, channels, 3, bias=True)
        self.upsampler = Upsampler(config.lemma)

    def upscale(self, lr: Tensor) -> Tensor:
        return self.restore(lr)

    def restore(self, lr: Tensor, prior: Tensor | None = None) -> Tensor:
        """`upscale`, with what `deepen` takes beside the features."""
        if self.training and self.rectifier is not None:
            lr = self.rectifier(lr)
        shallow = self.stem_act(self.stem(lr))
        deep = self.deepen(shallow, prior)
        return torch.tanh(self.upsampler(shallow + self.tail(deep)))

    def deepen(self, shallow: Tensor, prior: Tensor | None) -> Tensor:
        """Features [N, C, 16, 64] of the stem to what the skip ends at, before its convolution."""
        out: Tensor = self.blocks(shallow)
        return out
