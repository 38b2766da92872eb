"""Counts the nodes of the accelerated network's CUDA graph by stage, without a GPU.

    python tests/graph_nodes.py [--write]

prints a table, and with --write changes budgets/graph_nodes.json, the budget. FakeTensors on "cuda"
run the forward pass as a capture would, and every operator is logged. An operator is one kernel,
except those in `LAUNCHES`; a node of the graph is one launch. A call on the host (a copy from or
to it, a wait) is logged too; there may be none.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import cudnn_stand_in  # noqa: F401
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lemma_fast import LEMMA, LemmaConfig
from lemma_fast.acceleration import epilogues
from lemma_fast.acceleration.layers import Plan
from lemma_fast.acceleration.swap import folded
from lemma_fast.ops import adafm

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# By the innermost module that is running; the first that matches counts.
STAGES = {
    "residual network": r"prior\.vision\.resnet.*",
    "transformer": r"prior\.vision\.encoder.*",
    "position attention": r"prior\.vision\.attention.*",
    "language": r"prior\.language.*",
    "text encoder": r"guidance\.text_encoder.*",
    "guidance": r"guidance.*",
    "AdaFM": r"blocks\.\d+\.fusion",
    "GRU": r"blocks\.\d+\.(vertical|horizontal)",
    "SR blocks": r"blocks.*|tail",
    "upsampler": r"upsampler.*",
    "rest": r".*",
}
ATTENTION = "cross-attention"
COPIES = "layout copies"
BUDGET = Path(__file__).parent / "budgets" / "graph_nodes.json"
# Allocations and names for what is there.
NOTHING = re.compile(
    r"aten\.(detach|alias|empty|empty_like|empty_strided|new_empty|new_empty_strided|lift_fresh"
    r"|_unsafe_view)\.|prim\."
)
# What waits for the device, or takes a number from it to the host.
WAITS = re.compile(r"aten\.(_local_scalar_dense|item|nonzero|is_nonzero|equal|masked_select)\.")
# Kernels of an operator where these are not one. ATen adds the bias of a cuDNN convolution in a
# kernel of its own. Attention with a mask of booleans makes one of numbers first, and pads it.
CONVOLUTION_WITH_BIAS, MASKED_ATTENTION = 2, 4
LAUNCHES = {
    "lemma_fast.adafm_inference.default": 2,
    "lemma_fast.compress_select.default": 2,
    "lemma_fast.gather_region.default": 1,
    "lemma_fast.sparse_cross_attention.default": 2,
}


@dataclass
class Log(TorchDispatchMode):
    """What ran: nodes by stage and operator, layout copies, and dealings with the host."""

    nodes: Counter[tuple[str, str]] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    """Whole maps taken from channels-last to channels-first or back; they are nodes as well."""
    host: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=lambda: [""])

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def stage(self) -> str:
        name = self.running[-1]
        return next(stage for stage, pattern in STAGES.items() if re.fullmatch(pattern, name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if name == "aten.convolution.default":
            out = laid_out(out, *given[:2])
        if func.is_view or NOTHING.match(name):
            return out
        from_host = any(x.device.type == "cpu" and x.dim() for x in given)
        if WAITS.match(name) or from_host or any(x.device.type == "cpu" for x in made):
            self.host.append(f"{self.running[-1]}: {name}")
        stage = ATTENTION if "sparse_cross_attention" in name else self.stage
        copied = layout_copies(name, given, made)
        self.copies[stage] += copied
        count = launches(name, args, copied)
        self.nodes[stage, name] += count
        self.note(stage, name, count, args, made)
        return out

    def note(
        self, stage: str, name: str, count: int, args: tuple[Any, ...], made: list[Tensor]
    ) -> None:
        """Hear of an operator's launches; for who wants to know more than their number."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """In place of PyTorch's, whose choice of a kernel asks the device; heads come out last."""
        count = 1 if attn_mask is None else MASKED_ATTENTION
        name = "attention" + ("" if attn_mask is None else ", masked")
        self.nodes[self.stage, name] += count
        made = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
        self.note(self.stage, name, count, (q, k, v), [made])
        return made.transpose(1, 2)

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """Know which module runs."""
        handles = []
        for name, module in network.named_modules():
            enter = lambda *_, name=name: self.running.append(name)  # noqa: E731
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(lambda *_: self.running.pop() and None))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def by_stage(self) -> dict[str, int]:
        """Nodes of each stage, in the order of `STAGES`; all; those that change a map's layout."""
        found: Counter[str] = Counter()
        for (stage, _), count in self.nodes.items():
            found[stage] += count
        sums = {"all": found.total(), COPIES: self.copies.total()}
        return {stage: found[stage] for stage in (*STAGES, ATTENTION)} | sums


def channels_last(x: Tensor) -> bool:
    """Whether a map lies in memory as rows of channels, and only so."""
    return (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def laid_out(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Lay a convolution's result out as cuDNN does; a CPU build's FakeTensors do not."""
    last = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
    return out.contiguous(memory_format=torch.channels_last) if last else out


def layout_copies(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    """Copies of a map to the other layout."""
    if name == "lemma_fast.adafm_inference.default":
        # It copies a guidance that lies otherwise than the features do.
        return int(channels_last(given[0]) != channels_last(given[1]))
    if not re.match(r"aten\.(clone|_to_copy|copy_|contiguous)\.", name):
        return 0
    return int(given[-1].dim() == 4 and channels_last(given[-1]) != channels_last(made[0]))


def launches(name: str, args: tuple[Any, ...], copied: int) -> int:
    """Kernels that an operator is."""
    if name == "aten.convolution.default":
        return 1 if args[2] is None else CONVOLUTION_WITH_BIAS
    inside = copied if name.startswith("lemma_fast.") else 0
    return LAUNCHES.get(name, 1) + inside


def count(
    dtype: torch.dtype, batches: tuple[int, ...] = (64,), kind: Callable[[], Log] = Log
) -> list[Log]:
    """Log the forward pass of the network `base` for each number of crops."""
    logs = []
    # Without an index a PyTorch for the CPU would ask which device is the present one.
    device = torch.device("cuda", 0)
    cudnn = dtype in epilogues.DTYPES
    plan = Plan(device, dtype, packed=False, cpp=False, fused=True, compiled=True, cudnn=cudnn)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        # A library that was built without CUDA does not know.
        mock.patch.object(adafm, "_folded_bytes", return_value=16),
        mock.patch.object(Tensor, "contiguous", contiguous),
        mock.patch.object(Tensor, "__getitem__", getitem),
    ):
        # FakeTensors cannot be copied, and the network is nobody else's.
        with mock.patch("copy.deepcopy", lambda network: network):
            network = folded(LEMMA(LemmaConfig.base()).eval(), plan)
        for batch in batches:
            log = kind()
            lr = torch.empty(batch, 4, 16, 64, device=plan.device)
            attention = mock.patch.object(F, "scaled_dot_product_attention", log.attention)
            with log.watching(network), attention, log:
                network(lr)
            logs.append(log)
    return logs


def contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """What `Tensor.contiguous` does, which a PyTorch for the CPU refuses to tensors on CUDA."""
    if x.is_contiguous(memory_format=memory_format):
        return x
    return x.clone(memory_format=memory_format)


def getitem(x: Tensor, key: Any) -> Tensor:
    """Index by slices and None, which a PyTorch for the CPU refuses as well."""
    dim = 0
    for part in key if isinstance(key, tuple) else (key,):
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, slice):
            start, end, step = part.indices(x.shape[dim])
            if end - start < x.shape[dim] or step != 1:
                x = torch.ops.aten.slice(x, dim, start, end, step)
        else:
            x = x.select(dim, part)
            continue
        dim += 1
    return x


def main() -> None:
    logs = {str(dtype).removeprefix("torch."): count(dtype)[0] for dtype in DTYPES}
    rows = {name: log.by_stage() for name, log in logs.items()}
    print(f"{'nodes':20}" + "".join(f"{name:>10}" for name in rows))
    for stage in next(iter(rows.values())):
        print(f"{stage:20}" + "".join(f"{row[stage]:10}" for row in rows.values()))
    print(f"{'calls on the host':20}" + "".join(f"{len(log.host):10}" for log in logs.values()))
    print("\nbfloat16, by operator")
    operators: Counter[str] = Counter()
    for (_, name), number in logs["bfloat16"].nodes.items():
        operators[name] += number
    for name, number in operators.most_common():
        print(f"{number:5} {name}")
    if "--write" in sys.argv[1:]:
        BUDGET.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
