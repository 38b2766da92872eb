"""How things are timed: a clock that waits for the device, turns, and the device's rates.

Nothing here knows the network. All times are seconds a call.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

from lemma_fast.ops.precision import tensor_cores

#: How a variant is run: a call, and what has to be set around it (not timed).
Call = Callable[[], object]
Setting = Callable[[], AbstractContextManager[object]]
#: What a call is known by.
Key = TypeVar("Key")


@dataclass(frozen=True)
class Timed:
    """A call, and the settings it wants around it."""

    call: Call
    setting: Setting = nullcontext


class Clock:
    """Seconds a call takes on `device`.

    On CUDA `wall` chooses between the host's clock, read when the device has finished (what someone
    who waits for one result sees), and the device's own events around calls made without a pause.
    """

    def __init__(self, device: torch.device, wall: bool = True) -> None:
        self.device = device
        self.events = device.type == "cuda" and not wall

    def wait(self) -> None:
        """Return when the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, timed: Timed, repeats: int = 1) -> float:
        """Mean of `repeats` calls without a pause between them."""
        with timed.setting():
            self.wait()
            if self.events:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(repeats):
                    timed.call()
                end.record()
                self.wait()
                return begin.elapsed_time(end) / 1e3 / repeats
            start = time.perf_counter()
            for _ in range(repeats):
                timed.call()
            self.wait()
            return (time.perf_counter() - start) / repeats


def in_turn(
    calls: Mapping[Key, Timed],
    clock: Clock,
    seconds: float,
    rounds: tuple[int, int] = (5, 60),
    sample: float = 0.0,
) -> dict[Key, list[float]]:
    """Time the calls in turn, so that what disturbs the machine disturbs all of them alike.

    Each is warmed up twice. There are between `rounds[0]` and `rounds[1]` rounds, and no new one
    begins after `seconds`. In every round each call has one sample: as many calls as take `sample`
    seconds, at least one. The order moves on by one a round.
    """
    repeats = {}
    for name, timed in calls.items():
        clock.measure(timed)
        once = clock.measure(timed)
        repeats[name] = max(1, math.ceil(sample / once)) if once > 0 else 1
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    names = list(calls)
    begun = time.perf_counter()
    for number in range(rounds[1]):
        if number >= rounds[0] and time.perf_counter() - begun > seconds:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(clock.measure(calls[name], repeats[name]))
    return samples


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of some values."""
    if len(values) < 2:
        low = high = values[0]
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "low": low, "high": high, "count": len(values)}


def ratios(base: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times faster `other` is than `base`, round by round."""
    return spread([b / o for b, o in zip(base, other, strict=True)])


@dataclass(frozen=True)
class Rates:
    """What a device does in this very run: bytes copied and FLOPs of a matrix product a second."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, moved: float, flops: float) -> float:
        """Seconds that the bytes or the arithmetic take, whichever is longer."""
        return max(moved / self.bytes_per_second, flops / self.flops_per_second)


@cache
def bytes_per_second(device: torch.device) -> float:
    """Bytes read and written by a copy that no cache holds."""
    size = 1 << (29 if device.type == "cuda" else 27)
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


@cache
def flops_per_second(device: torch.device, dtype: torch.dtype, tf32: bool = False) -> float:
    """Rate of a large square matrix product of `dtype`."""
    size = 8192 if device.type == "cuda" else 1536
    a = torch.randn(size, size, device=device).to(dtype)
    with tensor_cores(tf32):
        return 2 * size**3 / _best(lambda: a @ a, device)


def _best(call: Call, device: torch.device, repeats: int = 10) -> float:
    clock = Clock(device)
    clock.measure(Timed(call))
    return min(clock.measure(Timed(call)) for _ in range(repeats))
