"""The clues of C3-STISR: maps for its blocks, made of what a CRNN reads in the crop.

Recognition: the CRNN's class probabilities, enlarged to the size of the crop. Linguistic: the same
after a language model has spelled them anew. Both are weighed by where they matter (DSTA), then
mixed by the features of the crop. The visual clue of the paper is not in the published code, nor
here.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.config import LemmaConfig
from lemma_fast.model.prior import Language

# Channels of a clue, inside its attention, and of the features that mix the clues.
CLUE, _INNER = 32, 8
_WIDTHS = (512, 128, 64, CLUE)
_STRIDES: tuple[int | tuple[int, int], ...] = (2, 2, 2, (2, 1))
_PADDINGS = (0, 0, 1, 1)
_TAPS = 9


class Projection(nn.Module):
    """Probabilities [N, T, classes] to a map [N, 32, H, W] (Text Prior Generator's enlargement).

    Four transposed convolutions make a strip of 26 steps one of 25 x 213, which is resized with
    aligned corners.
    """

    def __init__(self, classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.convs = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 3, stride, padding, bias=False)
            for (before, after), stride, padding in zip(
                pairwise((classes, *_WIDTHS)), _STRIDES, _PADDINGS, strict=True
            )
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in _WIDTHS)

    def forward(self, probabilities: Tensor) -> Tensor:
        x = probabilities.transpose(1, 2)[:, :, None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return F.interpolate(x, self.size, mode="bilinear", align_corners=True)


class DeformableConv(nn.Module):
    """A 3x3 convolution a channel that looks where it is told to (Deformable ConvNets V2).

    Pure PyTorch: every tap of every channel is a bilinear sample, zero outside the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        plain = nn.Conv2d(channels, channels, 3, groups=channels)
        assert plain.bias is not None
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, x: Tensor, offsets: Tensor, modulation: Tensor) -> Tensor:
        """`x` [N, C, H, W] to as much.

        `offsets` [N, C * 9 * 2, H, W] in pixels, y before x, and `modulation` [N, C * 9, H, W]:
        taps row by row, channel after channel.
        """
        N, C, H, W = x.shape
        rows, columns, near = (
            torch.arange(size, dtype=x.dtype, device=x.device) for size in (H, W, 3)
        )
        moved = offsets.unflatten(1, (C, 3, 3, 2))
        y = rows[:, None] + (near - 1)[:, None, None, None] + moved[:, :, :, :, 0]
        x_ = columns + (near - 1)[:, None, None] + moved[:, :, :, :, 1]
        # what grid_sample takes for the centre of pixel p without aligned corners
        grid = torch.stack([(2 * x_ + 1) / W - 1, (2 * y + 1) / H - 1], dim=-1)
        samples = F.grid_sample(
            x.reshape(N * C, 1, H, W), grid.reshape(N * C, _TAPS * H, W, 2), align_corners=False
        )
        taps = samples.view(N, C, _TAPS, H, W) * modulation.unflatten(1, (C, _TAPS))
        weighed = taps * self.weight.view(C, _TAPS, 1, 1)
        return weighed.sum(2) + self.bias[:, None, None]


class ClueAttention(nn.Module):
    """Deformable spatiotemporal attention (DSTA): a clue [N, 32, H, W] times where it matters."""

    def __init__(self) -> None:
        super().__init__()
        inner, kernels = _INNER, 3 * _TAPS * _INNER
        self.reduce = nn.Conv2d(CLUE, inner, 1)
        self.shrink = nn.Conv2d(inner, inner, 3, 2)
        self.first, self.second, self.third = (
            nn.Conv2d(inner, inner, 3, padding=1) for _ in range(3)
        )
        self.down = nn.Conv2d(inner, inner, 3, 2, 1)
        self.taps = nn.Conv2d(inner, kernels, 3, padding=1)
        self.coarse_taps = nn.Conv2d(inner, kernels, 3, padding=1)
        self.deform = DeformableConv(inner)
        self.gate1 = nn.Conv2d(inner, 2 * inner, 1)
        self.gate2 = nn.Conv2d(2 * inner, CLUE, 1)
        self.beside = nn.Conv2d(inner, inner, 1)
        self.restore = nn.Conv2d(inner, CLUE, 1)

    def forward(self, clue: Tensor) -> Tensor:
        narrow = self.reduce(clue)
        pooled = F.max_pool2d(self.shrink(narrow), 7, 3)
        deep = F.relu(self.third(F.relu(self.second(F.relu(self.first(pooled))))))
        deep = F.relu(self.deform(pooled, *self.look(deep)))
        gate = self.gate2(F.relu(self.gate1(deep.mean((2, 3), keepdim=True)))).sigmoid()
        wide = F.interpolate(deep, clue.shape[2:], mode="bilinear", align_corners=False)
        return clue * self.restore(wide + self.beside(narrow)).sigmoid() * gate

    def look(self, deep: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets and modulation of the deformable convolution."""
        coarse = self.coarse_taps(F.relu(self.down(deep)))
        coarse = F.interpolate(coarse, deep.shape[2:], mode="bilinear", align_corners=False)
        both = self.taps(deep) + coarse
        offsets, modulation = both.split([2 * _TAPS * _INNER, _TAPS * _INNER], dim=1)
        return offsets, modulation.sigmoid()


class NormedConv(nn.Module):
    """A convolution whose weight is a direction and a scale a channel (weight normalisation)."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.dilation, self.groups = dilation, groups
        plain = nn.Conv2d(inputs, outputs, kernel, groups=groups, bias=kernel > 1)
        self.direction, self.bias = plain.weight, plain.bias
        self.scale = nn.Parameter(self._lengths().detach().clone())

    def _lengths(self) -> Tensor:
        return self.direction.flatten(1).norm(dim=1)[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.direction * (self.scale / self._lengths())
        padding = self.dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, self.bias, 1, padding, self.dilation, self.groups)


class Fusion(nn.Module):
    """Mixes clues, each [N, 32, H, W], by a softmax over them at every place and channel."""

    def __init__(self, clues: int) -> None:
        super().__init__()
        both = 2 * CLUE
        self.branches = nn.ModuleList(
            nn.Sequential(
                NormedConv(both, both, 1),
                nn.ReLU(),
                *(NormedConv(both, both, 3, dilation, both) for dilation in (1, 2, 4, 8)),
            )
            for _ in range(clues)
        )
        self.compress = NormedConv(clues * both, clues * CLUE, 1)

    def forward(self, centre: Tensor, *clues: Tensor) -> Tensor:
        seen = [
            branch(torch.cat([centre, clue], dim=1))
            for branch, clue in zip(self.branches, clues, strict=True)
        ]
        scores = self.compress(F.leaky_relu(torch.cat(seen, dim=1), 0.2))
        weights = scores.unflatten(1, (len(clues), CLUE)).softmax(1)
        return (torch.stack(clues, dim=1) * weights).sum(1)


class Clues(nn.Module):
    """What C3-STISR's blocks are fed with [N, 32, H, W].

    In training the first quarter of a batch goes without: its probabilities are 0, as published.
    """

    def __init__(self, config: LemmaConfig) -> None:
        super().__init__()
        classes = config.num_classes
        self.language = Language(config)
        self.recognition = Projection(classes, config.size)
        self.linguistic = Projection(classes, config.size)
        self.recognition_attention = ClueAttention()
        self.linguistic_attention = ClueAttention()
        self.centre = nn.Conv2d(config.channels, CLUE, 1)
        self.fusion = Fusion(2)

    def forward(self, shallow: Tensor, probabilities: Tensor, fused: bool) -> Tensor:
        """Features [N, C, H, W], and probabilities [2, N, T, classes]: what is read and spelled.

        Where not `fused`, the clue is what is read, enlarged, and no more.
        """
        read, spelled = probabilities
        if self.training:
            kept = torch.ones(len(read), 1, 1, dtype=read.dtype, device=read.device)
            kept[: len(read) // 4] = 0
            read, spelled = read * kept, spelled * kept
        recognition = self.recognition(read)
        if not fused:
            return recognition
        return self.fusion(
            self.centre(shallow),
            self.recognition_attention(recognition),
            self.linguistic_attention(self.linguistic(spelled)),
        )

    def spell(self, read: Tensor) -> Tensor:
        """The language model's logits [N, T, classes] for what is read, CTC's blanks and all."""
        N, T, _ = read.shape
        lengths = torch.full((N,), T, dtype=torch.int64, device=read.device)
        return self.language(read.detach(), lengths)
