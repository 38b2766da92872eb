"""What happens between the steps: validation, the best weights, checkpoints, curves, the budget."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from lemma_fast.training.data.batches import Batch, EncodedCrops, InOrder, loader
from lemma_fast.training.loop.module import FALLING, StageModule
from lemma_fast.training.loop.provenance import device_name
from lemma_fast.training.settings.schema import WEIGHTS

LAST = "last.ckpt"
_JUDGED_AT_ONCE = 256


class Keeper(Callback):
    """Acts after a step, always in one order: average, validate, export, save.

    Lightning's own validation is not used, because a checkpoint that it writes in the middle
    either lacks the validation of its step or has it repeated on resumption. `end` is a time of
    `time.monotonic`, `last` a step, at which to stop before all steps are made.
    """

    def __init__(
        self,
        judged: EncodedCrops,
        origin: Mapping[str, str],
        end: float | None = None,
        last: int | None = None,
    ) -> None:
        self.judged = judged
        self.origin = origin
        self.end, self.last = end, last
        self.best: dict[str, float] | None = None
        self.latest: dict[str, float] = {}
        self.device = ""
        self.seconds = 0.0
        self._since = 0.0
        self._begun = 0
        self._crops = 0
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    @property
    def state_key(self) -> str:
        return "Keeper"

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "latest": self.latest,
            "seconds": self._elapsed(),
            "settings": json.loads(self.origin["settings"]),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.latest = state_dict["best"], state_dict["latest"]
        self.seconds = state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        self._since, self._begun = time.monotonic(), trainer.global_step
        self.device = device_name(pl_module.device)
        if trainer.world_size > 1:
            self.device = f"{trainer.world_size} x {self.device}"
        if not trainer.is_global_zero:
            return
        if trainer.global_step:
            self._say(f"{pl_module.settings.stage}: going on from step {trainer.global_step}")
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            stage = pl_module.settings.stage
            self._task = self._progress.add_task(stage, total=pl_module.total, note="")
            self._progress.update(self._task, completed=trainer.global_step)
            self._progress.start()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        module = pl_module
        assert isinstance(module, StageModule)
        run, step = module.settings.run, trainer.global_step
        module.update_average(step)
        self._crops += run.batch_size
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
        if step % run.log_every == 0:
            self._log_terms(trainer, module, step)
        validated = step % run.validate_every == 0 or step == module.total
        if validated:
            self._validate(trainer, module, step)
        stop = self._budget_spent(trainer, step) and step < module.total
        if validated or stop or step % run.save_every == 0:
            trainer.save_checkpoint(module.settings.folder / LAST)
        if stop:
            module.stop_requested = True
        if step == module.total and trainer.is_global_zero:
            with module.averaged():
                path = module.settings.folder / "last.safetensors"
                module.save(path, self._provenance(step, self.latest))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        made, seconds = trainer.global_step - self._begun, time.monotonic() - self._since
        self._close()
        if trainer.is_global_zero and made:
            self._say(f"{made} steps in {seconds:.0f} s, {made / seconds:.2f} a second")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def result(self, steps: int) -> dict[str, Any]:
        """The record of a finished stage."""
        origin: dict[str, Any] = dict(self.origin)
        for name in ("settings", "data", "versions"):
            origin[name] = json.loads(origin[name])
        return {
            **origin,
            "steps": steps,
            "best": self.best,
            "last": self.latest,
            "seconds": round(self.seconds, 1),
            "device": self.device,
        }

    def _log_terms(self, trainer: L.Trainer, module: StageModule, step: int) -> None:
        terms = module.window()
        if not math.isfinite(terms["loss"]):
            raise FloatingPointError(
                f"the loss is {terms['loss']} at step {step}; {module.settings.folder / LAST} is "
                "from before: lower optimizer.learning_rate, or use run.precision=float32"
            )
        curves = {f"train/{name}": value for name, value in terms.items()}
        curves["epoch"] = step / module.per_epoch
        for number, group in enumerate(trainer.optimizers[0].param_groups):
            curves[f"learning_rate/{number}"] = float(group["lr"])
        self._log(trainer, curves, step)
        speed = self._crops / max(1e-9, time.monotonic() - self._since)
        # Not among the curves: those do not depend on when and where a run was broken off.
        for logger in trainer.loggers[1:]:
            logger.log_metrics({"crops_per_second": speed}, step)
        if self._progress is not None:
            note = f"loss {terms['loss']:.4g}  {speed:.0f} crops/s"
            self._progress.update(self._task, note=note)

    def _validate(self, trainer: L.Trainer, module: StageModule, step: int) -> None:
        settings = module.settings
        with module.averaged():
            self.latest = judge(trainer, module, self.judged)
            metric = settings.select.metric
            value = self.latest[metric]
            sign = -1 if metric in FALLING else 1
            if self.best is None or sign * value > sign * self.best[metric]:
                self.best = {"step": step, **self.latest}
                if trainer.is_global_zero:
                    origin = self._provenance(step, self.latest)
                    module.save(settings.folder / WEIGHTS, origin)
        curves = {f"validation/{name}": number for name, number in self.latest.items()}
        self._log(trainer, curves, step)
        if trainer.is_global_zero:
            shown = "  ".join(f"{name} {number:.4g}" for name, number in self.latest.items())
            self._say(f"{settings.stage} step {step}/{module.total}  {shown}")

    def _provenance(self, step: int, scores: Mapping[str, float]) -> dict[str, str]:
        return {
            **self.origin,
            "steps": str(step),
            "validation": json.dumps(scores),
            "seconds": f"{self._elapsed():.0f}",
            "device": self.device,
        }

    def _elapsed(self) -> float:
        """Seconds of training, those of earlier chunks included."""
        running = time.monotonic() - self._since if self._since else 0.0
        return self.seconds + running

    def _budget_spent(self, trainer: L.Trainer, step: int) -> bool:
        spent = self.last is not None and step >= self.last
        if self.end is not None:
            # One clock for all ranks, or some would wait for steps that others do not make.
            late = trainer.strategy.broadcast(time.monotonic() >= self.end)
            spent = spent or late
        return spent

    def _log(self, trainer: L.Trainer, curves: Mapping[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(dict(curves), step)
            logger.save()

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def _close(self) -> None:
        if self._since:
            self.seconds = self._elapsed()
            self._since = 0.0
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@torch.no_grad()
def judge(trainer: L.Trainer, module: StageModule, judged: EncodedCrops) -> dict[str, float]:
    """Means of the scores over all crops, each rank reading its share."""
    rank, ranks = trainer.global_rank, trainer.world_size
    batches = InOrder(len(judged), _JUDGED_AT_ONCE, rank, ranks)
    totals: dict[str, torch.Tensor] = {}
    count = 0
    module.network.eval()
    if ranks > 1:
        # Statistics of batch norms are each rank's own; what is exported are those of the first.
        for buffer in module.network.buffers():
            torch.distributed.broadcast(buffer, 0)
    try:
        for batch in loader(judged, batches, workers=0):
            moved = trainer.strategy.batch_to_device(batch, module.device)
            with trainer.precision_plugin.forward_context():
                scores = module.scores(moved)
            for name, values in scores.items():
                total = values.double().sum().cpu()
                totals[name] = totals.get(name, torch.zeros_like(total)) + total
            count += len(batch.labels)
    finally:
        module.train()
    names = sorted(totals)
    sums = torch.stack([*(totals[name] for name in names), torch.tensor(float(count)).double()])
    reduced = trainer.strategy.reduce(sums.to(module.device), reduce_op="sum")
    assert isinstance(reduced, torch.Tensor)
    means = (reduced[:-1] / reduced[-1]).tolist()
    return dict(zip(names, means, strict=True))
