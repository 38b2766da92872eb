"""What the benchmarks of single operations share: parity first, a clock that waits, and the floor.

The floor of a call is what this device needs to move the bytes or to do the arithmetic, whichever
is longer, at the rates that it shows in this very run; `extra_info` holds bytes, FLOPs, floor and
how many floors the call took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lemma_fast.bench.timing import Rates, bytes_per_second, flops_per_second
from lemma_fast.ops import fused, reference

BATCHES = (1, 8, 64, 256)
IMPLEMENTATIONS = ("reference", "compiled", "fused")
DIRECTIONS = ("forward", "forward+backward")


def synchronised() -> float:
    """Seconds, once the device has done what was asked of it."""
    torch.cuda.synchronize()
    return time.perf_counter()


# Every file of this folder that times an operation says `pytestmark = MARKS`.
MARKS = [
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="kernels are timed on a GPU; on the CPU they run in Triton's interpreter",
    ),
    pytest.mark.benchmark(timer=synchronised),
]


def _function(implementation: str, name: str) -> Callable[..., Any]:
    table: ModuleType = fused if implementation == "fused" else reference
    function: Callable[..., Any] = getattr(table, name)
    return torch.compile(function, dynamic=False) if implementation == "compiled" else function


def time_operation(
    benchmark: Any,
    name: str,
    implementation: str,
    direction: str,
    arguments: Sequence[Any],
    moved: int,
    flops: int = 0,
) -> None:
    """Check operation `name` against the reference, then time it; `moved` and `flops` are counted.

    Gradients are those of every floating-point argument that requires one.
    """
    function = _function(implementation, name)

    def call() -> Tensor:
        out = function(*arguments)
        return out[0] if isinstance(out, tuple) else out

    out = call().detach()
    expected = getattr(reference, name)(*arguments)
    expected = (expected[0] if isinstance(expected, tuple) else expected).detach()
    # TF32 is allowed to cuDNN by default, to both sides.
    tolerance = 2e-3 if out.dtype == torch.float32 else 2e-2
    assert (out.double() - expected.double()).norm() <= tolerance * expected.double().norm()
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    grad = torch.randn_like(expected)

    def step() -> object:
        if direction == "forward":
            with torch.no_grad():
                return call()
        return torch.autograd.grad(call(), leaves, grad)

    step()
    dtype = out.dtype
    # TF32 is the fastest that fp32 may be.
    here = torch.device("cuda", torch.cuda.current_device())
    rates = Rates(bytes_per_second(here), flops_per_second(here, dtype, tf32=True))
    floor = rates.floor(moved, flops)
    benchmark.pedantic(step, rounds=20, iterations=50, warmup_rounds=3)
    benchmark.extra_info.update(
        bytes=moved,
        flops=flops,
        floor_us=floor * 1e6,
        floors=benchmark.stats.stats.median / floor,
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        dtype=str(dtype),
    )
