"""What the Triton kernels need, as a table: budgets/sass.json, made with one release of Triton.

`PYTHONPATH=tests TRITON_INTERPRET=1 python tests/cubin_budget.py` compiles every kernel and prints
the table; with --write it replaces the committed one. Names of groups (see cubin_cases.py) behind
it compile these alone and keep the other lines. Registers are a thread's, spills bytes of a
thread's local memory, shared bytes of a block. Instructions are those of the hot loop (see
sass.py), or of the whole kernel where it has no loop, on sm_90.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import triton
from aot import CAPABILITIES, Resources, compile_kernels
from cubin_cases import GROUPS, cases, groups

PATH = Path(__file__).parent / "budgets" / "sass.json"
# These may not grow at all, all others by a tenth.
FIXED = ("spills", "bar", "mufu")
# These may not fall by more than a tenth: the products would be done without tensor cores.
PRODUCTS = ("mma", "wgmma")

Figures = dict[str, int]
Table = dict[str, dict[str, Figures]]


def release() -> str:
    """Return the release of Triton that is installed, such as 3.9."""
    return ".".join(triton.__version__.split(".")[:2])


def figures(needs: Resources) -> Figures:
    """Name the figures of one kernel."""
    found = {"registers": needs.registers, "spills": needs.spills, "shared": needs.shared}
    if counts := needs.loop or needs.code:
        part = "loop" if needs.loop else "code"
        # Local memory is spills, counted above.
        named = counts._asdict().items()
        found |= {f"{part}.{name}": count for name, count in named if name != "local"}
    return found


def complaints(known: Figures, found: Figures) -> list[str]:
    """Say which of a kernel's figures left their budget."""
    if known.keys() != found.keys():
        return [f"has the figures {[*found]}, the table {[*known]}"]
    said = []
    for figure, budget in known.items():
        value, kind = found[figure], figure.rpartition(".")[2]
        if value > budget * (1 if kind in FIXED else 1.1):
            said.append(f"{figure} grew from {budget} to {value}")
        elif kind in PRODUCTS and value < 0.9 * budget:
            said.append(f"{figure} fell from {budget} to {value}: fewer products on tensor cores")
        elif value < 0.75 * budget:
            said.append(f"{figure} fell from {budget} to {value}: better, so lower the table")
    return said


def read() -> tuple[str, Table]:
    """Return the committed table and the release of Triton it was made with."""
    kept = json.loads(PATH.read_text(encoding="utf-8"))
    return kept["triton"], kept["architectures"]


def measure(wanted: Sequence[str]) -> Table:
    """Compile the cases of these groups."""
    table: Table = {}
    for capability in CAPABILITIES:
        some = [group for group in groups(capability) if group in wanted]
        compiled = {name: case for group in some for name, case in cases(group, capability).items()}
        results = zip(compiled, compile_kernels([*compiled.values()]), strict=True)
        table[f"sm_{capability}"] = {name: figures(needs) for name, needs in results}
    return table


def as_text(table: Table) -> str:
    """Lay the table out as JSON with a line for each kernel."""
    blocks = []
    for architecture, kernels in table.items():
        lines = [f"   {json.dumps(name)}: {json.dumps(found)}" for name, found in kernels.items()]
        blocks.append(f"  {json.dumps(architecture)}: {{\n" + ",\n".join(lines) + "\n  }")
    head = f'{{\n "triton": {json.dumps(release())},\n "architectures": {{\n'
    return head + ",\n".join(blocks) + "\n }\n}\n"


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("groups", nargs="*", help="all, if none is named")
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    given = parser.parse_args()
    # As tests/conftest.py sets them: products of full precision.
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    table = measure(given.groups or [*GROUPS])
    if given.groups:
        made_with, kept = read()
        if made_with != release():
            parser.error(f"the table is of Triton {made_with}, this is {release()}: name no groups")
        table = {name: kept[name] | kernels for name, kernels in table.items()}
    text = as_text(table)
    sys.stdout.write(text)
    if given.write:
        PATH.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    _main()
