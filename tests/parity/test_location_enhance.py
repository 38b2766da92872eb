"""location_enhance against its reference: result and both gradients, any device."""

import pytest
import torch
from closeness import BACKWARD, FORWARD, assert_as_good_as, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from lemma_fast.ops import fused, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(DEVICE == "cpu", reason="interpreter miscomputes bf16"),
)


def inputs(N: int, C: int, H: int, W: int, shared: bool = False) -> tuple[torch.Tensor, ...]:
    logits = 3 * torch.randn(N, 1 if shared else C, H, W, device=DEVICE)
    return logits, torch.randn(N, C, H, W, device=DEVICE) + 2


def check_parity(logits: torch.Tensor, features: torch.Tensor) -> None:
    results = []
    grad = torch.randn_like(features)
    for ops in (fused, reference):
        leaves = [x.detach().requires_grad_() for x in (logits, features)]
        out = ops.location_enhance(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for got, expected, limit in zip(*results, (FORWARD, BACKWARD, BACKWARD), strict=True):
        # One position has no variance: its gradient is rounding, times 1 / sqrt(eps).
        if features[0, 0].numel() > 1 or limit == FORWARD:
            assert_close(got, expected, limit)
        else:
            assert got.abs().max() <= 1e-3


@pytest.mark.parametrize("shared", [False, True], ids=["logits by channel", "one map"])
@pytest.mark.parametrize(
    "shape", [(1, 64, 16, 64), (2, 3, 5, 7), (1, 1, 1, 1), (3, 2, 1, 33)], ids=str
)
def test_parity(shape, shared):
    check_parity(*inputs(*shape, shared))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    N, C, H, W = (data.draw(st.integers(1, most)) for most in (3, 10, 9, 12))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    logits, features = inputs(N, C, H, W, data.draw(st.booleans()))
    if data.draw(st.booleans()):
        features = features.contiguous(memory_format=torch.channels_last)
    check_parity(logits, features)


def test_strides_are_read_in_place():
    logits, features = inputs(2, 9, 5, 6)
    check_parity(logits, features.contiguous(memory_format=torch.channels_last))
    check_parity(logits.transpose(2, 3), features.transpose(2, 3))
    check_parity(logits[:, ::2, 1:, ::3], features[:, ::2, 1:, ::3])
    check_parity(logits[:1].expand(2, -1, -1, -1), features[:, :1].expand(-1, 9, -1, -1))


def test_channels_last_stays_channels_last():
    logits, features = inputs(2, 4, 3, 5)
    features = features.contiguous(memory_format=torch.channels_last)
    out = fused.location_enhance(logits, features)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("logits_dtype", [torch.float32, None], ids=["fp32 logits", "same"])
def test_half_precision(dtype, logits_dtype):
    logits, features = inputs(2, 3, 6, 7)
    given = [logits.to(logits_dtype or dtype), features.to(dtype)]
    grad = torch.randn_like(given[1])
    results = []
    for ops, kinds in ((fused, None), (reference, None), (reference, torch.double)):
        leaves = [x.to(kinds or x.dtype).detach().requires_grad_() for x in given]
        out = ops.location_enhance(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))))
    for got, rounded, exact in zip(*results, strict=True):
        assert_as_good_as(got, rounded, exact)


def test_eps_is_used():
    logits, features = inputs(1, 2, 3, 4)
    out = fused.location_enhance(logits, features, 0.5)
    assert_close(out, reference.location_enhance(logits, features, 0.5), FORWARD)


def test_nan_stays_in_its_row():
    logits, features = inputs(2, 3, 4, 5)
    clean = fused.location_enhance(logits, features)
    features[0, 1, 2, 3] = logits[1, 2, 0, 0] = float("nan")
    out = fused.location_enhance(logits, features)
    assert torch.equal(out.isnan(), reference.location_enhance(logits, features).isnan())
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])


def test_no_images():
    leaves = [x[:0].requires_grad_() for x in inputs(1, 3, 4, 5)]
    out = fused.location_enhance(*leaves)
    assert all(x.shape == (0, 3, 4, 5) for x in (out, *torch.autograd.grad(out.sum(), leaves)))


def test_wrong_inputs_are_named():
    logits, features = inputs(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"features are \[2, 3, 4, 5\], logits \[2, 2, 4, 5\]"):
        fused.location_enhance(logits[:, :2], features)
    with pytest.raises(ValueError, match="float64"):
        fused.location_enhance(logits, features.double())
    with pytest.raises(ValueError, match="up to 4096 positions"):
        fused.location_enhance(*inputs(1, 1, 91, 91))


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"needs a CUDA device.*use ops\.reference"):
        fused.location_enhance(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("shared", [False, True], ids=["logits by channel", "one map"])
def test_opcheck(shared):
    from lemma_fast.kernels import location_enhance  # noqa: F401

    logits, features = inputs(2, 3, 3, 4, shared)
    last = features.contiguous(memory_format=torch.channels_last)
    for x in (features, last):
        arguments = (logits.requires_grad_(), x.requires_grad_(), 1e-5)
        torch.library.opcheck(torch.ops.lemma_fast.location_enhance, arguments)
        arguments = (x.detach(), logits.detach(), x.detach(), 1e-5)
        torch.library.opcheck(torch.ops.lemma_fast.location_enhance_backward, arguments)


def test_compiles_as_one_graph():
    def step(logits, features):
        return fused.location_enhance(logits * 2, features) + 1

    leaves = [x.requires_grad_() for x in inputs(2, 3, 3, 4)]
    results = []
    for run in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        out = run(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
