"""What Lightning trains: the part that all stages have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lemma_fast.recognizers import CRNN
from lemma_fast.training.data.batches import Batch, mix
from lemma_fast.training.evaluation.metrics import word_hits
from lemma_fast.training.settings.schema import OptimizerSettings, Settings

#: Metrics where less is better.
FALLING = frozenset({"loss"})
_EMA_RAMP = 10


def rate_factor(settings: OptimizerSettings, step: int, per_epoch: int, total: int) -> float:
    """What the learning rate is multiplied by at a step, from 0."""
    warm = min(1.0, (step + 1) / settings.warm_up) if settings.warm_up else 1.0
    if settings.schedule == "steps":
        return warm * settings.factor ** (step / per_epoch // settings.step_epochs)
    if settings.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    return warm


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
