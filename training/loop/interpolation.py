"""Weights to begin with: a network whose first guess is the interpolated crop, to be refined."""

from __future__ import annotations

import torch
from torch import Tensor

from lemma_fast.model import LEMMA

#: Added before mish, so that the crop lies where mish is nearly straight.
_SHIFT = 1.0
#: The line for which tanh(line(mish(y + shift) - shift)) is nearest to y over [0, 1].
_SLOPE, _OFFSET = 1.26, 0.1
#: What remains of the weights by which the other channels would be noise in the first guess.
_OTHERS = 0.1


@torch.no_grad()
def start_from_interpolation(network: LEMMA) -> None:
    """Let `network` begin as bilinear interpolation, in place of noise.

    Its residual way is left as it is: the first `in_channels` channels carry the crop from the
    stem to the output, the tail's batch norm starts at 0, and all else keeps its random weights.
    A network without this has to learn to copy first.
    """
    count = network.config.in_channels
    for conv in (network.stem, network.upsampler.expand, network.upsampler.project):
        assert conv.bias is not None
    own = torch.arange(count)

    stem = network.stem
    stem.weight[:count] = 0
    stem.weight[own, own, 4, 4] = 1
    stem.bias[:count] = 0  # type: ignore[index]

    tail = network.tail.norm.weight
    assert tail is not None
    tail.zero_()

    expand = network.upsampler.expand
    expand.weight[: 4 * count] = 0
    for channel in range(count):
        expand.weight[4 * channel : 4 * channel + 4, channel] = _bilinear()
    expand.bias[: 4 * count] = _SHIFT  # type: ignore[index]

    project = network.upsampler.project
    project.weight *= _OTHERS
    project.weight[:, :count] = 0
    project.weight[own, own, 4, 4] = _SLOPE
    project.bias[:] = _OFFSET - _SLOPE * _SHIFT  # type: ignore[index]


def _bilinear() -> Tensor:
    """Kernels [4, 3, 3] of the four pixels that one becomes, in PixelShuffle's order."""
    before, after = torch.tensor([0.25, 0.75, 0.0]), torch.tensor([0.0, 0.75, 0.25])
    return torch.stack([torch.outer(y, x) for y in (before, after) for x in (before, after)])
