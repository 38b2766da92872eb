"""What share of a forward pass each stage takes, and what a training step costs."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.acceleration import accelerate
from lemma_fast.bench.timing import Clock, Timed, ratios, spread
from lemma_fast.bench.variants import (
    PRECISIONS,
    TOLERANCE,
    Plan,
    Row,
    Unavailable,
    crops,
    failed,
    precision,
    time_rows,
)
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
#: Variants that have a backward pass.
TRAINABLE = ("reference", "compiled", "accelerated")


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


class Training:
    """Training steps (forward, loss, backward, Adam) of one network on one batch of crops.

    The loss is that of the pixels and of the prior's logits. A variant that makes another step
    without dropout than the reference, by loss and gradients, is not to be timed.
    """

    def __init__(
        self, name: str, model: LEMMA, device: torch.device, plan: Plan, batch: int
    ) -> None:
        self.model, self.device, self.plan = model, device, plan
        self.about = {"model": name, "batch": batch}
        self.lr = crops(model, batch, device)
        config = model.config
        hr = torch.rand(batch, config.in_channels, *(config.scale * side for side in config.size))
        ids = torch.randint(0, config.num_classes, (batch, config.max_length))
        self.targets = hr.to(device), ids.to(device)
        self.exact = self._gradients("reference", "float32")

    def prepare(self, variant: str, kind: str) -> tuple[Row, Timed | None]:
        """Start a row and make the step to be timed; None, and the reason, where there is none."""
        row: Row = {**self.about, "variant": variant, "precision": kind}
        try:
            row["deviation"] = _far(self._gradients(variant, kind), self.exact)
            # Gradients may be five times as far as values.
            if variant != "reference" and not row["deviation"] <= 5 * TOLERANCE[kind]:
                reason = f"five times {TOLERANCE[kind]:.0e} is allowed"
                return row | {"status": "differs", "reason": reason}, None
            network = self._trainable(variant, copy.deepcopy(self.model))
            optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
            step = Timed(partial(self._step, network, optimizer, kind), partial(precision, kind))
            row["peak_bytes"] = _peak(step, self.device)
        except Unavailable as missing:
            return row | {"status": "unavailable", "reason": str(missing)}, None
        except Exception as error:  # noqa: BLE001  (Triton's share no base with others)
            return row | failed(error), None
        return row | {"status": "timed"}, step

    def _step(self, network: nn.Module, optimizer: torch.optim.Optimizer, kind: str) -> None:
        optimizer.zero_grad(set_to_none=True)
        self._loss(network, kind).backward()
        optimizer.step()

    def _loss(self, network: nn.Module, kind: str) -> Tensor:
        hr, ids = self.targets
        dtype = PRECISIONS[kind]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            sr, prior = network(self.lr)
        read = (prior.img_logits, prior.text_logits)
        first, second = (F.cross_entropy(x.float().flatten(0, 1), ids.flatten()) for x in read)
        return F.mse_loss(sr.float(), hr) + 0.01 * (first + second)

    def _gradients(self, variant: str, kind: str) -> tuple[Tensor, Tensor]:
        """Loss and gradient (all of it, in one vector) of a step without dropout."""
        config = self.model.config
        still = LEMMA(replace(config, dropout=0.0, prior=replace(config.prior, dropout=0.0)))
        still.load_state_dict(self.model.state_dict())
        network = self._trainable(variant, still)
        with precision(kind):
            loss = self._loss(network, kind)
            loss.backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        return loss.detach(), torch.cat([g.flatten().float() for g in gradients])

    def _trainable(self, variant: str, network: LEMMA) -> nn.Module:
        network = network.to(self.device).train()
        if variant == "compiled":
            mode = self.plan.compile_mode if self.device.type == "cuda" else None
            return torch.compile(network, dynamic=False, mode=mode)  # type: ignore[return-value]
        if variant == "accelerated":
            try:
                return accelerate(network, training=True)
            except ImportError as error:
                raise Unavailable(str(error)) from error
        return network


def time_training(
    name: str, model: LEMMA, device: torch.device, plan: Plan, batch: int
) -> Iterator[Row]:
    """Time a training step of every variant, in turn; ratios are within a precision."""
    training = Training(name, model, device, plan, batch)
    rows: dict[tuple[str, str], Row] = {}
    steps: dict[tuple[str, str], Timed] = {}
    for kind in plan.precisions:
        for variant in plan.variants:
            # fp16 wants a scaler; and the other runtimes do not train.
            if kind == "float16" or variant not in TRAINABLE:
                continue
            rows[variant, kind], step = training.prepare(variant, kind)
            if step is not None:
                steps[variant, kind] = step
    samples = time_rows(rows, steps, Clock(device, wall=False), plan)
    for (variant, kind), own in samples.items():
        if ("reference", kind) in samples:
            rows[variant, kind]["ratio"] = ratios(samples["reference", kind], own)
    yield from rows.values()


def _far(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    """The larger of the relative deviations of loss and gradient."""
    worst = 0.0
    for got, expected in zip(found, exact, strict=True):
        if got.shape != expected.shape:
            return float("inf")
        wide = expected.double()
        far = ((got.double() - wide).norm() / wide.norm()).item()
        # max() would pass over NaN.
        worst = far if not far <= worst else worst
    return worst


def _peak(step: Timed, device: torch.device) -> int | None:
    """Bytes that a second step takes at most, beyond what is there between steps."""
    with step.setting():
        step.call()
        if device.type != "cuda":
            return None
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step.call()
        return torch.cuda.max_memory_allocated(device) - before
