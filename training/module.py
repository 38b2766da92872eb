"""What Lightning trains: the network of each stage, its objective, and what it is judged by."""

from __future__ import annotations

import importlib
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lemma_fast.model import LEMMA
from lemma_fast.ops import reference
from lemma_fast.recognizer import Prior, TextPrior
from lemma_fast.recognizers import CRNN, TextFocus, load_recognizer
from lemma_fast.recognizers.charset import PRIOR
from lemma_fast.training import export
from lemma_fast.training.batches import Batch, mix
from lemma_fast.training.data import with_mask
from lemma_fast.training.losses import (
    LemmaLoss,
    crnn_ctc_loss,
    fine_tune_loss,
    text_focus_cross_entropy,
)
from lemma_fast.training.metrics import psnr, ssim, word_hits
from lemma_fast.training.settings import OptimizerSettings, Settings
from lemma_fast.training.typed import SettingsError

#: Metrics where less is better.
FALLING = frozenset({"loss"})
_EMA_RAMP = 10


def op_table(name: str) -> ModuleType:
    """The operations by their config word; raises SettingsError where they cannot run."""
    if name == "reference":
        return reference
    try:
        return importlib.import_module("lemma_fast.ops.fused")
    except ImportError as error:
        raise SettingsError(
            f"ops: fused cannot be used here ({error}); write ops: reference, or install what is "
            "missing"
        ) from error


def rate_factor(settings: OptimizerSettings, step: int, per_epoch: int, total: int) -> float:
    """What the learning rate is multiplied by at a step, from 0."""
    warm = min(1.0, (step + 1) / settings.warm_up) if settings.warm_up else 1.0
    if settings.schedule == "steps":
        return warm * settings.factor ** (step / per_epoch // settings.step_epochs)
    if settings.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    return warm


def read_prior(logits: Tensor) -> list[str]:
    """Texts of the prior's logits (N, T, 37)."""
    return [PRIOR.decode(row) for row in logits.argmax(-1).tolist()]


class StageModule(L.LightningModule):
    """One stage; `network` is what is exported.

    Random numbers of a step are drawn by (seed, step, rank), so that a resumed run draws those of
    an uninterrupted one, whatever came between.
    """

    network: nn.Module

    def __init__(self, settings: Settings, total: int, per_epoch: int) -> None:
        super().__init__()
        self.settings = settings
        self.total = total
        self.per_epoch = per_epoch
        self.stop_requested = False
        # Kept out of the registry: neither DDP nor the optimiser has business with them.
        self.average: dict[str, Tensor] | None = None
        self.sums: dict[str, Tensor] = {}
        self.summed = 0
        self._readers: tuple[CRNN, ...] = ()

    @abstractmethod
    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The objective under `loss` and what it is made of, scalars."""

    @abstractmethod
    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """What the network is judged by, a number a crop (N,)."""

    @abstractmethod
    def save(self, path: Path, provenance: Mapping[str, str]) -> None:
        """Write the network's weights as safetensors."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        terms = self.terms(batch)
        for name, value in terms.items():
            before = self.sums.get(name)
            self.sums[name] = value.detach() if before is None else before + value.detach()
        self.summed += 1
        return self.settings.loss.scale * terms["loss"]

    def on_train_start(self) -> None:
        if self.settings.run.ema is not None:
            state = self.average if self.average is not None else self.network.state_dict()
            self.average = {
                name: tensor.detach().to(self.device, copy=True) for name, tensor in state.items()
            }
        self.sums = {name: value.to(self.device) for name, value in self.sums.items()}
        self._readers = tuple(reader.to(self.device) for reader in self._readers)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        if self.stop_requested:
            # Leaving here, and not by should_stop alone, adds no step and no validation.
            self.trainer.should_stop = True
            return -1
        torch.manual_seed(mix(self.settings.seed, self.global_step, self.global_rank))
        return None

    def window(self) -> dict[str, float]:
        """Means of the terms since the last call."""
        means = {name: value.item() / self.summed for name, value in self.sums.items()}
        self.sums, self.summed = {}, 0
        return means

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Follow the weights after a step, at first fast."""
        if self.average is None or self.settings.run.ema is None:
            return
        decay = min(self.settings.run.ema, (1 + step) / (_EMA_RAMP + step))
        state = self.network.state_dict()
        floating = [name for name, tensor in state.items() if tensor.is_floating_point()]
        # One launch for all, where a loop would take longer than the step.
        torch._foreach_lerp_(
            [self.average[name] for name in floating],
            [state[name] for name in floating],
            1 - decay,
        )
        for name in state.keys() - set(floating):
            self.average[name].copy_(state[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the network's, where there is an average."""
        if self.average is None:
            yield
            return
        own = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        try:
            yield
        finally:
            self.network.load_state_dict(own)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        settings = self.settings.optimizer
        groups: list[dict[str, Any]] = [
            {"params": parameters, "lr": rate} for parameters, rate in self.parameter_groups()
        ]
        optimizer = torch.optim.Adam(
            groups, betas=settings.betas, weight_decay=settings.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_factor(settings, step, self.per_epoch, self.total)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Parameters and their learning rate."""
        return [(list(self.network.parameters()), self.settings.optimizer.learning_rate)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = self.average
        checkpoint["window"] = {"sums": self.sums, "summed": self.summed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.average = checkpoint["average"]
        self.sums, self.summed = checkpoint["window"]["sums"], checkpoint["window"]["summed"]

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


class LemmaStage(StageModule):
    """Super-resolution: the whole network against the objective of the paper."""

    network: LEMMA

    def __init__(self, settings: Settings, total: int, per_epoch: int, fresh: bool = True) -> None:
        super().__init__(settings, total, per_epoch)
        config = settings.lemma_config()
        self.network = LEMMA(config, op_table(settings.ops))
        if fresh:
            export.start(self.network, settings)
        wanted = settings.loss
        recognizer: TextFocus | None = None
        if wanted.recognizer is not None and wanted.weights.text_focus != 0:
            loaded = load_recognizer("text_focus", settings.path(wanted.recognizer), device="cpu")
            assert isinstance(loaded, TextFocus)
            recognizer = loaded
        self.loss = LemmaLoss(
            recognizer,
            wanted.weights,
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

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        prior = list(self.network.prior.parameters())
        known = {id(parameter) for parameter in prior}
        rest = [p for p in self.network.parameters() if id(p) not in known]
        settings = self.settings.optimizer
        return [(rest, settings.learning_rate), (prior, settings.prior_learning_rate)]

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor, Prior, dict[str, Tensor]]:
        hr = with_mask(batch.hr)
        sr, prior = self.network(with_mask(batch.lr))
        sr = sr.float()
        terms = self.loss(sr, hr, batch.focus, prior, batch.prior_ids)._asdict()
        return sr, hr, prior, {"loss": terms.pop("total"), **terms}

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
        scores["prior_accuracy"] = self._hits(read_prior(prior.text_logits), batch)
        for reader in self._readers:
            texts = [reading.text for reading in reader.read(sr[:, :3].clamp(0, 1))]
            scores["accuracy"] = self._hits(texts, batch)
        return scores

    def save(self, path: Path, provenance: Mapping[str, str]) -> None:
        export.save_lemma(self.network, path, provenance, self.settings.export)


class PriorStage(StageModule):
    """The prior alone: ABINet's vision and language parts learn to read."""

    network: TextPrior

    def __init__(self, settings: Settings, total: int, per_epoch: int, fresh: bool = True) -> None:
        super().__init__(settings, total, per_epoch)
        self.network = TextPrior(settings.lemma_config())
        if fresh:
            export.start(self.network, settings)

    def _forward(self, batch: Batch) -> tuple[Prior, Tensor]:
        prior, _ = self.network(self._looked_at(batch, align_corners=True))
        loss = fine_tune_loss(
            prior.img_logits.float(),
            prior.text_logits.float(),
            batch.prior_ids,
            double_softmax=False,
            include_padding=False,
        )
        return prior, loss

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self._forward(batch)[1]}

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        prior, loss = self._forward(batch)
        return {
            "loss": loss.expand(len(batch.labels)),
            "accuracy": self._hits(read_prior(prior.text_logits), batch),
            "vision_accuracy": self._hits(read_prior(prior.img_logits), batch),
        }

    def save(self, path: Path, provenance: Mapping[str, str]) -> None:
        export.save_prior(self.network, path, provenance, self.settings.export)


class ReaderStage(StageModule):
    """A recogniser that is taught to read; the two below say which, and by what loss."""

    network: TextFocus | CRNN

    def __init__(self, settings: Settings, total: int, per_epoch: int, fresh: bool = True) -> None:
        super().__init__(settings, total, per_epoch)
        self.network = self._build(settings)
        if fresh:
            export.start(self.network, settings)

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
        export.save_recognizer(self.network, path, provenance, self.settings.export)


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


STAGES: Mapping[str, type[LemmaStage | PriorStage | TextFocusStage | CRNNStage]] = {
    "lemma": LemmaStage,
    "prior": PriorStage,
    "text_focus": TextFocusStage,
    "crnn": CRNNStage,
}
