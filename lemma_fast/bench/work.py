"""What a forward pass must do at least: arithmetic, and bytes to and from memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lemma_fast.bench.plan import PRECISIONS, Row, crops
from lemma_fast.bench.timing import Rates, bytes_per_second, flops_per_second
from lemma_fast.model import LEMMA


class _Moved(TorchDispatchMode):
    """Adds up what every operation that is not a view reads and writes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for x in tree_leaves((args, kwargs, out)):
                if isinstance(x, Tensor):
                    self.bytes += x.numel() * x.element_size()
        return out


@dataclass(frozen=True)
class Work:
    """What a forward pass must do, counted: FLOPs a crop, weights, bytes in and out a crop."""

    flops: int
    parameters: int
    in_out_bytes: int
    eager_bytes: tuple[int, int]
    """What eager mode moves in fp32: once, and a crop."""

    def of(self, batch: int, kind: str, device: torch.device) -> Row:
        """FLOPs, bytes and the floor of a batch: weights, crops and images moved once."""
        dtype = PRECISIONS[kind]
        flops = batch * self.flops
        moved = self.parameters * dtype.itemsize + batch * self.in_out_bytes
        rates = Rates(bytes_per_second(device), flops_per_second(device, dtype, kind == "tf32"))
        return {
            "flops": flops,
            "bytes": moved,
            "eager_bytes": self.eager_bytes[0] + batch * self.eager_bytes[1],
            "floor_seconds": rates.floor(moved, flops),
        }


def count_work(model: LEMMA) -> Work:
    """Count a forward pass on the CPU; PyTorch's counter knows attention only by its products."""
    cpu = copy.deepcopy(model).cpu().eval()
    moved = []
    for batch in (1, 2):
        with torch.no_grad(), _Moved() as mode:
            cpu(crops(cpu, batch, torch.device("cpu")))
        moved.append(mode.bytes)
    lr = crops(cpu, 1, torch.device("cpu"))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sr, _ = cpu(lr)
    unused = 0 if cpu.rectifier is None else sum(p.numel() for p in cpu.rectifier.parameters())
    parameters = sum(p.numel() for p in cpu.parameters()) - unused
    a_crop = moved[1] - moved[0]
    in_out = 4 * (lr.numel() + sr.numel())
    return Work(counter.get_total_flops(), parameters, in_out, (moved[0] - a_crop, a_crop))
