"""What the networks of the paper's Table 3 are taught by, beside pixels and LEMMA's text focus.

TG compares the attention of a recogniser of strokes, PCAN the edges. TATT and C3-STISR teach their
text prior by a frozen one that sees the true image; TATT also asks for the same result of a turned
crop. The numbers are unweighted: the published weights are in `configs/textzoom-baselines.yaml`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lemma_fast.training.data.labels import FocusLabels
from lemma_fast.training.losses.lemma import FocusLoss

# Added to probabilities before their logarithm.
_FLOOR = 1e-20
# The window of SSIM, and what keeps its two factors from dividing by nothing.
_WINDOW, _SIGMA = 11, 1.5
_LUMINANCE, _CONTRAST = 0.01**2, 0.03**2


class StrokeFocusLoss(FocusLoss):
    """The attention term of Text Gestalt; its recogniser names strokes, not characters."""

    def forward(self, sr: Tensor, hr: Tensor, labels: FocusLabels | None) -> Tensor:
        """Compare RGB `sr` and `hr` (N, 3, 32, 128); `labels` from `encode_stroke_labels`."""
        return self.compare(sr, hr, labels)[0]


def edge_loss(sr: Tensor, hr: Tensor) -> Tensor:
    """PCAN's loss: how far apart the edges of two RGB batches [N, 3, H, W] are, on average."""
    return F.l1_loss(edges(sr), edges(hr))


def edges(images: Tensor) -> Tensor:
    """Steepness [N, 1, H, W] of the sum of the channels of [N, C, H, W], by Sobel's filters.

    sqrt((x / 2)^2 + (y / 2)^2 + 1e-6), with zeros outside the image. The published code makes three
    equal channels of it.
    """
    grey = images.sum(1, keepdim=True)
    smooth, slope = grey.new_tensor([1, 2, 1]), grey.new_tensor([-1, 0, 1])
    filters = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None] / 2
    both = F.conv2d(grey, filters, padding=1)
    return (both.square().sum(1, keepdim=True) + 1e-6).sqrt()


def teaching_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """TATT's distillation: L1 and Kullback-Leibler of probabilities (..., classes), a scalar.

    The published means of both are over all entries, the classes too, so that a divergence is
    divided by their number.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(wide)
    divergence = (teacher + _FLOOR) * ((teacher + _FLOOR).log() - (student + _FLOOR).log())
    return F.l1_loss(student, teacher) + divergence.mean()


def rotate(images: Tensor, angles: Tensor, offsets: Tensor) -> Tensor:
    """[N, C, H, W] turned by `angles` (N,), in radians; bilinear, zeros outside, no clamp.

    `offsets` (N,) in [0, 1] change the aspect ratio H / W that the turn reckons with by up to 0.2,
    as published, which shears the image a little.
    """
    height, width = images.shape[2:]
    ratio = height / width + 0.4 * offsets - 0.2
    cosine, sine, nothing = angles.cos(), angles.sin(), torch.zeros_like(angles)
    rows = [cosine, ratio * sine, nothing, -sine / ratio, cosine, nothing]
    theta = torch.stack(rows, dim=1).unflatten(1, (2, 3)).to(images.dtype)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def draw_rotation(
    count: int, degrees: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Angles in radians, uniform in +-`degrees`, and offsets, both (count,) fp32 on the CPU."""
    drawn = torch.rand(2, count, generator=generator)
    return torch.deg2rad((2 * drawn[0] - 1) * degrees), drawn[1]


def triple_similarity(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """TATT's SSIM of three batches [N, C, H, W], a scalar: 1 where all are equal.

    As for two: products become sums over the three pairs. Gaussian window of 11 x 11 with zeros
    outside the image, mean over everything.
    """
    wide = torch.promote_types(first.dtype, torch.float32)
    images = torch.stack([first, second, third]).to(wide)
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    # The published window is in fp32, whatever the images.
    line = torch.exp(-offsets.square() / (2 * _SIGMA**2)).float()
    line = line / line.sum()
    window = torch.outer(line, line).to(images)

    def blur(x: Tensor) -> Tensor:
        flat = F.conv2d(x.flatten(0, 2)[:, None], window[None, None], padding=_WINDOW // 2)
        return flat.view_as(x)

    means = blur(images)
    squares = means.square().sum(0)
    variances = blur(images.square()).sum(0) - squares
    others = means.roll(1, 0)
    products = (means * others).sum(0)
    covariances = blur(images * images.roll(1, 0)).sum(0) - products
    top = (products + _LUMINANCE) * (covariances + _CONTRAST)
    return (top / ((squares + _LUMINANCE) * (variances + _CONTRAST))).mean()
