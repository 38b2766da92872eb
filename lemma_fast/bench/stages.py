"""What share of a forward pass each stage takes."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lemma_fast.acceleration import accelerate
from lemma_fast.bench.plan import Plan, Row, crops
from lemma_fast.bench.timing import Clock, Timed, spread
from lemma_fast.model import LEMMA

#: Stages by the names of their modules, the same in the reference and the accelerated network.
STAGES = {
    "residual network": r"prior\.vision\.resnet",
    "transformer": r"prior\.vision\.encoder\.\d+",
    "position attention": r"prior\.vision\.attention",
    "language": r"prior\.language",
    "guidance": r"guidance",
    "AdaFM": r"blocks\.\d+\.fusion",
    "GRU": r"blocks\.\d+\.(vertical|horizontal)",
    "convolutions": r"stem|blocks\.\d+\.(conv1|conv2|norm)|tail",
    "upsampler": r"upsampler",
}
REST = "rest"


class _Watch:
    """Reads the clock where stages begin and end; on CUDA without stopping the device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: dict[str, list[tuple[Any, Any]]] = {}
        self.open: list[Any] = []

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, *_: object) -> None:
        self.open.append(self.now())

    def end(self, stage: str, *_: object) -> None:
        self.marks.setdefault(stage, []).append((self.open.pop(), self.now()))

    def totals(self) -> dict[str, float]:
        """Seconds by stage since the last call."""
        seconds = {stage: sum(map(self._between, pairs)) for stage, pairs in self.marks.items()}
        self.marks = {}
        return seconds

    def _between(self, pair: tuple[Any, Any]) -> float:
        begin, end = pair
        return begin.elapsed_time(end) / 1e3 if self.cuda else end - begin


@contextmanager
def _watched(network: nn.Module, watch: _Watch) -> Iterator[None]:
    handles = []
    outer: list[str] = []
    for name, module in network.named_modules():
        stage = next((s for s, pattern in STAGES.items() if re.fullmatch(pattern, name)), None)
        # A stage counts once, by its outermost module: a list of layers is never called itself.
        if stage is None or any(name.startswith(f"{above}.") for above in outer):
            continue
        if isinstance(module, nn.ModuleList):
            continue
        outer.append(name)
        handles.append(module.register_forward_pre_hook(watch.begin))
        handles.append(module.register_forward_hook(partial(watch.end, stage)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stage_shares(
    network: nn.Module, lr: Tensor, device: torch.device, rounds: int = 10
) -> dict[str, dict[str, float]]:
    """Seconds that each stage of an eager network takes (median and quartiles), and the rest.

    A stage of which no module is called, because its arithmetic is part of another's, is missing.
    """
    watch = _Watch(device)
    clock = Clock(device)
    found: dict[str, list[float]] = {}
    with torch.inference_mode(), _watched(network, watch):
        call = Timed(partial(network, lr))
        for _ in range(2):
            clock.measure(call)
            watch.totals()
        for _ in range(rounds):
            begin = watch.now()
            network(lr)
            watch.marks["all"] = [(begin, watch.now())]
            clock.wait()
            seconds = watch.totals()
            whole = seconds.pop("all")
            seconds[REST] = whole - sum(seconds.values())
            for stage, value in seconds.items():
                found.setdefault(stage, []).append(value)
    return {stage: spread(values) for stage, values in found.items()}


def stage_rows(name: str, model: LEMMA, device: torch.device, plan: Plan) -> Iterator[Row]:
    """The stages of the reference and, on the CPU, of the accelerated network, by batch size.

    On CUDA the accelerated network is replayed as one graph, which has no stages.
    """
    networks: dict[str, nn.Module] = {"reference": copy.deepcopy(model).to(device).eval()}
    if device.type == "cpu" and "accelerated" in plan.variants:
        # The folded network itself, within what splits batches.
        networks["accelerated"] = accelerate(networks["reference"]).network
    for batch in plan.batches:
        lr = crops(model, batch, device)
        for variant, network in networks.items():
            rounds = max(plan.rounds[0], min(10, plan.rounds[1]))
            yield {
                "model": name,
                "variant": variant,
                "precision": "float32",
                "batch": batch,
                "stages": stage_shares(network, lr, device, rounds),
            }
