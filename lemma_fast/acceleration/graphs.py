"""CUDA graphs of the network: one for each batch size, all in one memory pool."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor

Run = Callable[[Tensor], tuple[Tensor, ...]]

# Before a capture: kernels are compiled, cuDNN tries its algorithms, libraries get workspaces.
WARM_UPS = 3
# One capture at a time, so that each can leave the collector as it was.
_CAPTURING = threading.Lock()


class CudaGraph:
    """A captured run on a batch of a fixed size."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, batch: Tensor, outputs: tuple[Tensor, ...]
    ) -> None:
        self.graph, self.batch, self.outputs = graph, batch, outputs

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """Captures `run` on zeros [size, *shape] of `dtype` on `device`.

    The graphs share a pool, so a replay may overwrite another's outputs; callers copy these first.
    """

    def __init__(
        self, run: Run, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.run, self.shape, self.dtype, self.device = run, shape, dtype, device
        self.done = torch.cuda.Event()
        # One for all recordings: a stream brings a workspace of cuBLAS with it.
        self.aside = torch.cuda.Stream(device)
        self.recorded: WeakSet[CudaGraph] = WeakSet()

    def begin(self) -> None:
        # The last use may have been on another stream.
        torch.cuda.current_stream(self.device).wait_event(self.done)

    def end(self) -> None:
        self.done.record(torch.cuda.current_stream(self.device))

    def record(self, size: int) -> CudaGraph:
        with torch.cuda.device(self.device):
            # Later batches are copied into it, in and out of inference mode.
            with torch.inference_mode(False):
                batch = torch.zeros(size, *self.shape, dtype=self.dtype, device=self.device)
            if not self.recorded:
                # PyTorch refuses a pool again whose graphs are all gone.
                self.pool = torch.cuda.graph_pool_handle()
            here = torch.cuda.current_stream()
            self.aside.wait_stream(here)
            # Garbage may hold graphs and memory, which can be had before the capture.
            gc.collect()
            with torch.cuda.stream(self.aside), _cudnn_benchmark():
                for _ in range(WARM_UPS):
                    self.run(batch)
                graph = torch.cuda.CUDAGraph()
                # Other threads may go on using the device meanwhile.
                with (
                    _without_collector(),
                    torch.cuda.graph(
                        graph, pool=self.pool, stream=self.aside, capture_error_mode="thread_local"
                    ),
                ):
                    outputs = self.run(batch)
            here.wait_stream(self.aside)
        recording = CudaGraph(graph, batch, outputs)
        self.recorded.add(recording)
        return recording


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep the cyclic collector off: a graph that it destroys would make a capture invalid."""
    with _CAPTURING:
        was_on = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_on:
                gc.enable()


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN try its algorithms; `cudnn.flags` would read TF32 by the old interface."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
