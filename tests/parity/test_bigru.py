"""The fused bidirectional GRU against the reference: values, gradients, layouts, edges."""

import os

import pytest
import torch
from closeness import relative
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lemma_fast.ops import fused, reference
from lemma_fast.ops.weights import BiGRUWeights

pytest.importorskip("triton", reason="needs Triton: pip install 'lemma-fast[triton]'")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Relative errors ||a - b|| / ||b||; gradients may stray five times as far.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
BF16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(INTERPRETED, reason="interpreter miscomputes bf16")
)


def parameters(channels: int, hidden: int, dtype: torch.dtype = torch.float32) -> BiGRUWeights:
    gru = torch.nn.GRU(channels, hidden, bidirectional=True, device=DEVICE, dtype=dtype)
    return BiGRUWeights(*gru.parameters())


def assert_parity(features: torch.Tensor, axis: int, weights: BiGRUWeights) -> None:
    """Output and gradients of the features and all eight parameters, both tables in one call."""
    features = features.requires_grad_()
    results = []
    for ops in (fused, reference):
        out = ops.bigru(features, axis, weights)
        torch.manual_seed(1)
        grad = torch.randn(out.shape, device=DEVICE, dtype=out.dtype)
        results.append((out, *torch.autograd.grad(out, (features, *weights), grad)))
    (out, *grads), (expected, *expected_grads) = results
    assert out.dtype == expected.dtype
    tolerance = TOLERANCE[features.dtype]
    assert relative(out, expected) <= tolerance
    for name, grad, wanted in zip(
        ("features", *weights._fields), grads, expected_grads, strict=True
    ):
        assert grad.dtype == wanted.dtype
        assert relative(grad, wanted) <= 5 * tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("axis", [2, 3])
def test_parity_at_the_models_widths(dtype, axis):
    """The model's widths; 9 and 20 sequences fill less and more than one tile of 16."""
    features = torch.randn(1, 64, 9, 10, device=DEVICE, dtype=dtype) * 2
    assert_parity(features, axis, parameters(64, 32, dtype))


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    # Interpreted, to shrink a failing shape would take minutes.
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    N=st.integers(1, 3),
    C=st.integers(1, 70),
    H=st.integers(1, 6),
    W=st.integers(1, 6),
    hidden=st.integers(16, 64),
    axis=st.sampled_from([2, 3]),
)
def test_drawn_shapes(N, C, H, W, hidden, axis):
    assert_parity(torch.randn(N, C, H, W, device=DEVICE), axis, parameters(C, hidden))


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("length", [1, 2, 33])
def test_lengths(length, axis):
    size = (length, 2) if axis == 2 else (2, length)
    assert_parity(torch.randn(1, 16, *size, device=DEVICE), axis, parameters(16, 16))


def test_layouts():
    """Channels-last in, channels-last out; a slice with odd strides and an expanded map."""
    weights = parameters(20, 16)
    dense = torch.randn(2, 20, 3, 5, device=DEVICE)
    last = dense.to(memory_format=torch.channels_last)
    odd = torch.randn(3, 2, 25, 7, device=DEVICE)[1:, :, 2:22, 1:6].transpose(1, 2)[:, :, :, ::2]
    for features in (last, odd, dense[:1, :, :1].expand(2, -1, 3, -1)):
        assert_parity(features.detach(), 3, weights)
        assert_parity(features.detach(), 2, weights)
    assert fused.bigru(last, 3, weights).is_contiguous(memory_format=torch.channels_last)
    assert fused.bigru(dense, 3, weights).is_contiguous()


def test_a_sum_of_outputs_has_a_gradient():
    """Its gradient is one number expanded to a map, all strides zero."""
    features = torch.randn(1, 16, 2, 3, device=DEVICE, requires_grad=True)
    weights = parameters(16, 16)
    grads = [
        torch.autograd.grad(ops.bigru(features, 3, weights).sum(), features)[0]
        for ops in (fused, reference)
    ]
    torch.testing.assert_close(*grads)


def test_parameters_may_be_wider_than_the_features():
    """What autocast hands over: half-precision features, fp32 parameters; their own gradients."""
    weights = parameters(64, 32)
    features = torch.randn(1, 64, 2, 3, device=DEVICE).half().requires_grad_()
    exact = reference.bigru(features.detach().float(), 3, weights)
    out = fused.bigru(features, 3, weights)
    assert out.dtype == torch.float16
    assert relative(out, exact) <= TOLERANCE[torch.float16]
    grads = torch.autograd.grad(out.sum(), weights)
    for grad, wanted in zip(grads, torch.autograd.grad(exact.sum(), weights), strict=True):
        assert grad.dtype == torch.float32
        assert relative(grad, wanted) <= 5 * TOLERANCE[torch.float16]


def test_autocast_gives_the_reference_s_type():
    weights = parameters(16, 16)
    for dtype in (torch.float32, torch.float16):
        features = torch.randn(1, 16, 2, 3, device=DEVICE, dtype=dtype)
        with torch.autocast(DEVICE, dtype=torch.float16):
            out, expected = (ops.bigru(features, 3, weights) for ops in (fused, reference))
        assert out.dtype == expected.dtype
        assert relative(out, expected) <= TOLERANCE[torch.float16]


def test_nan_stays_in_its_image():
    features = torch.randn(3, 16, 3, 4, device=DEVICE)
    weights = parameters(16, 16)
    clean = fused.bigru(features, 3, weights)
    features[1, 5, 2, 3] = torch.nan
    features.requires_grad_()
    out = fused.bigru(features, 3, weights)
    (grad,) = torch.autograd.grad(out.sum(), features)
    assert out[1].isnan().any()
    assert grad[1].isnan().any()
    torch.testing.assert_close(out[[0, 2]], clean[[0, 2]], atol=0, rtol=0)
    assert not grad[[0, 2]].isnan().any()


def test_an_empty_batch_passes():
    features = torch.randn(0, 16, 2, 3, device=DEVICE, requires_grad=True)
    weights = parameters(16, 16)
    out = fused.bigru(features, 3, weights)
    assert out.shape == (0, 32, 2, 3)
    for grad in torch.autograd.grad(out.sum(), weights):
        assert not grad.any()


def test_backward_twice_is_equal():
    features = torch.randn(3, 16, 7, 4, device=DEVICE, requires_grad=True)
    weights = parameters(16, 16)
    first, second = (
        torch.autograd.grad(fused.bigru(features, 2, weights).square().sum(), (features, *weights))
        for _ in range(2)
    )
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_what_is_kept_for_backward():
    """The input, the output and the parameters; nothing else."""
    features = torch.randn(1, 16, 2, 3, device=DEVICE, requires_grad=True)
    weights = parameters(16, 16)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = fused.bigru(features, 3, weights)
    expected = {tensor.data_ptr() for tensor in (features, out, *weights)}
    assert set(kept) == expected


@pytest.mark.parametrize(
    ("features", "axis", "hidden", "message"),
    [
        (torch.zeros(1, 16, 2, 3), 1, 16, "axis is 1"),
        (torch.zeros(1, 16, 2, 3, dtype=torch.float64), 3, 16, "float64"),
        (torch.zeros(1, 8, 2, 3), 3, 16, r"\[N, 16, H, W\]"),
        (torch.zeros(1, 16, 2, 3), 3, 65, "hidden = 65"),
    ],
)
def test_clear_errors(features, axis, hidden, message):
    with pytest.raises(ValueError, match=message):
        fused.bigru(features.to(DEVICE), axis, parameters(16, hidden))


def test_opcheck():
    features = torch.randn(2, 16, 2, 3, device=DEVICE).to(memory_format=torch.channels_last)
    weights = list(parameters(16, 16))
    torch.library.opcheck(torch.ops.lemma_fast.bigru, (features.requires_grad_(), 3, weights))
    out = torch.ops.lemma_fast.bigru(features, 3, weights).detach()
    torch.library.opcheck(
        torch.ops.lemma_fast.bigru_backward,
        (torch.ones_like(out), features.detach(), out, 3, [w.detach() for w in weights]),
    )


def test_compiles_without_a_break():
    weights = parameters(16, 16)
    features = torch.randn(1, 16, 2, 3, device=DEVICE, requires_grad=True)
    compiled = torch.compile(fused.bigru, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, fused.bigru):
        out = call(features, 2, weights)
        results.append((out, *torch.autograd.grad(out.sum(), (features, *weights))))
    torch.testing.assert_close(*results, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("axis", [2, 3])
def test_a_sum_at_the_store(dtype, axis):
    """Of another layout than the features; it changes no state."""
    from lemma_fast.kernels.bigru import bigru_add

    features = torch.randn(1, 20, 3, 5, device=DEVICE, dtype=dtype)
    features = features.to(memory_format=torch.channels_last)
    weights = parameters(20, 17, dtype)
    add = torch.randn(1, 34, 3, 5, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        out = bigru_add(features, add, axis, weights)
        expected = add.float() + reference.bigru(features.float(), axis, widened(weights))
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert relative(out, expected) <= TOLERANCE[dtype]
        for wrong in (add[:, :33], add.double()):
            with pytest.raises(ValueError, match="add is"):
                bigru_add(features, wrong, axis, weights)
        arguments = (features, add, axis, list(weights))
        torch.library.opcheck(torch.ops.lemma_fast.bigru_add, arguments)


def widened(weights: BiGRUWeights) -> BiGRUWeights:
    return BiGRUWeights(*(weight.float() for weight in weights))
