"""One stage from its settings to its weights, in one go or in chunks: `fit`.

The loop is plain, and devices and ranks are Lightning Fabric's. A stage's folder holds
`settings.json`, `last.ckpt` (everything to go on from), `best.safetensors`, `metrics.csv`,
`tensorboard/`, and, once all steps are made, `last.safetensors` and `result.json`. Where
`last.ckpt` is there the stage goes on from it, to the same numbers as without the break.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from rich import progress
from torch import Tensor

from lemma_fast.atomic import replace_file
from lemma_fast.training import signals
from lemma_fast.training.data.batches import (
    Batch,
    Batches,
    EncodedCrops,
    InOrder,
    loaded,
    mix,
    split,
)
from lemma_fast.training.data.verdicts import Verdicts
from lemma_fast.training.evaluation.tables import plain_console, skipped_lines
from lemma_fast.training.loop import folder as files
from lemma_fast.training.loop import weights
from lemma_fast.training.loop.average import Average
from lemma_fast.training.loop.curves import Curves
from lemma_fast.training.loop.devices import Agreement, device_name, launch
from lemma_fast.training.loop.provenance import provenance
from lemma_fast.training.loop.stages import STAGES, Stage
from lemma_fast.training.settings.schema import WEIGHTS, OptimizerSettings, Settings, plain
from lemma_fast.training.settings.values import SettingsError

#: Metrics where less is better.
FALLING = frozenset({"loss"})
_JUDGED_AT_ONCE = 256


class Outcome(NamedTuple):
    """How far a stage is: steps made, of how many, and the best validation so far."""

    folder: Path
    step: int
    total: int
    best: dict[str, float] | None
    #: Whether this process is the first of its run, the one that writes files.
    leads: bool = True
    #: The signal that ended the run before its time.
    signal: int | None = None

    @property
    def finished(self) -> bool:
        """True where all steps are made."""
        return self.step >= self.total


def fit(
    settings: Settings,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    restart: bool = False,
    accept_changes: bool = False,
) -> Outcome:
    """Train a stage to its end, or for so many minutes or steps; raises SettingsError.

    `restart` throws away what is in the stage's folder. `accept_changes` goes on although the
    settings are no longer those that the stage was begun with. A signal (`signals`) ends the run
    after the step that is being made, which is saved.
    """
    settings.check()
    fabric = launch(settings)
    with _alone_in(settings.folder, fabric, restart):
        if restart:
            if fabric.is_global_zero:
                files.clear(settings.folder)
            # No rank looks before the files are gone.
            fabric.barrier()
        elif done := files.finished(settings, accept_changes):
            made = done["steps"]
            return Outcome(settings.folder, made, made, done["best"], fabric.is_global_zero)
        return Run(settings, fabric, accept_changes).train(minutes, steps)


class Run:
    """A stage that is being trained: what a checkpoint holds, and what makes a step."""

    def __init__(self, settings: Settings, fabric: Fabric, accept_changes: bool) -> None:
        self.settings, self.fabric = settings, fabric
        self.folder, self.leads = settings.folder, fabric.is_global_zero
        verdicts = Verdicts(self.folder / files.RECORDS)
        train, chosen, left_out = split(settings.data, verdicts)
        self.per_epoch = len(train) // settings.run.batch_size
        if not self.per_epoch:
            raise SettingsError(
                f"run.batch_size is {settings.run.batch_size}, but there are {len(train)} training "
                "crops"
            )
        epochs = settings.run.epochs or 0
        self.total = settings.run.steps or max(1, round(epochs * self.per_epoch))
        saved = files.read_checkpoint(self.folder / files.LAST)
        if saved is not None and not accept_changes:
            files.compare(saved["settings"], settings)

        torch.manual_seed(settings.seed)
        self.stage = STAGES[settings.stage](settings, fresh=saved is None)
        length, filtered = settings.lemma_config().max_length, settings.loss.filtered_labels
        self.crops = EncodedCrops(train, length, filtered, self.stage.encodings)
        self.judged = EncodedCrops(chosen, length, filtered, self.stage.encodings)
        if settings.run.sync_batchnorm:
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.stage)
        self.network = fabric.setup_module(self.stage)
        self.optimizer = torch.optim.Adam(
            [{"params": group, "lr": rate} for group, rate in self.stage.parameter_groups()],
            betas=settings.optimizer.betas,
            weight_decay=settings.optimizer.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: rate_factor(settings.optimizer, step, self.per_epoch, self.total),
        )
        self.step = 0
        self.best: dict[str, float] | None = None
        self.latest: dict[str, float] = {}
        self.earlier = 0.0
        self.sums: dict[str, Tensor] = {}
        self.summed = 0
        if saved is not None:
            self._restore(saved)
        averaged = None if saved is None else saved["average"]
        self.average = Average(self.stage.network, settings.run.ema, averaged)
        self.origin = provenance(settings, len(train), len(chosen), left_out)
        self.origin["device"] = device_name(fabric)
        self.curves: Curves | None = None
        if self.leads:
            verdicts.save()
            self.curves = Curves(self.folder, self.step, settings.run.tensorboard)
            replace_file(self.folder / files.SETTINGS, json.dumps(plain(settings), indent=2))
        self.left_out = left_out
        self.bar = _progress_bar(self.leads)
        self.task = self.bar.add_task(
            settings.stage, total=self.total, completed=self.step, note=""
        )
        self.first, self.since = self.step, time.monotonic()

    def train(self, minutes: float | None, steps: int | None) -> Outcome:
        """Make the steps that are left, or as many as the budget or a signal leaves time for."""
        run, fabric = self.settings.run, self.fabric
        last = self.total if steps is None else self.first + steps
        end = math.inf if minutes is None else self.since + 60 * minutes
        batches = Batches(
            len(self.crops), run.batch_size, self.settings.seed, self.step, self.total,
            fabric.global_rank, fabric.world_size,
        )  # fmt: skip
        agree = Agreement(fabric)
        word = "stopping after this step" if self.leads else ""
        with self.bar, signals.held(word) as received:
            for text in skipped_lines(self.left_out, "`lemma-fast data inspect` lists all"):
                self.say(text)
            if self.step:
                self.say(f"{self.settings.stage}: going on from step {self.step}")
            for batch in loaded(self.crops, batches, self.settings.data.workers):
                self.make_step(fabric.to_device(batch))
                if self.step % run.log_every == 0:
                    self.log()
                validated = self.step % run.validate_every == 0 or self.step == self.total
                if validated:
                    self.validate()
                late, signal = agree(time.monotonic() >= end, *received[:1] or (0,))
                stop = late or signal or self.step >= last
                if validated or stop or self.step % run.save_every == 0:
                    self.save()
                if stop:
                    break
            # One may have come since, and another stage must not begin.
            (signal,) = agree(*received[:1] or (0,))
            made, seconds = self.step - self.first, time.monotonic() - self.since
            if made:
                self.say(f"{made} steps in {seconds:.0f} s, {made / seconds:.2f} a second")
        if self.leads and self.step == self.total:
            self.export(files.LAST_WEIGHTS)
            replace_file(self.folder / files.RESULT, json.dumps(self._result(), indent=2))
        if self.curves is not None:
            self.curves.close()
        # No rank ends while the first one still writes.
        fabric.barrier()
        return Outcome(self.folder, self.step, self.total, self.best, self.leads, signal or None)

    def make_step(self, batch: Batch) -> None:
        """Follow the gradient of one batch; what is random in it hangs on seed, step and rank."""
        settings = self.settings
        seed = mix(settings.seed, self.step, self.fabric.global_rank)
        torch.manual_seed(seed)
        with self._autocast():
            terms = self.network(batch, self.step, seed)
        self.optimizer.zero_grad()
        self.fabric.backward(settings.loss.scale * terms["loss"])
        if settings.optimizer.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.stage.clipped(), settings.optimizer.clip)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.average.update(self.step)
        for name, value in terms.items():
            before = self.sums.get(name)
            self.sums[name] = value.detach() if before is None else before + value.detach()
        self.summed += 1
        self.bar.update(self.task, completed=self.step)

    def log(self) -> None:
        """Write the means of the terms since the last time; raises FloatingPointError."""
        means = {name: value.item() / self.summed for name, value in self.sums.items()}
        self.sums, self.summed = {}, 0
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss is {means['loss']} at step {self.step}; {self.folder / files.LAST} is "
                "from before: lower optimizer.learning_rate, or use run.precision=float32"
            )
        crops = (self.step - self.first) * self.settings.run.batch_size
        speed = crops / max(1e-9, time.monotonic() - self.since)
        self.bar.update(self.task, note=f"loss {means['loss']:.4g}  {speed:.0f} crops/s")
        if self.curves is not None:
            values = {f"train/{name}": value for name, value in means.items()}
            values["epoch"] = self.step / self.per_epoch
            for number, rate in enumerate(self.schedule.get_last_lr()):
                values[f"learning_rate/{number}"] = float(rate)
            self.curves.add(values, self.step)
            # Not in the file, which does not depend on when and where a run was broken off.
            self.curves.draw({"crops_per_second": speed}, self.step)

    def validate(self) -> None:
        """Judge the averaged weights, and export them where they are the best so far."""
        settings, metric = self.settings, self.settings.select.metric
        with self.average.in_place(), self._autocast():
            self.latest = judge(self.fabric, self.stage, self.judged)
        sign = -1 if metric in FALLING else 1
        if self.best is None or sign * self.latest[metric] > sign * self.best[metric]:
            self.best = {"step": self.step, **self.latest}
            if self.leads:
                self.export(WEIGHTS)
        if self.curves is not None:
            values = {f"validation/{name}": number for name, number in self.latest.items()}
            self.curves.add(values, self.step)
        shown = "  ".join(f"{name} {number:.4g}" for name, number in self.latest.items())
        self.say(f"{settings.stage} step {self.step}/{self.total}  {shown}")

    def save(self) -> None:
        """Write all that the next chunk goes on from."""
        if not self.leads:
            return
        content = {
            "global_step": self.step,
            "state_dict": self.stage.state_dict(),
            "optimizer_states": [self.optimizer.state_dict()],
            "lr_schedulers": [self.schedule.state_dict()],
            "average": self.average.state,
            "window": {"sums": self.sums, "summed": self.summed},
            "best": self.best,
            "latest": self.latest,
            "seconds": self._seconds(),
            "settings": plain(self.settings),
        }
        files.write_checkpoint(self.folder / files.LAST, content)

    def say(self, text: str) -> None:
        """Print a line on standard error, above the bar."""
        if self.leads:
            self.bar.console.print(text, soft_wrap=True)

    def _restore(self, saved: dict[str, Any]) -> None:
        try:
            self.stage.load_state_dict(saved["state_dict"])
            self.optimizer.load_state_dict(saved["optimizer_states"][0])
            self.schedule.load_state_dict(saved["lr_schedulers"][0])
        except (RuntimeError, ValueError, LookupError) as error:
            raise SettingsError(
                f"{self.folder / files.LAST} does not fit the network "
                f"({str(error).splitlines()[0]}); --restart begins anew"
            ) from error
        self.step = int(saved["global_step"])
        self.best, self.latest = saved["best"], saved["latest"]
        self.earlier = saved["seconds"]
        window = saved["window"]
        self.sums = {name: x.to(self.fabric.device) for name, x in window["sums"].items()}
        self.summed = window["summed"]

    def export(self, name: str) -> None:
        """Write the averaged weights with where they come from."""
        facts = {"steps": str(self.step), "validation": json.dumps(self.latest)}
        facts["seconds"] = f"{self._seconds():.0f}"
        path = self.folder / name
        with self.average.in_place():
            weights.save(self.stage.network, path, self.origin | facts, self.settings.export)

    def _result(self) -> dict[str, Any]:
        parsed = {name: json.loads(self.origin[name]) for name in ("settings", "data", "versions")}
        return {
            **self.origin,
            **parsed,
            "steps": self.step,
            "best": self.best,
            "last": self.latest,
            "seconds": round(self._seconds(), 1),
        }

    def _seconds(self) -> float:
        """Seconds of training, those of earlier chunks included."""
        return self.earlier + time.monotonic() - self.since

    def _autocast(self) -> torch.autocast:
        half = self.settings.run.precision == "bfloat16"
        # A cached weight that was cast under no_grad would have no gradient.
        return torch.autocast(
            self.fabric.device.type, torch.bfloat16, enabled=half, cache_enabled=False
        )


@torch.no_grad()
def judge(fabric: Fabric, stage: Stage, judged: EncodedCrops) -> dict[str, float]:
    """Means of the scores over all crops, each rank reading its share."""
    batches = InOrder(len(judged), _JUDGED_AT_ONCE, fabric.global_rank, fabric.world_size)
    totals: dict[str, Tensor] = {}
    count = 0
    stage.network.eval()
    if fabric.world_size > 1:
        # Statistics of batch norms are each rank's own; what is exported are those of the first.
        for buffer in stage.network.buffers():
            torch.distributed.broadcast(buffer, 0)
    try:
        for batch in loaded(judged, batches, workers=0):
            for name, values in stage.scores(fabric.to_device(batch)).items():
                total = values.double().sum().cpu()
                totals[name] = totals.get(name, torch.zeros_like(total)) + total
            count += len(batch.labels)
    finally:
        stage.train()
    names = sorted(totals)
    sums = torch.stack([*(totals[name] for name in names), torch.tensor(float(count)).double()])
    reduced = fabric.all_reduce(sums.to(fabric.device), reduce_op="sum")
    assert isinstance(reduced, Tensor)
    means = (reduced[:-1] / reduced[-1]).tolist()
    return dict(zip(names, means, strict=True))


def rate_factor(settings: OptimizerSettings, step: int, per_epoch: int, total: int) -> float:
    """What the learning rate is multiplied by at a step, from 0."""
    warm = min(1.0, (step + 1) / settings.warm_up) if settings.warm_up else 1.0
    if settings.schedule == "steps":
        return warm * settings.factor ** (step / per_epoch // settings.step_epochs)
    if settings.schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    return warm


def _progress_bar(shown: bool) -> progress.Progress:
    """A bar on standard error, where that is a terminal; a narrow one cuts no number of it."""
    console = plain_console(stderr=True)
    columns: list[progress.ProgressColumn] = [
        progress.TextColumn("{task.description}"),
        progress.MofNCompleteColumn(),
    ]
    if console.width >= 60:
        columns.append(progress.TextColumn("{task.fields[note]}"))
    if console.width >= 80:
        columns[1:1] = [progress.BarColumn()]
        columns[3:3] = [progress.TimeRemainingColumn()]
    return progress.Progress(*columns, console=console, disable=not (shown and console.is_terminal))


@contextmanager
def _alone_in(folder: Path, fabric: Fabric, restart: bool) -> Iterator[None]:
    """Keep other runs out of the folder.

    All ranks raise SettingsError where one is in it, or where it cannot be written to.
    """
    with ExitStack() as stack:
        refusal = ""
        if fabric.is_global_zero:
            try:
                files.check(folder, restart)
                stack.enter_context(files.locked(folder))
            except (ValueError, OSError) as error:
                refusal = str(error)
        if refusal := fabric.broadcast(refusal):
            raise SettingsError(refusal)
        yield
