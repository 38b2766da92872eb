"""adafm at the paper's sizes: the reference, torch.compile of it, ours; on the GPU if there is one.

On the CPU the threads are PyTorch's (OMP_NUM_THREADS). A forward pass is inference as the
accelerated network runs it: ours on weights that were folded before. forward+backward is a training
step of this operation, with batch statistics and the gradients of both maps and all parameters.
"""

from types import SimpleNamespace

import pytest
import torch
from op_timing import (
    BATCHES,
    DIRECTIONS,
    IMPLEMENTATIONS,
    a_call,
    compared,
    keep,
    synchronised,
    time_replays,
)

from lemma_fast.acceleration.accelerated import make_plan
from lemma_fast.acceleration.blocks import CompiledAdaFM
from lemma_fast.model.blocks import AdaFM
from lemma_fast.ops import extension, fused, reference

C, H, W = 64, 16, 64
ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.benchmark(timer=a_call if ON_GPU else synchronised)
# torch.compile of the reference takes minutes a case on the CPU.
CASES = {
    "implementation": IMPLEMENTATIONS if ON_GPU else ("reference", "fused"),
    "dtype": (torch.float32, torch.bfloat16) if ON_GPU else (torch.float32,),
    "N": BATCHES if ON_GPU else BATCHES[:3],
}


@pytest.mark.skipif(extension.missing() is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("implementation", CASES["implementation"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", CASES["dtype"], ids=str)
@pytest.mark.parametrize("N", CASES["N"])
def bench_adafm(benchmark, N, dtype, layout, direction, implementation):
    torch.manual_seed(0)
    device = "cuda" if ON_GPU else "cpu"
    module = AdaFM(SimpleNamespace(channels=C, size=(H, W)), reference).to(device, dtype)
    memory = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
    maps = [
        torch.randn(N, C, H, W, device=device, dtype=dtype)
        .contiguous(memory_format=memory)
        .requires_grad_()
        for _ in range(2)
    ]
    training = direction != "forward"
    weights, leaves = module.weights(), (*maps, *module.parameters())
    grad = torch.randn_like(maps[0])
    function = (fused if implementation == "fused" else reference).adafm
    if implementation == "compiled":
        function = torch.compile(function, dynamic=False)

    def infer(*maps):
        return function(*maps, weights, False)

    if implementation == "fused":
        infer = CompiledAdaFM(weights, make_plan(torch.device(device), dtype, C)[0])

    def step():
        if not training:
            with torch.no_grad():
                return infer(*maps)
        return torch.autograd.grad(function(*maps, weights, True), leaves, grad)

    with torch.no_grad():
        judged = compared([infer(*maps)], [reference.adafm(*maps, weights, False)])
    if ON_GPU:
        time_replays(benchmark, step)
    else:
        benchmark.pedantic(step, rounds=7, iterations=max(1, 16 // N), warmup_rounds=1)
    # Eleven products of C x C a position; backward, two for each. Two maps in and one out, and
    # backward their gradients too.
    times = 3 if training else 1
    keep(
        benchmark,
        flops=times * 2 * 11 * C * C * N * H * W,
        bytes=times * 3 * N * C * H * W * dtype.itemsize,
        threads=torch.get_num_threads(),
        dtype=str(dtype),
        **judged,
        **extension.build_info(),
    )
