"""Bytes that an operation keeps for backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among arguments, those in lists and tuples too."""
    flat: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            flat.append(value)
        elif isinstance(value, (list, tuple)):
            flat += tensors(value)
    return flat


def kept_bytes(function: Callable[..., Tensor], arguments: Sequence[Any]) -> int:
    """Bytes of the storages that `function` keeps for backward, its arguments apart."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Held until all is counted, or a storage's address could come back as another's.
        out = function(*arguments)
    for given in tensors(arguments):
        kept.pop(given.untyped_storage().data_ptr(), None)
    del out
    return sum(kept.values())
