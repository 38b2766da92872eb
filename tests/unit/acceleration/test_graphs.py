"""CUDA graphs and Python's collector: nothing is left to it, and it stays off in a capture."""

import gc
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from lemma_fast import LEMMA, LemmaConfig, accelerate
from lemma_fast.acceleration import accelerated, graphs
from lemma_fast.acceleration.graphs import CudaRecorder


class Fake:
    """A stream, an event or a graph that does nothing."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_: None


@pytest.fixture
def machine(monkeypatch):
    """A CUDA device that captures in name only; returns what happened in turn."""
    events = []

    class Capture:
        def __init__(self, graph, **_):
            pass

        def __enter__(self):
            assert not gc.isenabled()
            events.append("begin")

        def __exit__(self, *_):
            assert not gc.isenabled()
            events.append("end")

    for name in ("Event", "Stream", "CUDAGraph", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, Fake)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    collect = gc.collect
    monkeypatch.setattr(graphs.gc, "collect", lambda: events.append("collect") or collect())
    return events


@contextmanager
def collector(on):
    before = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        yield
    finally:
        (gc.enable if before else gc.disable)()


def recorder(run):
    return CudaRecorder(run, (3,), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_off_in_a_capture_and_then_as_before(machine, on):
    def run(batch):
        machine.append("run")
        assert gc.isenabled() == (on and machine.count("run") <= graphs.WARM_UPS)
        return (batch,)

    with collector(on):
        recorder(run).record(2)
        assert gc.isenabled() == on
    assert machine == ["collect", *["run"] * graphs.WARM_UPS, "begin", "run", "end"]


@pytest.mark.parametrize("failing", [1, graphs.WARM_UPS + 1])
def test_an_error_leaves_the_collector_and_cudnn_as_they_were(machine, failing):
    def run(batch):
        machine.append("run")
        assert torch.backends.cudnn.benchmark
        if machine.count("run") == failing:
            raise RuntimeError("stop")
        return (batch,)

    with collector(True):
        with pytest.raises(RuntimeError, match="stop"):
            recorder(run).record(2)
        assert gc.isenabled()
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("new", [True, False])
def test_either_interface_to_tf32_may_have_been_used(machine, new):
    if new:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    else:
        torch.backends.cudnn.allow_tf32 = True
    recorder(lambda batch: (batch,)).record(1)
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


class FakeRecorder(SimpleNamespace):
    """Records nothing: a replay computes."""

    def __init__(self, run, shape, dtype, device):
        super().__init__(run=run, shape=shape, begin=lambda: None, end=lambda: None)

    def record(self, size):
        batch = torch.zeros(size, *self.shape)
        return SimpleNamespace(batch=batch, outputs=self.run(batch), replay=lambda: None)


@pytest.mark.parametrize("with_graphs", [True, False])
def test_the_last_reference_frees_everything(monkeypatch, with_graphs):
    monkeypatch.setattr(accelerated, "CudaRecorder", FakeRecorder)
    model = LEMMA(LemmaConfig.small()).eval()
    fast = accelerate(model)
    if with_graphs:
        parts = fast.config, fast.network, fast.plan
        fast = accelerated.Accelerated(*parts, 8, True, False, None, None)
    fast(torch.rand(1, 4, 16, 64))
    fast.parts.relieve()
    fast(torch.rand(1, 4, 16, 64))
    held = weakref.ref(fast), weakref.ref(fast.network)
    if with_graphs:
        del parts
        held += (weakref.ref(fast.recordings),)
    gc.collect()
    with collector(False):
        del fast
        assert [each() for each in held] == [None] * len(held)
