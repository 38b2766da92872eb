"""adafm at the paper's sizes: the reference, torch.compile of it, ours; on the GPU if there is one.

On the CPU the threads are PyTorch's (OMP_NUM_THREADS). A forward pass is inference, where ours
folds the batch norms; forward+backward is a training step of this operation, with batch statistics
and the gradients of both maps and of all parameters.
"""

import time
from types import SimpleNamespace

import pytest
import torch
from op_timing import BATCHES, DIRECTIONS, IMPLEMENTATIONS, synchronised

from lemma_fast.model.blocks import AdaFM
from lemma_fast.ops import extension, fused, reference

C, H, W = 64, 16, 64
ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.benchmark(timer=synchronised if ON_GPU else time.perf_counter)
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

    def step():
        if not training:
            with torch.no_grad():
                return function(*maps, weights, False)
        return torch.autograd.grad(function(*maps, weights, True), leaves, grad)

    with torch.no_grad():
        expected = reference.adafm(*maps, weights, False).double()
        difference = (function(*maps, weights, False).double() - expected).norm()
    # TF32 is allowed to cuDNN by default, to both sides.
    tolerance = 1e-5 if not ON_GPU else 2e-3 if dtype == torch.float32 else 2e-2
    assert difference <= tolerance * expected.norm()
    step()
    rounds, iterations = (20, 50) if ON_GPU else (7, max(1, 16 // N))
    benchmark.pedantic(step, rounds=rounds, iterations=iterations, warmup_rounds=1)
    # Eleven products of C x C a position; backward, two for each. Two maps in and one out, and
    # backward their gradients too.
    times = 3 if training else 1
    benchmark.extra_info.update(
        flops=times * 2 * 11 * C * C * N * H * W,
        bytes=times * 3 * N * C * H * W * dtype.itemsize,
        device=torch.cuda.get_device_name() if ON_GPU else "cpu",
        threads=torch.get_num_threads(),
        dtype=str(dtype),
        **extension.build_info(),
    )
