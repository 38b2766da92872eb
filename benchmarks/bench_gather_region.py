"""gather_region at the paper's sizes: the reference, torch.compile of it, and the kernels."""

import pytest
import torch
from op_timing import BATCHES, DIRECTIONS, IMPLEMENTATIONS, MARKS, time_operation

pytestmark = MARKS
C = D = 64
P, K = 16 * 64, 500


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("N", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_gather_region(benchmark, dtype, N, direction, implementation):
    def leaf(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()

    index = torch.rand(N, P, device="cuda").topk(K).indices.sort().values.int()
    positions = torch.randn(1, P, D, device="cuda").expand(N, -1, -1)
    arguments = (leaf(N, C, 16, 64), index, leaf(D, C, 3, 3), leaf(D), positions)
    # Features, positions and weights in, rows out; backward, features and rows in, features out.
    moved = dtype.itemsize * (N * (C * P + K * D) + 9 * C * D) + 4 * (N * K + P * D)
    flops = 2 * N * K * 9 * C * D
    if direction != "forward":
        moved += dtype.itemsize * (N * (2 * C * P + K * D) + 2 * 9 * C * D)
        flops *= 3
    time_operation(benchmark, "gather_region", implementation, direction, arguments, moved, flops)
