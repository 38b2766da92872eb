"""Batches of any size over a function that takes some sizes best: parts, retries, padding.

Nothing here knows a device. `Parts` splits a batch; `Recordings` serves each part from a recording
of a fixed size, one at a time. Both are called with a batch and return a tuple of tensors, whose
first dimension is the batch's.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Run = Callable[[Tensor], tuple[Tensor, ...]]


class Parts:
    """Runs a batch in parts of nearly the same size, none above `limit`.

    A part that the device has no memory for is halved, and so is the limit of later calls; results
    that are there stay. `relieve` is called before each new try. Raises torch.OutOfMemoryError
    where one image is too many. Without a `limit` a batch stays whole.
    """

    def __init__(
        self, run: Run, limit: int | None, relieve: Callable[[], None] = lambda: None
    ) -> None:
        self.run, self.limit, self.relieve = run, limit, relieve

    def __call__(self, batch: Tensor) -> tuple[Tensor, ...]:
        if not len(batch):
            # Only the shapes are wanted, and they come from one image.
            one = self(batch.new_zeros(1, *batch.shape[1:]))
            return tuple(result[:0] for result in one)
        if self.limit is None:
            return self.run(batch)
        waiting = self._split(batch, self.limit)[::-1]
        done: list[tuple[Tensor, ...]] = []
        while waiting:
            part = waiting.pop()
            finished = self._try(part)
            if finished is not None:
                done.append(finished)
                continue
            # Out of the handler: the error held the frames, and with them the memory.
            self.relieve()
            smaller = (len(part) + 1) // 2
            self.limit = min(self.limit, smaller)
            waiting.extend(self._split(part, smaller)[::-1])
        if len(done) == 1:
            return done[0]
        return tuple(torch.cat(pieces) for pieces in zip(*done, strict=True))

    @staticmethod
    def _split(batch: Tensor, limit: int) -> list[Tensor]:
        count = -(-len(batch) // limit)
        return list(batch.tensor_split(count))

    def _try(self, part: Tensor) -> tuple[Tensor, ...] | None:
        try:
            return self.run(part)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            return None


class Recording(Protocol):
    """A run of a fixed batch size that can be repeated on what `batch` holds."""

    batch: Tensor
    outputs: tuple[Tensor, ...]

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Makes recordings, which may share memory: only one of them is in use at a time."""

    def record(self, size: int) -> Recording: ...
    def begin(self) -> None:
        """Wait, on the device, for the last use."""

    def end(self) -> None:
        """Mark the end of a use."""


class Recordings:
    """Serves batches from recordings of 1, 2, 4, ... images, made when first needed.

    A batch is padded to the next size and the outputs cut. At most `keep` recordings stay, those
    used last. Threads take turns. Outputs are copies, but with `reuse_output` views into the
    recording that the next call overwrites.
    """

    def __init__(self, recorder: Recorder, keep: int, reuse_output: bool = False) -> None:
        self.recorder, self.keep, self.reuse_output = recorder, keep, reuse_output
        self._kept: OrderedDict[int, Recording] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def sizes(self) -> list[int]:
        """Sizes that are recorded, the one used last at the end."""
        return list(self._kept)

    def __call__(self, batch: Tensor) -> tuple[Tensor, ...]:
        count = len(batch)
        with self._lock:
            self.recorder.begin()
            try:
                recording = self._recording(bucket(count))
                # Rows past the batch keep what they had: images do not see each other.
                recording.batch[:count].copy_(batch)
                recording.replay()
                outputs = tuple(output[:count] for output in recording.outputs)
                if not self.reuse_output:
                    outputs = tuple(output.clone() for output in outputs)
            finally:
                self.recorder.end()
        return outputs

    def clear(self) -> None:
        """Forget all recordings."""
        with self._lock:
            self._kept.clear()

    def _recording(self, size: int) -> Recording:
        if size not in self._kept:
            while len(self._kept) >= self.keep:
                self._kept.popitem(last=False)
            self._kept[size] = self.recorder.record(size)
        self._kept.move_to_end(size)
        return self._kept[size]


def bucket(count: int) -> int:
    """The power of two that holds `count` images."""
    return 1 << (count - 1).bit_length()
