"""location_enhance at the paper's sizes: the reference, torch.compile of it, and the kernel."""

import pytest
import torch
from op_timing import BATCHES, DIRECTIONS, IMPLEMENTATIONS, MARKS, time_operation

pytestmark = MARKS
C, H, W = 64, 16, 64


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("N", BATCHES)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_location_enhance(benchmark, dtype, layout, N, direction, implementation):
    channels_last = layout == "channels-last"
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    arguments = [
        torch.randn(N, C, H, W, device="cuda", dtype=dtype)
        .contiguous(memory_format=memory_format)
        .requires_grad_()
        for _ in ("logits", "features")
    ]
    # Two maps in and one out; backward, three in and two out.
    maps = 3 if direction == "forward" else 8
    moved = maps * N * C * H * W * dtype.itemsize
    time_operation(benchmark, "location_enhance", implementation, direction, arguments, moved)
