"""Low-resolution crops made from high-resolution ones while training: a camera, in torch.

All that is drawn for a crop comes from the crop's own seed, on the CPU, so that it depends neither
on the batch it is in nor on the device. Lens, pixels and scaling are one matrix an axis, as in
`degrade`; all pictures of a batch lie in the upper left corner of one canvas, their last row and
column repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lemma_fast.training.synthesis import jpeg

Kernel = Literal["lens", "area", "bicubic"]
Range = tuple[float, float]

#: Crops that a step sees.
LR_HEIGHT, LR_WIDTH = 16, 64
# Room for a picture of 25 x 128 pixels, moved by up to 7.
_HEIGHT, _WIDTH = 32, 144
_TALLEST, _WIDEST = 25, 128
_NARROWEST = 10


@dataclass(frozen=True)
class Camera:
    """Ranges that a camera is drawn from; lengths are pixels of the picture that it takes.

    `odds`: share of the crops. `height`: rows of the picture; columns follow from the word's own
    shape, so that narrow words, which are stretched most afterwards, are blurred most across.
    `direct`: share shrunk to 16 x 64 at once, without that shape. `lens`: deviation of a Gaussian;
    where a number below 0 is drawn, the crop is shrunk by area or by Pillow's bicubic filter, half
    of them each. `moved`, `motion`: share that is smeared along one axis, and how far. `contrast`:
    what a veil of one grey leaves of it; in half of the crops the grey is the crop's own mean.
    `shot`, `read`: noise in linear light, of variance `shot * light + read**2` where white is 1.
    `chroma`: deviation of a Gaussian on the colour differences. `sharpened`: share with an unsharp
    mask. `jpeg`, `compressed`: quality, and share. `twice`: share of which `FIRST` took a picture
    before.
    """

    odds: float
    height: tuple[int, int]
    direct: float
    lens: Range
    moved: float
    motion: Range
    contrast: Range
    shot: Range
    read: Range
    chroma: Range
    sharpened: float
    jpeg: tuple[int, int]
    compressed: float
    twice: float


CAMERAS = {
    "sharp": Camera(
        odds=1 / 3,
        height=(9, 24),
        direct=0.4,
        lens=(-0.6, 0.3),
        moved=0.0,
        motion=(0.0, 0.0),
        contrast=(1.0, 1.0),
        shot=(0.0, 1e-4),
        read=(0.0, 2e-3),
        chroma=(0.0, 0.3),
        sharpened=0.2,
        jpeg=(75, 97),
        compressed=0.5,
        twice=0.3,
    ),
    "camera": Camera(
        odds=5 / 12,
        height=(14, 20),
        direct=0.0,
        lens=(0.35, 1.25),
        moved=0.1,
        motion=(0.5, 2.0),
        contrast=(0.8, 1.0),
        shot=(5e-5, 1.6e-3),
        read=(1e-3, 8e-3),
        chroma=(0.5, 1.3),
        sharpened=0.1,
        jpeg=(50, 92),
        compressed=0.95,
        twice=0.2,
    ),
    "hard": Camera(
        odds=1 / 4,
        height=(14, 18),
        direct=0.0,
        lens=(0.7, 1.25),
        moved=0.8,
        motion=(0.5, 2.2),
        contrast=(0.35, 0.85),
        shot=(1e-4, 2.2e-3),
        read=(2e-3, 1.1e-2),
        chroma=(0.7, 1.6),
        sharpened=0.1,
        jpeg=(22, 60),
        compressed=1.0,
        twice=0.2,
    ),
}
#: The camera of a first picture, of which the second one is taken or resampled.
FIRST = Camera(
    odds=1.0,
    height=(20, _TALLEST),
    direct=0.0,
    lens=(-0.2, 0.6),
    moved=0.0,
    motion=(0.0, 0.0),
    contrast=(1.0, 1.0),
    shot=(0.0, 4e-4),
    read=(0.0, 3e-3),
    chroma=(0.0, 0.6),
    sharpened=0.3,
    jpeg=(60, 95),
    compressed=0.8,
    twice=0.0,
)
#: Share of crops whose colours are inverted before, so that letters are light as often as dark.
INVERTED = 0.5
#: Width of a letter over the word's height, and the deviation of its logarithm; photographed words
#: have 2.3 (1.4 to 4.1) at five letters.
LETTER_WIDTH, LETTER_SPREAD = 0.47, 0.25
ASPECTS = (1.2, 6.0)


class Photographs(NamedTuple):
    """What `photograph` makes: lr uint8 [N, 3, 16, 64], hr uint8 [N, 3, 32, 128], aspect [N]."""

    lr: Tensor
    hr: Tensor
    aspect: Tensor


def photograph(hr: Tensor, labels: Sequence[str], seeds: Sequence[int]) -> Photographs:
    """Low-resolution crops of `hr` (uint8 [N, 3, 32, 128]), each by the camera of its seed.

    `labels` are the words, whose lengths tell how wide they are taken to have been. The hr that
    comes back is the one given, but for inverted colours.
    """
    if not len(hr) == len(labels) == len(seeds):
        raise ValueError(f"{len(hr)} crops, {len(labels)} labels, {len(seeds)} seeds")
    device = hr.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = _Draws(generators, device)
    # Before the picture is taken: blurred light brightens it, and that must not be turned round.
    hr = torch.where(_wide(draws.uniform() < INVERTED), 255 - hr, hr)
    letters = torch.tensor([float(len(label)) for label in labels], device=device)
    aspect = letters * LETTER_WIDTH * torch.exp(LETTER_SPREAD * draws.normal())
    aspect = aspect.clamp(*ASPECTS)
    cameras = tuple(CAMERAS.values())
    edges = torch.tensor([camera.odds for camera in cameras], device=device).cumsum(0)
    kind = torch.searchsorted(edges / edges[-1], draws.uniform(), right=True)
    kind = kind.clamp(max=len(cameras) - 1)

    rows, columns = hr.shape[-2:]
    size = torch.tensor([[rows, columns]], device=device).expand(len(hr), 2)
    canvas = torch.zeros(len(hr), 3, _HEIGHT, _WIDTH, device=device)
    canvas[..., :rows, :columns] = hr.float()
    twice = draws.uniform() < _of([camera.twice for camera in cameras], kind)
    first, first_size = _taken(canvas, size, aspect, (FIRST,), torch.zeros_like(kind), draws)
    canvas = torch.where(_wide(twice), first, canvas)
    size = torch.where(twice[:, None], first_size, size)
    canvas, size = _taken(canvas, size, aspect, cameras, kind, draws)

    lr = _resampled(canvas, size, size.new_tensor((LR_HEIGHT, LR_WIDTH)).expand_as(size), "bicubic")
    lr = lr[..., :LR_HEIGHT, :LR_WIDTH].round().clamp(0, 255).to(torch.uint8)
    return Photographs(lr, hr, aspect)


class _Draws:
    """Numbers of every crop's own generator, [N] or [N, ...], in the order they are asked for."""

    def __init__(self, generators: Sequence[torch.Generator], device: torch.device) -> None:
        self._generators = generators
        self._device = device

    def uniform(self, low: Tensor | float = 0.0, high: Tensor | float = 1.0) -> Tensor:
        unit = torch.stack([torch.rand((), generator=g) for g in self._generators])
        return low + (high - low) * unit.to(self._device)

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.stack([torch.randn(shape, generator=g) for g in self._generators])
        return drawn.to(self._device)

    def between(self, ranges: Sequence[Range], kind: Tensor) -> Tensor:
        """One number a crop from the range of its kind."""
        return self.uniform(
            _of([low for low, _ in ranges], kind), _of([x for _, x in ranges], kind)
        )

    def whole(self, ranges: Sequence[tuple[int, int]], kind: Tensor) -> Tensor:
        """As `between`, both ends included."""
        return self.between([(low, high + 1) for low, high in ranges], kind).floor().long()


def _of(values: Sequence[float], kind: Tensor) -> Tensor:
    return torch.tensor(values, device=kind.device)[kind]


def _taken(
    canvas: Tensor, size: Tensor, aspect: Tensor, cameras: Sequence[Camera], kind: Tensor,
    draws: _Draws,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The picture that each crop's camera takes of what is on the canvas, and its size [N, 2].

    Grey levels 0 to 255 in and out.
    """
    height = draws.whole([c.height for c in cameras], kind)
    width = (height * aspect).round().long().clamp(_NARROWEST, _WIDEST)
    direct = draws.uniform() < _of([c.direct for c in cameras], kind)
    height = torch.where(direct, LR_HEIGHT, height)
    width = torch.where(direct, LR_WIDTH, width)
    taken = torch.stack((height, width), 1)

    lens = draws.between([c.lens for c in cameras], kind)
    plain = lens < 0
    by_area = draws.uniform() < 0.5
    moved = draws.uniform() < _of([c.moved for c in cameras], kind)
    length = draws.between([c.motion for c in cameras], kind) * moved
    along = draws.uniform() < 0.5
    motion = torch.stack((length * along, length * ~along), 1)
    light = (canvas / 255).square()
    seen = _resampled(light, size, taken, "lens", lens.clamp(min=0.0), motion)
    # In grey levels, as programs do it.
    area = _resampled(canvas, size, taken, "area")
    bicubic = _resampled(canvas, size, taken, "bicubic")
    shrunk = (torch.where(_wide(by_area), area, bicubic) / 255).clamp(0, 1).square()
    light = torch.where(_wide(plain), shrunk, seen)

    contrast = _wide(draws.between([c.contrast for c in cameras], kind))
    own = light.mean((1, 2, 3))
    veil = _wide(torch.where(draws.uniform() < 0.5, own, draws.uniform(0.05, 0.95).square()))
    light = contrast * light + (1 - contrast) * veil

    shot = _wide(draws.between([c.shot for c in cameras], kind))
    read = _wide(draws.between([c.read for c in cameras], kind))
    noise = draws.normal(3, _HEIGHT, _WIDTH)
    light = light + noise * (shot * light + read.square()).clamp(min=0).sqrt()
    image = light.clamp(0, 1).sqrt() * 255
    # What lies beyond the picture repeats its edge, not the noise that was added there.
    image = _placed(image, taken, torch.zeros_like(taken))

    ycc = jpeg.to_ycc(image)
    chroma = draws.between([c.chroma for c in cameras], kind)
    soft = _blurred(ycc[:, 1:], taken, chroma)
    image = jpeg.to_rgb(torch.cat((ycc[:, :1], soft), 1))
    gain = draws.uniform(0.3, 1.0) * (draws.uniform() < _of([c.sharpened for c in cameras], kind))
    image = image + _wide(gain) * (image - _blurred(image, taken, torch.ones_like(gain)))
    image = image.round().clamp(0, 255)

    quality = draws.whole([c.jpeg for c in cameras], kind)
    phase = torch.stack((draws.uniform(0, 8), draws.uniform(0, 8)), 1).floor().long()
    coded = jpeg.compress(_placed(image, taken, phase), quality)
    coded = _placed(coded, taken, -phase, phase + taken)
    compressed = draws.uniform() < _of([c.compressed for c in cameras], kind)
    return torch.where(_wide(compressed), coded, image), taken


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _placed(image: Tensor, size: Tensor, move: Tensor, end: Tensor | None = None) -> Tensor:
    """Pictures [N, 3, H, W] moved down and right by `move` [N, 2], their edges repeated.

    A picture's last row and column are before `end`, which is `size` where it is not given.
    """
    first = (-move).clamp(min=0)
    last = (size if end is None else end) - 1
    index = []
    for axis, length in ((0, image.shape[-2]), (1, image.shape[-1])):
        place = torch.arange(length, device=image.device)[None] - move[:, axis, None]
        index.append(place.clamp(first[:, axis, None], last[:, axis, None]))
    batch = torch.arange(len(image), device=image.device)[:, None, None]
    moved = image.permute(0, 2, 3, 1)[batch, index[0][:, :, None], index[1][:, None, :]]
    return moved.permute(0, 3, 1, 2)


def _blurred(image: Tensor, size: Tensor, blur: Tensor) -> Tensor:
    """A Gaussian of `blur` [N] pixels on the pictures of `size` [N, 2]."""
    axes = [_gaussian(size[:, axis], image.shape[axis - 2], blur) for axis in (0, 1)]
    return _through(image, *axes)


def _through(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[N, C, H, W] through one matrix an axis, [N, out, in]."""
    return rows[:, None] @ image @ columns.transpose(1, 2)[:, None]


def _resampled(
    image: Tensor, size: Tensor, wanted: Tensor, kernel: Kernel, blur: Tensor | None = None,
    motion: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Pictures of `size` [N, 2] on the canvas in `wanted` [N, 2] pixels.

    `blur` [N] and `motion` [N, 2] of the lens are in pixels of the result.
    """
    matrices = []
    for axis in (0, 1):
        smear = None if motion is None else motion[:, axis]
        length = image.shape[axis - 2]
        matrices.append(weights(size[:, axis], wanted[:, axis], length, kernel, blur, smear))
    return _through(image, *matrices)


def weights(
    inputs: Tensor, outputs: Tensor, length: int, kernel: Kernel, blur: Tensor | None = None,
    motion: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Weights [N, length, length] from `inputs` [N] pixels to `outputs` [N] along one axis.

    Rows past the last output repeat it. `lens` takes the pixel's box as a Gaussian of its
    variance, 1/12, beside the lens's own; `area` is the box itself; `bicubic` is Pillow's filter.
    """
    index = torch.arange(length, device=inputs.device)
    scale = (inputs / outputs)[:, None, None]
    row = torch.minimum(index[None], outputs[:, None] - 1)[:, :, None]
    centre = (row + 0.5) * scale
    distance = index + 0.5 - centre
    if kernel == "area":
        total = ((scale + 1) / 2 - distance.abs()).clamp(min=0).minimum(scale.clamp(max=1.0))
    elif kernel == "bicubic":
        total = _cubic(distance.abs() / scale.clamp(min=1.0))
    else:
        assert blur is not None and motion is not None
        deviation = scale * (blur.square() + 1 / 12).sqrt()[:, None, None]
        total = torch.zeros_like(distance)
        for share in (-0.5, -0.25, 0.0, 0.25, 0.5):
            shifted = distance - share * motion[:, None, None] * scale
            total = total + torch.exp(-0.5 * (shifted / deviation).square())
    total = total * (index < inputs[:, None])[:, None]
    return total / total.sum(2, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Keys's cubic with a = -0.5."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _gaussian(inputs: Tensor, length: int, blur: Tensor) -> Tensor:
    """Weights [N, length, length] of a Gaussian alone; nothing changes where `blur` is 0."""
    index = torch.arange(length, device=inputs.device)
    row = torch.minimum(index[None], inputs[:, None] - 1)[:, :, None]
    deviation = blur.clamp(min=1e-3)[:, None, None]
    total = torch.exp(-0.5 * ((index - row) / deviation).square())
    total = total * (index < inputs[:, None])[:, None]
    return total / total.sum(2, keepdim=True)
