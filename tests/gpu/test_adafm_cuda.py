"""What only a GPU can show of AdaFM: the kernels' own arithmetic, graphs, work without a pause."""

import pytest
import torch
from adafm_case import (
    draw_weights,
    map_weights,
    named,
    reference_pass,
    wanted_parameters,
)
from closeness import BACKWARD, FORWARD, KINKS, relative
from torch import Tensor

from lemma_fast.ops import fused, reference
from lemma_fast.ops.weights import AdaFMWeights

pytestmark = pytest.mark.gpu
# Relative errors ||a - b|| / ||b||; gradients may stray five times as far.
TOLERANCE = {torch.float32: FORWARD, torch.float16: 5e-3, torch.bfloat16: 2e-2}
SIZES = [(1, 64, 16, 64), (64, 64, 16, 64), (3, 20, 7, 41)]


def inputs(
    size: tuple[int, int, int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, AdaFMWeights]:
    N, C, H, W = size
    features, guidance = (torch.randn(N, C, H, W).to("cuda", dtype) for _ in range(2))
    return features, guidance, map_weights(draw_weights(C, H, W), lambda x: x.to("cuda", dtype))


def exact(features: Tensor, guidance: Tensor, weights: AdaFMWeights) -> Tensor:
    wide = map_weights(weights, Tensor.double)
    return reference.adafm(features.double(), guidance.double(), wide, False)


def forward_backward(
    features: Tensor, guidance: Tensor, weights: AdaFMWeights, training: bool
) -> tuple[Tensor, ...]:
    """Output and gradients; the weights' running statistics are updated in training."""
    weights = map_weights(weights, Tensor.detach)
    leaves = [features.detach(), guidance.detach(), *wanted_parameters(weights).values()]
    for leaf in leaves:
        leaf.requires_grad_()
    out = fused.adafm(leaves[0], leaves[1], weights, training)
    return out.detach(), *torch.autograd.grad(out, leaves, torch.cos(out.detach()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_inference(size, dtype):
    given = inputs(size, dtype)
    out = fused.adafm(*given, False)
    assert out.dtype == dtype
    assert relative(out, exact(*given)) <= TOLERANCE[dtype]


@torch.no_grad()
def test_tf32_is_used_where_it_is_allowed():
    given = inputs((2, 64, 16, 64))
    strict = relative(fused.adafm(*given, False), exact(*given))
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    loose = relative(fused.adafm(*given, False), exact(*given))
    assert strict <= FORWARD
    assert 10 * strict < loose <= 2e-3


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients(size, training):
    features, guidance, weights = inputs(size)
    given = map_weights(weights, torch.clone)
    out, *gradients = forward_backward(features, guidance, given, training)
    expected = reference_pass(features, guidance, weights, training, torch.cos(out))
    assert relative(out, expected.out) <= FORWARD
    found = dict(zip(expected.gradients, gradients, strict=True))
    # Biases before a norm have a gradient of zero in training: rounding alone is left of them.
    rounding = 1e-7 * max(float(gradient.norm()) for gradient in expected.gradients.values())
    limit = BACKWARD if size[0] < 64 else KINKS
    for name, gradient in expected.gradients.items():
        error = float((found[name].double() - gradient).norm())
        assert error <= limit * float(gradient.norm()) + rounding, name
    for name, statistic in expected.statistics.items():
        assert relative(named(given)[name], statistic) <= FORWARD, name


def test_a_second_run_gives_the_same_bits():
    given = inputs((64, 64, 16, 64), torch.bfloat16)
    runs = [
        forward_backward(*given[:2], map_weights(given[2], torch.clone), True) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@torch.no_grad()
def test_nan_stays_in_its_image():
    features, guidance, weights = inputs((3, 64, 16, 64), torch.bfloat16)
    clean = fused.adafm(features, guidance, weights, False)
    features[1, 7, 2, 1] = float("nan")
    out = fused.adafm(features, guidance, weights, False)
    assert out[1].isnan().all()
    assert torch.equal(out[::2], clean[::2])


def test_never_waits_for_the_device():
    given = inputs((4, 64, 16, 64))
    forward_backward(*given, True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(*given, True)
        with torch.no_grad():
            fused.adafm(*given, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_cuda_graph_replays_on_new_data(training):
    given = inputs((4, 64, 16, 64))

    def run() -> tuple[Tensor, ...]:
        if training:
            return forward_backward(*given, True)
        with torch.no_grad():
            return (fused.adafm(*given, False),)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    given[0].copy_(torch.randn_like(given[0]))
    graph.replay()
    for got, expected in zip(captured, run(), strict=True):
        assert torch.equal(got, expected)


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_their_tensors_device():
    features, guidance, weights = inputs((2, 64, 16, 64))
    given = [features.to("cuda:1"), guidance.to("cuda:1")]
    weights = map_weights(weights, lambda tensor: tensor.to("cuda:1"))
    assert relative(fused.adafm(*given, weights, False), exact(*given, weights)) <= FORWARD
