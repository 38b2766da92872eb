"""The text prior: where the characters are and what they may be (SPEC section 2).

An attention-based recogniser (ABINet without its fusion step): a residual network and a Transformer
encoder see the crop at twice its size, position attention finds one place a character, and a
bidirectional cloze network corrects the reading from its own context.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.config import LemmaConfig
from lemma_fast.model.layers import ConvNorm, TransformerLayer, sinusoid

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Prior(NamedTuple):
    """What the recogniser tells the network, and the caller."""

    attn_map: Tensor
    """[N, T, H, W] fp32, one attention map a character, at the size of the input."""
    img_logits: Tensor
    """[N, T, classes], read from the image; class 0 is the end."""
    text_logits: Tensor
    """[N, T, classes], corrected by the language model."""
    pt_lengths: Tensor
    """[N] int64, valid characters with the end token, read from `text_logits`."""


class ResidualBlock(nn.Module):
    """conv1x1, conv3x3 (which carries the stride), and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.reduce = ConvNorm(in_channels, out_channels, 1, activation="relu")
        self.expand = ConvNorm(out_channels, out_channels, 3, stride, activation="relu")
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = ConvNorm(in_channels, out_channels, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        return self.expand(self.reduce(x), add=identity)


class ResNet(nn.Module):
    """Normalised RGB [N, 3, 2H, 2W] to features [N, C, h, w]."""

    def __init__(self, config: LemmaConfig) -> None:
        super().__init__()
        prior = config.prior
        self.stem = ConvNorm(3, prior.stem_width, 3, activation="relu")
        stages: list[nn.Module] = []
        channels = prior.stem_width
        for width, depth, stride in zip(prior.widths, prior.depths, prior.strides, strict=True):
            blocks = [ResidualBlock(channels, width, stride)]
            blocks += [ResidualBlock(width, width, 1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = width
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        return self.stages(self.stem(image))


class PositionAttention(nn.Module):
    """One query a character position attends to the image; keys come from a small U-Net."""

    queries: Tensor

    def __init__(self, config: LemmaConfig) -> None:
        super().__init__()
        width, narrow = config.prior.width, config.prior.key_width
        strides: tuple[int | tuple[int, int], ...] = ((1, 2), 2, 2, 2)
        widths = (width, narrow, narrow, narrow)
        self.down = nn.ModuleList(
            ConvNorm(before, narrow, 3, stride, bias=True, activation="relu")
            for before, stride in zip(widths, strides, strict=True)
        )
        self.up = nn.ModuleList(
            ConvNorm(narrow, after, 3, bias=True, activation="relu") for after in reversed(widths)
        )
        self.project = nn.Linear(width, width)
        self.register_buffer("queries", sinusoid(config.max_length, width))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, C, h, w] to vectors [N, T, C] and fp32 maps `h_attn` [N, T, h, w]."""
        key = self.keys(features)
        # Half-precision scores would tie and reorder positions: fp32 whatever the autocast.
        with torch.autocast(features.device.type, enabled=False):
            query, key, value = (
                x if x.dtype == torch.float64 else x.float()
                for x in (self.project(self.queries), key.flatten(2), features.flatten(2))
            )
            attention = (query @ key / features.shape[1] ** 0.5).softmax(dim=2)
            vectors = (attention @ value.transpose(1, 2)).to(features.dtype)
        return vectors, attention.unflatten(2, features.shape[2:])

    def keys(self, features: Tensor) -> Tensor:
        """The U-Net: features [N, C, h, w] to keys of the same shape."""
        levels = [features]
        for down in self.down:
            levels.append(down(levels[-1]))
        key = levels.pop()
        for up in list(self.up)[:-1]:
            skip = levels.pop()
            key = up(F.interpolate(key, size=skip.shape[2:])) + skip
        return self.up[-1](F.interpolate(key, size=features.shape[2:]))


class Seen(NamedTuple):
    """What the vision part knows of a crop."""

    features: Tensor
    """[N, C, h, w], of the Transformer encoder."""
    vectors: Tensor
    """[N, T, C], one a character."""
    attention: Tensor
    """[N, T, h, w], one map a character."""
    logits: Tensor
    """[N, T, classes]."""


class Vision(nn.Module):
    """Image to one vector, one attention map and one class score a character."""

    positions: Tensor

    def __init__(self, config: LemmaConfig) -> None:
        super().__init__()
        prior = config.prior
        self.resnet = ResNet(config)
        tokens = 4 * config.height * config.width // prior.reduction**2
        self.register_buffer("positions", sinusoid(tokens, prior.width))
        self.dropout = nn.Dropout(prior.dropout)
        self.encoder = nn.ModuleList(
            TransformerLayer(prior.width, prior.heads, prior.feedforward, prior.dropout)
            for _ in range(prior.encoder_layers)
        )
        self.attention = PositionAttention(config)
        self.classifier = nn.Linear(prior.width, config.num_classes)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised RGB [N, 3, 2H, 2W] to `img_logits` [N, T, classes] and `h_attn`."""
        seen = self.look(image)
        return seen.logits, seen.attention

    def look(self, image: Tensor) -> Seen:
        """As `forward`, with all that was found on the way."""
        features = self.resnet(image)
        tokens = self.dropout(features.flatten(2).transpose(1, 2) + self.positions)
        for layer in self.encoder:
            tokens = layer(tokens)
        features = tokens.transpose(1, 2).unflatten(2, features.shape[2:])
        vectors, h_attn = self.attention(features)
        return Seen(features, vectors, h_attn, self.classifier(vectors))


class Language(nn.Module):
    """Bidirectional cloze network: each character is read from all the others."""

    positions: Tensor

    def __init__(self, config: LemmaConfig) -> None:
        super().__init__()
        prior = config.prior
        self.embed = nn.Linear(config.num_classes, prior.width, bias=False)
        self.register_buffer("positions", sinusoid(config.max_length, prior.width))
        self.dropout = nn.Dropout(prior.dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(prior.width, prior.heads, prior.feedforward, prior.dropout)
            for _ in range(prior.language_layers)
        )
        self.classifier = nn.Linear(prior.width, config.num_classes)

    def forward(self, probabilities: Tensor, lengths: Tensor) -> Tensor:
        """Class probabilities [N, T, classes] and lengths [N] to `text_logits` [N, T, classes]."""
        return self.classifier(self.reconsider(probabilities, lengths))

    def reconsider(self, probabilities: Tensor, lengths: Tensor) -> Tensor:
        """The vectors [N, T, C] that `forward` classifies."""
        N, T, _ = probabilities.shape
        memory = self.dropout(self.embed(probabilities) + self.positions)
        place = torch.arange(T, device=lengths.device)
        others = place[:, None] != place
        mask = (others & (place < lengths[:, None, None]))[:, None]
        x = self.positions.to(memory.dtype).expand(N, -1, -1)
        for layer in self.layers:
            x = layer(x, memory, mask)
        return x


def valid_lengths(logits: Tensor, shortest: int) -> Tensor:
    """Characters up to and with the first end token (all T where there is none), [N] int64."""
    is_end = logits.argmax(dim=2) == 0
    T = is_end.shape[1]
    first = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1), T - 1)
    return (first + 1).clamp(shortest, T)


class TextPrior(nn.Module):
    """RGB crop to the prior; the image is resized and normalised inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: LemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = Vision(config)
        self.language = Language(config)
        for name, value in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> tuple[Prior, Tensor]:
        """`image` [N, 3, H, W] in [0, 1] to the prior and its small maps `h_attn` [N, T, h, w]."""
        img_logits, h_attn = self.vision(self.prepare(image))
        probabilities = img_logits.detach().softmax(dim=2)
        text_logits = self.language(probabilities, self.valid_lengths(img_logits))
        lengths = self.valid_lengths(text_logits)
        return Prior(self.resize(h_attn), img_logits, text_logits, lengths), h_attn

    def prepare(self, image: Tensor) -> Tensor:
        """RGB [N, 3, any, any] in [0, 1] to the vision part's input [N, 3, 2H, 2W], normalised."""
        size = (2 * self.config.height, 2 * self.config.width)
        if image.shape[-2:] != size:
            image = F.interpolate(image, size=size, mode="bicubic", align_corners=True)
        return (image - self.mean) / self.std

    def resize(self, h_attn: Tensor) -> Tensor:
        """Attention maps [N, T, h, w] to the size of the crop [N, T, H, W]."""
        return F.interpolate(h_attn, size=self.config.size, mode="bicubic", align_corners=True)

    def valid_lengths(self, logits: Tensor) -> Tensor:
        """`valid_lengths` of logits [N, T, classes] with the config's shortest length."""
        return valid_lengths(logits, self.config.min_length)
