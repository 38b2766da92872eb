"""The fused alignment against the reference: values, gradients, dropout, edges."""

import math
import os
from typing import NamedTuple

import pytest
import torch
from closeness import relative
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from memory import kept_bytes
from torch import Tensor

from lemma_fast.ops import fused, philox, reference
from lemma_fast.ops.weights import CrossAttentionWeights

pytest.importorskip("triton", reason="needs Triton: pip install 'lemma-fast[triton]'")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Relative errors ||a - b|| / ||b||; gradients may stray five times as far.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
BF16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(INTERPRETED, reason="interpreter miscomputes bf16")
)


class Case(NamedTuple):
    """Arguments of the operation, and the sizes they were made of."""

    text: Tensor
    selected: Tensor
    index: Tensor
    size: tuple[int, int]
    to_text: list[CrossAttentionWeights]
    to_image: list[CrossAttentionWeights]
    heads: int

    @property
    def parameters(self) -> list[Tensor]:
        return [weight for layer in (*self.to_text, *self.to_image) for weight in layer]


def layer(C: int, F: int, dtype: torch.dtype) -> CrossAttentionWeights:
    def tensor(*shape: int) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        return (torch.randn(shape, device=DEVICE) * scale).to(dtype).requires_grad_()

    def gain() -> Tensor:
        return (torch.rand(C, device=DEVICE) + 0.5).to(dtype).requires_grad_()

    return CrossAttentionWeights(
        tensor(3 * C, C), tensor(3 * C), tensor(C, C), tensor(C), gain(), tensor(C), tensor(F, C),
        tensor(F), tensor(C, F), tensor(C), gain(), tensor(C),
    )  # fmt: skip


def case(
    N: int = 2, T: int = 5, K: int = 7, size: tuple[int, int] = (4, 5), C: int = 16, F: int = 16,
    heads: int = 4, layers: tuple[int, int] = (1, 1), dtype: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
    positions = size[0] * size[1]
    rows = [torch.randperm(positions)[:K].sort().values for _ in range(N)]
    return Case(
        torch.randn(N, T, C, device=DEVICE, dtype=dtype).requires_grad_(),
        torch.randn(N, K, C, device=DEVICE, dtype=dtype).requires_grad_(),
        torch.stack(rows).to(DEVICE, torch.int32),
        size,
        [layer(C, F, dtype) for _ in range(layers[0])],
        [layer(C, F, dtype) for _ in range(layers[1])],
        heads,
    )


def results(ops, case: Case, *rest) -> tuple[Tensor, list[Tensor]]:
    """Return the output and the gradients of text, selected rows and every parameter."""
    out = ops.sparse_cross_attention(*case, *rest)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    inputs = (case.text, case.selected, *case.parameters)
    return out, list(torch.autograd.grad(out, inputs, weight))


def exact(case: Case) -> Case:
    """The same numbers in fp64."""

    def widen(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    layers = [
        [CrossAttentionWeights(*map(widen, layer)) for layer in direction]
        for direction in (case.to_text, case.to_image)
    ]
    text, selected = widen(case.text), widen(case.selected)
    return Case(text, selected, case.index, case.size, *layers, case.heads)


def assert_parity(case: Case, *rest) -> None:
    """Hold fp32 against the reference in fp32, the half types against it in fp64."""
    out, grads = results(fused, case, *rest)
    expected, expected_grads = results(reference, case, *rest)
    rounded_grads = expected_grads
    if case.selected.dtype != torch.float32:
        expected, expected_grads = results(reference, exact(case), *rest)
    assert out.dtype == case.selected.dtype
    tolerance = TOLERANCE[case.selected.dtype]
    assert relative(out, expected) <= tolerance
    # Some gradients are zero but for rounding: no key's shift moves a softmax. Those are held
    # against a hundredth of the largest.
    floor = max(float(grad.double().norm()) for grad in expected_grads) / 100
    names = ["text", "selected"]
    for direction, layers in (("to_text", case.to_text), ("to_image", case.to_image)):
        names += [f"{direction}[{i}].{f}" for i, w in enumerate(layers) for f in w._fields]
    for name, grad, own, wanted in zip(names, grads, rounded_grads, expected_grads, strict=True):
        assert grad.dtype == own.dtype, name
        # Half types: where a ReLU turns at a rounded zero, the reference strays as far itself.
        limit = max(5 * tolerance, 2 * relative(own, wanted, floor))
        assert relative(grad, wanted, floor) <= limit, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_parity_at_the_models_widths(dtype):
    """The model's width, heads and three layers each way; 40 rows are more than a tile."""
    shape = {"size": (6, 11), "C": 64, "F": 64, "layers": (3, 3), "dtype": dtype}
    assert_parity(case(N=1, T=6, K=40, **shape))


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    # Interpreted, to shrink a failing shape would take minutes.
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_drawn_shapes(data):
    draw = data.draw
    size = draw(st.tuples(st.integers(1, 7), st.integers(1, 9)))
    heads = draw(st.integers(1, 6))
    C = heads * draw(st.integers(2, 20))
    assume(C <= 70)
    assert_parity(
        case(
            N=draw(st.integers(1, 3)),
            T=draw(st.integers(1, 35)),
            K=draw(st.integers(1, size[0] * size[1])),
            size=size,
            C=C,
            F=draw(st.integers(1, 70)),
            heads=heads,
            layers=draw(st.sampled_from([(1, 1), (0, 1), (2, 1), (1, 2)])),
        )
    )


@pytest.mark.parametrize(
    "shape",
    [
        {"T": 2},
        {"K": 1},
        {"K": 20},
        {"N": 1, "K": 1, "T": 1, "size": (1, 1)},
        {"K": 32, "T": 33, "size": (5, 7)},
        {"layers": (0, 2)},
    ],
    ids=str,
)
def test_edges(shape):
    """L = 2, K = 1, all selected, N = 1, one past a tile, one direction alone."""
    assert_parity(case(**shape))


def test_index_in_any_order_and_strided_inputs():
    given = case(T=4, K=9, size=(3, 5))
    order = torch.randperm(9, device=DEVICE)
    text = torch.randn(2, 16, 4, device=DEVICE).mT.requires_grad_()
    selected = torch.randn(4, 9, 32, device=DEVICE)[::2, :, ::2].requires_grad_()
    index = given.index[:, order].long()
    assert_parity(given._replace(text=text, selected=selected, index=index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dropout_replays_the_kernels_masks(dtype):
    seed = torch.tensor(2**40 + 12345, device=DEVICE)
    given = case(T=3, K=17, size=(3, 6), F=24, layers=(2, 2), dtype=dtype)
    assert_parity(given, 0.3, seed)
    out = fused.sparse_cross_attention(*given, 0.3, seed)
    assert torch.equal(out, fused.sparse_cross_attention(*given, 0.3, seed))
    assert not torch.equal(out, fused.sparse_cross_attention(*given, 0.3, seed + 1))
    # An image's masks do not depend on the batch that it comes in.
    alone = given._replace(text=given.text[:1], selected=given.selected[:1], index=given.index[:1])
    assert torch.equal(out[:1], fused.sparse_cross_attention(*alone, 0.3, seed))


def test_a_seed_without_dropout_changes_nothing():
    given = case()
    seed = torch.tensor(3, device=DEVICE)
    for ops in (fused, reference):
        plain = ops.sparse_cross_attention(*given)
        assert torch.equal(plain, ops.sparse_cross_attention(*given, 0.0, seed))


def test_dropout_without_a_seed_draws_one():
    given = case()
    torch.manual_seed(5)
    first, second = (fused.sparse_cross_attention(*given, 0.5) for _ in range(2))
    torch.manual_seed(5)
    again = fused.sparse_cross_attention(*given, 0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_statistics_of_dropout():
    """Masks keep 1 - p of the elements, independently across rows, sites, images and seeds."""
    p, shape = 0.1, (50, 64)
    masks = torch.stack(
        [
            philox.dropout_mask(torch.tensor(seed), site, 2, shape, p)
            for seed in (0, 1, 2**61)
            for site in (0, 1, 1 << 16)
        ]
    ).flatten(0, 1)
    values = masks.unique()
    torch.testing.assert_close(values, torch.tensor([0, 1 / (1 - p)]))
    count = masks.numel()
    kept = (masks > 0).double()
    deviation = math.sqrt(p * (1 - p) / count)
    assert abs(float(kept.mean()) - (1 - p)) <= 4 * deviation
    # No two masks, and no row and its neighbour, agree more often than chance would have it.
    flat = kept.flatten(1) - (1 - p)
    products = flat @ flat.T / (flat.shape[1] * p * (1 - p))
    products.fill_diagonal_(0)
    assert float(products.abs().max()) <= 5 / math.sqrt(flat.shape[1])
    neighbours = (kept[:, 1:] - (1 - p)) * (kept[:, :-1] - (1 - p))
    assert abs(float(neighbours.mean())) <= 5 * p * (1 - p) / math.sqrt(neighbours.numel())


def test_mean_over_seeds_is_that_of_pytorchs_masks():
    """Many seeds of the kernel's masks against many draws of PyTorch's, one layer each way."""
    torch.manual_seed(2)
    with torch.no_grad():
        given = case(N=1, T=4, K=3, size=(2, 4))
        # An image's masks differ from another's: a batch of copies is a set of draws.
        draws = 256
        many = given._replace(
            text=given.text.expand(draws, -1, -1),
            selected=given.selected.expand(draws, -1, -1),
            index=given.index.expand(draws, -1),
        )
        seed = torch.tensor(9, device=DEVICE)
        replayed = reference.sparse_cross_attention(*many, 0.2, seed)
        drawn = reference.sparse_cross_attention(*many, 0.2)
        spread = (replayed.var(0) + drawn.var(0)).div(draws).sqrt()
        assert float(((replayed.mean(0) - drawn.mean(0)) / spread).abs().max()) <= 5
        first = fused.sparse_cross_attention(*(given._replace(index=given.index)), 0.2, seed)
        torch.testing.assert_close(first, replayed[:1], atol=1e-5, rtol=1e-5)
    # Unselected positions of an image share one row, also with dropout on.
    free = [p for p in range(8) if p not in given.index[0].tolist()]
    rows = first.flatten(2)[0].T[free]
    assert torch.equal(rows, rows[:1].expand_as(rows))


def test_nan_stays_in_its_image():
    given = case(N=3)
    clean = fused.sparse_cross_attention(*given)
    selected = given.selected.detach().clone()
    selected[1, 2, 3] = torch.nan
    given = given._replace(selected=selected.requires_grad_())
    out = fused.sparse_cross_attention(*given)
    text_grad, selected_grad = torch.autograd.grad(out.sum(), (given.text, given.selected))
    assert out[1].isnan().any()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    for grad in (text_grad, selected_grad):
        assert not grad[[0, 2]].isnan().any()


def test_backward_twice_is_equal():
    given = case(K=17, size=(3, 6), layers=(1, 2))
    first, second = (results(fused, given)[1] for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_what_is_kept_for_backward():
    """Packed parameters and the key of the second direction, whatever the map's size."""
    given = case(T=20, K=10, size=(4, 4), layers=(1, 1))
    packed = 4 * sum(weight.numel() for weight in given.parameters)
    kept = kept_bytes(fused.sparse_cross_attention, given)
    assert kept == packed + 4 * given.text.numel()
    assert kept_bytes(reference.sparse_cross_attention, given) > 10 * kept - 10 * packed


def test_autocast_gives_the_reference_s_type():
    given = case(C=32, F=32)
    for text, selected in ((torch.float32,) * 2, (torch.float16,) * 2, (torch.float32, torch.half)):
        mixed = given._replace(
            text=given.text.detach().to(text), selected=given.selected.detach().to(selected)
        )
        with torch.autocast(DEVICE, dtype=torch.float16):
            out, expected = (ops.sparse_cross_attention(*mixed) for ops in (fused, reference))
        assert out.dtype == expected.dtype
        assert relative(out, expected) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selected": torch.zeros(2, 7, 16, dtype=torch.float64)}, "float64"),
        ({"text": torch.zeros(2, 5, 16, dtype=torch.float16)}, "outside autocast"),
        ({"text": torch.zeros(3, 5, 16)}, r"text is \[3, 5, 16\]"),
        ({"index": torch.zeros(2, 6, dtype=torch.int32)}, r"index is \[2, 6\]"),
        ({"size": (2, 3)}, "map has 6 positions"),
        ({"heads": 3}, "16 channels, 3 heads"),
    ],
)
def test_clear_errors(change, message):
    changed = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        fused.sparse_cross_attention(*case()._replace(**changed))


def test_opcheck():
    given = case(T=3, K=4, size=(2, 4))
    packed = [
        torch.cat([w.reshape(-1) for w in layers[0]]).detach().view(1, -1).requires_grad_()
        for layers in (given.to_text, given.to_image)
    ]
    seed = torch.tensor(7, device=DEVICE)
    arguments = (given.text, given.selected, given.index, *packed)
    rest = (seed, *given.size, given.heads, 0.2, torch.float32)
    ops = torch.ops.lemma_fast
    torch.library.opcheck(ops.sparse_cross_attention, (*arguments, *rest))
    out, key = ops.sparse_cross_attention(*arguments, *rest)
    text, selected, index, *packed = (tensor.detach() for tensor in arguments)
    torch.library.opcheck(
        ops.sparse_cross_attention_backward,
        (torch.ones_like(out), text, selected, index, key.detach(), *packed, seed, 4, 0.2),
    )


def test_compiles_without_a_break():
    given = case(T=3, K=4, size=(2, 4))
    seed = torch.tensor(7, device=DEVICE)
    compiled = torch.compile(fused.sparse_cross_attention, fullgraph=True, backend="aot_eager")
    inputs = (given.text, given.selected, *given.parameters)
    calls = []
    for call in (compiled, fused.sparse_cross_attention):
        out = call(*given, 0.2, seed)
        calls.append((out, *torch.autograd.grad(out.sum(), inputs)))
    torch.testing.assert_close(*calls, atol=0, rtol=0)
