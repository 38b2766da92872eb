"""Super-resolution branch: recurrent blocks that take the guidance in, and the upsampler."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.config import LemmaConfig
from lemma_fast.model.layers import ConvNorm
from lemma_fast.ops import Operations
from lemma_fast.ops.weights import AdaFMWeights, BatchNormWeights, BiGRUWeights, BranchWeights


class Branch(nn.Module):
    """Parameters of conv1x1 -> BatchNorm -> PReLU -> conv1x1; `ops.adafm` computes."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.PReLU()
        self.project = nn.Conv2d(channels, channels, 1)

    def weights(self) -> BranchWeights:
        return BranchWeights(
            *conv_weights(self.reduce),
            norm_weights(self.norm),
            self.act.weight,
            *conv_weights(self.project),
        )


class AdaFM(nn.Module):
    """Adaptive fusion of features and guidance, both [N, C, H, W] (eq. 7)."""

    def __init__(self, config: LemmaConfig, ops: Operations) -> None:
        super().__init__()
        channels = config.channels
        self.op = ops.adafm
        self.guidance_norm = nn.BatchNorm2d(channels)
        self.branch1 = Branch(2 * channels, channels)
        self.branch2 = Branch(2 * channels, channels)
        self.branch3 = Branch(2 * channels, channels)
        self.global_conv = nn.Conv2d(channels, channels, config.size, groups=channels)
        self.gate1 = nn.Conv2d(channels, channels, 1)
        self.gate2 = nn.Conv2d(channels, channels, 1)
        self.gate3 = nn.Conv2d(channels, channels, 1)
        self.aggregate = Branch(channels, channels)
        self.out_norm = nn.BatchNorm2d(channels)

    def weights(self) -> AdaFMWeights:
        """The parameters and running statistics as `ops.adafm` takes them."""
        return AdaFMWeights(
            guidance_norm=norm_weights(self.guidance_norm),
            branches=(self.branch1.weights(), self.branch2.weights(), self.branch3.weights()),
            global_conv=conv_weights(self.global_conv),
            gate=(
                *conv_weights(self.gate1),
                *conv_weights(self.gate2),
                *conv_weights(self.gate3),
            ),
            aggregate=self.aggregate.weights(),
            out_norm=norm_weights(self.out_norm),
        )

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        """Fuse; the batch norms' own mode counts, so that they can be frozen in training."""
        weights = self.weights()
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        training = norms[0].training
        if any(norm.training != training for norm in norms):
            raise ValueError("AdaFM's batch norms are one operation: all train, or none does")
        if training:
            for norm in norms:
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.add_(1)
        return self.op(features, guidance, weights, training)


class Concatenation(nn.Module):
    """What Table 4 puts in AdaFM's place: concatenate, then conv1x1 + BatchNorm."""

    def __init__(self, config: LemmaConfig) -> None:
        super().__init__()
        self.mix = ConvNorm(2 * config.channels, config.channels, 1, bias=True)

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        return self.mix(torch.cat([features, guidance], dim=1))


class BiGRU(nn.Module):
    """Bidirectional GRU along one axis of [N, C, H, W]; parameters are those of `nn.GRU`."""

    def __init__(self, channels: int, axis: int, ops: Operations) -> None:
        super().__init__()
        self.op = ops.bigru
        self.axis = axis
        hidden = channels // 2
        for suffix in ("", "_reverse"):
            for name, shape in (
                ("weight_ih", (3 * hidden, channels)),
                ("weight_hh", (3 * hidden, hidden)),
                ("bias_ih", (3 * hidden,)),
                ("bias_hh", (3 * hidden,)),
            ):
                parameter = nn.Parameter(torch.empty(shape))
                nn.init.uniform_(parameter, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))
                self.register_parameter(name + suffix, parameter)

    def weights(self) -> BiGRUWeights:
        return BiGRUWeights(*(getattr(self, name) for name in BiGRUWeights._fields))

    def forward(self, features: Tensor) -> Tensor:
        return self.op(features, self.axis, self.weights())


class RecurrentBlock(nn.Module):
    """Sequential-recurrent block with AdaFM inside its residual: X_n and X_G to X_{n+1}."""

    def __init__(self, config: LemmaConfig, ops: Operations) -> None:
        super().__init__()
        channels = config.channels
        self.conv1 = ConvNorm(channels, channels, 3, bias=True, activation="mish")
        self.conv2 = ConvNorm(channels, channels, 3, bias=True)
        self.fusion = AdaFM(config, ops) if config.adaptive_fusion else Concatenation(config)
        self.vertical = BiGRU(channels, 2, ops)
        self.norm = nn.BatchNorm2d(channels)
        self.horizontal = BiGRU(channels, 3, ops)

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        residual = self.fusion(self.conv2(self.conv1(features)), guidance)
        return self.horizontal(self.norm(features + self.vertical(residual)))


class Upsampler(nn.Module):
    """conv3x3, PixelShuffle, mish, conv9x9: [N, C, H, W] to [N, 4, 2H, 2W] before tanh."""

    def __init__(self, config: LemmaConfig) -> None:
        super().__init__()
        channels, scale = config.channels, config.scale
        self.expand = nn.Conv2d(channels, channels * scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)
        self.project = nn.Conv2d(channels, config.in_channels, 9, padding=4)

    def forward(self, features: Tensor) -> Tensor:
        return self.project(F.mish(self.shuffle(self.expand(features))))


def conv_weights(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that has both."""
    assert conv.bias is not None
    return conv.weight, conv.bias


def norm_weights(norm: nn.Module) -> BatchNormWeights:
    """Affine parameters and running statistics of a plain batch norm.

    Raises ValueError for what the operation would compute otherwise than the module.
    """
    if (
        not isinstance(norm, nn.BatchNorm2d)
        or (norm.eps, norm.momentum) != (1e-5, 0.1)
        or norm.running_mean is None
        or norm.running_var is None
    ):
        raise ValueError(
            f"AdaFM takes nn.BatchNorm2d with eps 1e-5 and momentum 0.1 as its norms, not {norm}"
        )
    return BatchNormWeights(norm.weight, norm.bias, norm.running_mean, norm.running_var)
