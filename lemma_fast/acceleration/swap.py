"""The network's layers for their folded forms: one network, two kinds of layers.

`folded` copies a LEMMA and replaces modules by type. The copy runs `LEMMA.forward`, and every part
that is not named here runs the reference's own code around folded layers.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lemma_fast.acceleration.blocks import FoldedBiGRU, FoldedUpsampler, FusedBlock, fusion
from lemma_fast.acceleration.folding import Affine, conv, linear
from lemma_fast.acceleration.guidance import ExactGuidance, FoldedGuidance
from lemma_fast.acceleration.layers import Conv, Plan, Product, SelfAttention, conv_norm, stride
from lemma_fast.acceleration.prior import (
    ExactPrior,
    FoldedLanguage,
    FoldedPositionAttention,
    FoldedPrior,
)
from lemma_fast.config import LemmaConfig
from lemma_fast.model import LEMMA
from lemma_fast.model.blocks import AdaFM, BiGRU, RecurrentBlock, Upsampler
from lemma_fast.model.layers import ConvNorm, TransformerLayer
from lemma_fast.model.prior import (
    Language,
    PositionAttention,
    ResidualBlock,
    TextPrior,
    Vision,
)


class Enter(nn.Module):
    """Crops [N, 4, H, W] in the type and layout of the network's convolutions."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, lr: Tensor) -> Tensor:
        return lr.to(self.dtype, memory_format=torch.channels_last)


def folded(model: LEMMA, plan: Plan, with_attention: bool = True) -> LEMMA:
    """Copy a network for evaluation as `plan` says; the original is not changed.

    Crops and the scores of positions are in `plan.wide`, the outputs in `plan.dtype`. Without
    `with_attention`, `prior.attn_map` keeps the size [N, T, h, w] that the prior sees.
    """
    network = copy.deepcopy(model).eval().requires_grad_(False)
    network.rectifier = None
    prior, guidance = network.prior, network.guidance
    # These two have forms of their own.
    put(network, "prior", nn.Identity())
    put(network, "guidance", nn.Identity())
    slope = network.stem_act.weight
    stem = Conv(conv(network.stem), plan, slope=slope)
    put(network, "stem", nn.Sequential(Enter(plan.dtype), stem))
    put(network, "stem_act", nn.Identity())
    swap(network, plan)
    if isinstance(prior, TextPrior):
        swap(prior, plan)
        put(network, "prior", FoldedPrior(prior, plan, with_attention))
    else:
        put(network, "prior", ExactPrior(prior, plan, with_attention))
    kind = FoldedGuidance if is_whole(model.config) else ExactGuidance
    put(network, "guidance", kind(guidance, plan))
    return network


def residual_block(block: ResidualBlock, shortcut: ConvNorm, plan: Plan) -> None:
    """Fold a block whose shortcut is a convolution: the sum's bias stands for both."""
    first, second = (conv(module.conv, module.norm) for module in (shortcut, block.expand))
    both = Affine(second.weight, second.bias + first.bias)
    put(block, "reduce", conv_norm(block.reduce, plan))
    put(block, "expand", Conv(both, plan, stride(block.expand), block.expand.activation))
    put(block, "shortcut", Conv(first, plan, stride(shortcut), biased=False))


def put(module: nn.Module, name: str, part: nn.Module) -> None:
    """Replace a part by one of another type with the same face."""
    setattr(module, name, part)


def swap(module: nn.Module, plan: Plan) -> nn.Module:
    """Return the folded form of a module, or the module with its children's forms in it."""
    match module:
        case ConvNorm():
            return conv_norm(module, plan)
        case nn.Conv2d():
            return Conv(conv(module), plan, (module.stride[0], module.stride[1]))
        case nn.Linear():
            return Product(linear(module), plan)
        case TransformerLayer():
            return SelfAttention(module, plan)
        case Language():
            return FoldedLanguage(module, plan)
        case BiGRU():
            return FoldedBiGRU(module, plan)
        case AdaFM():
            return fusion(module, plan)
        case Upsampler():
            return FoldedUpsampler(module, plan)
        case ResidualBlock() if plan.fused and module.shortcut is not None:
            residual_block(module, module.shortcut, plan)
            return module
        case RecurrentBlock() if plan.fused and isinstance(module.fusion, AdaFM):
            return FusedBlock(module, plan)
        case RecurrentBlock():
            # The norm lies before the GRU's input products.
            put(module, "horizontal", FoldedBiGRU(module.horizontal, plan, module.norm))
            put(module, "norm", nn.Identity())
        case Vision():
            module.positions = plan.keep(module.positions)
        case PositionAttention():
            swap(module.down, plan)
            swap(module.up, plan)
            return FoldedPositionAttention(module, plan)
    for name, child in module.named_children():
        put(module, name, swap(child, plan))
    return module


def is_whole(config: LemmaConfig) -> bool:
    """Whether every part of the guidance is there; how many positions are selected is free."""
    switches = (
        config.location_enhancement,
        config.multimodal_alignment,
        config.character_attention,
        config.expansion,
        config.pixel_to_region,
        config.alignment == "bidirectional",
    )
    return all(switches)
