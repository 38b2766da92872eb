"""What the benchmarks of single operations share: parity beside the time, a clock, and the floor.

On a GPU a call is captured in a CUDA graph, CALLS times over, and replays are timed: a call from
Python takes the host longer than most of these take the device. The floor of a call is what this
device needs to move the bytes or to do the arithmetic, whichever is longer, at the rates that it
shows in this very run; `extra_info` holds bytes, FLOPs, floor, how many floors the call took, and
how far its results lie from the reference's. In a run of gpu_suite.py each is a record as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from memory import tensors
from suite.records import here
from torch import Tensor

from lemma_fast.bench.timing import Rates, bytes_per_second, flops_per_second
from lemma_fast.ops import fused, reference

BATCHES = (1, 8, 64, 256)
IMPLEMENTATIONS = ("reference", "compiled", "fused")
DIRECTIONS = ("forward", "forward+backward")


#: So many calls are captured in one graph, and so long is a sample of replays at least.
CALLS, SAMPLE = 10, 5e-3
#: Deviations within which a result is the reference's: TF32 is allowed to cuDNN, to both sides.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def synchronised() -> float:
    """Seconds, once the device has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def a_call() -> float:
    """The clock of replays: seconds by the number of calls in a graph."""
    return synchronised() / CALLS


# Every file of this folder whose operations run on a GPU alone says `pytestmark = MARKS`.
MARKS = [
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="kernels are timed on a GPU; on the CPU they run in Triton's interpreter",
    ),
    pytest.mark.benchmark(timer=a_call),
]


def _function(implementation: str, name: str) -> Callable[..., Any]:
    table: ModuleType = fused if implementation == "fused" else reference
    function: Callable[..., Any] = getattr(table, name)
    return torch.compile(function, dynamic=False) if implementation == "compiled" else function


def captured(step: Callable[[], object]) -> Callable[[], None]:
    """A graph of CALLS calls of `step`, ready to be replayed."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            step()
    return graph.replay


def time_replays(benchmark: Any, step: Callable[[], object]) -> None:
    """Time a call on the GPU under the clock `a_call`, in samples of at least SAMPLE seconds."""
    replay = captured(step)
    replay()
    begun = synchronised()
    replay()
    once = synchronised() - begun
    iterations = max(1, math.ceil(SAMPLE / once))
    benchmark.pedantic(replay, rounds=10, iterations=iterations, warmup_rounds=1)


def keep(benchmark: Any, **about: object) -> None:
    """Note in `extra_info` what was timed, and record it where a suite runs."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "cpu"
    benchmark.extra_info.update(about, device=device, torch=torch.__version__)
    if (records := here()) is not None:
        times = benchmark.stats.stats
        seconds = {"median": times.median, "low": times.q1, "high": times.q3, "count": times.rounds}
        params = {name: str(value) for name, value in (benchmark.params or {}).items()}
        record = {"name": benchmark.name, "params": params, "seconds": seconds}
        records.add("ops", record | dict(benchmark.extra_info))


def compared(got: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, object]:
    """The largest relative deviation of results, and whether it is more than rounding."""
    worst = 0.0
    for mine, theirs in zip(got, expected, strict=True):
        far = ((mine.double() - theirs.double()).norm() / theirs.double().norm()).item()
        # max() would pass over NaN.
        worst = far if not far <= worst else worst
    return {"deviation": worst, "differs": not worst <= TOLERANCE[got[0].dtype]}


def time_operation(
    benchmark: Any,
    name: str,
    implementation: str,
    direction: str,
    arguments: Sequence[Any],
    moved: int,
    flops: int = 0,
) -> None:
    """Compare operation `name` with the reference and time it; `moved` and `flops` are counted.

    Gradients are those of every floating-point argument that requires one, in lists too. One that
    differs is timed all the same, and says so.
    """
    leaves = [x for x in tensors(arguments) if x.requires_grad]

    def call(function: Callable[..., Any]) -> Tensor:
        out = function(*arguments)
        return out[0] if isinstance(out, tuple) else out

    def step(function: Callable[..., Any]) -> Sequence[Tensor]:
        if direction == "forward":
            with torch.no_grad():
                return (call(function),)
        return torch.autograd.grad(call(function), leaves, grad)

    expected = call(getattr(reference, name)).detach()
    grad = torch.randn_like(expected)
    function = _function(implementation, name)
    # Gradients pass through kinks, where rounding decides: the values alone are judged.
    judged = compared([call(function).detach()], [expected])
    dtype = expected.dtype
    # TF32 is the fastest that fp32 may be.
    rate = flops_per_second(expected.device, dtype, tf32=True)
    floor = Rates(bytes_per_second(expected.device), rate).floor(moved, flops)
    about = {"bytes": moved, "flops": flops, "floor_us": floor * 1e6, "dtype": str(dtype)}
    time_replays(benchmark, partial(step, function))
    keep(benchmark, **about, **judged, floors=benchmark.stats.stats.median / floor)
