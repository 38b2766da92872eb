"""sparse_cross_attention at the paper's sizes: reference, torch.compile of it, SDPA, ours."""

import pytest
import torch
import torch.nn.functional as F
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
from torch import Tensor

from lemma_fast.ops import fused, reference
from lemma_fast.ops.weights import CrossAttentionWeights

pytestmark = MARKS
T, K, C, H, W, HEADS, LAYERS = 26, 500, 64, 16, 64, 4, 3


def layer(dtype: torch.dtype) -> CrossAttentionWeights:
    def tensor(*shape: int) -> Tensor:
        return (torch.randn(shape, device="cuda") / 8).to(dtype).requires_grad_()

    square, vector = (C, C), (C,)
    return CrossAttentionWeights(
        tensor(3 * C, C), tensor(3 * C), tensor(*square), *(tensor(*vector) for _ in range(3)),
        tensor(*square), tensor(*vector), tensor(*square), *(tensor(*vector) for _ in range(3)),
    )  # fmt: skip


def inputs(N: int, dtype: torch.dtype, to_text: int, to_image: int) -> tuple:
    text = torch.randn(N, T, C, device="cuda", dtype=dtype, requires_grad=True)
    selected = torch.randn(N, K, C, device="cuda", dtype=dtype, requires_grad=True)
    index = torch.rand(N, H * W, device="cuda").topk(K).indices.sort().values.int()
    first, second = ([layer(dtype) for _ in range(count)] for count in (to_text, to_image))
    return text, selected, index, (H, W), first, second, HEADS


def attention_flops(N: int, rows: int, keys: int) -> int:
    """One layer: projections of rows and keys, two products with the keys, the MLP."""
    return 2 * N * (rows * 4 * C * C + keys * 2 * C * C + rows * keys * 2 * C)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("N", BATCHES)
@pytest.mark.parametrize("layers", [(LAYERS, LAYERS), (0, LAYERS)], ids=["both", "text-to-image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_sparse_cross_attention(benchmark, dtype, layers, N, direction, implementation):
    arguments = inputs(N, dtype, *layers)
    flops = layers[0] * attention_flops(N, T, K) + layers[1] * attention_flops(N, K + 1, T)
    # Text and rows in, the map out; backward, the map's gradient and the rows in, theirs out.
    rows = N * (T + K) * C
    moved = dtype.itemsize * (rows + N * C * H * W) + 4 * N * K
    if direction != "forward":
        flops *= 4
        moved += dtype.itemsize * (2 * rows + N * C * H * W)
    for ops in (reference, fused):
        name = f"kept_bytes_{ops.__name__.rpartition('.')[2]}"
        benchmark.extra_info[name] = kept_bytes(ops.sparse_cross_attention, arguments)
    time_operation(
        benchmark, "sparse_cross_attention", implementation, direction, arguments, moved, flops
    )


@pytest.mark.parametrize("N", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_sparse_cross_attention_sdpa(benchmark, dtype, N):
    """The attention products alone, three layers each way, as PyTorch's SDPA runs them."""

    def heads(rows: int) -> Tensor:
        return torch.randn(N, HEADS, rows, C // HEADS, device="cuda", dtype=dtype)

    text, image = heads(T), heads(K + 1)

    def attend() -> None:
        for _ in range(LAYERS):
            F.scaled_dot_product_attention(text, image[:, :, :K], image[:, :, :K])
        for _ in range(LAYERS):
            F.scaled_dot_product_attention(image, text, text)

    time_replays(benchmark, attend)
    keep(benchmark)
