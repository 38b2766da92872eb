"""The parts of one process: the network in each precision, a profile, a training step.

All parts share the networks: each is folded once, cuDNN chooses once, graphs are captured once.
Every number is recorded as soon as it is there, and a part that raises costs itself alone.
"""

from __future__ import annotations

import faulthandler
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lemma_fast import LEMMA, LemmaConfig, PriorConfig
from lemma_fast.bench.inference import prepare, time_rows
from lemma_fast.bench.plan import PRECISIONS, Plan, Row, crops, precision
from lemma_fast.bench.run import random_network
from lemma_fast.bench.timing import Clock, Timed, in_turn, spread
from lemma_fast.bench.training import Training
from lemma_fast.bench.variants import Variants
from lemma_fast.bench.work import count_work
from suite.plan import AUTOTUNE, Part
from suite.records import Record, Records

#: By device, so many samples of a call, each of at least so many seconds.
ROUNDS, SAMPLE = {"cuda": 20, "cpu": 2}, {"cuda": 0.02, "cpu": 0.0}
#: So many algorithms does cuDNN try for a convolution; by default it tries ten.
CUDNN_PLANS = 4
#: The kernels that a profile's record names, by time.
KERNELS = 60
#: The exit code of a process whose device answers no more.
DEVICE_LOST = 3


def network(name: str) -> LEMMA:
    """A network with random weights; "tiny" has every part, for runs that show that all works."""
    if name != "tiny":
        return random_network(name)
    prior = PriorConfig(
        stem_width=8, widths=(8, 8, 8, 8, 16), depths=(1, 1, 1, 1, 1), heads=2, feedforward=16,
        encoder_layers=1, key_width=8, language_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LemmaConfig(
        num_blocks=1, channels=16, text_layers=1, alignment_layers=1, num_selected=40,
        rectification=False, prior=prior,
    )  # fmt: skip
    return LEMMA(config).eval()


@dataclass
class Subject:
    """One network with what its parts share: variants, and what the reference makes of crops."""

    name: str
    device: torch.device
    mode: str | None
    expected: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def variants(self) -> Variants:
        """The variants, built when they are first called."""
        return Variants(network(self.name), self.device, self.mode)

    def crops(self, batch: int) -> Tensor:
        """The crops that every variant is given."""
        return crops(self.variants.model, batch, self.device)

    def exact(self, batch: int) -> tuple[Tensor, Tensor]:
        """What the reference makes of the crops in fp32, without TF32."""
        if batch not in self.expected:
            with precision("float32"):
                forward = self.variants.forward("reference", "float32", batch)
                self.expected[batch] = forward(self.crops(batch))
        return self.expected[batch]


class Parts:
    """Does parts in turn and records what they give."""

    def __init__(self, step: str, device: torch.device, mode: str | None, records: Records) -> None:
        self.step, self.device, self.mode, self.records = step, device, mode, records
        self.rounds = (ROUNDS[device.type], ROUNDS[device.type])
        self.sample = SAMPLE[device.type]
        self.subjects: dict[str, Subject] = {}
        self.done: set[tuple[str, str, str, int]] = set()
        torch.backends.cudnn.benchmark_limit = CUDNN_PLANS
        if mode == "max-autotune":
            import torch._inductor.config as inductor

            for name, value in AUTOTUNE.items():
                setattr(inductor, name, value)

    def run(self, parts: Sequence[Part]) -> int:
        """Do the parts; 1 where one raised an error, DEVICE_LOST where no other can be done."""
        code = 0
        for part in parts:
            # What is noted as begun is not begun again by a process that follows this one.
            self.records.add("begun", {"step": self.step, "name": part.name})
            faulthandler.dump_traceback_later(part.limit, exit=True)
            try:
                getattr(self, part.kind)(part)
            except Exception as error:  # noqa: BLE001  (the next part is wanted)
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}"[:500]
                self.records.add("errors", {"step": self.step, "name": part.name, "reason": reason})
                code = 1
            finally:
                faulthandler.cancel_dump_traceback_later()
            self._check_device()
        return code

    def subject(self, part: Part) -> Subject:
        """The network of a part."""
        if part.network not in self.subjects:
            self.subjects[part.network] = Subject(part.network, self.device, self.mode)
        return self.subjects[part.network]

    def forward(self, part: Part) -> None:
        """Compare and time variants of the network."""
        subject = self.subject(part)
        base = "tf32" if self.device.type == "cuda" else "float32"
        strayed = 0.0
        for variant, kind in part.calls(base, self.done):
            row = self._row(part, variant, kind)
            timed = prepare(
                subject.variants, (variant, kind), subject.crops(part.batch),
                subject.exact(part.batch), strayed, row,
            )  # fmt: skip
            if variant == "reference" and kind == part.precision:
                strayed = row.get("deviation", 0.0)
            self._time(part, variant, kind, timed, row)

    def training(self, part: Part) -> None:
        """Compare and time training steps."""
        plan = Plan((part.batch,), (part.precision,), part.variants, 0.0, self.rounds, self.mode)
        judge = network("tiny") if part.network == "tiny" else None
        model = network(part.network)
        training = Training(part.network, model, self.device, plan, part.batch, judge)
        for variant in part.variants:
            row, timed = training.prepare(variant, part.precision)
            row |= {"name": part.row(variant, part.precision), **self._compiler(variant)}
            if timed is not None:
                rows = {(variant, part.precision): row}
                time_rows(rows, {(variant, part.precision): timed}, Clock(self.device, False), plan)
            self.records.add("training", row)

    def profile(self, part: Part) -> None:
        """Record which kernels one call of the accelerated network takes, and how long each."""
        subject = self.subject(part)
        cuda = self.device.type == "cuda"
        with precision(part.precision):
            forward = subject.variants.forward("accelerated", part.precision, part.batch)
            lr = subject.crops(part.batch)
            for _ in range(3):
                forward(lr)
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
            with profile(activities=activities) as seen:
                forward(lr)
                if cuda:
                    torch.cuda.synchronize()
        self.records.add("profile", self._row(part, "accelerated", part.precision, kernels(seen)))

    def work(self, part: Part) -> None:
        """Record what a forward pass must do, and what the device does at most."""
        work = count_work(network(part.network))
        kinds = PRECISIONS if self.device.type == "cuda" else {"float32": torch.float32}
        floors = {
            kind: {batch: work.of(batch, kind, self.device)["floor_seconds"] for batch in (1, 64)}
            for kind in kinds
        }
        record = {"flops": work.flops, "parameters": work.parameters, "floor_seconds": floors}
        self.records.add("work", {"name": part.name, "model": part.network, **record})

    def _row(self, part: Part, variant: str, kind: str, more: Row | None = None) -> Row:
        name = part.name if part.kind == "profile" else part.row(variant, kind)
        about = {"name": name, "model": part.network, "variant": variant, "precision": kind}
        return {**about, "batch": part.batch, **self._compiler(variant), **(more or {})}

    def _compiler(self, variant: str) -> Record:
        """What a row says of torch.compile."""
        if variant != "compiled":
            return {}
        limits = AUTOTUNE if self.mode == "max-autotune" else {}
        return {"compile_mode": self.mode or "default", "limits": limits}

    def _time(self, part: Part, variant: str, kind: str, timed: Timed | None, row: Row) -> None:
        """Time a call and record its row, whatever comes of it."""
        key = variant, kind
        plan = Plan((part.batch,), (kind,), (variant,), 0.0, self.rounds)
        if timed is not None:
            # At batch 1 what somebody sees who waits, and beside it what the device takes.
            alone = part.batch == 1
            time_rows(
                {key: row},
                {key: timed},
                Clock(self.device, alone),
                plan,
                0.0 if alone else self.sample,
            )
            if alone and "seconds" in row and self.device.type == "cuda":
                clock = Clock(self.device, wall=False)
                samples = in_turn({key: timed}, clock, 0.0, self.rounds, self.sample)
                row["device_seconds"] = spread(samples[key])
        self.records.add("rows", row)

    def _check_device(self) -> None:
        """End the process where a kernel has left the device unusable."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except Exception as error:  # noqa: BLE001
            self.records.add("errors", {"step": self.step, "name": "device", "reason": str(error)})
            os._exit(DEVICE_LOST)


def kernels(seen: Any) -> Row:
    """What a profile saw: kernels (operators where there is no device) by time, and launches."""
    found: dict[str, list[float]] = {}
    on_device = any(e.device_type == torch.autograd.DeviceType.CUDA for e in seen.events())
    for event in seen.events():
        if on_device != (event.device_type == torch.autograd.DeviceType.CUDA):
            continue
        # A kernel has no children; what an operator's take is not its own.
        spent = event.time_range.elapsed_us() if on_device else event.self_cpu_time_total
        found.setdefault(event.name, []).append(1e-6 * spent)
    ranked = sorted(found.items(), key=lambda item: -sum(item[1]))
    launches = sum(len(times) for times in found.values())
    whole = sum(sum(times) for times in found.values())
    listed = [
        {"kernel": name[:160], "calls": len(times), "seconds": sum(times)}
        for name, times in ranked[:KERNELS]
    ]
    return {"launches": launches, "kernel_seconds": whole, "kernels": listed}
