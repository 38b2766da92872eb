"""The networks of the baselines."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.baselines.config import BaselineConfig
from lemma_fast.model.blocks import BiGRU, Upsampler
from lemma_fast.model.layers import ConvNorm
from lemma_fast.model.rectify import Rectifier
from lemma_fast.ops import Operations, reference


class Baseline(nn.Module):
    """A network without a text prior; its forward pass returns the image alone."""

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


class Bicubic(Baseline):
    """Bicubic interpolation, that of the published tables (torch's, `align_corners=False`)."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        # What tells the device of a network without parameters.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def upscale(self, lr: Tensor) -> Tensor:
        return enlarge(lr)


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


class SequentialBlock(nn.Module):
    """TSRN's sequential residual block: LEMMA's without fusion and the norm after the sum.

    A conv1x1 comes before each GRU, as in the published code.
    """

    def __init__(self, channels: int, ops: Operations) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3, bias=True)
        self.conv2 = ConvNorm(channels, channels, 3, bias=True)
        self.before_vertical = nn.Conv2d(channels, channels, 1)
        self.vertical = BiGRU(channels, 2, ops)
        self.before_horizontal = nn.Conv2d(channels, channels, 1)
        self.horizontal = BiGRU(channels, 3, ops)

    def forward(self, features: Tensor) -> Tensor:
        residual = self.conv2(F.mish(self.conv1(features)))
        residual = self.vertical(self.before_vertical(residual))
        return self.horizontal(self.before_horizontal(features + residual))


class TSRN(Baseline):
    """TSRN: Wang et al., Scene Text Image Super-Resolution in the Wild, section 4 (Method).

    Five sequential residual blocks between LEMMA's stem and upsampler, no guidance. In training
    the crop is rectified first (central alignment), which pairs that are aligned do without.
    """

    def __init__(self, config: BaselineConfig, ops: Operations = reference) -> None:
        super().__init__(config)
        channels = config.channels
        self.rectifier = Rectifier(config.lemma) if config.rectification else None
        self.stem = nn.Conv2d(config.in_channels, channels, 9, padding=4)
        self.stem_act = nn.PReLU()
        self.blocks = nn.Sequential(*(SequentialBlock(channels, ops) for _ in range(config.blocks)))
        self.tail = ConvNorm(channels, channels, 3, bias=True)
        self.upsampler = Upsampler(config.lemma)

    def upscale(self, lr: Tensor) -> Tensor:
        if self.training and self.rectifier is not None:
            lr = self.rectifier(lr)
        shallow = self.stem_act(self.stem(lr))
        return torch.tanh(self.upsampler(shallow + self.tail(self.blocks(shallow))))


def create_baseline(name: str, *, ops: Operations = reference, **changes: int | bool) -> Baseline:
    """An untrained baseline with its paper's sizes, or entries of BaselineConfig changed."""
    return build_baseline(BaselineConfig.paper(name, **changes), ops)


def build_baseline(config: BaselineConfig, ops: Operations = reference) -> Baseline:
    """The network of a config; `ops` is LEMMA's table of operations."""
    if config.name == "tsrn":
        return TSRN(config, ops)
    kinds: dict[str, type[Baseline]] = {"bicubic": Bicubic, "srcnn": SRCNN, "srresnet": SRResNet}
    return kinds[config.name](config)


def enlarge(lr: Tensor) -> Tensor:
    """Double [N, C, H, W] by bicubic interpolation, not clamped."""
    return F.interpolate(lr, scale_factor=2, mode="bicubic", align_corners=False)
