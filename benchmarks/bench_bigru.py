"""bigru at the paper's sizes: the reference, torch.compile of it, cuDNN in its own layout, ours.

The reference on a GPU is cuDNN between two permutes; "cudnn" is the same without the permutes, on
sequences that lie ready: what no caller with a map can have.
"""

import pytest
import torch
from memory import kept_bytes
from op_timing import (
    BATCHES,
    DIRECTIONS,
    IMPLEMENTATIONS,
    MARKS,
    keep,
    time_operation,
    time_replays,
)

from lemma_fast.ops import fused, reference
from lemma_fast.ops.weights import BiGRUWeights

pytestmark = MARKS
C, HIDDEN, H, W = 64, 32, 16, 64


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("N", BATCHES)
@pytest.mark.parametrize("axis", [2, 3], ids=["vertical", "horizontal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_bigru(benchmark, dtype, axis, N, direction, implementation):
    gru = torch.nn.GRU(C, HIDDEN, bidirectional=True, device="cuda", dtype=dtype)
    features = torch.randn(N, C, H, W, device="cuda", dtype=dtype, requires_grad=True)
    arguments = (features, axis, BiGRUWeights(*gru.parameters()))
    # Two directions, three gates, both products; backward, twice that and the gates again.
    positions = N * H * W
    flops = 2 * positions * 2 * 3 * HIDDEN * (C + HIDDEN)
    # A map in and one out; backward, three more in and one out.
    moved = positions * dtype.itemsize * (C + 2 * HIDDEN)
    if direction != "forward":
        flops *= 4
        moved += positions * dtype.itemsize * (2 * C + 4 * HIDDEN)
    for ops in (reference, fused):
        name = f"kept_bytes_{ops.__name__.rpartition('.')[2]}"
        benchmark.extra_info[name] = kept_bytes(ops.bigru, arguments)
    time_operation(benchmark, "bigru", implementation, direction, arguments, moved, flops)


@pytest.mark.parametrize("N", BATCHES)
@pytest.mark.parametrize("axis", [2, 3], ids=["vertical", "horizontal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_bigru_cudnn(benchmark, dtype, axis, N):
    gru = torch.nn.GRU(C, HIDDEN, bidirectional=True, batch_first=True, device="cuda", dtype=dtype)
    length, lines = (H, W) if axis == 2 else (W, H)
    sequences = torch.randn(N * lines, length, C, device="cuda", dtype=dtype)
    with torch.no_grad():
        time_replays(benchmark, lambda: gru(sequences))
    keep(benchmark)
