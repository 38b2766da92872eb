"""What networks that read are taught beside the result: TATT and C3-STISR."""

from __future__ import annotations

import torch
from torch import Tensor

from lemma_fast.baselines.reading import ReadingFrame
from lemma_fast.recognizers import CRNN
from lemma_fast.training.data.labels import CTCLabels
from lemma_fast.training.losses.baselines import (
    draw_rotation,
    rotate,
    teaching_loss,
    triple_similarity,
)
from lemma_fast.training.losses.lemma import ReadLoss, crnn_ctc_loss
from lemma_fast.training.settings.schema import LossSettings

# The released training of C3-STISR's language model cuts labels there.
_SPELLED = 15


class Teaching(ReadLoss[CRNN]):
    """A pass of a network that reads, and the terms `teaching`, `spelling` and `rotation`.

    Those whose weight in the settings is 0 are left out. The frozen recogniser is the teacher.
    """

    def __init__(self, settings: LossSettings, teacher: CRNN | None) -> None:
        super().__init__(teacher)
        self.settings = settings

    def forward(
        self, network: ReadingFrame, lr: Tensor, hr: Tensor, labels: CTCLabels | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`sr`, the true crop that it is compared with, and the terms.

        In training both crops [N, C, 16, 64] and [N, C, 32, 128] are turned where `rotation` is on.
        """
        settings, terms = self.settings, {}
        turned = settings.rotation != 0 and network.training
        angles = offsets = torch.empty(0)
        if turned:
            angles, offsets = (x.to(lr) for x in draw_rotation(len(lr), settings.rotation_degrees))
            lr, hr = rotate(lr, angles, offsets), rotate(hr, angles, offsets)
        look = network.look(lr)
        sr = network.restore(lr, look.prior)
        if turned:
            straight = network.restore(rotate(lr, -angles, offsets), look.prior)
            again = rotate(straight.to(sr), angles, offsets)
            terms["rotation"] = 1 - triple_similarity(again, sr, hr)
        if self.recognizer is not None:
            taught = self.teach(hr)
            if settings.teaching:
                terms["teaching"] = teaching_loss(look.read, taught)
            if settings.spelling and settings.spelling_by == "teacher":
                assert look.spelled is not None
                terms["spelling"] = teaching_loss(look.spelled.float().softmax(2), taught)
        if settings.spelling and settings.spelling_by == "ctc":
            assert look.spelled is not None
            assert labels is not None
            labels = cut_labels(labels, _SPELLED)
            terms["spelling"] = crnn_ctc_loss(look.spelled.transpose(0, 1), labels)
        return sr, hr, terms

    @torch.no_grad()
    def teach(self, hr: Tensor) -> Tensor:
        """Probabilities [N, 26, 37] of what the teacher reads in the true crops."""
        teacher = self.recognizer
        assert teacher is not None
        steps: Tensor = teacher(teacher.prepare(hr[:, :3]))
        return steps.float().softmax(2).transpose(0, 1)


def cut_labels(labels: CTCLabels, longest: int) -> CTCLabels:
    """The first `longest` characters of each label."""
    rows = labels.targets.split(labels.lengths.tolist())
    cut = torch.cat([row[:longest] for row in rows])
    return CTCLabels(cut, labels.lengths.clamp(max=longest))
