"""What the accelerated forward pass would take on an H100: launches, bytes, FLOPs, time by stage.

    python benchmarks/estimate.py [--dtype bfloat16|float32] [--json]

needs no GPU and measures nothing: FakeTensors run `base` as tests/graph_nodes.py does, every node
of the captured graph is counted, and `DEVICE` says what a node takes. It is a lead (+-30 %): what
to do next, not what was reached. Bytes are each operand once and each result once; the products of
fp32 are of full precision (PyTorch's TF32 off).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import graph_nodes
from graph_nodes import ATTENTION, LAUNCHES, STAGES, Log

#: An H100 (SXM, 80 GB). The first two were measured on one; the others are estimates from compiled
#: code and from what libraries reach on such shapes.
DEVICE = {
    "copy, B/s": 3.0e12,
    "bf16 products, best, FLOP/s": 790e12,
    "bf16 products, as libraries reach here, FLOP/s": 575e12,
    "fp32 products, FLOP/s": 50e12,
    "attention, FLOP/s": 400e12,
    "multiprocessors": 132,
    "gap between nodes, us": 1.0,
    "shortest convolution, us": 4.5,
    "shortest product or attention, us": 3.0,
    "shortest other node, us": 2.0,
    "GRU, a step, bf16 / fp32, us": (0.35, 0.8),
    "GRU, programs a multiprocessor that cost no time": 1.75,
    "AdaFM, a wave of both kernels, bf16 / fp32, us": (14.0, 28.0),
    "image to text, us": 145.0,
    "text to image, a wave, us": 24.0,
    "position attention, a wave, us": 6.0,
    "selection, us": 8.0,
}
#: Tiles [rows, columns] of a product, and the share of the best rate that a multiprocessor has.
#: Convolutions have the first two.
TILES = ((128, 128, 1.0), (128, 64, 0.8), (64, 64, 0.6), (64, 32, 0.4))
CONVOLUTIONS = ("aten.convolution.default", "aten.cudnn_convolution_add_relu.default")
PRODUCTS = tuple(f"aten.{kind}.default" for kind in ("addmm", "_addmm_activation", "mm", "bmm"))
LIBRARY = "bf16 products, as libraries reach here"
Number = dict[str, float]
UNITS = (("bytes", "MB", 1e6), ("flops", "GFLOP", 1e9), ("us", "us", 1))


def constant(name: str) -> float:
    value = DEVICE[name]
    assert isinstance(value, int | float)
    return value


#: Microseconds to move a byte.
US = 1e6 / constant("copy, B/s")


def waves(programs: int, at_once: int = 1) -> int:
    """How often all multiprocessors are filled."""
    return math.ceil(programs / (at_once * constant("multiprocessors")))


def product_us(
    rows: int, columns: int, depth: int, times: int, half: bool, tiles: int = len(TILES)
) -> float:
    """A product [rows, depth] [depth, columns], `times` of them: whole waves of the best tile."""
    flops = 2 * rows * columns * depth * times
    if not half:
        return flops / constant("fp32 products, FLOP/s") * 1e6
    each = constant("bf16 products, best, FLOP/s") / constant("multiprocessors")
    by_tiles = min(
        waves(math.ceil(rows / height) * math.ceil(columns / width) * times)
        * (2 * height * width * depth / (each * share))
        for height, width, share in TILES[:tiles]
    )
    return max(by_tiles, flops / constant(f"{LIBRARY}, FLOP/s")) * 1e6


def sizes_of(name: str, args: tuple[Any, ...], made: list[Tensor]) -> tuple[int, int, int, int]:
    """Rows, columns, depth and number of a product or convolution."""
    if name in CONVOLUTIONS:
        D, C, height, width = args[1].shape
        return made[0].numel() // D, D, C * height * width, 1
    left = args[-2] if name.split(".")[1] in ("mm", "bmm") else args[1]
    *times, rows, columns = made[0].shape
    return rows, columns, left.shape[-1], math.prod(times)


def ours(name: str, args: tuple[Any, ...], half: bool) -> tuple[float, float]:
    """FLOPs and microseconds of one of our own operators, but for what its bytes take."""
    kind, first = name.split(".")[1], args[0]
    which = 0 if half else 1
    N = len(first)
    if kind in ("bigru", "bigru_add"):
        axis, weights = args[-2], args[-1]
        hidden, C = weights[1].shape[1], first.shape[1]
        lines, steps = first.shape[5 - axis], first.shape[axis]
        share = 2 * math.ceil(N * lines / 16) / constant("multiprocessors")
        step = DEVICE["GRU, a step, bf16 / fp32, us"][which]  # type: ignore[index]
        busy = max(1.0, share / constant("GRU, programs a multiprocessor that cost no time"))
        return 12.0 * N * lines * steps * hidden * (C + hidden), steps * step * busy
    if kind == "adafm_inference":
        C, P = first.shape[1], first.shape[2] * first.shape[3]
        blocks = N * math.ceil(P / (256 if half else 128))
        wave = DEVICE["AdaFM, a wave of both kernels, bf16 / fp32, us"][which]  # type: ignore[index]
        return 22.0 * N * P * C * C, waves(blocks) * wave
    if kind == "sparse_cross_attention":
        T, K, C = first.shape[1], args[1].shape[1], first.shape[2]
        flops = 3.0 * N * (4 * K * C * C + 4 * T * K * C + 2 * (K + 1) * (6 * C * C + 2 * T * C))
        wave = waves(N * math.ceil((K + 1) / 15), 2) * constant("text to image, a wave, us")
        return flops, constant("image to text, us") + wave
    if kind == "position_attention":
        P, C = first.shape[1:]
        T = args[2].shape[1]
        programs = N * math.ceil(C / 128)
        return 8.0 * N * T * P * C, waves(programs, 2) * constant("position attention, a wave, us")
    if kind == "gather_region":
        C, D, K = first.shape[1], args[2].shape[0], args[1].shape[1]
        return 18.0 * N * K * C * D, product_us(N * K, D, 9 * C, 1, half)
    if kind == "compress_select":
        return 0.0, constant("selection, us")
    if kind == "cloze_attention":
        T, C = args[1].shape[1:]
        return 4.0 * N * T * T * C, constant("shortest product or attention, us")
    return 0.0, 0.0


@dataclass
class Estimate(Log):
    """A log that also knows bytes, FLOPs and microseconds by stage."""

    sums: dict[str, Number] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))

    def note(
        self, stage: str, name: str, count: int, args: tuple[Any, ...], made: list[Tensor]
    ) -> None:
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        half = any(x.dtype in (torch.bfloat16, torch.float16) for x in (*tensors, *made))
        # What is expanded is read once.
        moved = sum(touched(x) for x in (*tensors, *made))
        shortest = constant("shortest other node, us")
        flops = work = 0.0
        if name in (*CONVOLUTIONS, *PRODUCTS):
            rows, columns, depth, times = sizes_of(name, args, made)
            flops = 2.0 * rows * columns * depth * times
            narrow = half and made[0].dtype != torch.float32
            tiles = 2 if name in CONVOLUTIONS else len(TILES)
            work = product_us(rows, columns, depth, times, narrow, tiles)
            kind = "convolution" if name in CONVOLUTIONS else "product or attention"
            shortest = constant(f"shortest {kind}, us")
        elif name.startswith("attention"):
            q, k = args[:2]
            flops = 4.0 * q.numel() * k.shape[2]
            work = flops / constant("attention, FLOP/s" if half else "fp32 products, FLOP/s") * 1e6
            shortest = constant("shortest product or attention, us")
        elif name.startswith("lemma_fast."):
            flops, work = ours(name, args, half)
        # Kernels beyond an operator's own pass once more over its result.
        passes = count - LAUNCHES.get(name, 1)
        again = 2.0 * passes * sum(touched(x) for x in made)
        time = max(shortest, work, moved * US)
        time += max(passes * constant("shortest other node, us"), again * US)
        time += count * constant("gap between nodes, us")
        here = self.sums[stage]
        for key, value in (("bytes", moved + again), ("flops", flops), ("us", time)):
            here[key] += value


def touched(x: Tensor) -> int:
    """Bytes of a tensor's elements, those that repeat counted once."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(sizes) * x.element_size()


def rows(dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row a stage and one of all: nodes, and MB, GFLOP and us at batch 64 and 1."""
    many, one = graph_nodes.count(dtype, (64, 1), Estimate)
    nodes = many.by_stage()
    found = []
    for stage in (*STAGES, ATTENTION, "all"):
        row: dict[str, Any] = {"stage": stage, "nodes": nodes[stage]}
        for log, batch in ((many, 64), (one, 1)):
            assert isinstance(log, Estimate)
            parts = [log.sums[stage]] if stage != "all" else [*log.sums.values()]
            for key, unit, scale in UNITS:
                row[f"{unit} {batch}"] = sum(part[key] for part in parts) / scale
        found.append(row)
    return found


def as_table(found: list[dict[str, Any]]) -> str:
    head = ("stage", "nodes", *(f"{u}, batch {n}" for n in (64, 1) for u in ("MB", "GFLOP", "us")))
    lines = [head, ("---", *["---:"] * (len(head) - 1))]
    for row in found:
        numbers = (f"{row[f'{u} {n}']:,.4g}" for n in (64, 1) for u in ("MB", "GFLOP", "us"))
        lines.append((row["stage"], str(row["nodes"]), *numbers))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the forward pass would take on an H100.")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="both, if none is given")
    parser.add_argument("--json", action="store_true", help="print numbers, not tables")
    given = parser.parse_args()
    names = [given.dtype] if given.dtype else ["bfloat16", "float32"]
    found = {name: rows(getattr(torch, name)) for name in names}
    if given.json:
        print(json.dumps(found, indent=1))
        return
    print("\n".join(f"{name}: {value}" for name, value in DEVICE.items()))
    for name, table in found.items():
        print(f"\n{name}\n\n{as_table(table)}")


if __name__ == "__main__":
    main()
