"""Record the launches of Triton kernels without running them, as cases to compile.

`record` runs a step on CPU tensors in a process with TRITON_INTERPRET set. No kernel runs: its
outputs stay as torch.empty leaves them. Arguments are described as Triton specialises them at a
launch: a pointer or an integer that 16 divides, an integer that is 1, an argument that is None.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from aot import Case
from triton.runtime.interpreter import InterpretedFunction

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Launch(NamedTuple):
    """One launch: its kernel's name, grid and case (without the capability)."""

    name: str
    grid: tuple[int, ...]
    case: Case


def _type_of(value: Any, specialise: bool = True) -> str | list[str]:
    if isinstance(value, tuple | list):
        return [str(_type_of(part)) for part in value]
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype] + (":16" if value.data_ptr() % 16 == 0 else "")
    if isinstance(value, float):
        return "fp32"
    if specialise and value == 1:
        return "1"
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind + (":16" if specialise and value % 16 == 0 else "")


def _launch(fn: InterpretedFunction, args: Any, grid: Any, kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    given = inspect.signature(fn.fn).bind(*args, **kwargs).arguments
    kinds = inspect.get_annotations(fn.fn)
    plain = fn.kwargs["do_not_specialize"] or ()
    signature, constexprs = {}, {}
    for name, value in given.items():
        if value is None or "constexpr" in str(kinds.get(name)):
            constexprs[name] = value
        else:
            signature[name] = _type_of(value, name not in plain)
    place = f"{fn.fn.__module__}:{fn.fn.__name__}"
    # 4 warps are Triton's own choice.
    case = Case(place, signature, constexprs, 0, **{"num_warps": 4} | options)
    return Launch(fn.fn.__name__, tuple(grid), case)


def record(step: Callable[[], object]) -> list[Launch]:
    """Return the launches of `step` in their order, without those that repeat a case."""
    launches: list[Launch] = []

    def run(fn: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = _launch(fn, args, grid, kwargs)
        if launch not in launches:
            launches.append(launch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", run)
        step()
    return launches
