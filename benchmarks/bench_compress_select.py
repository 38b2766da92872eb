"""compress_select at the paper's sizes: the reference, torch.compile of it, and the kernels."""

import pytest
import torch
from op_timing import BATCHES, DIRECTIONS, IMPLEMENTATIONS, MARKS, time_operation

pytestmark = MARKS
T, SOURCES, P, K = 26, 8 * 32, 16 * 64, 500


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("N", BATCHES)
def bench_compress_select(benchmark, N, direction, implementation):
    h_attn = torch.rand(N, T, 8, 32, device="cuda", requires_grad=True)
    lengths = torch.randint(2, T + 1, (N,), device="cuda")
    # What any implementation must move: maps in; scores and positions out; backward, the scores'
    # gradient in and the maps' out.
    moved = N * 4 * (T * SOURCES + P + K)
    if direction != "forward":
        moved += N * 4 * (P + T * SOURCES)
    arguments = (h_attn, lengths, K, (16, 64))
    time_operation(benchmark, "compress_select", implementation, direction, arguments, moved)
