"""What the benchmarks of single operations share: parity first, a clock that waits, and the floor.

The floor of a call is what this device needs to move the bytes or to do the arithmetic, whichever
is longer, at the rates that it shows in this very run; `extra_info` holds bytes, FLOPs, floor and
how many floors the call took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

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


def _best_time(call: Callable[[], object], repeats: int = 10) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = synchronised()
        call()
        times.append(synchronised() - start)
    return min(times)


@cache
def bytes_per_second() -> float:
    """Bytes read and written by a copy of 512 MB."""
    source = torch.empty(1 << 29, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _best_time(lambda: target.copy_(source))


@cache
def flops_per_second(dtype: torch.dtype) -> float:
    """Rate of a square matrix product of `dtype`; TF32 for fp32."""
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    rate = 2 * size**3 / _best_time(lambda: a @ a)
    torch.backends.cuda.matmul.allow_tf32 = before
    return rate


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
    floor = max(moved / bytes_per_second(), flops / flops_per_second(dtype))
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
