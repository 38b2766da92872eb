"""RCAN and SAN: their switches, and what their parts promise."""

import pytest
import torch
import torch.nn.functional as F

from lemma_fast.baselines import build_baseline, create_baseline, from_published
from lemma_fast.baselines.clues import DeformableConv, NormedConv
from lemma_fast.baselines.rcan import MEAN_COLOUR
from lemma_fast.baselines.san import RegionAttention, covariance, square_root
from lemma_fast.checkpoint.published import published_name

SIZES = {"channels": 16, "groups": 1, "blocks": 1}
CROPS = torch.rand(2, 3, 16, 64)


def as_published(model):
    names = model.published.names(model.config)
    return {published_name(n, names): t for n, t in model.state_dict().items()}


def test_rcan_of_its_authors_counts_colours_to_255():
    torch.manual_seed(0)
    model = create_baseline("rcan", **SIZES, rgb_range=255).eval()
    assert model.add_mean.bias.tolist() == pytest.approx([255 * part for part in MEAN_COLOUR])
    opened = from_published(as_published(model))
    assert opened.config == model.config
    with torch.no_grad():
        # Without features, what is left is the mean colour, in [0, 1] outside.
        opened.project.weight.zero_()
        opened.project.bias.zero_()
        expected = torch.tensor(MEAN_COLOUR).view(3, 1, 1).expand(2, 3, 32, 128)
        torch.testing.assert_close(opened(CROPS), expected)
        seen = []
        opened.head.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
        opened(CROPS)
    mean = torch.tensor(MEAN_COLOUR).view(3, 1, 1)
    torch.testing.assert_close(seen[0], 255 * (CROPS - mean), atol=1e-4, rtol=1e-5)
    assert from_published(as_published(create_baseline("rcan", **SIZES))).config.rgb_range == 1


def test_san_with_all_its_keys():
    torch.manual_seed(0)
    model = create_baseline("san", **SIZES)
    torch.nn.init.normal_(model.regions.out.weight)
    opened = from_published(as_published(model))
    right = from_published(as_published(model), corrected=True)
    assert right.config.corrected
    with torch.no_grad():
        assert (opened(CROPS) - right(CROPS)).abs().max() > 1e-4
    assert build_baseline(right.config).regions.subsample is False


@pytest.mark.parametrize("subsample", [True, False])
def test_attention_stays_in_its_quarter(subsample):
    attention = RegionAttention(16, subsample)
    torch.nn.init.normal_(attention.out.weight)
    one = torch.rand(1, 16, 8, 12)
    other = one.clone()
    other[:, :, :4, :6] += 1
    changed = (attention(one) != attention(other)).any(1)[0]
    assert changed[:4, :6].all()
    assert not changed[4:].any()
    assert not changed[:, 6:].any()


def test_the_square_root_of_a_covariance():
    features = torch.randn(3, 8, 16, 64, dtype=torch.float64)
    found = covariance(features)
    expected = torch.stack([torch.cov(crop.flatten(1), correction=0) for crop in features])
    torch.testing.assert_close(found, expected)
    root = square_root(found)
    # Five steps come near for a matrix of like eigenvalues, as that of noise is.
    torch.testing.assert_close(root @ root, found, atol=1e-2, rtol=0)


def test_a_deformable_convolution_that_looks_straight_ahead():
    layer = DeformableConv(4)
    x = torch.rand(2, 4, 3, 7)
    straight = torch.zeros(2, 4 * 18, 3, 7), torch.ones(2, 4 * 9, 3, 7)
    plain = F.conv2d(x, layer.weight, layer.bias, padding=1, groups=4)
    torch.testing.assert_close(layer(x, *straight), plain)
    # One pixel to the right, by the second of each pair; what comes from outside is 0.
    offsets = straight[0].view(2, 4, 9, 2, 3, 7).clone()
    offsets[:, :, :, 1] = 1
    shifted = F.pad(x, (1, 2, 1, 1))[..., 1:]
    moved = F.conv2d(shifted, layer.weight, layer.bias, groups=4)
    torch.testing.assert_close(layer(x, offsets.flatten(1, 3), straight[1]), moved)
    half = layer(x, straight[0], straight[1] / 2) - layer.bias[:, None, None]
    torch.testing.assert_close(half, (plain - layer.bias[:, None, None]) / 2)


def test_weight_normalisation_starts_as_the_plain_convolution():
    layer = NormedConv(4, 6, 3, dilation=2)
    x = torch.rand(1, 4, 9, 9)
    plain = F.conv2d(x, layer.direction, layer.bias, padding=2, dilation=2)
    torch.testing.assert_close(layer(x), plain)
    with torch.no_grad():
        layer.direction.mul_(3)
    torch.testing.assert_close(layer(x), plain)
