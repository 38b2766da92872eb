"""JPEG's loss in torch: 4:2:0, the standard's tables, a batch of pictures, each its own quality.

What libjpeg does (colours, 2 x 2 means of the chroma, its triangle filter on the way back), with
exact cosine transforms in place of its integer ones.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ITU T.81, tables K.1 and K.2.
_LUMA = """
16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101
72 92 95 98 112 100 103 99
"""
_CHROMA = """
17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99
"""
_TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


def to_ycc(rgb: Tensor) -> Tensor:
    """Luma and the two chroma differences, around 0, of [N, 3, H, W]."""
    return torch.einsum("ij,njhw->nihw", rgb.new_tensor(_TO_YCC), rgb)


def to_rgb(ycc: Tensor) -> Tensor:
    """The way back from `to_ycc`."""
    return torch.einsum("ij,njhw->nihw", ycc.new_tensor(_TO_RGB), ycc)


def compress(images: Tensor, quality: Tensor) -> Tensor:
    """[N, 3, H, W] of whole numbers 0 to 255, H and W multiples of 16, after JPEG.

    `quality` [N] is libjpeg's, 1 to 100. Whole numbers come back; no gradient does.
    """
    if images.shape[-2] % 16 or images.shape[-1] % 16:
        raise ValueError(f"sides are multiples of 16, not {tuple(images.shape[-2:])}")
    ycc = to_ycc(images).round()
    luma = _quantized(ycc[:, :1] - 128, _table(_LUMA, quality)) + 128
    # libjpeg rounds the ties of even columns down, of odd ones up.
    bias = ycc.new_tensor((0.25, 0.5)).repeat(ycc.shape[-1] // 4)
    small = (F.avg_pool2d(ycc[:, 1:], 2) + bias).floor()
    chroma = _quantized(small, _table(_CHROMA, quality)).clamp(-128, 127)
    # Weights 9, 3, 3 and 1 of 16: libjpeg's triangle filter.
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    ycc = torch.cat((luma.clamp(0, 255), chroma.round()), 1)
    return to_rgb(ycc).round().clamp(0, 255)


def _table(values: str, quality: Tensor) -> Tensor:
    """The quantisation table [N, 1, 1, 8, 1, 8] at each picture's quality, by libjpeg's rule."""
    table = torch.tensor([int(value) for value in values.split()], device=quality.device)
    scale = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    scaled = (table * scale[:, None] + 50) // 100
    return scaled.clamp(1, 255).view(-1, 1, 1, 8, 1, 8)


def _quantized(planes: Tensor, table: Tensor) -> Tensor:
    """Planes [N, C, H, W] around 0 after quantisation of their 8 x 8 cosine transforms."""
    N, C, H, W = planes.shape
    index = torch.arange(8, dtype=planes.dtype, device=planes.device)
    cosine = torch.cos((2 * index[None] + 1) * index[:, None] * (math.pi / 16)) / 2
    cosine[0] *= math.sqrt(0.5)
    blocks = planes.view(N, C, H // 8, 8, W // 8, 8)
    levels = torch.einsum("ui,ncaibj,vj->ncaubv", cosine, blocks, cosine) / table
    blocks = torch.einsum("ui,ncaubv,vj->ncaibj", cosine, levels.round() * table, cosine)
    return blocks.reshape(N, C, H, W).round()
