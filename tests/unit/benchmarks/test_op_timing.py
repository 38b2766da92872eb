"""What benchmarks of operations note: deviation beside the time, floors, records for a suite."""

from types import SimpleNamespace

import op_timing
import pytest
import torch
from suite import records

from lemma_fast.ops import reference


class Benchmark:
    """As much of pytest-benchmark's fixture as is used."""

    name, params = "bench_location_enhance[torch.float32-1-forward-fused]", {"N": 1}

    def __init__(self):
        self.extra_info, self.calls = {}, 0

    def pedantic(self, function, rounds, iterations, warmup_rounds):
        function()
        times = {"median": 2.0, "q1": 1.0, "q3": 3.0, "rounds": rounds}
        self.stats = SimpleNamespace(stats=SimpleNamespace(**times))


@pytest.fixture
def found(monkeypatch, tmp_path):
    """Time an operation on the CPU in the GPU's way, its replays apart; the record of it."""
    monkeypatch.setattr(op_timing, "captured", lambda step: step)
    monkeypatch.setattr(op_timing, "bytes_per_second", lambda device: 100.0)
    monkeypatch.setattr(op_timing, "flops_per_second", lambda *arguments, **more: 100.0)
    path = tmp_path / "records.jsonl"
    for name, value in records.Records(path, 0.0).environment().items():
        monkeypatch.setenv(name, value)

    def time(function, direction="forward"):
        monkeypatch.setattr(op_timing, "_function", lambda *names: function)
        maps = [torch.randn(1, 4, 3, 5).requires_grad_() for _ in range(2)]
        arguments = ("location_enhance", "fused", direction, maps, 400)
        op_timing.time_operation(Benchmark(), *arguments)
        return records.read(path)[-1]

    return time


@pytest.mark.parametrize("direction", op_timing.DIRECTIONS)
def test_an_operation_becomes_a_record(found, direction):
    record = found(reference.location_enhance, direction)
    assert record["part"] == "ops"
    assert record["name"] == Benchmark.name
    assert record["params"] == {"N": "1"}
    assert record["seconds"] == {"median": 2.0, "low": 1.0, "high": 3.0, "count": 10}
    # Four seconds for 400 bytes are the floor, and the call took two.
    assert record["floors"] == 0.5
    assert record["deviation"] == 0
    assert record["differs"] is False


@pytest.mark.parametrize("off", [1.01, float("nan")])
def test_one_that_differs_is_timed_and_says_so(found, off):
    record = found(lambda *maps: off * reference.location_enhance(*maps))
    assert record["differs"] is True
    assert record["seconds"]["median"] == 2.0


def test_the_clock_of_replays_counts_their_calls(monkeypatch):
    monkeypatch.setattr(op_timing.time, "perf_counter", lambda: 30.0)
    assert op_timing.a_call() == 30.0 / op_timing.CALLS


def test_without_a_suite_nothing_is_recorded(monkeypatch):
    monkeypatch.delenv(records.PATH, raising=False)
    assert records.here() is None
