"""A CUDA device that computes nothing: PyTorch's FakeTensors on "cuda", and Triton's own launches.

`fake_device` makes this process believe in one device of a compute capability. Tensors have sizes,
strides and addresses but no contents. A fused operation runs as a user's call would: its
arguments go through the dispatcher, and its kernels through Triton's binder, compiler and launcher
to the driver of `driver.c`. Every other operation only says what it would return.

Import it first in a process of its own, started as `test_launches.py` does.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import before_torch  # noqa: F401
import torch
import triton
from torch._library.custom_ops import OPDEFS
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# As in driver.c. Storages lie far enough apart that none reaches the next.
FIRST_ADDRESS, SPACING = 1 << 44, 1 << 34
CAPABILITY = int(os.environ["FAKE_CUDA_CAPABILITY"])


class Launch(NamedTuple):
    """One launch as the driver got it, and what its cubin needs."""

    kernel: str
    """ "module.function" below lemma_fast.kernels."""
    grid: tuple[int, int, int]
    threads: int
    shared: int
    """Bytes a block, asked for at the launch."""
    registers: int
    """A thread."""
    spills: int
    """Bytes of local memory a thread."""


class _LastLaunch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_long),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
    )


class _Driver(nvidia.CudaDriver):
    """Triton's driver, with nothing replaced but what it asks of PyTorch's CUDA half."""

    def __init__(self) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_device_capability = lambda device: divmod(CAPABILITY, 10)
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None


class _StandIn:
    """What Triton takes for a tensor: a type and an address."""

    def __init__(self, tensor: FakeTensor, addresses: dict[int, tuple[object, int]]) -> None:
        self.dtype = tensor.dtype
        storage = tensor.untyped_storage()
        # The storage is kept, or another might get its number.
        _, first = addresses.setdefault(
            storage._cdata, (storage, FIRST_ADDRESS + len(addresses) * SPACING)
        )
        self.address = first + tensor.storage_offset() * tensor.itemsize

    def data_ptr(self) -> int:
        return self.address


class _RunFused(TorchDispatchMode):
    """Runs the bodies of our custom operations, of which FakeTensors would know the shapes only."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        said = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default:
            return _laid_out(said, *args[:2])
        operation = OPDEFS.get(function.name())
        if operation is None or function.namespace != "lemma_fast":
            return said
        with self:
            done = operation._init_fn(*args, **(kwargs or {}))
        for one, two in zip(tree_leaves(said), tree_leaves(done), strict=True):
            assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype), (
                f"{function}: {one} is announced, {two} is returned"
            )
        return done


def _laid_out(out: torch.Tensor, features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Lay a convolution's result out as cuDNN does; a CPU build's FakeTensors do not."""
    layouts = (suggest_memory_format(features), suggest_memory_format(weight))
    last = torch.channels_last in layouts
    return out.contiguous(memory_format=torch.channels_last) if last else out


@contextmanager
def fake_device() -> Iterator[list[Launch]]:
    """Enter with a list to which every launch is added."""
    path = Path(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1")
    fake = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    fake.fake_last_launch.restype = ctypes.POINTER(_LastLaunch)
    driver.set_active(_Driver())
    _patch_torch()
    launches: list[Launch] = []
    addresses: dict[int, tuple[object, int]] = {}
    run = JITFunction.run

    def stand_in(argument: Any) -> Any:
        return _StandIn(argument, addresses) if isinstance(argument, FakeTensor) else argument

    def recorded(self: JITFunction[Any], *args: Any, **keywords: Any) -> Any:
        for tensor in tree_leaves((args, keywords)):
            assert not isinstance(tensor, torch.Tensor) or tensor.is_cuda, (
                f"{self.fn.__name__} is given a tensor on {tensor.device}"
            )
        before = fake.fake_last_launch().contents.count
        keywords = {name: stand_in(value) for name, value in keywords.items()}
        kernel = run(self, *map(stand_in, args), **keywords)
        last = fake.fake_last_launch().contents
        assert last.count == before + 1, f"{self.fn.__name__} was not launched"
        registers, spills = _resources(kernel.asm["cubin"])
        assert registers * last.threads <= 65536, f"{self.fn.__name__}: too many registers"
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        launches.append(
            Launch(name, tuple(last.grid), last.threads, last.shared, registers, spills)
        )
        return kernel

    JITFunction.run = recorded
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _RunFused():
            yield launches
    finally:
        JITFunction.run = run


def _patch_torch() -> None:
    """Answer for the one device where a PyTorch without CUDA would say that there is none."""
    torch.cuda._exchange_device = lambda device: 0
    torch.cuda._maybe_exchange_device = lambda device: 0
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True


@cache
def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and local memory of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, text
    registers, stack, local = map(int, found.groups())
    return registers, stack + local
