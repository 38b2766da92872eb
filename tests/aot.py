"""Compile Triton kernels ahead of time, on any machine: cubins and what they need.

`compile_kernels` runs the cases of one test in a process of its own, because kernels that were
declared under TRITON_INTERPRET cannot be compiled. A signature gives each argument's type in
Triton's own notation: "*fp32:16" (a pointer, aligned to 16 bytes), "i32:16" (a size that 16
divides), "i32", "1" (a size or stride that is 1, which Triton specialises), "fp32"; a tuple of
those for a tuple of strides. As at a launch, what is not a pointer or a size is a constexpr.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sass import Counts, read_sass

# Budgets are of one architecture; tests/launches compiles the network for sm_80 and sm_120 too, and
# checks spills and shared memory there.
CAPABILITIES = (90,)
# What one block may have on the smallest of the three (sm_120); sm_80 and sm_90 have more.
SHARED_LIMIT = 99 * 1024
# Where instructions are counted.
DISASSEMBLED = 90
# Triton's, by its own keys: all tests that compile kernels share it, also from run to run.
CACHE = Path(__file__).resolve().parents[1] / "build" / "triton-cache"

Types = Mapping[str, str | Sequence[str]]


class Resources(NamedTuple):
    """What one cubin needs and what its code holds."""

    registers: int
    """Of a thread."""
    spills: int
    """Bytes of local memory of a thread."""
    shared: int
    """Bytes of a block."""
    products: bool
    """Whether there are products on tensor cores."""
    code: Counts | None = None
    """Of the whole kernel, on sm_90 alone: to disassemble takes as long as to compile."""
    loop: Counts | None = None
    """Of the hot loop, likewise, if there is one: see `read_sass`."""


class Case(NamedTuple):
    """One kernel to compile: where it is ("package.module:name") and the arguments below."""

    kernel: str
    signature: dict[str, str | list[str]]
    constexprs: dict[str, Any]
    capability: int
    num_warps: int
    num_stages: int = 3
    maxnreg: int | None = None


def compile_kernel(
    fn: Callable[..., Any],
    signature: Types,
    constexprs: Mapping[str, Any],
    capability: int,
    num_warps: int,
    num_stages: int = 3,
    maxnreg: int | None = None,
) -> Resources:
    """Make a cubin of one `@triton.jit` function; not in a process with TRITON_INTERPRET set."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], list[list[object]]] = {}

    # Hints are empty where a launch leaves them empty: what both compile then has one key in
    # Triton's cache.
    def read(text: str, path: tuple[int, ...]) -> str:
        kind, _, divisor = text.partition(":")
        if kind == "1":
            constants[path] = 1
            if len(path) == 1:
                hints[path] = []
            return "constexpr"
        if kind != "fp32" and not fn.params[path[0]].do_not_specialize:
            hints[path] = [["tt.divisibility", int(divisor)]] if divisor else []
        return kind

    for place, name in enumerate(fn.arg_names):
        if name in constexprs:
            types[name] = "constexpr"
            constants[place,], hints[place,] = constexprs[name], []
        elif isinstance(signature[name], str):
            types[name] = read(signature[name], (place,))
        else:
            parts = enumerate(signature[name])
            types[name] = tuple(read(text, (place, part)) for part, text in parts)
    unknown = (set(signature) | set(constexprs)) - set(fn.arg_names)
    if unknown:
        raise ValueError(f"{fn.__name__} has no arguments {sorted(unknown)}")
    source = ASTSource(fn, signature=types, constexprs=constants, attrs=hints)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    compiled = triton.compile(source, target=target, options=options)
    products = re.search(r"mma\.sync|wgmma\.mma_async", compiled.asm["ptx"]) is not None
    # What a kernel needs of shared memory, Triton asks for at the launch.
    shared = compiled.metadata.shared
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        tools = triton.knobs.nvidia
        usage = _output(tools.cuobjdump.path, "--dump-resource-usage", str(path))
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        registers, stack, local = map(int, found.groups())
        needs = Resources(registers, stack + local, shared, products)
        if capability != DISASSEMBLED:
            return needs
        code, loop = read_sass(_output(tools.nvdisasm.path, "-c", str(path)))
        return needs._replace(code=code, loop=loop)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_kernels(cases: Sequence[Case]) -> list[Resources]:
    """Compile every case in one fresh process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(CACHE)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [
        Resources(*needs, code and Counts(*code), loop and Counts(*loop))
        for *needs, code, loop in json.loads(run.stdout)
    ]


def _main() -> None:
    results = []
    for fields in json.load(sys.stdin):
        case = Case(*fields)
        module, _, name = case.kernel.partition(":")
        fn = getattr(importlib.import_module(module), name)
        results.append(compile_kernel(fn, *case[1:]))
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    _main()
