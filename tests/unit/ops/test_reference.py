"""What the specification promises, operation by operation, on inputs small enough to work out."""

import pytest
import torch
from torch import Tensor, nn

from lemma_fast.config import LemmaConfig, PriorConfig
from lemma_fast.model.blocks import AdaFM, BiGRU
from lemma_fast.model.guidance import layer_weights
from lemma_fast.model.layers import TransformerLayer
from lemma_fast.ops import reference

TINY = LemmaConfig(
    height=2,
    width=3,
    channels=4,
    heads=2,
    num_selected=3,
    rectification=False,
    prior=PriorConfig(strides=(1, 1, 1, 1, 1)),
)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_compress_select_counts_dead_characters_as_zero() -> None:
    maps = torch.tensor([[[-1.0, 0.2], [-0.5, -0.1]], [[-2.0, 0.1], [0.3, -0.3]], [[9.0] * 2] * 2])
    score, index = reference.compress_select(maps[None], torch.tensor([2]), 2, (2, 2))
    torch.testing.assert_close(score, torch.tensor([[[0.0, 0.2], [0.3, 0.0]]]))
    assert index.tolist() == [[1, 2]]
    assert index.dtype == torch.int32


def test_compress_select_without_dead_characters_may_be_negative() -> None:
    maps = torch.full((1, 2, 2, 2), -1.0)
    score, _ = reference.compress_select(maps, torch.tensor([2]), 1, (2, 2))
    assert score.flatten().tolist() == [-1.0] * 4


def test_compress_select_gives_ties_to_the_lower_index() -> None:
    maps = torch.tensor([[0.0, -0.0, 0.0], [0.0, 1.0, 0.0]]).expand(1, 1, 2, 3)
    _, index = reference.compress_select(maps, torch.tensor([1]), 3, (2, 3))
    assert index.tolist() == [[0, 1, 4]]


def test_compress_select_takes_nan_for_the_largest() -> None:
    maps = torch.zeros(2, 1, 8, 1)
    maps[1, 0, 7] = torch.nan
    _, index = reference.compress_select(maps, torch.tensor([1, 1]), 3, (8, 1))
    # The resize reaches two rows up, so three rows are NaN.
    assert index.tolist() == [[0, 1, 2], [5, 6, 7]]


def test_compress_select_sends_the_gradient_to_the_first_of_equal_maps() -> None:
    maps = torch.ones(1, 3, 2, 2, requires_grad=True)
    score, _ = reference.compress_select(maps, torch.tensor([3]), 1, (2, 2))
    score.sum().backward()
    assert maps.grad is not None
    assert maps.grad.sum(dim=(2, 3)).tolist() == [[4.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compress_select_widens_half_precision(dtype: torch.dtype) -> None:
    score, _ = reference.compress_select(
        torch.rand(1, 2, 2, 2).to(dtype), torch.tensor([2]), 1, (4, 4)
    )
    assert score.dtype == torch.float32


def test_compress_select_refuses_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="num_selected is 5, the map has 4 positions"):
        reference.compress_select(torch.rand(1, 2, 2, 2), torch.tensor([2]), 5, (2, 2))


def test_location_enhance_is_softmax_times_instance_norm() -> None:
    logits, features = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = nn.InstanceNorm2d(3)(features) * logits.flatten(2).softmax(2).view(2, 3, 4, 5)
    torch.testing.assert_close(reference.location_enhance(logits, features), expected)
    shared = reference.location_enhance(logits[:, :1], features)
    spread = reference.location_enhance(logits[:, :1].expand_as(features), features)
    torch.testing.assert_close(shared, spread)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_location_enhance_computes_half_precision_in_fp32(dtype: torch.dtype) -> None:
    # An offset that half precision cannot resolve beside the spread: only fp32 statistics can.
    logits, features = torch.randn(1, 2, 8, 8).to(dtype), (torch.randn(1, 2, 8, 8) + 60).to(dtype)
    exact = reference.location_enhance(logits.double(), features.double())
    got = reference.location_enhance(logits, features)
    assert got.dtype == dtype
    rounding = (exact.to(dtype).double() - exact).abs().max()
    assert (got.double() - exact).abs().max() <= 2 * rounding


def test_gather_region_keeps_the_order_of_index() -> None:
    features, weight, bias = torch.randn(1, 2, 3, 4), torch.randn(5, 2, 3, 3), torch.randn(5)
    positions = torch.randn(1, 12, 5)
    index = torch.tensor([[7, 0, 11]], dtype=torch.int32)
    dense = nn.functional.conv2d(features, weight, bias, padding=1).flatten(2).transpose(1, 2)
    expected = (dense + positions)[:, [7, 0, 11]]
    actual = reference.gather_region(features, index, weight, bias, positions)
    torch.testing.assert_close(actual, expected)


def test_bigru_is_nn_gru_along_either_axis() -> None:
    ours = BiGRU(6, 3, reference)
    theirs = nn.GRU(6, 3, bidirectional=True, batch_first=True)
    for ours_parameter, parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        parameter.data.copy_(ours_parameter.data)
    features = torch.randn(2, 6, 4, 5)
    along_width = torch.stack(
        [theirs(row.T)[0].T for row in features.transpose(1, 2).flatten(0, 1)]
    )
    expected = along_width.view(2, 4, 6, 5).transpose(1, 2)
    torch.testing.assert_close(reference.bigru(features, 3, ours.weights()), expected)
    turned = reference.bigru(features.transpose(2, 3), 2, ours.weights())
    torch.testing.assert_close(turned, expected.transpose(2, 3))
    with pytest.raises(ValueError, match="axis is 1"):
        reference.bigru(features, 1, ours.weights())


def test_adafm_refuses_another_size() -> None:
    weights = AdaFM(TINY, reference).weights()
    with pytest.raises(ValueError, match=r"\(3, 3\) in height and width"):
        reference.adafm(torch.rand(1, 4, 3, 3), torch.rand(1, 4, 3, 3), weights, False)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_adafm(training: bool) -> None:
    weights = AdaFM(TINY, reference).double().weights()

    def op(features: Tensor, guidance: Tensor) -> Tensor:
        return reference.adafm(features, guidance, weights, training)

    assert torch.autograd.gradcheck(op, (double(2, 4, 2, 3), double(2, 4, 2, 3)))


def test_gradients_of_bigru() -> None:
    weights = BiGRU(4, 3, reference).double().weights()
    assert torch.autograd.gradcheck(
        lambda x, w: reference.bigru(x, 3, weights._replace(weight_hh=w)),
        (double(1, 4, 2, 3), double(6, 2)),
    )


def test_gradients_of_location_enhance() -> None:
    assert torch.autograd.gradcheck(
        reference.location_enhance, (double(1, 2, 2, 3), double(1, 2, 2, 3))
    )


def test_gradients_of_gather_region() -> None:
    index = torch.tensor([[0, 4]], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda x, w, b, p: reference.gather_region(x, index, w, b, p),
        (double(1, 2, 2, 3), double(1, 2, 3, 3), double(1), double(1, 6, 1)),
    )


def test_gradients_of_compress_select() -> None:
    lengths = torch.tensor([2])
    assert torch.autograd.gradcheck(
        lambda maps: reference.compress_select(maps, lengths, 2, (4, 4))[0], double(1, 3, 2, 2)
    )


def test_gradients_of_sparse_cross_attention() -> None:
    layers = [layer_weights(TransformerLayer(4, 2, 4, 0.0).double()) for _ in range(2)]
    index = torch.tensor([[1, 4]], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda text, rows: reference.sparse_cross_attention(
            text, rows, index, (2, 3), layers[:1], layers[1:], 2
        ),
        (double(1, 3, 4), double(1, 2, 4)),
    )


def test_unselected_positions_share_one_row() -> None:
    layers = [layer_weights(TransformerLayer(4, 2, 4, 0.0)) for _ in range(2)]
    index = torch.tensor([[1, 4]], dtype=torch.int32)
    guidance = reference.sparse_cross_attention(
        torch.randn(1, 3, 4), torch.randn(1, 2, 4), index, (2, 3), layers[:1], layers[1:], 2
    )
    rows = guidance.flatten(2)[0].T
    torch.testing.assert_close(rows[[0, 2, 3, 5]], rows[:1].expand(4, -1))
    assert not torch.allclose(rows[1], rows[0])
