"""The whole network, folded: one batch in, every output out."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.acceleration.blocks import FoldedBranch
from lemma_fast.acceleration.folding import conv
from lemma_fast.acceleration.guidance import FoldedGuidance, Resize, Sight
from lemma_fast.acceleration.layers import Conv, Plan
from lemma_fast.acceleration.prior import FoldedPrior, OriginalPrior
from lemma_fast.config import LemmaConfig
from lemma_fast.model import LEMMA
from lemma_fast.model.guidance import Guidance
from lemma_fast.model.prior import Prior, TextPrior

#: `sr`, `attn_map`, `img_logits`, `text_logits`, `pt_lengths`.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Network(nn.Module):
    """`lr` [N, 4, H, W] to `Outputs`; nothing waits for the device.

    Without `with_attention`, `attn_map` is the prior's own [N, T, h, w], before its resize.
    """

    def __init__(self, model: LEMMA, plan: Plan, with_attention: bool = True) -> None:
        super().__init__()
        config = model.config
        self.plan, self.with_attention = plan, with_attention
        self.wide = plan.wide
        prior: nn.Module = model.prior
        self.prior = (
            FoldedPrior(prior, plan) if isinstance(prior, TextPrior) else OriginalPrior(prior, plan)
        )
        grid = config.prior.reduction
        small = (2 * config.height // grid, 2 * config.width // grid)
        self.resize = Resize(small, config.size, plan)
        self.stem = Conv(conv(model.stem), plan)
        self.stem_slope = plan.keep(model.stem_act.weight.detach())
        whole = _is_whole(config)
        kind = FoldedGuidance if whole else OriginalGuidance
        self.guidance = kind(model.guidance, plan)
        self.resizes = with_attention or not whole or not plan.fused
        self.branch = FoldedBranch(model.blocks, model.tail, model.upsampler, plan)

    def forward(self, lr: Tensor) -> Outputs:
        reading = self.prior(lr[:, :3])
        attn_map = self.resize(reading.h_attn) if self.resizes else reading.h_attn
        crop = lr.to(self.plan.dtype).contiguous(memory_format=torch.channels_last)
        shallow = F.prelu(self.stem(crop), self.stem_slope)
        guidance = self.guidance(Sight(shallow, reading, attn_map))
        sr = self.branch(shallow, guidance)
        shown = attn_map if self.with_attention else reading.h_attn
        logits = reading.img_logits.to(self.wide), reading.text_logits.to(self.wide)
        return sr.to(self.wide), shown, *logits, reading.lengths


class OriginalGuidance(nn.Module):
    """The guidance of an ablation, as the reference computes it."""

    def __init__(self, guidance: Guidance, plan: Plan) -> None:
        super().__init__()
        self.module = copy.deepcopy(guidance).to(plan.device, plan.dtype).eval()
        self.module.requires_grad_(False)

    def forward(self, sight: Sight) -> Tensor:
        reading = sight.reading
        prior = Prior(sight.attn_map, reading.img_logits, reading.text_logits, reading.lengths)
        return self.module(sight.shallow.contiguous(), prior, reading.h_attn)


def _is_whole(config: LemmaConfig) -> bool:
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
