"""The stages by their names, and those of them that teach a recogniser to read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lemma_fast.model import text_prior
from lemma_fast.model.crnn_prior import CRNNPrior
from lemma_fast.model.prior import Prior, TextPrior
from lemma_fast.recognizers import CRNN, TextFocus
from lemma_fast.training.data.batches import Batch, mix
from lemma_fast.training.data.labels import encode_prior_labels
from lemma_fast.training.loop import weights
from lemma_fast.training.loop.module import StageModule
from lemma_fast.training.loop.restoration import BaselineStage, LemmaStage
from lemma_fast.training.losses.lemma import (
    IGNORED,
    crnn_ctc_loss,
    position_cross_entropy,
    text_focus_cross_entropy,
    without_padding,
)
from lemma_fast.training.losses.prior import prior_loss, read_prior, simulated_reading
from lemma_fast.training.settings.schema import BASELINES, Settings
from lemma_fast.training.synthesis.words import Vocabulary


class PriorStage(StageModule):
    """The prior alone: ABINet's vision and language parts, or a CRNN, learn to read."""

    network: TextPrior | CRNNPrior

    def __init__(self, settings: Settings, total: int, per_epoch: int, fresh: bool = True) -> None:
        super().__init__(settings, total, per_epoch)
        self.network = text_prior(settings.lemma_config())
        if fresh:
            weights.start(self.network, settings)

    def _forward(self, batch: Batch) -> tuple[Prior, Tensor]:
        prior, _ = self.network(self._looked_at(batch, align_corners=True))
        return prior, prior_loss(self.network, prior, batch)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self._forward(batch)[1]}

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        prior, loss = self._forward(batch)
        config = self.network.config
        return {
            "loss": loss.expand(len(batch.labels)),
            "accuracy": self._hits(read_prior(prior.img_logits, config), batch),
            "language_accuracy": self._hits(read_prior(prior.text_logits, config), batch),
        }

    def save(self, path: Path, provenance: Mapping[str, str]) -> None:
        weights.save_prior(self.network, path, provenance, self.settings.export)


class LanguageStage(PriorStage):
    """The language part of ABINet's prior alone: it learns to spell, from words without images.

    The words are the labels of the batch, or drawn from the dictionary `data.words`; what it reads
    is simulated. The rest of the prior stays as it is.
    """

    network: TextPrior

    def __init__(self, settings: Settings, total: int, per_epoch: int, fresh: bool = True) -> None:
        super().__init__(settings, total, per_epoch, fresh)
        # It has no gradient, and several devices want to know that beforehand.
        self.network.vision.requires_grad_(False)
        words = settings.data.words
        self.vocabulary = None if words is None else Vocabulary(words, "train")

    def _spell(self, read: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits for words read as `read`, and their loss against `ids`."""
        logits = self.network.language(read, self.network.valid_lengths(read)).float()
        return logits, position_cross_entropy(logits, without_padding(ids))

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        ids = batch.prior_ids
        seed = mix(self.settings.seed, self.global_step, self.global_rank)
        if self.vocabulary is not None:
            rng = np.random.default_rng(seed)
            words = [self.vocabulary.draw(rng, "") for _ in range(len(ids))]
            ids = encode_prior_labels(words, ids.shape[1], filtered=True).to(ids.device)
        read = simulated_reading(ids, torch.Generator().manual_seed(seed))
        return {"loss": self._spell(read, ids)[1]}

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        ids = batch.prior_ids
        # A word is read alike in whatever batch, so that ranks and runs compare.
        seeds = [mix(*word) for word in ids.tolist()]
        read = [
            simulated_reading(word[None], torch.Generator().manual_seed(seed))
            for word, seed in zip(ids, seeds, strict=True)
        ]
        logits, loss = self._spell(torch.cat(read), ids)
        counted = without_padding(ids) != IGNORED
        right = ((logits.argmax(-1) == ids) & counted).sum(1) / counted.sum(1)
        return {"loss": loss.expand(len(ids)), "character_accuracy": right}


class ReaderStage(StageModule):
    """A recogniser that is taught to read; the two below say which, and by what loss."""

    network: TextFocus | CRNN

    def __init__(self, settings: Settings, total: int, per_epoch: int, fresh: bool = True) -> None:
        super().__init__(settings, total, per_epoch)
        self.network = self._build(settings)
        if fresh:
            weights.start(self.network, settings)

    @abstractmethod
    def _build(self, settings: Settings) -> TextFocus | CRNN:
        """Return the network as its config has it."""

    @abstractmethod
    def _loss(self, images: Tensor, batch: Batch) -> Tensor:
        """Return the loss of reading `images`."""

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self._loss(self._looked_at(batch, align_corners=False), batch)}

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        images = self._looked_at(batch, align_corners=False)
        texts = [reading.text for reading in self.network.read(images)]
        loss = self._loss(images, batch).expand(len(images))
        return {"loss": loss, "accuracy": self._hits(texts, batch)}

    def save(self, path: Path, provenance: Mapping[str, str]) -> None:
        weights.save_recognizer(self.network, path, provenance, self.settings.export)


class TextFocusStage(ReaderStage):
    """The loss recogniser, taught by teacher forcing."""

    network: TextFocus

    def _build(self, settings: Settings) -> TextFocus:
        return TextFocus(settings.text_focus_config())

    def _loss(self, images: Tensor, batch: Batch) -> Tensor:
        logits = self.network(self.network.prepare(images), batch.focus.inputs).logits
        return text_focus_cross_entropy(logits.float(), batch.focus)


class CRNNStage(ReaderStage):
    """The evaluator, by CTC."""

    network: CRNN

    def _build(self, settings: Settings) -> CRNN:
        return CRNN(settings.crnn_config())

    def _loss(self, images: Tensor, batch: Batch) -> Tensor:
        return crnn_ctc_loss(self.network(self.network.prepare(images)), batch.ctc)


STAGES: Mapping[str, type[LemmaStage | BaselineStage | PriorStage | TextFocusStage | CRNNStage]] = {
    "lemma": LemmaStage,
    "language": LanguageStage,
    "prior": PriorStage,
    "text_focus": TextFocusStage,
    "crnn": CRNNStage,
    **dict.fromkeys(BASELINES, BaselineStage),
}
