"""A stand-in for the network that enlarges its input: what tests of files and images need."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lemma_fast import LemmaConfig, Prior

TEXT = "ab1"


class EchoModel(nn.Module):
    """Returns its input at twice the size (nearest), and a prior that reads "ab1" from anything.

    The second position's attention has one bright pixel, at row 3, column 5; the last position is
    past the length and brighter still. `batches` records the batch sizes that were seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = LemmaConfig.small()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.batches: list[int] = []
        self.eval()

    def forward(self, lr: Tensor) -> tuple[Tensor, Prior]:
        self.batches.append(len(lr))
        sr = lr.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        attention = torch.zeros(len(lr), 26, 16, 64)
        attention[:, 1, 3, 5] = 0.5
        attention[:, 25] = 0.9
        logits = torch.zeros(len(lr), 26, 37)
        spelled = [self.config.charset.index(letter) + 1 for letter in TEXT]
        for position, letter in enumerate([*spelled, 0]):
            logits[:, position, letter] = 1
        # Behind the end mark: no part of the text.
        logits[:, 4:, 7] = 1
        lengths = torch.full((len(lr),), 4)
        # What the language part guesses is not what is read.
        return sr, Prior(attention, logits, -logits, lengths)
