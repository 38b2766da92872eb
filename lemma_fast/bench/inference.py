"""Forward passes: every variant timed in turn, and compared with what the reference returns.

The row of a variant that does not return what the reference does says so beside its time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from lemma_fast.bench.plan import Plan, Row, crops, precision
from lemma_fast.bench.timing import Clock, Timed, in_turn, ratios, spread
from lemma_fast.bench.variants import Unavailable, Variants
from lemma_fast.bench.work import count_work
from lemma_fast.model import LEMMA

#: ||sr - expected|| / ||expected||, where expected is the reference's in fp32 without TF32. A half
#: type may also stray twice as far as the reference itself does in that type.
TOLERANCE = {"float32": 1e-4, "tf32": 2e-3, "bfloat16": 2e-2, "float16": 5e-3}
#: Share of crops whose length must be the reference's.
SAME_LENGTHS = {"float32": 1.0, "tf32": 0.98, "bfloat16": 0.98, "float16": 0.98}


def time_model(name: str, model: LEMMA, device: torch.device, plan: Plan) -> Iterator[list[Row]]:
    """Time every variant in every precision; yields the rows of a batch size when it is done.

    All are timed in turn in one run; `ratio` is against the reference in eager mode, in fp32 with
    TF32 where the device has it. `seconds` are those of one batch: at batch 1 by the host's clock
    around single calls, above it on CUDA by the device's own without a pause between calls.
    """
    variants = Variants(model, device, plan.compile_mode)
    base = ("reference", "tf32" if "tf32" in plan.precisions else plan.precisions[0])
    work = count_work(variants.model)
    for batch in plan.batches:
        lr = crops(model, batch, device)
        with precision("float32"):
            expected = variants.forward("reference", "float32", batch)(lr)
        rows: dict[tuple[str, str], Row] = {}
        calls: dict[tuple[str, str], Timed] = {}
        for kind in plan.precisions:
            strayed = 0.0
            for variant in plan.variants:
                row: Row = {"model": name, "variant": variant, "precision": kind, "batch": batch}
                key = variant, kind
                rows[key] = row | work.of(batch, kind, device)
                timed = prepare(variants, key, lr, expected, strayed, rows[key])
                if variant == "reference":
                    strayed = rows[key].get("deviation", 0.0)
                if timed is not None:
                    calls[key] = timed
        clock = Clock(device, wall=batch == 1)
        # At batch 1 each call waits for the last; above, samples are long enough for the clock.
        samples = time_rows(rows, calls, clock, plan, 0.0 if batch == 1 else 0.02)
        for key, seconds in samples.items():
            if base in samples:
                rows[key]["ratio"] = ratios(samples[base], seconds)
        yield list(rows.values())


def time_rows(
    rows: Mapping[tuple[str, str], Row],
    calls: Mapping[tuple[str, str], Timed],
    clock: Clock,
    plan: Plan,
    sample: float = 0.0,
) -> dict[tuple[str, str], list[float]]:
    """Time the calls in turn and write `seconds` into their rows; returns the samples.

    Where that raises an error, the rows of the calls say so, and there are no samples.
    """
    if not calls:
        return {}
    try:
        samples = in_turn(calls, clock, plan.seconds, plan.rounds, sample)
    except Exception as error:  # noqa: BLE001  (other rows, and what comes later, are wanted)
        for key in calls:
            rows[key].update(failed(error))
        return {}
    for key, seconds in samples.items():
        rows[key]["seconds"] = spread(seconds)
    return samples


def prepare(
    variants: Variants,
    key: tuple[str, str],
    lr: Tensor,
    expected: tuple[Tensor, Tensor],
    strayed: float,
    row: Row,
) -> Timed | None:
    """Build a variant and compare it; None, and the reason in `row`, where it does not run.

    `key` is a variant and a precision, `expected` what the reference makes of `lr` in fp32, and
    `strayed` how far the reference itself strays from that in this precision. A variant that
    differs is returned all the same, and `row` says so.
    """
    variant, kind = key
    memory = _Memory(variants.device)
    try:
        with precision(kind):
            forward = variants.forward(variant, kind, len(lr))
            sr, lengths = forward(lr)
    except Unavailable as reason:
        row |= {"status": "unavailable", "reason": str(reason)}
        return None
    except Exception as error:  # noqa: BLE001  (Triton's share no base with others)
        row |= failed(error)
        return None
    row["peak_bytes"] = memory.peak()
    if key in variants.uses:
        row["uses"] = variants.uses[key]
    row["deviation"] = deviation(sr, expected[0])
    row["same_lengths"] = (lengths == expected[1]).double().mean().item()
    row |= {"status": "timed"}
    # What the reference itself loses in a half type is a finding, not a fault.
    if not variant.startswith("reference"):
        row |= judged(row, kind, strayed)
    return Timed(partial(forward, lr), partial(precision, kind))


def judged(row: Row, kind: str, strayed: float) -> Row:
    """What a row says of its deviation and lengths in a precision: nothing, or that it differs."""
    allowed = max(TOLERANCE[kind], 2 * strayed)
    same = SAME_LENGTHS[kind]
    if row["deviation"] <= allowed and row["same_lengths"] >= same:
        return {}
    return {
        "status": "differs",
        "reason": f"a deviation of {allowed:.1e} and {same:.0%} of the lengths are allowed",
    }


def failed(error: Exception) -> Row:
    """What a row says of a variant that raised an error."""
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}


def deviation(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, in fp64."""
    wide = expected.double()
    return ((got.double() - wide).norm() / wide.norm()).item()


class _Memory:
    """Bytes that a variant's construction and first call take on a CUDA device, at most."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            gc.collect()
            self.before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)

    def peak(self) -> int | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) - self.before
