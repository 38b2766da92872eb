"""One stage from its settings to its weights, in one go or in chunks: `fit`.

A stage's folder holds `settings.json`, `last.ckpt` (everything to go on from), `best.safetensors`,
`metrics.csv`, `tensorboard/`, and, once all steps are made, `last.safetensors` and `result.json`.
Where `last.ckpt` is there the stage goes on from it, to the same numbers as without the break.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy

from lemma_fast.atomic import replace_file
from lemma_fast.training.data.batches import (
    Batch,
    Batches,
    EncodedCrops,
    loader,
    split,
)
from lemma_fast.training.loop.curves import CurveLogger, leads
from lemma_fast.training.loop.keeper import LAST, Keeper
from lemma_fast.training.loop.provenance import provenance
from lemma_fast.training.loop.stages import STAGES
from lemma_fast.training.settings.schema import Settings
from lemma_fast.training.settings.typed import SettingsError

RESULT = "result.json"
# What may differ between two chunks of one run without changing what is trained.
_FREE = frozenset(
    {
        "output",
        "data.workers",
        "data.cache",
        "run.accelerator",
        "run.devices",
        "run.nodes",
        "run.save_every",
        "run.tensorboard",
    }
)
_NOISE = (
    ".*does not have many workers.*",
    ".*tensorboard.*",
    ".*module.* in eval mode.*",
    ".*treespec, LeafSpec.*",
)


class Outcome(NamedTuple):
    """How far a stage is: steps made, of how many, and the best validation so far."""

    folder: Path
    step: int
    total: int
    best: dict[str, float] | None

    @property
    def finished(self) -> bool:
        """True where all steps are made."""
        return self.step >= self.total


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all, whatever kills the process.

    Lightning's own are moved from the temporary folder, which need not be on the same disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


class Loaders(L.LightningDataModule):
    """Hands the trainer the batches that are left."""

    def __init__(self, crops: EncodedCrops, settings: Settings, total: int) -> None:
        super().__init__()
        self.crops, self.settings, self.total = crops, settings, total

    def train_dataloader(self) -> torch.utils.data.DataLoader[Batch]:
        assert self.trainer is not None
        batches = Batches(
            len(self.crops),
            self.settings.run.batch_size,
            self.settings.seed,
            # The trainer has restored its step when it asks for the loader.
            first=self.trainer.global_step,
            last=self.total,
            rank=self.trainer.global_rank,
            ranks=self.trainer.world_size,
        )
        return loader(self.crops, batches, self.settings.data.workers)


def fit(
    settings: Settings,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    restart: bool = False,
    accept_changes: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Outcome:
    """Train a stage to its end, or for so many minutes or steps; raises SettingsError.

    `restart` throws away what is in the stage's folder. `accept_changes` goes on although the
    settings are no longer those that the stage was begun with.
    """
    settings.check()
    folder = settings.folder
    if restart and leads():
        _clear(folder)
    # Another rank may look before the files are gone.
    if not restart and (done := _finished(settings, accept_changes)):
        return done
    train, chosen, left_out = split(settings.data)
    length = settings.lemma_config().max_length
    filtered = settings.loss.filtered_labels
    crops = EncodedCrops(train, length, filtered)
    judged = EncodedCrops(chosen, length, filtered)
    per_epoch = len(crops) // settings.run.batch_size
    if not per_epoch:
        raise SettingsError(
            f"run.batch_size is {settings.run.batch_size}, but there are {len(crops)} training "
            "crops"
        )
    total = settings.run.steps or round((settings.run.epochs or 0) * per_epoch)
    saved = None if restart else _saved(folder / LAST)
    first = 0 if saved is None else int(saved["global_step"])
    if saved is not None and not accept_changes:
        _compare(saved["settings"], settings)

    L.seed_everything(settings.seed, verbose=False)
    module = STAGES[settings.stage](settings, total, per_epoch, fresh=saved is None)
    folder.mkdir(parents=True, exist_ok=True)
    if leads():
        replace_file(folder / "settings.json", json.dumps(dataclasses.asdict(settings), indent=2))
    keeper = Keeper(
        judged,
        provenance(settings, len(crops), len(judged), left_out),
        end=None if minutes is None else time.monotonic() + 60 * minutes,
        last=None if steps is None else first + steps,
    )
    with _quiet():
        trainer = _trainer(settings, total, first, [keeper, *callbacks])
        trainer.fit(
            module,
            datamodule=Loaders(crops, settings, total),
            ckpt_path=None if saved is None else str(folder / LAST),
            weights_only=True,
        )
    outcome = Outcome(folder, trainer.global_step, total, keeper.best)
    if outcome.finished and trainer.is_global_zero:
        replace_file(folder / RESULT, json.dumps(keeper.result(outcome.step), indent=2))
    return outcome


def _trainer(settings: Settings, total: int, first: int, callbacks: list[Callback]) -> L.Trainer:
    run = settings.run
    loggers: list[Logger] = [CurveLogger(settings.folder / "metrics.csv", first)]
    if run.tensorboard:
        # Without `purge_step` a killed chunk's last points would be drawn twice.
        loggers.append(
            TensorBoardLogger(
                settings.folder, name="tensorboard", version="", purge_step=first or None
            )
        )
    strategy: str | DDPStrategy = "auto"
    if run.devices * run.nodes > 1:
        # Without the fine-tuning loss the classifier of a prior that learns has no gradient.
        learns = settings.optimizer.prior_learning_rate != 0
        unused = settings.stage == "lemma" and settings.loss.weights.fine_tune == 0 and learns
        strategy = DDPStrategy(find_unused_parameters=unused)
    return L.Trainer(
        accelerator=run.accelerator,
        devices=run.devices,
        num_nodes=run.nodes,
        strategy=strategy,
        precision="bf16-mixed" if run.precision == "bfloat16" else "32-true",
        max_steps=total,
        max_epochs=-1,
        gradient_clip_val=settings.optimizer.clip,
        sync_batchnorm=run.sync_batchnorm,
        use_distributed_sampler=False,
        logger=loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpoints()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _clear(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    names = ("settings.json", LAST, "best.safetensors", "last.safetensors", "metrics.csv", RESULT)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if (folder / "tensorboard").is_dir():
        shutil.rmtree(folder / "tensorboard")


def _saved(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says about its run; raises SettingsError where it cannot be read."""
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {"global_step": content["global_step"], **content["callbacks"]["Keeper"]}
    except (RuntimeError, KeyError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"{path} cannot be read ({reason}); --restart begins anew") from error


def _finished(settings: Settings, accept_changes: bool) -> Outcome | None:
    """The outcome of a stage that is through already."""
    path = settings.folder / RESULT
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if _changes(result["settings"], settings):
        if accept_changes:
            return None
        _compare(result["settings"], settings)
    return Outcome(settings.folder, result["steps"], result["steps"], result["best"])


def _compare(old: Mapping[str, Any], settings: Settings) -> None:
    if changes := _changes(old, settings):
        raise SettingsError(
            f"{settings.folder} was begun with other settings: {'; '.join(changes)}. "
            "--accept-changes goes on all the same, --restart begins anew"
        )


def _changes(old: Mapping[str, Any], settings: Settings) -> list[str]:
    # JSON has no tuples
    new, defaults = (
        json.loads(json.dumps(dataclasses.asdict(values)))
        for values in (settings, Settings(settings.stage))
    )
    # A run of an earlier version says nothing of the words that have come since.
    before, after = {**dict(_flat(defaults)), **dict(_flat(old))}, dict(_flat(new))
    return [
        f"{key} was {before.get(key)}, is {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if key not in _FREE and before.get(key) != after.get(key)
    ]


def _flat(values: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's advice on what is meant to be so stays away."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.setLevel(level)
