"""SRResNet."""

from __future__ import annotations

from torch import Tensor, nn

from lemma_fast.baselines.base import Baseline
from lemma_fast.baselines.config import BaselineConfig
from lemma_fast.model.layers import ConvNorm


class ResidualBlock(nn.Module):
    """conv3x3, BatchNorm, PReLU, conv3x3, BatchNorm, and the sum with the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3, bias=True)
        self.act = nn.PReLU()
        self.conv2 = ConvNorm(channels, channels, 3, bias=True)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.conv2(self.act(self.conv1(features)))


class SRResNet(Baseline):
    """SRResNet: Ledig et al., Photo-Realistic Single Image Super-Resolution [...], 2.1, figure 4.

    The generator of SRGAN, taught by pixels: 16 residual blocks, a skip around all of them, one
    sub-pixel convolution (the paper's two make four times the size). PReLU has one slope a layer.
    """

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        channels = config.channels
        self.stem = nn.Conv2d(config.in_channels, channels, 9, padding=4)
        self.stem_act = nn.PReLU()
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(config.blocks)))
        self.tail = ConvNorm(channels, channels, 3, bias=True)
        self.expand = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.expand_act = nn.PReLU()
        self.project = nn.Conv2d(channels, config.in_channels, 9, padding=4)

    def upscale(self, lr: Tensor) -> Tensor:
        shallow = self.stem_act(self.stem(lr))
        features = shallow + self.tail(self.blocks(shallow))
        return self.project(self.expand_act(self.shuffle(self.expand(features))))
