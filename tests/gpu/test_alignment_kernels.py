"""What only a GPU can show of the alignment and the GRU: the paper's sizes, graphs, no waiting.

bf16 parity is in tests/parity, where it runs as soon as there is a GPU.
"""

import pytest
import torch
from closeness import BACKWARD, FORWARD, KINKS
from torch import Tensor

from lemma_fast.ops import fused, reference
from lemma_fast.ops.weights import BiGRUWeights, CrossAttentionWeights

pytestmark = pytest.mark.gpu
NAMES = ("bigru", "sparse_cross_attention")
T, K, C, H, W = 26, 500, 64, 16, 64


def layer() -> CrossAttentionWeights:
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
        *((torch.randn(shape, device="cuda") / 8).requires_grad_() for shape in shapes)
    )


def arguments(name: str, N: int) -> tuple:
    if name == "bigru":
        gru = torch.nn.GRU(C, C // 2, bidirectional=True, device="cuda")
        features = torch.randn(N, C, H, W, device="cuda", requires_grad=True)
        return features, 3, BiGRUWeights(*gru.parameters())
    text = torch.randn(N, T, C, device="cuda", requires_grad=True)
    selected = torch.randn(N, K, C, device="cuda", requires_grad=True)
    index = torch.rand(N, H * W, device="cuda").topk(K).indices.sort().values.int()
    layers = ([layer() for _ in range(3)] for _ in range(2))
    return text, selected, index, (H, W), *layers, 4, 0.1, torch.tensor(11, device="cuda")


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
