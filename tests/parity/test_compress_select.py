"""compress_select against its reference: scores, selection and gradient, any device."""

import pytest
import torch
from closeness import BACKWARD, FORWARD, assert_as_good_as, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from lemma_fast.ops import fused, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAPER = (1, 26, 8, 32, 500, 16, 64)


def attention(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def check_selection(score: torch.Tensor, index: torch.Tensor) -> None:
    """The index is what a stable sort of these very scores selects."""
    ones = torch.ones(len(score), dtype=torch.long, device=score.device)
    size = (score.shape[1], score.shape[2])
    _, expected = reference.compress_select(score[:, None], ones, index.shape[1], size)
    assert torch.equal(index, expected)


def check_parity(h_attn: torch.Tensor, lengths: torch.Tensor, K: int, size: tuple[int, int]):
    results = []
    grad = torch.randn(len(h_attn), *size, device=DEVICE)
    for ops in (fused, reference):
        leaf = h_attn.detach().requires_grad_()
        score, index = ops.compress_select(leaf, lengths, K, size)
        results.append((score, index, *torch.autograd.grad(score, leaf, grad)))
    (score, index, gradient), (expected, _, expected_gradient) = results
    assert score.dtype == torch.float32
    assert index.dtype == torch.int32
    assert_close(score, expected, FORWARD)
    assert (score - expected).abs().max() <= 2e-6 * max(1, h_attn.abs().max())
    check_selection(score.detach(), index)
    assert_close(gradient, expected_gradient, BACKWARD)
    assert (gradient == 0).logical_or(expected_gradient.abs() > 1e-12).all()


@pytest.mark.parametrize(
    "shape",
    [
        PAPER,
        (2, 3, 5, 7, 11, 9, 13),
        (3, 4, 6, 8, 1, 3, 5),
        (2, 2, 1, 3, 4, 4, 1),
        (1, 1, 1, 1, 1, 1, 1),
    ],
    ids=str,
)
def test_parity(shape):
    N, T, h, w, K, H, W = shape
    lengths = torch.randint(min(2, T), T + 1, (N,), device=DEVICE)
    check_parity(attention(N, T, h, w), lengths, K, (H, W))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    N, T, h, w = (data.draw(st.integers(1, most)) for most in (3, 5, 6, 6))
    H, W = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    K = data.draw(st.integers(1, H * W))
    lengths = data.draw(st.lists(st.integers(0, T + 2), min_size=N, max_size=N))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    check_parity(attention(N, T, h, w), torch.tensor(lengths, device=DEVICE), K, (H, W))


def test_strides_are_read_in_place():
    channels_last = attention(2, 5, 6, 3).contiguous(memory_format=torch.channels_last)
    every_other = attention(4, 6, 5, 12)[::2, 1::2, :, ::3]
    lengths = torch.tensor([3, 9, 2, 9], device=DEVICE)[::2]
    for h_attn in (channels_last, every_other, attention(2, 1, 4, 4).expand(2, 3, 4, 4)):
        check_parity(h_attn, lengths, 7, (5, 9))


def test_expanded_gradient():
    leaf = attention(2, 3, 4, 5).requires_grad_()
    lengths = torch.tensor([3, 2], device=DEVICE)
    gradient = [
        torch.autograd.grad(ops.compress_select(leaf, lengths, 4, (6, 7))[0].sum(), leaf)[0]
        for ops in (fused, reference)
    ]
    assert_close(*gradient, BACKWARD)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(DEVICE == "cpu", reason="interpreter miscomputes bf16"),
        ),
    ],
    ids=str,
)
def test_half_precision_scores_are_fp32(dtype):
    h_attn = attention(2, 4, 5, 6).to(dtype).requires_grad_()
    lengths = torch.tensor([4, 3], device=DEVICE)
    score, index = fused.compress_select(h_attn, lengths, 9, (7, 8))
    expected, _ = reference.compress_select(h_attn, lengths, 9, (7, 8))
    assert score.dtype == torch.float32
    assert_close(score, expected, FORWARD)
    check_selection(score.detach(), index)
    grad = torch.randn_like(score)
    wide = h_attn.detach().double().requires_grad_()
    exact, _ = reference.compress_select(wide, lengths, 9, (7, 8))
    assert_as_good_as(
        *torch.autograd.grad(score, h_attn, grad),
        *torch.autograd.grad(expected, h_attn, grad),
        *torch.autograd.grad(exact, wide, grad.double()),
    )


@pytest.mark.parametrize("value", [0.0, 0.37, -2.0])
def test_equal_scores_select_the_first_positions(value):
    h_attn = torch.full((2, 2, 3, 5), value, device=DEVICE)
    lengths = torch.tensor([2, 2], device=DEVICE)
    score, index = fused.compress_select(h_attn, lengths, 7, (3, 5))
    assert torch.equal(score, torch.full_like(score, value))
    assert torch.equal(index, torch.arange(7, dtype=torch.int32, device=DEVICE).expand(2, 7))


def test_ties_at_the_threshold_take_the_lower_positions():
    row = torch.tensor([1.0, 3.0, 2.0, 1.0, 3.0, 1.0, -1.0, 1.0], device=DEVICE)
    lengths = torch.ones(1, dtype=torch.long, device=DEVICE)
    _, index = fused.compress_select(row.view(1, 1, 2, 4), lengths, 5, (2, 4))
    assert index.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("K", [1, 17, 199, 200])
def test_scores_of_every_magnitude_are_ordered(K):
    exponents = torch.linspace(-43, 37, 200, device=DEVICE)[torch.randperm(200, device=DEVICE)]
    score = (10.0**exponents * torch.where(torch.rand(200, device=DEVICE) < 0.5, -1, 1)).float()
    lengths = torch.ones(1, dtype=torch.long, device=DEVICE)
    _, index = fused.compress_select(score.view(1, 1, 10, 20), lengths, K, (10, 20))
    assert index.tolist() == [sorted(score.topk(K).indices.tolist())]


def test_dead_characters_count_as_zero_without_gradient():
    h_attn = (-attention(2, 4, 3, 3).abs() - 1).requires_grad_()
    # All characters are alive in the second image: its scores stay negative.
    score, _ = fused.compress_select(h_attn, torch.tensor([2, 4], device=DEVICE), 3, (3, 3))
    assert (score[0] == 0).all()
    assert (score[1] < 0).all()
    (gradient,) = torch.autograd.grad(score.sum(), h_attn)
    assert (gradient[0] == 0).all()
    torch.testing.assert_close(gradient[1].sum(), torch.tensor(9.0, device=DEVICE))


def test_gradient_of_equal_maps_goes_to_the_first():
    h_attn = attention(1, 1, 3, 4).expand(1, 3, 3, 4).contiguous().requires_grad_()
    score, _ = fused.compress_select(h_attn, torch.tensor([3], device=DEVICE), 2, (5, 6))
    (gradient,) = torch.autograd.grad(score.sum(), h_attn)
    assert gradient[0, 0].abs().sum() > 0
    assert (gradient[0, 1:] == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_nan_stays_in_its_image_and_counts_as_the_largest(sign):
    h_attn = attention(2, 3, 4, 6)
    lengths = torch.tensor([3, 3], device=DEVICE)
    clean = fused.compress_select(h_attn, lengths, 70, (7, 11))
    # A NaN's sign bit must not matter.
    h_attn[0, 1, 2, 3] = torch.tensor(float("nan")).copysign(torch.tensor(sign))
    score, index = fused.compress_select(h_attn, lengths, 70, (7, 11))
    expected, expected_index = reference.compress_select(h_attn, lengths, 70, (7, 11))
    assert score[0].isnan().any()
    assert torch.equal(score.isnan(), expected.isnan())
    assert torch.equal(index, expected_index)
    assert torch.equal(score[1], clean[0][1])
    assert torch.equal(index[1], clean[1][1])


def test_many_images():
    N = 33
    check_parity(attention(N, 2, 2, 2), torch.full((N,), 2, device=DEVICE), 3, (3, 3))


def test_no_images():
    h_attn = attention(1, 3, 4, 5)[:0].requires_grad_()
    lengths = torch.zeros(0, dtype=torch.long, device=DEVICE)
    score, index = fused.compress_select(h_attn, lengths, 4, (6, 7))
    assert score.shape == (0, 6, 7)
    assert index.shape == (0, 4)
    assert torch.autograd.grad(score.sum(), h_attn)[0].shape == (0, 3, 4, 5)


def test_wrong_inputs_are_named():
    lengths = torch.tensor([2], device=DEVICE)
    with pytest.raises(ValueError, match="num_selected is 10, the map has 9"):
        fused.compress_select(attention(1, 2, 3, 3), lengths, 10, (3, 3))
    with pytest.raises(ValueError, match="up to 8192 positions"):
        fused.compress_select(attention(1, 2, 3, 3), lengths, 10, (91, 91))
    with pytest.raises(ValueError, match="has 2 images, lengths is"):
        fused.compress_select(attention(2, 2, 3, 3), lengths, 1, (3, 3))
    with pytest.raises(ValueError, match="float64"):
        fused.compress_select(attention(1, 2, 3, 3).double(), lengths, 1, (3, 3))


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"needs a CUDA device.*use ops\.reference"):
        fused.compress_select(torch.zeros(1, 2, 3, 3), torch.tensor([2]), 1, (3, 3))


def test_opcheck():
    from lemma_fast.kernels import compress_select  # noqa: F401

    h_attn = attention(2, 3, 3, 4).requires_grad_()
    lengths = torch.tensor([3, 2], device=DEVICE)
    operator = torch.ops.lemma_fast.compress_select
    torch.library.opcheck(operator, (h_attn, lengths, 4, 4, 5))
    score, _, winner = operator(h_attn.detach(), lengths, 4, 4, 5)
    backward = torch.ops.lemma_fast.compress_select_backward
    torch.library.opcheck(backward, (score, winner, [2, 3, 3, 4], torch.float32))


def test_compiles_as_one_graph():
    lengths = torch.tensor([3, 2], device=DEVICE)

    def step(h_attn):
        score, index = fused.compress_select(h_attn * 2, lengths, 4, (4, 5))
        return score + 1, index

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    h_attn = attention(2, 3, 3, 4).requires_grad_()
    results = []
    for run in (compiled, step):
        score, index = run(h_attn)
        results.append((score, index, *torch.autograd.grad(score.square().sum(), h_attn)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
