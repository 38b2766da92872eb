"""Rectification (STN), in training only: a thin-plate spline straightens the crop (SPEC 1)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.config import LemmaConfig
from lemma_fast.model.layers import ConvNorm

WIDTHS = (32, 64, 128, 256, 256, 256)
POOLS: tuple[tuple[int, int] | None, ...] = ((2, 2), (2, 2), (2, 2), (2, 2), (1, 2), None)
# For a crop that is seen at twice its height.
TALL_POOLS: tuple[tuple[int, int] | None, ...] = ((2, 2), (2, 2), (2, 2), (2, 2), (2, 2), None)


class Localization(nn.Module):
    """Crop [N, C, H, W] to control points [N, P, 2] as (x, y) in [0, 1]."""

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        count: int,
        pools: Sequence[tuple[int, int] | None] = POOLS,
    ) -> None:
        super().__init__()
        self.pools = tuple(pools)
        widths = (channels, *WIDTHS)
        convs = [
            ConvNorm(before, after, 3, bias=True) for before, after in itertools.pairwise(widths)
        ]
        self.convs = nn.ModuleList(convs)
        height, width = size
        for pool in self.pools:
            if pool is not None:
                height, width = height // pool[0], width // pool[1]
        self.hidden = nn.Linear(WIDTHS[-1] * height * width, 512)
        self.norm = nn.BatchNorm1d(512)
        self.points = nn.Linear(512, 2 * count)
        for conv in convs:
            nn.init.kaiming_normal_(conv.conv.weight, mode="fan_out", nonlinearity="relu")
            assert conv.conv.bias is not None
            nn.init.zeros_(conv.conv.bias)
        nn.init.normal_(self.hidden.weight, std=0.001)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.points.weight)
        with torch.no_grad():
            self.points.bias.copy_(edge_points(count, (0.01, 0.01)).flatten())

    def forward(self, crop: Tensor) -> Tensor:
        for conv, pool in zip(self.convs, self.pools, strict=True):
            crop = F.relu(conv(crop))
            if pool is not None:
                crop = F.max_pool2d(crop, pool)
        hidden = F.relu(self.norm(self.hidden(crop.flatten(1))))
        return self.points(0.1 * hidden).unflatten(1, (-1, 2))


class ThinPlateSpline(nn.Module):
    """Sample a crop to `size` so that its control points come to lie on the top and bottom edge.

    The buffers are the published ones. `inverse_kernel` is ill-conditioned (largest entry 87): two
    machines' inverses differ by 1e-3, so a checkpoint's own is kept.
    """

    inverse_kernel: Tensor
    padding_matrix: Tensor
    target_coordinate_repr: Tensor
    target_control_points: Tensor

    def __init__(self, size: tuple[int, int], count: int) -> None:
        super().__init__()
        self.size = height, width = size
        targets = edge_points(count, (0.05, 0.05))
        kernel = torch.zeros(count + 3, count + 3)
        kernel[:count, :count] = radial(targets, targets)
        kernel[:count, -3] = kernel[-3, :count] = 1
        kernel[:count, -2:] = targets
        kernel[-2:, :count] = targets.T
        y, x = torch.meshgrid(
            torch.arange(height, dtype=torch.float32) / (height - 1),
            torch.arange(width, dtype=torch.float32) / (width - 1),
            indexing="ij",
        )
        pixels = torch.stack([x.flatten(), y.flatten()], dim=1)
        lifted = [radial(pixels, targets), torch.ones(len(pixels), 1), pixels]
        self.register_buffer("inverse_kernel", torch.linalg.inv(kernel))
        self.register_buffer("padding_matrix", torch.zeros(3, 2))
        self.register_buffer("target_coordinate_repr", torch.cat(lifted, dim=1))
        self.register_buffer("target_control_points", targets)

    def forward(self, crop: Tensor, points: Tensor) -> Tensor:
        """Resample `crop` [N, C, H, W] by `points` [N, P, 2]; bilinear, zeros outside."""
        padded = torch.cat([points, self.padding_matrix.expand(len(points), -1, -1)], dim=1)
        grid = self.target_coordinate_repr @ (self.inverse_kernel @ padded)
        grid = 2 * grid.clamp(0, 1) - 1
        grid = grid.unflatten(1, self.size)
        return F.grid_sample(crop, grid, align_corners=False)


class Rectifier(nn.Module):
    """Localisation and thin-plate spline, in fp32: half precision would shift the sampling grid.

    `tall` stretches the crop to twice its height first (bilinear, align_corners=True), and both
    parts see that, as in TextZoom's code; the result has the crop's size either way.
    """

    def __init__(self, config: LemmaConfig, tall: bool = False) -> None:
        super().__init__()
        size = (config.height, config.width)
        self.seen = (2 * config.height, config.width) if tall else size
        pools = TALL_POOLS if tall else POOLS
        self.localization = Localization(
            config.in_channels, self.seen, config.control_points, pools
        )
        self.spline = ThinPlateSpline(size, config.control_points)

    def forward(self, crop: Tensor) -> Tensor:
        with torch.autocast(crop.device.type, enabled=False):
            if self.seen != crop.shape[2:]:
                crop = F.interpolate(crop, self.seen, mode="bilinear", align_corners=True)
            return self.spline(crop, self.localization(crop))


def edge_points(count: int, margins: tuple[float, float]) -> Tensor:
    """`count` points [count, 2] as (x, y): half along the top edge, half along the bottom edge."""
    side = count // 2
    x_margin, y_margin = margins
    x = torch.linspace(x_margin, 1 - x_margin, side, dtype=torch.float64)
    top = torch.stack([x, torch.full_like(x, y_margin)], dim=1)
    bottom = torch.stack([x, torch.full_like(x, 1 - y_margin)], dim=1)
    return torch.cat([top, bottom]).float()


def radial(points: Tensor, centres: Tensor) -> Tensor:
    """Thin-plate kernel `0.5 r^2 log(r^2)` between [A, 2] and [B, 2], 0 where r is 0."""
    squared = (points[:, None] - centres[None]).square().sum(dim=2)
    return 0.5 * torch.xlogy(squared, squared)
