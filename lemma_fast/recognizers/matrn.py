"""MATRN: LEMMA's prior, whose two parts look at each other, three times over.

In each round the language part reconsiders the reading so far, and an encoder over image and
character tokens together lets either change the other before a gate mixes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lemma_fast.checkpoint.published import PARTS
from lemma_fast.config import LemmaConfig
from lemma_fast.model.layers import TransformerLayer, sinusoid
from lemma_fast.model.prior import PositionAttention, Seen
from lemma_fast.recognizers import prior_reader
from lemma_fast.recognizers.prior_reader import PriorReader, prior_names

ROUNDS = 3
_ENCODER_LAYERS = 2


class Round(NamedTuple):
    """One round: its reading `logits` [N, T, 37] and what went into it.

    `visual` and `semantic` [N, T, C] are the vectors that the gate mixed.
    """

    logits: Tensor
    language_logits: Tensor
    visual: Tensor
    semantic: Tensor


class _SemanticVisual(nn.Module):
    """Joint encoder over image and character tokens, then a gate a channel."""

    positions: Tensor

    def __init__(self, config: LemmaConfig) -> None:
        super().__init__()
        prior = config.prior
        tokens = 4 * config.height * config.width // prior.reduction**2
        self.register_buffer("positions", sinusoid(tokens, prior.width))
        self.encoder = nn.ModuleList(
            TransformerLayer(prior.width, prior.heads, prior.feedforward, prior.dropout)
            for _ in range(_ENCODER_LAYERS)
        )
        self.attention = PositionAttention(config)
        self.gate = nn.Linear(2 * prior.width, prior.width)
        self.classifier = nn.Linear(prior.width, config.num_classes)
        # The published training alone uses these three: two heads for the unmixed vectors, and a
        # token put in the place of hidden image tokens. They are kept for the checkpoint's sake.
        self.visual_classifier = nn.Linear(prior.width, config.num_classes)
        self.semantic_classifier = nn.Linear(prior.width, config.num_classes)
        self.visual_token = nn.Parameter(torch.zeros(1, prior.width))

    def forward(self, seen: Seen, expected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mix what is `seen` with language vectors [N, T, C]: logits, visual, semantic vectors."""
        size = seen.features.shape[2:]
        # Where a character was seen tells the encoder which image tokens it belongs to.
        places = seen.attention.flatten(2).to(expected.dtype) @ self.positions.to(expected.dtype)
        image = seen.features.flatten(2).transpose(1, 2)
        tokens = torch.cat([image, expected + places], dim=1)
        for layer in self.encoder:
            tokens = layer(tokens)
        image, semantic = tokens.split([image.shape[1], expected.shape[1]], dim=1)
        visual, _ = self.attention(image.transpose(1, 2).unflatten(2, size))
        gate = self.gate(torch.cat([visual, semantic], dim=2)).sigmoid()
        return self.classifier(gate * visual + (1 - gate) * semantic), visual, semantic


class MATRN(PriorReader):
    """The recogniser."""

    name = "matrn"

    def __init__(self, config: LemmaConfig | None = None) -> None:
        super().__init__(config)
        self.fusion = _SemanticVisual(self.config)

    def forward(self, prepared: Tensor) -> tuple[Seen, list[Round]]:
        """Read the input of `prepare` (N, 3, 32, 128): the first look, then the three rounds."""
        language = self.prior.language
        seen = self.prior.vision.look(prepared)
        logits = seen.logits
        rounds = []
        for _ in range(ROUNDS):
            expected = language.reconsider(logits.softmax(2), self.prior.valid_lengths(logits))
            logits, visual, semantic = self.fusion(seen, expected)
            rounds.append(Round(logits, language.classifier(expected), visual, semantic))
        return seen, rounds

    def read_logits(self, prepared: Tensor) -> Tensor:
        _, rounds = self(prepared)
        return rounds[-1].logits

    def fusion_names(self) -> dict[str, str]:
        theirs = "semantic_visual"
        names = {
            "fusion.positions": f"{theirs}.pos_encoder_tfm.pe",
            "fusion.visual_token": f"{theirs}.v_token",
            "fusion.gate": f"{theirs}.w_att",
            "fusion.classifier": f"{theirs}.cls",
            "fusion.visual_classifier": f"{theirs}.cls_vis",
            "fusion.semantic_classifier": f"{theirs}.cls_sem",
        }
        for layer in range(_ENCODER_LAYERS):
            for part, published in PARTS["self"].items():
                names[f"fusion.encoder.{layer}.{part}"] = (
                    f"{theirs}.model1.layers.{layer}.{published}"
                )
        attention = "prior.vision.attention."
        for ours, published in prior_names(self.config).items():
            if ours.startswith(attention):
                leaf = published.removeprefix("vision.attention.")
                names[f"fusion.attention.{ours.removeprefix(attention)}"] = (
                    f"{theirs}.model2_vis.{leaf}"
                )
        return names


def load(checkpoint: str | Path) -> MATRN:
    """Open a checkpoint that `save` wrote, or the published one, on the CPU, for reading."""
    return prior_reader.load(MATRN, checkpoint)
