"""What is timed: variants of the network, precisions, batch sizes, and the crops they are given."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemma_fast.acceleration import tensor_cores
from lemma_fast.model import LEMMA

#: A result, made to be written as JSON.
Row = dict[str, Any]

VARIANTS = (
    "reference",
    "reference-cast",
    "compiled",
    "accelerated",
    "onnxruntime",
    "openvino",
)
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Plan:
    """What to time, and for how long."""

    batches: tuple[int, ...]
    precisions: tuple[str, ...]
    variants: tuple[str, ...] = VARIANTS
    seconds: float = 20.0
    rounds: tuple[int, int] = (5, 60)
    compile_mode: str | None = None


def default_plan(device: torch.device, quick: bool = False) -> Plan:
    """What is worth timing on `device`; `quick` leaves out what takes minutes to prepare."""
    cuda = device.type == "cuda"
    precisions = tuple(PRECISIONS) if cuda else ("float32",)
    mode = "max-autotune" if cuda else None
    variants = VARIANTS if cuda else tuple(v for v in VARIANTS if v != "reference-cast")
    if quick:
        batches = (1, 64) if cuda else (1, 4)
        return Plan(batches, precisions, ("reference", "accelerated"), 3.0, (3, 30), mode)
    sizes = (1, 8, 64, 256) if cuda else (1, 16)
    return Plan(sizes, precisions, variants, compile_mode=mode)


def precision(name: str) -> AbstractContextManager[None]:
    """Set PyTorch's TF32 switches, old and new, to what `name` asks for."""
    return tensor_cores(name != "float32", old_interface=True)


def crops(model: LEMMA, batch: int, device: torch.device, seed: int = 0) -> Tensor:
    """Random crops [N, 4, H, W] in [0, 1]: nothing in the network is faster for what is in them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.config.in_channels, *model.config.size)
    return torch.rand(shape, generator=generator).to(device)
