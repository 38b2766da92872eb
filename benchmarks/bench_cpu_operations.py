"""The C++ operations for the CPU at the paper's sizes against PyTorch's, on one thread and on all.

PyTorch's side is what a prepared model would call: channels-last maps, convolution weights laid out
for oneDNN beforehand with bias, residual and ReLU fused. Parity comes first; `extra_info` has FLOPs
(a plain convolution's, whoever saves some) and the rate that they make.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lemma_fast.ops import cpu, extension, reference
from lemma_fast.ops.weights import BiGRUWeights

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason=str(extension.missing())),
    pytest.mark.parametrize("threads", sorted({1, torch.get_num_threads()})),
    pytest.mark.parametrize("N", [1, 16]),
]
LAST = torch.channels_last


def time_operation(
    benchmark: Any, call: Callable[[], Tensor], expected: Tensor, threads: int, flops: int
) -> None:
    """Check `call` against plain PyTorch, then time it on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            assert (call() - expected).norm() <= 1e-5 * expected.norm()
            benchmark.pedantic(call, rounds=20, iterations=1, warmup_rounds=3)
    finally:
        torch.set_num_threads(before)
    benchmark.extra_info.update(
        flops=flops,
        gflops=flops / benchmark.stats.stats.median / 1e9,
        torch=torch.__version__,
        capability=torch.backends.cpu.get_cpu_capability(),
    )


@pytest.mark.parametrize("axis", [2, 3], ids=["vertical", "horizontal"])
@pytest.mark.parametrize("implementation", ["torch", "cpp"])
def bench_bigru(benchmark, implementation, axis, N, threads):
    channels, hidden = 64, 32
    module = torch.nn.GRU(channels, hidden, bidirectional=True)
    weights = BiGRUWeights(*(weight.detach() for weight in module.parameters()))
    features = torch.randn(N, channels, 16, 64).to(memory_format=LAST)
    packed = cpu.pack_bigru(weights)
    calls = {
        "torch": lambda: reference.bigru(features, axis, weights),
        "cpp": lambda: cpu.bigru_packed(features, axis, packed, hidden),
    }
    expected = reference.bigru(features, axis, weights)
    flops = 2 * N * 16 * 64 * 2 * 3 * hidden * (channels + hidden)
    time_operation(benchmark, calls[implementation], expected, threads, flops)


@pytest.mark.parametrize("channels", [64, 128, 256, 512])
@pytest.mark.parametrize("implementation", ["torch", "cpp-2", "cpp-4"])
def bench_winograd(benchmark, implementation, channels, N, threads):
    """`cpp-2` and `cpp-4` are the sizes of the tile; maps as large as the networks'."""
    size = (16, 64) if channels == 64 else (8, 32)
    features, residual = (torch.randn(N, channels, *size).to(memory_format=LAST) for _ in range(2))
    weight, bias = (
        torch.randn(channels, channels, 3, 3) / (3 * channels**0.5),
        torch.randn(channels),
    )
    if implementation == "torch":
        ready = torch.ops.mkldnn._reorder_convolution_weight(
            weight, [1, 1], [1, 1], [1, 1], 1, list(features.shape)
        )

        def call() -> Tensor:
            return torch.ops.mkldnn._convolution_pointwise.binary(
                features, residual, ready, bias, [1, 1], [1, 1], [1, 1], 1, "add", 1.0, "relu",
                [], "",
            )  # fmt: skip
    else:
        packed = cpu.pack_winograd(weight, int(implementation[-1]))

        def call() -> Tensor:
            return cpu.winograd(features, packed, bias, residual, "relu")

    plain = F.conv2d(features, weight, bias, padding=1)
    flops = 2 * features.numel() * channels * 9
    time_operation(benchmark, call, F.relu(plain + residual), threads, flops)
