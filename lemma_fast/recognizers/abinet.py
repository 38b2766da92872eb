"""ABINet: LEMMA's prior, and one gate that mixes what it sees with what it expects.

A single pass, as the published evaluation runs it, without the iterative correction.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lemma_fast.config import LemmaConfig
from lemma_fast.model.prior import Seen
from lemma_fast.recognizers import prior_reader
from lemma_fast.recognizers.prior_reader import PriorReader


class ABINetOutput(NamedTuple):
    """`logits` [N, T, 37] are the reading; the others are what it was made from."""

    logits: Tensor
    language_logits: Tensor
    seen: Seen


class _Alignment(nn.Module):
    """A gate a channel between the vectors of the two parts."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * width, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, vision: Tensor, language: Tensor) -> Tensor:
        """Two stacks of vectors [N, T, C] to class scores [N, T, classes]."""
        gate = self.gate(torch.cat([language, vision], dim=2)).sigmoid()
        return self.classifier(gate * vision + (1 - gate) * language)


class ABINet(PriorReader):
    """The recogniser; the prior of the published LEMMA starts from its weights."""

    name = "abinet"

    def __init__(self, config: LemmaConfig | None = None) -> None:
        super().__init__(config)
        self.alignment = _Alignment(self.config.prior.width, self.config.num_classes)

    def forward(self, prepared: Tensor) -> ABINetOutput:
        """Read the input of `prepare` (N, 3, 32, 128)."""
        seen = self.prior.vision.look(prepared)
        lengths = self.prior.valid_lengths(seen.logits)
        expected = self.prior.language.reconsider(seen.logits.softmax(2), lengths)
        logits = self.alignment(seen.vectors, expected)
        return ABINetOutput(logits, self.prior.language.classifier(expected), seen)

    def read_logits(self, prepared: Tensor) -> Tensor:
        return self(prepared).logits

    def fusion_names(self) -> dict[str, str]:
        return {"alignment.gate": "alignment.w_att", "alignment.classifier": "alignment.cls"}


def load(checkpoint: str | Path) -> ABINet:
    """Open a checkpoint that `save` wrote, or the published one, on the CPU, for reading."""
    return prior_reader.load(ABINet, checkpoint)
