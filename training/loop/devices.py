"""What a run trains on: one device or several ranks, by way of Lightning Fabric."""

from __future__ import annotations

import logging
import os
import platform

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy

from lemma_fast.training.settings.schema import Settings
from lemma_fast.training.settings.values import SettingsError


def launch(settings: Settings) -> Fabric:
    """The devices of the settings, with all ranks started; raises SettingsError.

    A run on one device is the first rank, whatever RANK or SLURM_PROCID say.
    """
    run = settings.run
    strategy: str | DDPStrategy = "auto"
    ranks = os.environ.get("WORLD_SIZE", "1") if "TORCHELASTIC_RUN_ID" in os.environ else "1"
    if run.devices * run.nodes == 1 and ranks != "1":
        raise SettingsError(f"torchrun has started {ranks} processes, but run.devices is 1")
    if run.devices * run.nodes > 1:
        # Without the fine-tuning loss the classifier of a prior that learns has no gradient.
        learns = settings.optimizer.prior_learning_rate != 0
        unused = settings.stage == "lemma" and settings.loss.weights.fine_tune == 0 and learns
        strategy = DDPStrategy(find_unused_parameters=unused)
    # What it says of how ranks were started is no news.
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        fabric = Fabric(
            accelerator=run.accelerator,
            strategy=strategy,
            devices=run.devices,
            num_nodes=run.nodes,
        )
        fabric.launch()
    except Exception as error:
        # Its own exceptions, torch's, and KeyErrors of what a cluster has not set.
        wanted = f"run.accelerator={run.accelerator} run.devices={run.devices}"
        said = " ".join(str(error).split())
        reason = f"{said} is not set" if isinstance(error, KeyError) else said
        raise SettingsError(f"{wanted} run.nodes={run.nodes} cannot be had: {reason}") from error
    return fabric


def device_name(fabric: Fabric) -> str:
    """What the devices of a run are called."""
    if fabric.device.type == "cuda":
        name = torch.cuda.get_device_name(fabric.device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return name if fabric.world_size == 1 else f"{fabric.world_size} x {name}"


class Agreement:
    """What all ranks do after a step: each brings its numbers, all get the largest ones."""

    def __init__(self, fabric: Fabric) -> None:
        self.group: torch.distributed.ProcessGroup | None = None
        if fabric.world_size > 1:
            # By way of the processors: a GPU would have to finish the step first.
            group = torch.distributed.new_group(backend="gloo")
            # Only for a rank outside it PyTorch returns something else.
            assert isinstance(group, torch.distributed.ProcessGroup)
            self.group = group

    def __call__(self, *numbers: int) -> list[int]:
        """The largest of each number over all ranks."""
        if self.group is None:
            return list(numbers)
        largest = torch.tensor(numbers, dtype=torch.int64)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, self.group)
        return largest.tolist()
