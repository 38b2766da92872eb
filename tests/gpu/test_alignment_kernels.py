"""What only a GPU can show of the alignment and the GRU: the paper's sizes, graphs, no waiting.

Small shapes are in tests/parity, in bf16 as soon as there is a GPU.
"""

from typing import Any

import pytest
import torch
from closeness import BACKWARD, FORWARD, KINKS
from torch import Tensor

from lemma_fast.ops import fused, reference
from lemma_fast.ops.weights import BiGRUWeights, CrossAttentionWeights

pytestmark = pytest.mark.gpu
NAMES = ("bigru", "sparse_cross_attention")
T, K, C, H, W = 26, 500, 64, 16, 64
# ||a - b|| / ||b|| in bf16, beside twice what the reference loses in it.
HALF = 5e-3


def layer(dtype: torch.dtype) -> CrossAttentionWeights:
    shapes = [
        (3 * C, C),
        (3 * C,),
        (C, C),
        (C,),
        (C,),
        (C,),
        (C, C),
        (C,),
        (C, C),
        (C,),
        (C,),
        (C,),
    ]
    return CrossAttentionWeights(
        *((torch.randn(shape, device="cuda") / 8).to(dtype).requires_grad_() for shape in shapes)
    )


def arguments(name: str, N: int, dtype: torch.dtype = torch.float32, dropout: float = 0.1) -> tuple:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)

    if name == "bigru":
        gru = torch.nn.GRU(C, C // 2, bidirectional=True, device="cuda", dtype=dtype)
        return leaf(N, C, H, W), 3, BiGRUWeights(*gru.parameters())
    text, selected = leaf(N, T, C), leaf(N, K, C)
    index = torch.rand(N, H * W, device="cuda").topk(K).indices.sort().values.int()
    layers = ([layer(dtype) for _ in range(3)] for _ in range(2))
    return text, selected, index, (H, W), *layers, 4, dropout, torch.tensor(11, device="cuda")


def widened(given: Any) -> Any:
    """The same arguments in fp32."""
    if isinstance(given, Tensor):
        if not given.is_floating_point():
            return given
        return given.detach().float().requires_grad_(given.requires_grad)
    if isinstance(given, tuple) and hasattr(given, "_fields"):
        return type(given)(*map(widened, given))
    return type(given)(map(widened, given)) if isinstance(given, (list, tuple)) else given


def leaves(given: tuple) -> list[Tensor]:
    flat: list[Tensor] = []
    for item in given:
        if isinstance(item, Tensor):
            flat.append(item)
        elif isinstance(item, (list, tuple)):
            flat += leaves(tuple(item))
    return [tensor for tensor in flat if tensor.requires_grad]


def forward_backward(ops, name: str, given: tuple) -> list[Tensor]:
    out = getattr(ops, name)(*given)
    return [out.detach(), *torch.autograd.grad(out, leaves(given), torch.cos(out.detach()))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("N", [1, 64, 1000])
def test_parity_at_the_papers_size(name, N):
    given = arguments(name, N)
    got, expected = (forward_backward(ops, name, given) for ops in (fused, reference))
    largest = max(float(wanted.double().norm()) for wanted in expected[1:])
    for place, (mine, wanted) in enumerate(zip(got, expected, strict=True)):
        floor = largest / 100 if place else 0.0
        distance = float((mine.double() - wanted.double()).norm())
        bent = BACKWARD if N == 1 or name == "bigru" else KINKS
        limit = bent if place else FORWARD
        assert distance <= limit * max(float(wanted.double().norm()), floor), place


# Kernels with dropout and without are compiled apart, and a network trains with either.
@pytest.mark.parametrize(
    ("name", "dropout"), [("bigru", 0.0), *(("sparse_cross_attention", p) for p in (0.0, 0.1))]
)
@pytest.mark.parametrize("N", [1, 64])
def test_bf16_is_as_near_as_the_reference_in_bf16(name, N, dropout):
    given = arguments(name, N, torch.bfloat16, dropout)
    exact = forward_backward(reference, name, widened(given))
    rounded, got = (forward_backward(ops, name, given) for ops in (reference, fused))
    largest = max(float(wanted.norm()) for wanted in exact[1:])
    for place, (mine, other, wanted) in enumerate(zip(got, rounded, exact, strict=True)):
        floor = largest / 100 if place else 0.0
        strayed = float((other.float() - wanted).norm())
        allowed = 2 * strayed + HALF * (5 if place else 1) * max(float(wanted.norm()), floor)
        assert float((mine.float() - wanted).norm()) <= allowed, place


@pytest.mark.parametrize("name", NAMES)
def test_never_waits_for_the_device(name):
    given = arguments(name, 4)
    forward_backward(fused, name, given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(fused, name, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_cuda_graph_replays_on_new_data(name):
    given = arguments(name, 4)
    forward_backward(fused, name, given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(fused, name, given)
    with torch.no_grad():
        given[0].copy_(torch.randn_like(given[0]))
    graph.replay()
    for got, expected in zip(captured, forward_backward(fused, name, given), strict=True):
        assert torch.equal(got, expected)


def test_masks_of_kernel_and_reference_are_equal_on_the_device():
    given = arguments("sparse_cross_attention", 8)
    with torch.no_grad():
        results = [ops.sparse_cross_attention(*given) for ops in (fused, reference)]
    # One mask that differed would move its row by a tenth of its size.
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)
