"""What only a GPU can show of the location kernels: graphs, streams of work without a pause, sizes.

Small shapes are in tests/parity, in bf16 as soon as there is a GPU.
"""

import pytest
import torch
from closeness import BACKWARD, FORWARD, KINKS, assert_close
from torch import Tensor

from lemma_fast.ops import fused, reference

pytestmark = pytest.mark.gpu
K = 500
# ||a - b|| / ||b|| in bf16, beside twice what the reference loses in it.
HALF = 5e-3


def inputs(N: int, dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    device = "cuda"
    h_attn = torch.randn(N, 26, 8, 32, device=device)
    lengths = torch.randint(2, 27, (N,), device=device)
    features = torch.randn(N, 64, 16, 64, device=device, dtype=dtype)
    logits = torch.randn(N, 64, 16, 64, device=device, dtype=dtype)
    index = torch.rand(N, 1024, device=device).topk(K).indices.sort().values.int()
    weight = torch.randn(64, 64, 3, 3, device=device, dtype=dtype) / 24
    bias = torch.randn(64, device=device, dtype=dtype)
    positions = torch.randn(1, 1024, 64, device=device).expand(N, -1, -1)
    return {
        "compress_select": (h_attn, lengths, K, (16, 64)),
        "location_enhance": (logits, features),
        "gather_region": (features, index, weight, bias, positions),
    }


def forward_backward(ops, name: str, given: tuple) -> tuple[Tensor, ...]:
    leaves = [
        x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x
        for x in given
    ]
    out = getattr(ops, name)(*leaves)
    out = out[0] if isinstance(out, tuple) else out
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return out.detach(), *torch.autograd.grad(out, wanted, torch.cos(out.detach()))


@pytest.mark.parametrize("name", ["compress_select", "location_enhance", "gather_region"])
@pytest.mark.parametrize("N", [1, 64, 1000])
def test_parity_at_the_papers_size(name, N):
    given = inputs(N)[name]
    results = (forward_backward(fused, name, given), forward_backward(reference, name, given))
    bent = KINKS if N > 1 and name == "compress_select" else BACKWARD
    for place, (got, expected) in enumerate(zip(*results, strict=True)):
        assert_close(got, expected, bent if place else FORWARD)


@pytest.mark.parametrize("name", ["location_enhance", "gather_region"])
@pytest.mark.parametrize("N", [1, 64])
def test_bf16_is_as_near_as_the_reference_in_bf16(name, N):
    given = inputs(N, torch.bfloat16)[name]
    wide = tuple(x.float() if x.is_floating_point() else x for x in given)
    exact = forward_backward(reference, name, wide)
    rounded, got = (forward_backward(ops, name, given) for ops in (reference, fused))
    for place, (mine, other, wanted) in enumerate(zip(got, rounded, exact, strict=True)):
        strayed = float((other.float() - wanted).norm())
        allowed = 2 * strayed + (5 if place else 1) * HALF * float(wanted.norm())
        assert float((mine.float() - wanted).norm()) <= allowed, place


@pytest.fixture
def any_order():
    """PyTorch's deterministic scatter, the gradient of positions, copies from the host."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize("name", ["compress_select", "location_enhance", "gather_region"])
def test_never_waits_for_the_device(name):
    given = inputs(4)[name]
    forward_backward(fused, name, given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(fused, name, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize("name", ["compress_select", "location_enhance", "gather_region"])
def test_cuda_graph_replays_on_new_data(name):
    given = inputs(4)[name]
    forward_backward(fused, name, given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(fused, name, given)
    given[0].copy_(torch.randn_like(given[0]))
    graph.replay()
    for got, expected in zip(captured, forward_backward(fused, name, given), strict=True):
        assert torch.equal(got, expected)


def test_tf32_is_used_where_it_is_allowed():
    given = inputs(2)["gather_region"]
    exact = reference.gather_region(*(x.double() if x.is_floating_point() else x for x in given))
    strict = (fused.gather_region(*given) - exact).norm() / exact.norm()
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    loose = (fused.gather_region(*given) - exact).norm() / exact.norm()
    assert strict <= FORWARD
    assert 10 * strict < loose <= 2e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_their_tensors_device():
    given = [x.to("cuda:1") for x in inputs(2)["location_enhance"]]
    assert_close(fused.location_enhance(*given), reference.location_enhance(*given), FORWARD)
