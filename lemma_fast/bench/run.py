"""A run of the benchmarks: what is timed, said and written as it comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lemma_fast.atomic import replacing
from lemma_fast.bench.environment import environment
from lemma_fast.bench.inference import time_model
from lemma_fast.bench.plan import PRECISIONS, Plan, Row
from lemma_fast.bench.stages import stage_rows
from lemma_fast.bench.timing import bytes_per_second, flops_per_second
from lemma_fast.bench.training import time_training
from lemma_fast.config import LemmaConfig
from lemma_fast.model import LEMMA


def random_network(size: str) -> LEMMA:
    """A network with the sizes of "base" or "small" and random weights, always the same."""
    configs = {"base": LemmaConfig.base, "small": LemmaConfig.small}
    torch.manual_seed(0)
    return LEMMA(configs[size]()).eval()


def run(
    networks: Sequence[tuple[str, LEMMA]],
    device: torch.device,
    plan: Plan,
    training: int | None = None,
    stages: bool = True,
    output: Path | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Time networks by `plan`, `say` each row as a line, and return what `output` holds as JSON.

    `training` is the batch size of a training step. The file is rewritten after each batch size,
    so that a run that is cut keeps what it has. Raises OSError where it cannot be written.
    """
    record: dict[str, Any] = {"kind": "model", "environment": environment(device)}
    say(f"{record['environment']['device']}, torch {torch.__version__}")
    record["rates"] = {
        "bytes_per_second": bytes_per_second(device),
        "flops_per_second": {
            kind: flops_per_second(device, PRECISIONS[kind], kind == "tf32")
            for kind in plan.precisions
        },
    }
    record |= {"rows": [], "stages": [], "training": []}

    def keep(part: str, rows: Sequence[Row]) -> None:
        record[part] += rows
        for row in rows:
            say(as_line(part, row))
        if output is not None:
            with replacing(output) as partial:
                partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    for name, network in networks:
        for rows in time_model(name, network, device, plan):
            keep("rows", rows)
        if stages:
            for row in stage_rows(name, network, device, plan):
                keep("stages", [row])
        if training is not None:
            keep("training", list(time_training(name, network, device, plan, training)))
    return record


def as_line(part: str, row: Row) -> str:
    """One row of `rows`, `stages` or `training` as text."""
    head = f"{row['model']:<8} {row['variant']:<12} {row['precision']:<9} batch {row['batch']:<4}"
    if part == "stages":
        whole = sum(stage["median"] for stage in row["stages"].values())
        shares = (f"{n} {s['median'] / whole:.0%}" for n, s in row["stages"].items())
        return f"{head} {', '.join(shares)}"
    if part == "training":
        head += " training step"
    off = f"off by {row['deviation']:.1e}" if "deviation" in row else ""
    if "seconds" not in row:
        return f"{head} {row['status']}: {row['reason']} {off}".rstrip()
    median, low, high = (1e3 * row["seconds"][name] for name in ("median", "low", "high"))
    ratio = f"{row['ratio']['median']:.2f}x" if "ratio" in row else ""
    if row["status"] == "differs":
        off += f", DIFFERS: {row['reason']}"
    return f"{head} {median:9.2f} ms ({low:.2f} to {high:.2f}) {ratio:>7}  {off}"
