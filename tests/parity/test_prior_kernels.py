"""The prior's kernels against PyTorch: position attention, what is read, the cloze attention."""

import pytest
import torch
import torch.nn.functional as F
from closeness import FORWARD, assert_close, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install 'lemma-fast[triton]'")

from lemma_fast.kernels import read_characters as reading
from lemma_fast.kernels.cloze_attention import cloze_attention
from lemma_fast.kernels.position_attention import position_attention, split
from lemma_fast.model.prior import valid_lengths

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16
TYPES = [torch.float32, HALF] + ([torch.bfloat16] if DEVICE == "cuda" else [])
NAN = float("nan")


def looked(keys: Tensor, bias: Tensor, queries: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors and attention in fp64 from what the kernel is given."""
    attention = (queries.double() @ F.relu(keys + bias).double().transpose(1, 2)).softmax(2)
    return attention @ values.double(), attention


@pytest.mark.parametrize("sizes", [(2, 256, 64, 26), (1, 7, 40, 3), (3, 33, 130, 17)], ids=str)
def test_position_attention(sizes):
    """Attention and vectors are of fp32's precision, although operands are half, then rounded."""
    N, P, C, T = sizes
    keys, values = torch.randn(2, N, P, C, device=DEVICE).to(HALF).unbind()
    bias, queries = torch.randn(C, device=DEVICE).to(HALF), torch.randn(T, C, device=DEVICE) / 8
    vectors, attention = position_attention(keys, bias, split(queries, HALF), values)
    wanted, exact = looked(keys, bias, queries, values)
    assert relative(attention, exact) <= FORWARD
    assert attention.dtype == torch.float32
    assert relative(vectors, wanted) <= 1.1 * relative(wanted.to(HALF), wanted)
    assert vectors.dtype == HALF


def test_position_attention_keeps_nan_in_its_image():
    keys, values = torch.randn(2, 3, 20, 16, device=DEVICE).to(HALF).unbind()
    bias, queries = torch.zeros(16, device=DEVICE).to(HALF), torch.randn(4, 16, device=DEVICE)
    clean = position_attention(keys, bias, split(queries, HALF), values)
    keys[1, 3, 2] = NAN
    for out, kept in zip(
        position_attention(keys, bias, split(queries, HALF), values), clean, strict=True
    ):
        assert out[1].isnan().all()
        assert torch.equal(out[::2], kept[::2])


def test_position_attention_says_what_is_wrong():
    keys, bias, queries = torch.zeros(1, 4, 8).half(), torch.zeros(8).half(), torch.zeros(3, 8)
    parts = split(queries, HALF)
    for words, arguments in (
        ("float32", (keys.float(), bias.float(), parts.float(), keys.float())),
        ("not 257", (torch.zeros(1, 257, 8).half(), bias, parts, keys)),
        ("and 33 in", (keys, bias, torch.zeros(2, 33, 8).half(), keys)),
        ("need", (keys, bias, parts, keys[:, :3])),
        ("contiguous", (keys.expand(2, -1, -1), bias, parts, keys.expand(2, -1, -1))),
    ):
        with pytest.raises(ValueError, match=words):
            position_attention(*arguments)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_reading(data):
    N, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    classes, shortest = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from(TYPES))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    # In eighths, so that many are equal.
    logits = (torch.randn(N, T, classes, device=DEVICE) * 8).round().div(8).to(dtype)
    logits[:, :, 0] += data.draw(st.sampled_from([0, 2]))
    lengths, rows, wide = reading.read_characters(logits, shortest)
    expected = valid_lengths(logits, min(shortest, T))
    assert torch.equal(lengths, expected)
    assert torch.equal(reading.valid_lengths(logits, shortest), expected)
    assert torch.equal(wide, logits.float())
    assert rows.dtype == dtype
    assert rows.shape == (N, T, reading.columns_of(classes, T))
    near = FORWARD if dtype == torch.float32 else 1e-2
    assert_close(rows[:, :, :classes], logits.softmax(2), near)
    places = torch.eye(T, rows.shape[2] - classes, device=DEVICE, dtype=dtype)
    assert torch.equal(rows[:, :, classes:], places.expand(N, -1, -1))


def test_of_equal_logits_the_lower_class_counts():
    logits = torch.zeros(1, 5, 4, device=DEVICE)
    logits[0, :, 2] = 1
    logits[0, 2, 0] = 1
    assert reading.valid_lengths(logits, 1).tolist() == valid_lengths(logits, 1).tolist() == [3]


@pytest.mark.parametrize("at", [0, 1, 4])
def test_nan_is_the_largest_logit(at):
    logits = torch.randn(2, 6, 5, device=DEVICE)
    logits[:, :, 0] -= 9
    logits[1, 3, 0] = 9
    logits[1, 2, at] = NAN
    expected = valid_lengths(logits, 1)
    assert expected.tolist() == [6, 3 if at == 0 else 4]
    lengths, rows, _ = reading.read_characters(logits, 1)
    assert torch.equal(lengths, expected)
    assert rows[1, 2, :5].isnan().all()
    assert not rows[0].isnan().any()


def test_reading_says_what_is_wrong():
    for words, logits in (
        ("float64", torch.zeros(1, 2, 3).double()),
        ("got torch.float32, 129", torch.zeros(1, 129, 3)),
        ("250", torch.zeros(1, 20, 250)),
        ("contiguous", torch.zeros(1, 3, 2).transpose(1, 2)),
    ):
        with pytest.raises(ValueError, match=words):
            reading.read_characters(logits, 2)


def attended(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, heads: int) -> Tensor:
    place = torch.arange(q.shape[1], device=q.device)
    mask = ((place[:, None] != place) & (place < lengths[:, None, None]))[:, None]
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~mask, -torch.inf)
    # Nothing is seen where all is masked.
    return (scores.softmax(3).nan_to_num(0.0) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 26, 8, 64), (3, 5, 2, 3), (1, 1, 1, 4)], ids=str)
def test_cloze_attention(dtype, sizes):
    """Rows of one product, a first query that all images share, lengths from 1 on."""
    N, T, heads, width = sizes
    C = heads * width
    k, v = torch.randn(N, T, 2 * C, device=DEVICE).to(dtype).chunk(2, dim=2)
    q = torch.randn(T, C, device=DEVICE).to(dtype).expand(N, -1, -1)
    lengths = torch.arange(1, N + 1, device=DEVICE) * T // N
    lengths = lengths.clamp(min=1)
    out = cloze_attention(q, k, v, lengths, heads)
    expected = attended(q.double(), k.double(), v.double(), lengths, heads)
    assert relative(out, expected) <= (FORWARD if dtype == torch.float32 else 5e-3)
    assert out.dtype == dtype
    assert out.is_contiguous()


def test_cloze_attention_keeps_nan_in_its_image():
    q, k, v = torch.randn(3, 3, 5, 8, device=DEVICE).unbind()
    lengths = torch.tensor([5, 4, 3], device=DEVICE)
    clean = cloze_attention(q, k, v, lengths, 2)
    k[1, 2, 3] = NAN
    out = cloze_attention(q, k, v, lengths, 2)
    assert out[1, 0, :4].isnan().all()
    assert torch.equal(out[::2], clean[::2])


def test_cloze_attention_says_what_is_wrong():
    x, lengths = torch.zeros(1, 4, 8), torch.zeros(1, dtype=torch.int64)
    for words, arguments in (
        ("float64", (x.double(), x.double(), x.double(), lengths, 2)),
        ("65", (torch.zeros(1, 65, 8),) * 3 + (lengths, 2)),
        ("8 in 3 heads", (x, x, x, lengths, 3)),
        (r"q \[1, 3, 8\]", (x[:, :3], x, x, lengths, 2)),
        ("side by side", (x.transpose(1, 2), *(2 * (torch.zeros(1, 8, 4),)), lengths, 2)),
        ("lengths", (x, x, x, lengths.int(), 2)),
    ):
        with pytest.raises(ValueError, match=words):
            cloze_attention(*arguments)


def test_opcheck():
    ops, check = torch.ops.lemma_fast, torch.library.opcheck
    keys = torch.randn(2, 6, 8, device=DEVICE).to(HALF)
    parts = split(torch.randn(3, 8, device=DEVICE), HALF)
    check(ops.position_attention, (keys, keys[0, 0].clone(), parts, keys.clone()))
    logits = torch.randn(2, 4, 5, device=DEVICE)
    check(ops.read_characters, (logits, 2, 16))
    check(ops.valid_lengths, (logits, 2))
    lengths = torch.tensor([2, 4], device=DEVICE)
    rows = [torch.randn(2, 4, 8, device=DEVICE) for _ in "qkv"]
    check(ops.cloze_attention, (*rows, lengths, 2))


def test_no_images():
    keys = torch.zeros(0, 6, 8).to(DEVICE, HALF)
    parts = split(torch.zeros(3, 8, device=DEVICE), HALF)
    vectors, attention = position_attention(keys, keys.new_zeros(8), parts, keys)
    assert (vectors.shape, attention.shape) == ((0, 3, 8), (0, 3, 6))
    assert reading.read_characters(torch.zeros(0, 4, 5, device=DEVICE), 2)[1].shape == (0, 4, 16)
    x = torch.zeros(0, 4, 8, device=DEVICE)
    assert (
        cloze_attention(x, x, x, torch.zeros(0, dtype=torch.int64).to(DEVICE), 2).shape == x.shape
    )
