"""Read a cubin's machine code (SASS): count instructions and find the innermost loops.

A loop is what lies between a label and a later branch back to it. A branch to itself, which ends
every kernel, is none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

# Opcodes that are counted, by the name of their figure.
COUNTED = {
    # Products on tensor cores: of a warp, and of the four warps of a warpgroup (sm_90).
    "mma": ("HMMA",),
    "wgmma": ("HGMMA",),
    "bar": ("BAR",),
    "mufu": ("MUFU",),
    # Loads from global memory, into registers or past them into shared memory.
    "ldg": ("LDG", "LDGSTS"),
    # Local memory: spills.
    "local": ("LDL", "STL"),
}


class Counts(NamedTuple):
    """How often instructions occur in a piece of SASS."""

    instructions: int
    mma: int
    wgmma: int
    bar: int
    mufu: int
    ldg: int
    local: int

    @property
    def products(self) -> int:
        """Instructions for tensor cores."""
        return self.mma + self.wgmma


def _count(opcodes: Sequence[str]) -> Counts:
    names = [opcode.partition(".")[0] for opcode in opcodes]
    counts = {figure: sum(name in counted for name in names) for figure, counted in COUNTED.items()}
    return Counts(len(names), **counts)


def read_sass(text: str) -> tuple[Counts, Counts | None]:
    """Count in the whole kernel and in its hot loop, from what `nvdisasm -c` prints.

    The hot loop is the innermost one of those with products on tensor cores, or of all if none has
    any; among several, the one with the most such products, then the longest.
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(opcodes)
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^\s;]*)(.*)", line):
            target = re.search(r"\((\.L\w+)\)", code[2])
            if target and code[1].startswith("BRA"):
                branches.append((len(opcodes), target[1]))
            # Padding behind the kernel.
            if code[1] != "NOP":
                opcodes.append(code[1])
    # Several branches to one label are one loop: the last of them ends it.
    ends = {labels[label]: place for place, label in branches if labels[label] < place}
    loops = {start: _count(opcodes[start : end + 1]) for start, end in ends.items()}
    if any(counts.products for counts in loops.values()):
        loops = {start: counts for start, counts in loops.items() if counts.products}
    innermost = [
        counts
        for start, counts in loops.items()
        if not any(start < other < ends[start] for other in loops)
    ]
    hot = max(innermost, key=lambda counts: (counts.products, counts.instructions), default=None)
    return _count(opcodes), hot
