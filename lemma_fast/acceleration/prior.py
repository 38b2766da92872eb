"""The text prior, folded: ResNet, Transformer encoder, position attention, language model."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.acceleration.folding import Affine, conv, linear, stack, wide
from lemma_fast.acceleration.layers import (
    Conv,
    Heads,
    Plan,
    Product,
    SelfAttention,
    projections,
)
from lemma_fast.model.layers import TransformerLayer
from lemma_fast.model.prior import (
    ConvNorm,
    Language,
    PositionAttention,
    ResidualBlock,
    ResNet,
    TextPrior,
    valid_lengths,
)
from lemma_fast.ops.cpu import Activation


class Reading(NamedTuple):
    """What the prior hands on, before its maps are resized."""

    h_attn: Tensor
    """[N, T, h, w] fp32 (fp64 for fp64)."""
    img_logits: Tensor
    """[N, T, classes]"""
    text_logits: Tensor
    """[N, T, classes]"""
    lengths: Tensor
    """[N] int64"""


def conv_norm(module: nn.Module, plan: Plan, activation: Activation = "none") -> Conv:
    """Fold one of the network's convolutions with its batch norm."""
    assert isinstance(module, ConvNorm)
    stride = module.conv.stride
    return Conv(conv(module.conv, module.norm), plan, (stride[0], stride[1]), activation)


class FoldedResidualBlock(nn.Module):
    """conv1x1, conv3x3, shortcut; each with its norm, sum and ReLU in one."""

    def __init__(self, block: ResidualBlock, plan: Plan) -> None:
        super().__init__()
        self.reduce = conv_norm(block.reduce, plan, "relu")
        self.expand = conv_norm(block.expand, plan, "relu")
        shortcut = block.shortcut
        self.shortcut = None if shortcut is None else conv_norm(shortcut, plan)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        return self.expand(self.reduce(x), add=identity)


class FoldedResNet(nn.Module):
    """Normalised RGB [N, 3, 2H, 2W] to tokens [N, h * w, C]."""

    def __init__(self, resnet: ResNet, plan: Plan) -> None:
        super().__init__()
        self.stem = conv_norm(resnet.stem, plan, "relu")
        blocks = [m for m in resnet.stages.modules() if isinstance(m, ResidualBlock)]
        self.blocks = nn.ModuleList(FoldedResidualBlock(block, plan) for block in blocks)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 2, 3, 1).flatten(1, 2)


class FoldedPositionAttention(nn.Module):
    """Tokens to vectors and maps; the queries are a constant, scaled already."""

    def __init__(self, attention: PositionAttention, plan: Plan) -> None:
        super().__init__()
        self.down = nn.ModuleList(conv_norm(m, plan, "relu") for m in attention.down)
        self.up = nn.ModuleList(conv_norm(m, plan, "relu") for m in attention.up)
        self.plan = plan
        project = linear(attention.project)
        queries = F.linear(wide(attention.queries), *project)
        self.queries = plan.keep_exact(queries / queries.shape[1] ** 0.5)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Tokens [N, h * w, C] to vectors [N, T, C] and h_attn [N, T, h, w]; scores are fp32."""
        N, _, C = tokens.shape
        levels = [tokens.unflatten(1, size).permute(0, 3, 1, 2)]
        for down in self.down:
            levels.append(down(levels[-1]))
        key = levels.pop()
        for up in list(self.up)[:-1]:
            skip = levels.pop()
            key = up(F.interpolate(key, size=skip.shape[2:])) + skip
        key = self.up[-1](F.interpolate(key, size=size))
        keys = key.permute(0, 2, 3, 1).reshape(N, -1, C).to(self.queries.dtype)
        with self.plan.exact():
            attention = (self.queries @ keys.transpose(1, 2)).softmax(dim=2)
        vectors = (attention @ tokens.to(attention.dtype)).to(tokens.dtype)
        return vectors, attention.unflatten(2, size)


class FoldedLanguage(nn.Module):
    """Cloze network: all layers look at one memory, and the first layer's queries are constant."""

    def __init__(self, language: Language, plan: Plan) -> None:
        super().__init__()
        layers = [layer for layer in language.layers if isinstance(layer, TransformerLayer)]
        positions = wide(language.positions)
        both = stack([projections(layer, 1, 3) for layer in layers])
        # Memory is embedded probabilities plus positions, and only keys and values see it.
        embed = wide(language.embed.weight)
        bias = torch.zeros_like(both.bias)
        self.memory = Product(Affine(both.weight @ embed, bias), plan)
        self.memory_positions = plan.keep(F.linear(positions, *both))
        self.start = plan.keep(positions)
        self.start_query = plan.keep(F.linear(positions, *projections(layers[0], 0, 1)))
        self.queries = nn.ModuleList(Product(projections(m, 0, 1), plan) for m in layers[1:])
        self.layers = nn.ModuleList(Heads(layer, plan) for layer in layers)
        self.classifier = Product(linear(language.classifier), plan)
        place = torch.arange(len(positions), device=plan.device)
        self.place = place
        self.others = place[:, None] != place

    def forward(self, probabilities: Tensor, lengths: Tensor) -> Tensor:
        """Class probabilities [N, T, classes] and lengths [N] to `text_logits`."""
        N = len(probabilities)
        memory = self.memory(probabilities) + self.memory_positions
        parts = memory.chunk(2 * len(self.layers), dim=2)
        mask = (self.others & (self.place < lengths[:, None, None]))[:, None]
        x = self.start.expand(N, -1, -1).contiguous()
        query = self.start_query.expand(N, -1, -1)
        for number, layer in enumerate(self.layers):
            if number:
                query = self.queries[number - 1](x)
            x = layer(x, query, parts[2 * number], parts[2 * number + 1], mask)
        return self.classifier(x)


class OriginalPrior(nn.Module):
    """A prior that is not folded, as the reference computes it, in fp32."""

    def __init__(self, prior: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.module = copy.deepcopy(prior).to(plan.device, plan.wide).eval().requires_grad_(False)
        self.wide, self.dtype = plan.wide, plan.dtype

    def forward(self, image: Tensor) -> Reading:
        prior, h_attn = self.module(image.to(self.wide))
        logits = prior.img_logits.to(self.dtype), prior.text_logits.to(self.dtype)
        return Reading(h_attn, *logits, prior.pt_lengths)


class FoldedPrior(nn.Module):
    """RGB crop [N, 3, H, W] to a `Reading`."""

    def __init__(self, prior: TextPrior, plan: Plan) -> None:
        super().__init__()
        config, vision = prior.config, prior.vision
        self.min_length = config.min_length
        self.size = (2 * config.height, 2 * config.width)
        grid = config.prior.reduction
        self.grid = (self.size[0] // grid, self.size[1] // grid)
        # The weights of a bicubic resize sum to one: the small crop is normalised, not the large.
        self.mean = plan.keep_exact(prior.mean)
        self.inverse_std = plan.keep_exact(1 / wide(prior.std))
        self.dtype = plan.dtype
        self.resnet = FoldedResNet(vision.resnet, plan)
        self.positions = plan.keep(vision.positions)
        self.encoder = nn.ModuleList(
            SelfAttention(m, plan) for m in vision.encoder if isinstance(m, TransformerLayer)
        )
        self.attention = FoldedPositionAttention(vision.attention, plan)
        self.classifier = Product(linear(vision.classifier), plan)
        self.language = FoldedLanguage(prior.language, plan)

    def forward(self, image: Tensor) -> Reading:
        image = (image.to(self.mean.dtype) - self.mean) * self.inverse_std
        image = F.interpolate(image, size=self.size, mode="bicubic", align_corners=True)
        image = image.to(self.dtype).contiguous(memory_format=torch.channels_last)
        tokens = self.resnet(image) + self.positions
        for layer in self.encoder:
            tokens = layer(tokens)
        vectors, h_attn = self.attention(tokens, self.grid)
        img_logits = self.classifier(vectors)
        probabilities = img_logits.softmax(dim=2)
        text_logits = self.language(probabilities, valid_lengths(img_logits, self.min_length))
        return Reading(h_attn, img_logits, text_logits, valid_lengths(text_logits, self.min_length))
