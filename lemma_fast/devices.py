"""The device that a name stands for, and the one that a network is on."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Turn a device's name into a device that is there; raises ValueError in one sentence.

    "auto" is the first CUDA device where there is one, else the CPU.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f'device {device!r} is not a name like "cpu", "cuda" or "cuda:1"'
        ) from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() or "no"
        raise ValueError(f'device "{chosen}" is not there: torch sees {found} CUDA devices')
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError('device "mps" is not there on this machine')
    return chosen


def device_of(model: nn.Module) -> torch.device:
    """Where a network is, bicubic's too, which has no parameters."""
    return next(chain(model.parameters(), model.buffers())).device
