"""A shadow of memory that knows which program of a launch read and wrote each element.

`watch` wraps the loads and stores of Triton's interpreter, which runs one program after the other.
It fails where two programs of a launch write one element, where a program reads an element that
another one of the launch writes (before or after), where one store names an element twice, and
where an access lies outside the memory of the launch's arguments. What a program wrote itself, it
may read and write again. `Shadow.check` tells whether the step left anything unwritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

NOBODY, SEVERAL = -1, -2


class Race(AssertionError):
    """Programs of one launch meet in memory, or an access lies outside it."""


class Block:
    """One storage: who read and wrote its elements in this launch, and what was ever written."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.untyped_storage()
        self.start, self.itemsize = self.storage.data_ptr(), tensor.itemsize
        self.stop = self.start + self.storage.nbytes()
        elements = self.storage.nbytes() // tensor.itemsize
        self.names: set[str] = set()
        """Of this launch's arguments."""
        self.views: list[Tensor] = []
        """All launches' arguments."""
        self.written = np.zeros(elements, bool)
        self.readers = np.empty(elements, np.int32)
        self.writers = np.empty(elements, np.int32)
        self.forget()

    def forget(self) -> None:
        """Begin a launch."""
        self.names.clear()
        self.readers.fill(NOBODY)
        self.writers.fill(NOBODY)

    def check(self) -> None:
        """Fail unless each argument was written whole, and nothing between its elements."""
        named = np.zeros_like(self.written)
        for tensor in self.views:
            written, own = (
                torch.from_numpy(marks).as_strided(
                    tensor.shape, tensor.stride(), tensor.storage_offset()
                )
                for marks in (self.written, named)
            )
            left = int((~written).sum())
            assert not left, f"{self.names}: {left} of {tensor.numel()} elements never written"
            own.fill_(True)
        assert not (self.written & ~named).any(), f"{self.names}: written between elements"


class Shadow:
    """All launches of a step: the memory of their arguments and what they wrote."""

    def __init__(self) -> None:
        self.blocks: dict[int, Block] = {}
        self.written: dict[str, set[str]] = {}
        """By kernel: the names of the arguments that it wrote."""
        self.kernel = ""
        self.program = 0
        self.here: list[Block] = []

    def begin(self, kernel: str, arguments: dict[str, Any]) -> None:
        """Note the tensors that a launch may touch."""
        self.kernel = kernel
        self.written.setdefault(kernel, set())
        tensors = {
            name: value
            for name, value in arguments.items()
            if isinstance(value, Tensor) and value.numel()
        }
        places = {name: x.untyped_storage().data_ptr() for name, x in tensors.items()}
        for name, place in places.items():
            self.blocks.setdefault(place, Block(tensors[name])).forget()
        for name, place in places.items():
            self.blocks[place].names.add(name)
            self.blocks[place].views.append(tensors[name])
        self.here = [self.blocks[place] for place in set(places.values())]

    def _find(self, pointers: Any, mask: Any) -> tuple[Block, NDArray[np.int64]] | None:
        at = np.asarray(pointers.data)[np.asarray(mask.data, bool)].astype(np.int64)
        if not at.size:
            return None
        low, high = int(at.min()), int(at.max())
        for block in self.here:
            if block.start <= low and high < block.stop:
                return block, (at - block.start) // block.itemsize
        raise Race(f"{self.kernel}, program {self.program}: an access outside its arguments")

    def load(self, pointers: Any, mask: Any) -> None:
        """Note a load by the current program."""
        if (found := self._find(pointers, mask)) is None:
            return
        block, at = found
        others = block.writers[at]
        if ((others != NOBODY) & (others != self.program)).any():
            raise Race(self._words(block, "reads what another program wrote"))
        readers = block.readers[at]
        block.readers[at] = np.where(
            (readers == NOBODY) | (readers == self.program), self.program, SEVERAL
        )

    def store(self, pointers: Any, mask: Any) -> None:
        """Note a store by the current program."""
        if (found := self._find(pointers, mask)) is None:
            return
        block, at = found
        for others, words in (
            (block.writers[at], "writes what another program wrote"),
            (block.readers[at], "writes what another program read"),
        ):
            if ((others != NOBODY) & (others != self.program)).any():
                raise Race(self._words(block, words))
        if np.unique(at).size != at.size:
            raise Race(self._words(block, "writes an element twice at once"))
        block.writers[at] = self.program
        block.written[at] = True
        self.written[self.kernel] |= block.names

    def _words(self, block: Block, words: str) -> str:
        return f"{self.kernel}, program {self.program}, {'/'.join(sorted(block.names))}: {words}"

    def check(self) -> None:
        """Fail unless each argument that was written at all was written whole."""
        for block in self.blocks.values():
            if block.written.any():
                block.check()


@contextmanager
def watch() -> Iterator[Shadow]:
    """Watch every interpreted launch inside."""
    shadow = Shadow()
    begin = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    set_program = InterpreterBuilder.set_grid_idx

    def arguments(executor: GridExecutor, args: Any, kwargs: Any) -> Any:
        on_host = begin(executor, args, kwargs)
        named = dict(zip(executor.arg_names, on_host[0], strict=False)) | on_host[1]
        shadow.begin(executor.fn.__name__, named)
        return on_host

    def program(builder: InterpreterBuilder, x: int, y: int, z: int) -> None:
        set_program(builder, x, y, z)
        _, height, depth = builder.grid_dim
        shadow.program = (x * height + y) * depth + z

    def masked_load(builder: InterpreterBuilder, pointers: Any, mask: Any, *rest: Any) -> Any:
        shadow.load(pointers, mask)
        return load(builder, pointers, mask, *rest)

    def masked_store(
        builder: InterpreterBuilder, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        shadow.store(pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    def atomic(*_: Any) -> None:
        raise Race(f"{shadow.kernel} has an atomic operation")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "_init_args_hst", arguments)
        patch.setattr(InterpreterBuilder, "set_grid_idx", program)
        patch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", masked_store)
        for name in dir(InterpreterBuilder):
            if name.startswith("create_atomic"):
                patch.setattr(InterpreterBuilder, name, atomic)
        yield shadow
