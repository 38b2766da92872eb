"""One small call of each fused operation, forward and backward, and CUDA's tools around it."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from suite.plan import SUITE
from suite.records import Record, Records

#: The package's kernels: Triton's begin with an underscore.
OURS = "regex:^_|^(pool|fuse|fold|pack|mix|rows|write|gate_forward)_kernel"
PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute", "/usr/local/cuda/nsight-compute")
#: What ncu is asked for: whether a kernel is bound by memory or by arithmetic.
NCU = ("--clock-control", "none", "-k", OURS, "-c", "40", "--csv")
SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats")


def command(tool: str) -> list[str] | None:
    """The tool's command before Python's, None where it is not there."""
    program = "ncu" if tool == "ncu" else "compute-sanitizer"
    path = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    found = shutil.which(program, path=path)
    if found is None:
        return None
    if tool == "ncu":
        return [found, *NCU, *(word for section in SECTIONS for word in ("--section", section))]
    return [found, "--tool", tool, "--error-exitcode", "9"]


def run(tool: str, records: Records) -> int:
    """Run the calls under a tool and record what it finds; 1 where it finds errors."""
    begins = command(tool)
    if begins is None:
        records.add("tools", {"name": tool, "status": "unavailable", "reason": "not installed"})
        return 0
    # With PyTorch's own allocator an access beyond a tensor may lie within its block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        [*begins, sys.executable, SUITE, "--calls", "64" if tool == "ncu" else "2"],
        env=os.environ if tool == "ncu" else environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    lines = []
    # Said at once, so that the log of a tool that is cut has what it found.
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    said, code = "".join(lines), process.wait()
    if tool == "ncu":
        found: Record = {"kernels": counters(said)}
        bad = code != 0 or not found["kernels"]
    else:
        found = {"errors": errors(said)}
        bad = found["errors"] != 0
    status = "failed" if bad else "done"
    records.add("tools", {"name": tool, "status": status, "code": code, **found})
    return int(bad)


def errors(said: str) -> int | None:
    """How many errors a sanitizer counts; None where it did not come to its end."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", said)
    return int(found[-1]) if found else None


def counters(said: str) -> list[Record]:
    """The kernels in ncu's table, each with its metrics by name."""
    start = said.find('"ID"')
    if start < 0:
        return []
    found: dict[str, Record] = {}
    for line in csv.DictReader(io.StringIO(said[start:])):
        if not (line.get("Metric Name") and (line.get("ID") or "").isdigit()):
            continue
        kernel = found.setdefault(line["ID"], {"kernel": line["Kernel Name"][:80]})
        kernel[line["Metric Name"]] = f"{line['Metric Value']} {line['Metric Unit']}".strip()
    return list(found.values())


def calls(batch: int) -> int:
    """Call each fused operation once in each type, with its gradients, in the paper's sizes."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(0)
    # bf16 is wrong in Triton's interpreter, which is what there is without a GPU.
    for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
        for name, call in operations(batch, device, dtype).items():
            call().float().square().mean().backward()
            if cuda:
                torch.cuda.synchronize()
            print(f"called {name}, {dtype}", flush=True)
    return 0


def operations(
    batch: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """A call of each fused operation by name, with the weights of a network."""
    import torch

    from lemma_fast import LEMMA, LemmaConfig
    from lemma_fast.model.guidance import layer_weights
    from lemma_fast.ops import fused

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    network = LEMMA(LemmaConfig.base(), fused).to(device, dtype).train()
    block, guidance = network.blocks[0], network.guidance
    layers = [
        [layer_weights(layer) for layer in part]
        for part in (guidance.image_to_text, guidance.text_to_image)
    ]
    maps, other = leaf(batch, 64, 16, 64), leaf(batch, 64, 16, 64)
    text, rows = leaf(batch, 26, 64), leaf(batch, 500, 64)
    weight, bias = leaf(64, 64, 3, 3), leaf(64)
    index = torch.rand(batch, 1024).topk(500).indices.sort().values.int().to(device)
    positions = torch.randn(1, 1024, 64, device=device).expand(batch, -1, -1)
    attention = torch.randn(batch, 26, 8, 32, device=device, requires_grad=True)
    lengths = torch.full((batch,), 9, device=device)
    seed = torch.tensor(11, device=device)
    return {
        "bigru, vertical": lambda: block.vertical(maps),
        "bigru, horizontal": lambda: block.horizontal(maps),
        "adafm": lambda: block.fusion(maps, other),
        "location_enhance": lambda: fused.location_enhance(other, maps),
        "compress_select": lambda: fused.compress_select(attention, lengths, 500, (16, 64))[0],
        "gather_region": lambda: fused.gather_region(maps, index, weight, bias, positions),
        "sparse_cross_attention": lambda: fused.sparse_cross_attention(
            text, rows, index, (16, 64), *layers, 4, 0.1, seed
        ),
    }
