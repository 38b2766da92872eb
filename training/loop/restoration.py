"""The stages that teach super-resolution: LEMMA, and the baselines that it is compared with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from lemma_fast.acceleration import training_operations
from lemma_fast.baselines import Baseline, build_baseline, super_resolve
from lemma_fast.model import LEMMA
from lemma_fast.model.prior import Prior, TextPrior
from lemma_fast.ops import Operations, reference
from lemma_fast.recognizers import CRNN, TextFocus, load_recognizer
from lemma_fast.training.data.batches import Batch
from lemma_fast.training.data.labels import CTCLabels
from lemma_fast.training.data.pairs import with_mask
from lemma_fast.training.evaluation.metrics import psnr, ssim
from lemma_fast.training.loop import weights
from lemma_fast.training.loop.module import StageModule
from lemma_fast.training.losses.lemma import LemmaLoss, gradient_profile_loss
from lemma_fast.training.losses.prior import prior_labels, read_prior, reading_loss
from lemma_fast.training.settings.schema import Settings
from lemma_fast.training.settings.typed import SettingsError


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


class RestorationStage(StageModule):
    """Crops against the true ones, by the objective of the settings."""

    network: LEMMA | Baseline

    def __init__(self, settings: Settings, total: int, per_epoch: int, fresh: bool = True) -> None:
        super().__init__(settings, total, per_epoch)
        self.network = self._build(settings)
        if fresh:
            weights.start(self.network, settings)
        wanted = settings.loss
        recognizer: TextFocus | None = None
        if wanted.recognizer is not None and wanted.weights.text_focus != 0:
            loaded = load_recognizer("text_focus", settings.path(wanted.recognizer), device="cpu")
            assert isinstance(loaded, TextFocus)
            recognizer = loaded
        self.loss = LemmaLoss(
            recognizer,
            wanted.weights,
            distance=wanted.distance,
            attention_padding=wanted.attention_padding,
            unit_diagonal=wanted.unit_diagonal,
            double_softmax=wanted.double_softmax,
            fine_tune_padding=wanted.fine_tune_padding,
        )
        if settings.select.recognizer is not None:
            reader = load_recognizer(
                "crnn", settings.path(settings.select.recognizer), device="cpu"
            )
            assert isinstance(reader, CRNN)
            self._readers = (reader,)

    @abstractmethod
    def _build(self, settings: Settings) -> LEMMA | Baseline:
        """Return the network as its config has it."""

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, Prior | None, dict[str, Tensor]]:
        sr, prior = super_resolve(self.network, with_mask(batch.lr))
        sr = sr.float()
        # A network of three channels has no mask to compare.
        hr = with_mask(batch.hr)[:, : sr.shape[1]]
        labels: Tensor | CTCLabels = batch.prior_ids
        if isinstance(self.network, LEMMA):
            labels = prior_labels(self.network.prior, batch)
        terms = self.loss(sr, hr, batch.focus, prior, labels)._asdict()
        terms = {"loss": terms.pop("total"), **terms}
        if profile := self.settings.loss.gradient_profile:
            terms["gradient_profile"] = gradient_profile_loss(sr[:, :3], hr[:, :3])
            terms["loss"] = terms["loss"] + profile * terms["gradient_profile"]
        return sr, hr, prior, terms

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        weights = self.settings.loss.weights
        if self.global_step < self.settings.loss.pixel_steps:
            weights = replace(weights, text_focus=0.0)
        self.loss.weights = weights
        return self._forward(batch)[-1]

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        # the whole objective from the first step on, so that the curve is of one thing
        self.loss.weights = self.settings.loss.weights
        sr, hr, prior, terms = self._forward(batch)
        scores = {name: value.expand(len(sr)) for name, value in terms.items()}
        scores["psnr"] = psnr(sr, hr)
        scores["ssim"] = ssim(sr, hr)
        if prior is not None and isinstance(self.network, LEMMA):
            texts = read_prior(prior.img_logits, self.network.config)
            scores["prior_accuracy"] = self._hits(texts, batch)
        for reader in self._readers:
            texts = [reading.text for reading in reader.read(sr[:, :3].clamp(0, 1))]
            scores["accuracy"] = self._hits(texts, batch)
        return scores


class LemmaStage(RestorationStage):
    """The whole network against the objective of the paper."""

    network: LEMMA

    def __init__(self, settings: Settings, total: int, per_epoch: int, fresh: bool = True) -> None:
        super().__init__(settings, total, per_epoch, fresh)
        self.train()

    def _build(self, settings: Settings) -> LEMMA:
        return LEMMA(settings.lemma_config(), op_table(settings.ops))

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, Prior | None, dict[str, Tensor]]:
        sr, hr, prior, terms = super()._forward(batch)
        if reading := self.settings.loss.reading:
            reader = self.network.prior
            assert isinstance(reader, TextPrior)
            terms["reading"] = reading_loss(reader, sr[:, :3], hr[:, :3], batch.prior_ids)
            terms["loss"] = terms["loss"] + reading * terms["reading"]
        return sr, hr, prior, terms

    def train(self, mode: bool = True) -> LemmaStage:
        """As any module, but a prior that is not taught stays as it is, statistics too."""
        super().train(mode)
        if self.settings.optimizer.prior_learning_rate == 0:
            self.network.prior.eval().requires_grad_(False)
        return self

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        prior = list(self.network.prior.parameters())
        known = {id(parameter) for parameter in prior}
        rest = [p for p in self.network.parameters() if id(p) not in known]
        settings = self.settings.optimizer
        return [(rest, settings.learning_rate), (prior, settings.prior_learning_rate)]

    def save(self, path: Path, provenance: Mapping[str, str]) -> None:
        weights.save_lemma(self.network, path, provenance, self.settings.export)


class BaselineStage(RestorationStage):
    """A network of Table 3 in LEMMA's place; the stage's name says which one."""

    network: Baseline

    def _build(self, settings: Settings) -> Baseline:
        return build_baseline(settings.baseline_config(), op_table(settings.ops))

    def save(self, path: Path, provenance: Mapping[str, str]) -> None:
        weights.save_baseline(self.network, path, provenance, self.settings.export)
