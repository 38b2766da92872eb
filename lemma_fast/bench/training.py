"""What a training step costs, and how far its gradients are from the reference's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.acceleration import accelerate
from lemma_fast.bench.inference import TOLERANCE, failed, time_rows
from lemma_fast.bench.plan import PRECISIONS, Plan, Row, crops, precision
from lemma_fast.bench.timing import Clock, Timed, ratios
from lemma_fast.bench.variants import Unavailable
from lemma_fast.checkpoint import load
from lemma_fast.model import LEMMA

#: Variants that have a backward pass.
TRAINABLE = ("reference", "compiled", "accelerated")
#: The packaged network that training steps are compared on, and on how many crops at most.
JUDGE, JUDGED_CROPS = "small", 8


class _Batch(NamedTuple):
    """Crops and what a loss compares with: images [N, C, sH, sW] and characters [N, T]."""

    lr: Tensor
    hr: Tensor
    ids: Tensor

    @classmethod
    def draw(cls, model: LEMMA, device: torch.device, batch: int) -> _Batch:
        config = model.config
        hr = torch.rand(batch, config.in_channels, *(config.scale * side for side in config.size))
        ids = torch.randint(0, config.num_classes, (batch, config.max_length))
        return cls(crops(model, batch, device), hr.to(device), ids.to(device))

    def loss(self, network: nn.Module, kind: str) -> Tensor:
        """The loss of the pixels and of the prior's logits, in a precision."""
        dtype = PRECISIONS[kind]
        with torch.autocast(self.lr.device.type, dtype, enabled=dtype != torch.float32):
            sr, prior = network(self.lr)
        read = (prior.img_logits, prior.text_logits)
        ids = self.ids.flatten()
        first, second = (F.cross_entropy(x.float().flatten(0, 1), ids) for x in read)
        return F.mse_loss(sr.float(), self.hr) + 0.01 * (first + second)


class Training:
    """Training steps (forward, loss, backward, Adam) of one network on one batch of crops.

    The loss is that of the pixels and of the prior's logits. Steps are compared on the `judge`, by
    loss and gradients without dropout; None stands for the packaged trained network. A step of
    random weights magnifies rounding a thousandfold and would tell nothing.
    """

    def __init__(
        self,
        name: str,
        model: LEMMA,
        device: torch.device,
        plan: Plan,
        batch: int,
        judge: LEMMA | None = None,
    ) -> None:
        self.model, self.device, self.plan = model, device, plan
        self.about = {"model": name, "batch": batch}
        self.batch = _Batch.draw(model, device, batch)
        self.judge = load(JUDGE) if judge is None else judge
        self.judged = _Batch.draw(self.judge, device, min(batch, JUDGED_CROPS))
        self._found: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def prepare(self, variant: str, kind: str) -> tuple[Row, Timed | None]:
        """Start a row and make the step to be timed; None, and the reason, where there is none.

        The row of a step that differs says so.
        """
        row: Row = {**self.about, "variant": variant, "precision": kind, "status": "timed"}
        try:
            row |= self._compared(variant, kind)
            network = self._trainable(variant, copy.deepcopy(self.model))
            optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
            step = Timed(partial(self._step, network, optimizer, kind), partial(precision, kind))
            row["peak_bytes"] = _peak(step, self.device)
        except Unavailable as missing:
            return row | {"status": "unavailable", "reason": str(missing)}, None
        except Exception as error:  # noqa: BLE001  (Triton's share no base with others)
            return row | failed(error), None
        return row, step

    def _compared(self, variant: str, kind: str) -> Row:
        """How far a step lies from the reference's in fp32, and whether that is too far."""
        exact = self._gradients("reference", "float32")
        strayed = _far(self._gradients("reference", kind), exact)
        far = _far(self._gradients(variant, kind), exact)
        # Gradients may be five times as far as values, or twice as far as the reference's own.
        allowed = max(5 * TOLERANCE[kind], 2 * strayed)
        if variant == "reference" or far <= allowed:
            return {"deviation": far}
        reason = f"a deviation of {allowed:.1e} is allowed"
        return {"deviation": far, "status": "differs", "reason": reason}

    def _step(self, network: nn.Module, optimizer: torch.optim.Optimizer, kind: str) -> None:
        optimizer.zero_grad(set_to_none=True)
        self.batch.loss(network, kind).backward()
        optimizer.step()

    def _gradients(self, variant: str, kind: str) -> tuple[Tensor, Tensor]:
        """Loss and gradient (all of it, in one vector) of the judge's step without dropout."""
        if (variant, kind) not in self._found:
            config = self.judge.config
            still = LEMMA(replace(config, dropout=0.0, prior=replace(config.prior, dropout=0.0)))
            still.load_state_dict(self.judge.state_dict())
            network = self._trainable(variant, still)
            with precision(kind):
                loss = self.judged.loss(network, kind)
                loss.backward()
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            found = loss.detach(), torch.cat([g.flatten().float() for g in gradients])
            self._found[variant, kind] = found
        return self._found[variant, kind]

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
    name: str,
    model: LEMMA,
    device: torch.device,
    plan: Plan,
    batch: int,
    judge: LEMMA | None = None,
) -> Iterator[Row]:
    """Time a training step of every variant, in turn; ratios are within a precision."""
    training = Training(name, model, device, plan, batch, judge)
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
