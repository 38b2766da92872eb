"""What follows convolutions and products in one pass, against PyTorch's own steps."""

import pytest
import torch
import torch.nn.functional as F
from closeness import FORWARD, assert_as_good_as, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install 'lemma-fast[triton]'")

from lemma_fast.kernels.add_norm import add_norm
from lemma_fast.kernels.bias_act import bias_act

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
NAN = float("nan")


def last(*shape: int) -> Tensor:
    x = torch.randn(shape, device=DEVICE)
    return x.contiguous(memory_format=torch.channels_last)


def plain(y, bias, add, activation, slope, add_last, size):
    """The same by PyTorch."""
    if bias is not None:
        y = y + bias[:, None, None]
    if add is not None and not add_last:
        y = y + add
    if activation != "none":
        y = F.relu(y) if activation == "relu" else F.mish(y)
    if slope is not None:
        y = F.prelu(y, slope)
    if add is not None and add_last:
        y = y + add
    return y if size is None else F.interpolate(y, size=size)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_bias_act(data):
    N, H, W = (data.draw(st.integers(1, most)) for most in (3, 5, 6))
    D = data.draw(st.sampled_from([1, 3, 8, 32, 130]))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    activation = data.draw(st.sampled_from(["none", "relu", "mish", "prelu"]))
    slope = torch.rand(1, device=DEVICE) if activation == "prelu" else None
    times = data.draw(st.sampled_from([None, (1, 1), (2, 1), (2, 3)]))
    arguments = (
        torch.randn(D, device=DEVICE) if data.draw(st.booleans()) else None,
        last(N, D, H, W) if data.draw(st.booleans()) else None,
        "none" if activation == "prelu" else activation,
        slope,
        data.draw(st.booleans()),
        times and (times[0] * H, times[1] * W),
    )
    y = 3 * last(N, D, H, W)
    out = bias_act(y, *arguments)
    assert_close(out, plain(y, *arguments), FORWARD)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "mish"])
def test_bias_act_rounds_once(dtype, activation):
    y, add = (last(2, 64, 9, 7).to(dtype) for _ in "ya")
    bias = torch.randn(64, device=DEVICE).to(dtype)
    rest = (activation, None, False, None)
    exact = plain(y.double(), bias.double(), add.double(), *rest)
    assert_as_good_as(bias_act(y, bias, add, *rest), exact.to(dtype), exact)


def test_bias_act_keeps_nan_where_it_is():
    y, bias = last(3, 5, 4, 6), torch.randn(5, device=DEVICE)
    for activation in ("none", "relu", "mish"):
        clean = bias_act(y, bias, activation=activation)
        spoilt = y.clone()
        spoilt[1, 2, 3, 4] = NAN
        out = bias_act(spoilt, bias, activation=activation)
        assert out[1, 2, 3, 4].isnan()
        out[1, 2, 3, 4] = clean[1, 2, 3, 4]
        assert torch.equal(out, clean)
    extremes = torch.tensor([100.0, 1e30, -1e30, -100.0], device=DEVICE)[None, :, None, None]
    torch.testing.assert_close(bias_act(extremes, activation="mish"), F.mish(extremes))


def test_bias_act_says_what_is_wrong():
    y = last(2, 4, 3, 5)
    for words, arguments in (
        ("channels-last maps, y has", (y.contiguous(),)),
        ("float64", (y.double(),)),
        (r"bias is \[3\]", (y, torch.zeros(3))),
        (r"add \[1, 4, 3, 5\]", (y, None, y[:1])),
        ("add .* torch.float16", (y, None, y.half())),
        ("one slope", (y, None, None, "relu", torch.zeros(1))),
        ("one slope", (y, None, None, "none", torch.zeros(4))),
        ("4 x 10 is no multiple of 3 x 5", (y, None, None, "none", None, False, (4, 10))),
    ):
        with pytest.raises(ValueError, match=words):
            bias_act(*arguments)
    assert bias_act(y[:0]).shape == (0, 4, 3, 5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_add_norm(data):
    N, L = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    C = data.draw(st.sampled_from([1, 16, 33, 64, 512]))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    y, residual = (torch.randn(N, L, C, device=DEVICE) + 2 for _ in "yr")
    residual = residual[0].contiguous() if data.draw(st.booleans()) else residual
    weight, bias = torch.randn(2, C, device=DEVICE).unbind()
    expected = F.layer_norm((y + residual).double(), (C,), weight.double(), bias.double(), 1e-5)
    assert_close(add_norm(y, residual, weight, bias), expected.float(), FORWARD)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_add_norm_rounds_once(dtype):
    y, residual = (torch.randn(5, 7, 64, device=DEVICE).to(dtype) for _ in "yr")
    weight, bias = torch.randn(2, 64, device=DEVICE).to(dtype).unbind()
    wide = (weight.double(), bias.double())
    exact = F.layer_norm(y.double() + residual.double(), (64,), *wide)
    assert_as_good_as(add_norm(y, residual, weight, bias), exact.to(dtype), exact)


def test_add_norm_keeps_nan_in_its_row_and_uses_eps():
    y, residual = torch.randn(2, 3, 4, 20, device=DEVICE).unbind()
    weight, bias = torch.randn(2, 20, device=DEVICE).unbind()
    clean = add_norm(y, residual, weight, bias, 0.5)
    assert_close(clean, F.layer_norm(y + residual, (20,), weight, bias, 0.5), FORWARD)
    y[1, 2, 3] = NAN
    out = add_norm(y, residual, weight, bias, 0.5)
    assert out[1, 2].isnan().all()
    out[1, 2] = clean[1, 2]
    assert torch.equal(out, clean)


def test_add_norm_says_what_is_wrong():
    y, w = torch.zeros(2, 3, 8), torch.zeros(8)
    for words, arguments in (
        ("not 8 in torch.float64", (y.double(), y, w, w)),
        ("not 4097", (torch.zeros(1, 4097), y, w, w)),
        (r"residual \[2, 8\]", (y, y[:, 0], w, w)),
        ("contiguous", (y.transpose(0, 1), y.transpose(0, 1), w, w)),
        (r"weight \[4\]", (y, y, w[:4], w)),
    ):
        with pytest.raises(ValueError, match=words):
            add_norm(*arguments)
    assert add_norm(y[:0], y[:0], w, w).shape == (0, 3, 8)


def test_opcheck():
    y, bias = last(2, 8, 3, 4), torch.randn(8, device=DEVICE)
    ops = torch.ops.lemma_fast
    torch.library.opcheck(ops.bias_act, (y, bias, y.clone(), None, 1, True, 6, 4))
    torch.library.opcheck(ops.bias_act, (y, None, None, bias[:1], 3, False, 3, 4))
    rows = torch.randn(2, 3, 8, device=DEVICE)
    torch.library.opcheck(ops.add_norm, (rows, rows[0].clone(), bias, bias.clone(), 1e-5))
