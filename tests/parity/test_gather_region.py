"""gather_region against its reference: rows and every gradient, any device."""

import pytest
import torch
from closeness import BACKWARD, FORWARD, assert_as_good_as, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lemma_fast.ops import fused, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(DEVICE == "cpu", reason="interpreter miscomputes bf16"),
)
SMALL = (2, 5, 7, 4, 5, 9)


def inputs(N: int, C: int, D: int, H: int, W: int, K: int) -> list[Tensor]:
    """Features, ascending index, weight, bias, and positions that all images share (stride 0)."""
    index = torch.rand(N, H * W, device=DEVICE).topk(K).indices.sort().values.int()
    weight = torch.randn(D, C, 3, 3, device=DEVICE) / (3 * C**0.5)
    positions = torch.randn(1, H * W, D, device=DEVICE).expand(N, -1, -1)
    features = torch.randn(N, C, H, W, device=DEVICE)
    return [features, index, weight, torch.randn(D, device=DEVICE), positions]


def run(ops, given: list[Tensor], grad: Tensor | None = None) -> tuple[Tensor, ...]:
    """The rows, and the gradients of all but the index for `grad`."""
    leaves = [x.detach() for x in given]
    wanted = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
    out = ops.gather_region(*leaves)
    grad = (
        torch.sin(torch.arange(out.numel(), device=DEVICE)).view_as(out) if grad is None else grad
    )
    return out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.dtype))


def check_parity(given: list[Tensor], grad: Tensor | None = None) -> None:
    results = zip(run(fused, given, grad), run(reference, given, grad), strict=True)
    for place, (got, expected) in enumerate(results):
        assert_close(got, expected, BACKWARD if place else FORWARD)


@pytest.mark.parametrize(
    "shape",
    [SMALL, (1, 1, 1, 1, 1, 1), (3, 17, 2, 1, 6, 6), (1, 3, 65, 5, 4, 20), (1, 33, 16, 3, 9, 17)],
    ids=str,
)
def test_parity(shape):
    check_parity(inputs(*shape))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_any_index(data):
    N, C, D, H, W = (data.draw(st.integers(1, most)) for most in (2, 18, 18, 4, 4))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    given = inputs(N, C, D, H, W, 1)
    rows = st.lists(st.integers(0, H * W - 1), min_size=1, max_size=17)
    row = data.draw(rows)
    given[1] = torch.tensor([row, *(row[::-1] for _ in range(N - 1))], device=DEVICE)
    check_parity(given)


def test_positions_may_repeat_in_any_order():
    given = inputs(*SMALL)
    given[1] = torch.tensor([[3, 3, 3, 0, 19, 3], [7, 0, 7, 1, 0, 7]], device=DEVICE)
    check_parity(given)


def test_strides_are_read_in_place():
    features, index, weight, bias, positions = inputs(*SMALL)
    last = features.contiguous(memory_format=torch.channels_last)
    check_parity([last, index, weight, bias, positions])
    wide = torch.randn(2, 10, 8, 15, device=DEVICE)[:, ::2, ::2, ::3]
    every = torch.stack([index, index], 2)[:, :, 0]
    dense = torch.randn(2, 7, 20, device=DEVICE).transpose(1, 2)
    turned = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    check_parity([wide, every, turned, torch.stack([bias, bias], 1)[:, 0], dense])
    check_parity([features[:1].expand(2, -1, -1, -1), index, weight, bias, positions])


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_gradient_of_any_layout(layout):
    grad = torch.randn(2, 7, 9, device=DEVICE).transpose(1, 2)
    check_parity(inputs(*SMALL), grad if layout == "transposed" else grad[:1, :1].expand(2, 9, 7))


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_half_precision(dtype):
    given = [x.to(dtype) if x.is_floating_point() else x for x in inputs(*SMALL)]
    exact = [x.double() if x.is_floating_point() else x for x in given]
    results = (run(fused, given), run(reference, given), run(reference, exact))
    for got, rounded, true in zip(*results, strict=True):
        assert_as_good_as(got, rounded, true)


@pytest.mark.parametrize("features_dtype", [torch.float16, torch.float32], ids=str)
def test_autocast(features_dtype):
    given = inputs(*SMALL)
    given[0] = given[0].to(features_dtype)
    exact = [x.double() if x.is_floating_point() else x for x in given]
    results = []
    for ops in (fused, reference):
        with torch.autocast(DEVICE, torch.float16):
            results.append(run(ops, given))
    for got, rounded, true in zip(*results, run(reference, exact), strict=True):
        assert_as_good_as(got, rounded, true)


def test_only_wanted_gradients_are_made():
    given = inputs(*SMALL)
    for place in (0, 2, 3, 4):
        leaves = [x.detach().requires_grad_(i == place) for i, x in enumerate(given)]
        (got,) = torch.autograd.grad(fused.gather_region(*leaves).sum(), leaves[place])
        (expected,) = torch.autograd.grad(reference.gather_region(*leaves).sum(), leaves[place])
        assert_close(got, expected, BACKWARD)


def test_deterministic_algorithms_are_honoured():
    torch.use_deterministic_algorithms(True)
    given = inputs(*SMALL)
    given[1] = given[1] % 3
    for first, second in zip(run(fused, given), run(fused, given), strict=True):
        assert torch.equal(first, second)


def test_nan_stays_in_its_image():
    given = inputs(*SMALL)
    clean = run(fused, given)
    given[0][0, 2, 1, 1] = float("nan")
    out, features_gradient, *_ = run(fused, given)
    assert torch.equal(out.isnan(), reference.gather_region(*given).isnan())
    assert out[0].isnan().any()
    assert torch.equal(out[1], clean[0][1])
    assert torch.equal(features_gradient, clean[1])


def test_no_images():
    given = inputs(*SMALL)
    given = [x if place in (2, 3) else x[:0] for place, x in enumerate(given)]
    out, features_gradient, weight_gradient, *_ = run(fused, given)
    assert out.shape == (0, 9, 7)
    assert features_gradient.shape == (0, 5, 4, 5)
    assert torch.equal(weight_gradient, torch.zeros_like(given[2]))


def test_wrong_inputs_are_named():
    features, index, weight, bias, positions = inputs(*SMALL)
    with pytest.raises(ValueError, match=r"features \[2, 5, 4, 5\] need .*\(7, 4, 3, 3\)"):
        fused.gather_region(features, index, weight[:, :4], bias, positions)
    with pytest.raises(ValueError, match="features are torch.float16, weight torch.float32"):
        fused.gather_region(features.half(), index, weight, bias, positions)
    with pytest.raises(ValueError, match=r"use ops\.reference"):
        fused.gather_region(features, index, weight, bias, positions.double())


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"needs a CUDA device.*use ops\.reference"):
        fused.gather_region(*(x.cpu() for x in inputs(*SMALL)))


def test_opcheck():
    from lemma_fast.kernels import gather_region  # noqa: F401

    given = inputs(1, 2, 3, 2, 3, 4)
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in given]
    torch.library.opcheck(torch.ops.lemma_fast.gather_region, (*leaves, torch.float32))
    backward = torch.ops.lemma_fast.gather_region_backward
    torch.library.opcheck(backward, (torch.randn(1, 4, 3, device=DEVICE), *given[:4]))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_compiles_as_one_graph(autocast):
    given = inputs(1, 2, 3, 2, 3, 4)

    def step(*leaves):
        with torch.autocast(DEVICE, torch.float16, enabled=autocast):
            return fused.gather_region(*leaves)

    results = []
    for call in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in given]
        wanted = [x for x in leaves if x.requires_grad]
        out = call(*leaves)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), wanted)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
