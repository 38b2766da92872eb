"""Batches of any size: parts, memory that runs out, recordings of fixed sizes, threads."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lemma_fast.acceleration.parts import Parts, Recordings, bucket


def images(count):
    return torch.arange(1.0, count + 1)[:, None].expand(-1, 3).contiguous()


class Device:
    """Doubles and counts; has memory for `room` images, and forgets nothing it was asked."""

    def __init__(self, room=10**9):
        self.room, self.sizes = room, []

    def __call__(self, batch):
        self.sizes.append(len(batch))
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("no room")
        return 2 * batch, batch.sum(dim=1)


@pytest.mark.parametrize(
    ("count", "limit", "sizes"),
    [
        (1, 8, [1]),
        (8, 8, [8]),
        (9, 8, [5, 4]),
        (16, 8, [8, 8]),
        (17, 8, [6, 6, 5]),
        (3, 1, [1] * 3),
    ],
)
def test_parts_are_of_nearly_one_size_and_in_order(count, limit, sizes):
    device = Device()
    doubled, sums = Parts(device, limit)(images(count))
    assert device.sizes == sizes
    assert torch.equal(doubled, 2 * images(count))
    assert torch.equal(sums, 3 * images(count)[:, 0])


def test_an_empty_batch_has_the_shapes_of_a_full_one():
    doubled, sums = Parts(Device(), 8)(images(0))
    assert doubled.shape == (0, 3)
    assert sums.shape == (0,)


def test_where_memory_runs_out_parts_are_halved_and_nothing_is_lost():
    device, relieved = Device(room=3), []
    parts = Parts(device, 16, lambda: relieved.append(True))
    doubled, _ = parts(images(21))
    assert torch.equal(doubled, 2 * images(21))
    assert relieved
    assert parts.limit <= 3
    device.sizes.clear()
    parts(images(6))
    assert max(device.sizes) <= 3


def test_results_before_memory_ran_out_are_not_computed_again():
    seen = []

    def run(batch):
        if len(seen) == 1 and len(batch) == 4:
            seen.append("full")
            raise torch.OutOfMemoryError("no room")
        seen.append(batch[:, 0].tolist())
        return (batch,)

    (out,) = Parts(run, 4)(images(8))
    assert torch.equal(out, images(8))
    assert seen == [[1, 2, 3, 4], "full", [5, 6], [7, 8]]


def test_no_room_for_one_image_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        Parts(Device(room=0), 8)(images(2))


class Recorded:
    """Doubles what `batch` holds into fixed memory, as a captured graph does."""

    def __init__(self, size, owner):
        self.batch = torch.full((size, 3), torch.nan)
        self.outputs = (torch.empty(size, 3),)
        self.owner = owner

    def replay(self):
        assert self.owner.busy == 1
        # Long enough for a thread that does not wait its turn to come between.
        time.sleep(0.001)
        torch.mul(self.batch, 2, out=self.outputs[0])
        self.owner.log.append(len(self.batch))


class Recorder:
    """Makes `Recorded`, and sees to it that one use ends before the next begins."""

    def __init__(self):
        self.made, self.log, self.busy = [], [], 0

    def record(self, size):
        self.made.append(size)
        return Recorded(size, self)

    def begin(self):
        self.busy += 1
        assert self.busy == 1

    def end(self):
        self.busy -= 1


def test_buckets_are_powers_of_two():
    sizes = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 64: 64, 65: 128, 256: 256}
    assert {count: bucket(count) for count in sizes} == sizes


def test_batches_are_padded_and_outputs_cut():
    recordings = Recordings(recorder := Recorder(), keep=4)
    for count in (3, 1, 4, 3):
        (out,) = recordings(images(count))
        assert torch.equal(out, 2 * images(count))
    assert recorder.made == [4, 1]
    assert recorder.log == [4, 1, 4, 4]


def test_only_the_recordings_used_last_are_kept():
    recordings = Recordings(recorder := Recorder(), keep=2)
    for count in (1, 2, 1, 4, 1, 2):
        recordings(images(count))
    assert recorder.made == [1, 2, 4, 2]
    assert recordings.sizes == [1, 2]
    recordings.clear()
    assert recordings.sizes == []


def test_outputs_are_fresh_unless_reuse_is_asked_for():
    fresh = Recordings(Recorder(), keep=2)
    (first,) = fresh(images(2))
    fresh(10 * images(2))
    assert torch.equal(first, 2 * images(2))
    reused = Recordings(Recorder(), keep=2, reuse_output=True)
    (first,) = reused(images(2))
    reused(10 * images(2))
    assert torch.equal(first, 20 * images(2))


def test_threads_take_turns():
    recordings = Recordings(Recorder(), keep=3)
    gate = threading.Barrier(4)

    def work(i):
        if i < 4:
            gate.wait(timeout=10)
        batch = i * images(1 + i % 5)
        return torch.equal(recordings(batch)[0], 2 * batch)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))


def test_a_use_that_fails_leaves_the_recordings_usable():
    recorder = Recorder()
    recordings = Recordings(recorder, keep=2)

    def full(size):
        raise torch.OutOfMemoryError("no room")

    recorder.record, kept = full, recorder.record
    with pytest.raises(torch.OutOfMemoryError):
        recordings(images(2))
    recorder.record = kept
    assert torch.equal(recordings(images(2))[0], 2 * images(2))
    assert recordings.sizes == [2]
