"""The stages by their names: what each trains, by which objective, and how it is judged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.acceleration import training_operations
from lemma_fast.baselines import Baseline, build_baseline
from lemma_fast.baselines.reading import ReadingFrame
from lemma_fast.model import LEMMA, text_prior
from lemma_fast.model.crnn_prior import CRNNPrior
from lemma_fast.model.prior import Prior, TextPrior
from lemma_fast.ops import Operations, reference
from lemma_fast.recognizers import CRNN, TextFocus
from lemma_fast.recognizers.text_focus import STROKES
from lemma_fast.training.data.batches import Batch, Encoding, mix
from lemma_fast.training.data.labels import CTCLabels, encode_prior_labels
from lemma_fast.training.data.pairs import with_mask
from lemma_fast.training.evaluation.metrics import psnr, ssim, word_hits
from lemma_fast.training.loop import weights
from lemma_fast.training.loop.readers import open_focus, open_reader
from lemma_fast.training.losses.baselines import StrokeFocusLoss, edge_loss
from lemma_fast.training.losses.lemma import (
    IGNORED,
    LemmaLoss,
    crnn_ctc_loss,
    gradient_profile_loss,
    position_cross_entropy,
    text_focus_cross_entropy,
    without_padding,
)
from lemma_fast.training.losses.prior import (
    prior_encoding,
    prior_labels,
    prior_loss,
    read_prior,
    reading_loss,
    simulated_reading,
)
from lemma_fast.training.losses.reader import ReaderLoss
from lemma_fast.training.losses.teaching import Teaching
from lemma_fast.training.networks import super_resolve
from lemma_fast.training.settings.schema import BASELINES, Settings
from lemma_fast.training.settings.values import SettingsError
from lemma_fast.training.synthesis.camera import photograph
from lemma_fast.training.synthesis.words import Vocabulary


class Stage(nn.Module):
    """One stage; `network` is what is exported.

    All that it draws in a step comes from the step's seed, so that a resumed run draws what an
    uninterrupted one does, whatever came between. With `fresh`, the network starts from what the
    settings name; else a checkpoint follows.
    """

    #: The encodings of labels that the objective asks for.
    encodings: frozenset[Encoding] = frozenset()

    def __init__(self, settings: Settings, network: nn.Module, fresh: bool) -> None:
        super().__init__()
        self.settings = settings
        self.network = network
        if fresh:
            weights.start(network, settings)

    @abstractmethod
    def terms(self, batch: Batch, step: int, seed: int) -> dict[str, Tensor]:
        """The objective under `loss` and what it is made of, scalars."""

    @abstractmethod
    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """What the network is judged by, a number a crop (N,)."""

    def forward(self, batch: Batch, step: int, seed: int) -> dict[str, Tensor]:
        """As `terms`, of which `loss` alone has a gradient."""
        terms = self.terms(batch, step, seed)
        return {name: x if name == "loss" else x.detach() for name, x in terms.items()}

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Parameters and their learning rate."""
        return [(list(self.network.parameters()), self.settings.optimizer.learning_rate)]

    def clipped(self) -> list[nn.Parameter]:
        """The parameters whose gradients are clipped, by their norm together."""
        return [parameter for group, _ in self.parameter_groups() for parameter in group]

    def _hits(self, texts: list[str], batch: Batch) -> Tensor:
        return torch.from_numpy(word_hits(texts, batch.labels))

    def _looked_at(self, batch: Batch, align_corners: bool) -> Tensor:
        """RGB [N, 3, 32, 128] that a recogniser learns from: hr, lr, or every other one of each."""
        hr = batch.hr.float() / 255
        if self.settings.images == "hr":
            return hr
        size = hr.shape[-2:]
        lr = F.interpolate(
            batch.lr.float() / 255, size, mode="bicubic", align_corners=align_corners
        )
        if self.settings.images == "lr":
            return lr
        odd = torch.arange(len(hr), device=hr.device) % 2 == 1
        return torch.where(odd[:, None, None, None], lr, hr)


class RestorationStage(Stage):
    """LEMMA or a baseline: crops against the true ones, by the objective of the settings."""

    network: LEMMA | Baseline

    def __init__(self, settings: Settings, fresh: bool = True) -> None:
        operations = op_table(settings.ops)
        network: LEMMA | Baseline
        if settings.stage == "lemma":
            network = LEMMA(settings.lemma_config(), operations)
        else:
            network = build_baseline(settings.baseline_config(), operations)
        super().__init__(settings, network, fresh)
        wanted = settings.loss
        focus = wanted.recognizer if wanted.weights.text_focus != 0 else None
        encodings: set[Encoding] = set() if focus is None else {"focus"}
        if isinstance(network, LEMMA) and (wanted.weights.fine_tune or wanted.reading):
            encodings.add(prior_encoding(network.prior))
        if wanted.strokes:
            encodings.add("strokes")
        if wanted.spelling and wanted.spelling_by == "ctc":
            encodings.add("ctc")
        self.encodings = frozenset(encodings)
        self.loss = LemmaLoss(
            open_focus(settings, focus),
            wanted.weights,
            distance=wanted.distance,
            attention_padding=wanted.attention_padding,
            unit_diagonal=wanted.unit_diagonal,
            double_softmax=wanted.double_softmax,
            fine_tune_padding=wanted.fine_tune_padding,
        )
        strokes = wanted.stroke_recognizer if wanted.strokes else None
        self.strokes = StrokeFocusLoss(
            open_focus(settings, strokes, STROKES), attention_padding=wanted.attention_padding
        )
        judge = open_reader(CRNN, settings, settings.select.recognizer)
        self.teaching: Teaching | None = None
        if isinstance(network, ReadingFrame):
            # TATT's reader learns from its teacher alone, C3-STISR's from the result too.
            taught = wanted.teaching != 0 or settings.stage == "c3-stisr"
            network.reader.requires_grad_(taught and settings.optimizer.prior_learning_rate != 0)
            self.teaching = Teaching(wanted, open_reader(CRNN, settings, wanted.teacher))
        self.reader = _onnx_reader(settings) if wanted.reader else None
        # Kept out of the registry: neither DDP nor the optimiser has business with it.
        self._judges = () if judge is None else (judge,)
        self.train()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RestorationStage:
        # .to() passes through here
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for judge in self._judges:
            judge._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> RestorationStage:
        """As any module, but a prior that is not taught stays as it is, statistics too."""
        super().train(mode)
        if isinstance(self.network, LEMMA) and self.settings.optimizer.prior_learning_rate == 0:
            self.network.prior.eval().requires_grad_(False)
        return self

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        if (reader := self._prior_network()) is None:
            return super().parameter_groups()
        prior = list(reader.parameters())
        known = {id(parameter) for parameter in prior}
        rest = [p for p in self.network.parameters() if id(p) not in known]
        settings = self.settings.optimizer
        return [(rest, settings.learning_rate), (prior, settings.prior_learning_rate)]

    def _photographed(self, batch: Batch, seeds: Sequence[int]) -> tuple[Batch, Tensor | None]:
        """The batch as cameras of these seeds see it, and the words' shapes; else as it is."""
        if self.settings.data.degrade == "none":
            return batch, None
        lr, hr, aspect = photograph(batch.hr, batch.labels, seeds)
        return batch._replace(lr=lr, hr=hr), aspect

    def clipped(self) -> list[nn.Parameter]:
        """As published: the reader of a network of Table 3 is not clipped, LEMMA's prior is."""
        groups = self.parameter_groups()
        own = groups[:1] if isinstance(self.network, ReadingFrame) else groups
        return [parameter for group, _ in own for parameter in group]

    def _prior_network(self) -> nn.Module | None:
        """The part that reads, and learns at a rate of its own."""
        if isinstance(self.network, LEMMA):
            return self.network.prior
        return self.network.reader if isinstance(self.network, ReadingFrame) else None

    def _restore(
        self, lr: Tensor, hr: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Prior | None, dict[str, Tensor]]:
        """`sr`, what it is compared with, the prior, and what its pass is judged by beside that."""
        if isinstance(self.network, ReadingFrame):
            assert self.teaching is not None
            channels = self.network.config.in_channels
            sr, hr, taught = self.teaching(self.network, lr[:, :channels], hr, batch.ctc)
            return sr.float(), hr[:, :channels], None, taught
        sr, prior = super_resolve(self.network, lr)
        # A network of three channels has no mask to compare.
        return sr.float(), hr[:, : sr.shape[1]], prior, {}

    def _forward(
        self, batch: Batch, aspect: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Prior | None, dict[str, Tensor]]:
        sr, hr, prior, taught = self._restore(with_mask(batch.lr), with_mask(batch.hr), batch)
        labels: Tensor | CTCLabels | None = None
        if isinstance(self.network, LEMMA):
            labels = prior_labels(self.network.prior, batch)
        terms = self.loss(sr, hr, batch.focus, prior, labels)._asdict()
        terms = {"loss": terms.pop("total"), **terms}
        if profile := self.settings.loss.gradient_profile:
            terms["gradient_profile"] = gradient_profile_loss(sr[:, :3], hr[:, :3])
            terms["loss"] = terms["loss"] + profile * terms["gradient_profile"]
        for name, value in taught.items():
            terms[name] = value
            terms["loss"] = terms["loss"] + getattr(self.settings.loss, name) * value
        if edges := self.settings.loss.edges:
            terms["edges"] = edge_loss(sr[:, :3], hr[:, :3])
            terms["loss"] = terms["loss"] + edges * terms["edges"]
        if strokes := self.settings.loss.strokes:
            terms["strokes"] = self.strokes(sr[:, :3], hr[:, :3], batch.strokes)
            terms["loss"] = terms["loss"] + strokes * terms["strokes"]
        if isinstance(self.network, LEMMA) and (reading := self.settings.loss.reading):
            reader = self.network.prior
            assert isinstance(reader, TextPrior) and batch.prior_ids is not None
            terms["reading"] = reading_loss(reader, sr[:, :3], hr[:, :3], batch.prior_ids)
            terms["loss"] = terms["loss"] + reading * terms["reading"]
        if self.reader is not None:
            terms["reader"] = self.reader(sr[:, :3], hr[:, :3], aspect)
            terms["loss"] = terms["loss"] + self.settings.loss.reader * terms["reader"]
        return sr, hr, prior, terms

    def terms(self, batch: Batch, step: int, seed: int) -> dict[str, Tensor]:
        weights = self.settings.loss.weights
        if step < self.settings.loss.pixel_steps:
            weights = replace(weights, text_focus=0.0)
        self.loss.weights = weights
        seeds = [mix(seed, crop) for crop in range(len(batch.hr))]
        return self._forward(*self._photographed(batch, seeds))[-1]

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        # the whole objective from the first step on, so that the curve is of one thing
        self.loss.weights = self.settings.loss.weights
        # A crop is photographed alike in whatever batch, so that ranks and runs compare.
        seeds = [crc32(crop.numpy().tobytes()) for crop in batch.hr.cpu()]
        batch, aspect = self._photographed(batch, seeds)
        sr, hr, prior, terms = self._forward(batch, aspect)
        scores = {name: value.expand(len(sr)) for name, value in terms.items()}
        scores["psnr"] = psnr(sr, hr)
        scores["ssim"] = ssim(sr, hr)
        if prior is not None and isinstance(self.network, LEMMA):
            texts = read_prior(prior.img_logits, self.network.config)
            scores["prior_accuracy"] = self._hits(texts, batch)
        for judge in self._judges:
            texts = [reading.text for reading in judge.read(sr[:, :3].clamp(0, 1))]
            scores["accuracy"] = self._hits(texts, batch)
        return scores


class PriorStage(Stage):
    """The prior alone: ABINet's vision and language parts, or a CRNN, learn to read."""

    network: TextPrior | CRNNPrior

    def __init__(self, settings: Settings, fresh: bool = True) -> None:
        prior = text_prior(settings.lemma_config())
        super().__init__(settings, prior, fresh)
        self.encodings = frozenset({prior_encoding(prior)})

    def _forward(self, batch: Batch) -> tuple[Prior, Tensor]:
        prior, _ = self.network(self._looked_at(batch, align_corners=True))
        return prior, prior_loss(self.network, prior, batch)

    def terms(self, batch: Batch, step: int, seed: int) -> dict[str, Tensor]:
        return {"loss": self._forward(batch)[1]}

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        prior, loss = self._forward(batch)
        config = self.network.config
        return {
            "loss": loss.expand(len(batch.labels)),
            "accuracy": self._hits(read_prior(prior.img_logits, config), batch),
            "language_accuracy": self._hits(read_prior(prior.text_logits, config), batch),
        }


class LanguageStage(PriorStage):
    """The language part of ABINet's prior alone: it learns to spell, from words without images.

    The words are the labels of the batch, or drawn from the dictionary `data.words`; what it reads
    is simulated. The rest of the prior stays as it is.
    """

    network: TextPrior

    def __init__(self, settings: Settings, fresh: bool = True) -> None:
        super().__init__(settings, fresh)
        # It has no gradient, and several devices want to know that beforehand.
        self.network.vision.requires_grad_(False)
        words = settings.data.words
        self.vocabulary = None if words is None else Vocabulary(words, "train")

    def _spell(self, read: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits for words read as `read`, and their loss against `ids`."""
        logits = self.network.language(read, self.network.valid_lengths(read)).float()
        return logits, position_cross_entropy(logits, without_padding(ids))

    def terms(self, batch: Batch, step: int, seed: int) -> dict[str, Tensor]:
        ids = batch.prior_ids
        assert ids is not None
        if self.vocabulary is not None:
            rng = np.random.default_rng(seed)
            words = [self.vocabulary.draw(rng, "") for _ in range(len(ids))]
            ids = encode_prior_labels(words, ids.shape[1], filtered=True).to(ids.device)
        read = simulated_reading(ids, torch.Generator().manual_seed(seed))
        return {"loss": self._spell(read, ids)[1]}

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        ids = batch.prior_ids
        assert ids is not None
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


class ReaderStage(Stage):
    """A recogniser that learns to read: the losses' by teacher forcing, the evaluator by CTC."""

    network: TextFocus | CRNN

    def __init__(self, settings: Settings, fresh: bool = True) -> None:
        network: TextFocus | CRNN
        encoding: Encoding
        if settings.stage == "crnn":
            network, encoding = CRNN(settings.crnn_config()), "ctc"
        else:
            network = TextFocus(settings.text_focus_config())
            encoding = "strokes" if settings.stage == "stroke_focus" else "focus"
        super().__init__(settings, network, fresh)
        self.encodings = frozenset({encoding})

    def _loss(self, images: Tensor, batch: Batch) -> Tensor:
        shown = self.network.prepare(images)
        if isinstance(self.network, CRNN):
            assert batch.ctc is not None
            return crnn_ctc_loss(self.network(shown), batch.ctc)
        labels = batch.strokes if "strokes" in self.encodings else batch.focus
        assert labels is not None
        logits = self.network(shown, labels.inputs).logits
        return text_focus_cross_entropy(logits.float(), labels)

    def terms(self, batch: Batch, step: int, seed: int) -> dict[str, Tensor]:
        return {"loss": self._loss(self._looked_at(batch, align_corners=False), batch)}

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        images = self._looked_at(batch, align_corners=False)
        loss = self._loss(images, batch).expand(len(images))
        if "strokes" in self.encodings:
            return {"loss": loss}
        texts = [reading.text for reading in self.network.read(images)]
        return {"loss": loss, "accuracy": self._hits(texts, batch)}


STAGES: Mapping[str, type[RestorationStage | PriorStage | ReaderStage]] = {
    "lemma": RestorationStage,
    **dict.fromkeys(BASELINES, RestorationStage),
    "prior": PriorStage,
    "language": LanguageStage,
    "text_focus": ReaderStage,
    "stroke_focus": ReaderStage,
    "crnn": ReaderStage,
}


def op_table(name: str) -> Operations:
    """The operations by their config word; raises SettingsError where they cannot run."""
    if name == "reference":
        return reference
    try:
        return training_operations("cpu" if name == "native" else "cuda")
    except ImportError as error:
        raise SettingsError(
            f"ops: {name} cannot be used here ({error}); write ops: reference, or install what is "
            "missing"
        ) from error


def _onnx_reader(settings: Settings) -> ReaderLoss:
    """The reader of the loss; raises SettingsError where its file cannot be used."""
    assert settings.loss.reader_onnx is not None
    try:
        return ReaderLoss(settings.path(settings.loss.reader_onnx))
    except (ImportError, OSError, ValueError) as error:
        raise SettingsError(f"loss.reader_onnx: {error}") from error
