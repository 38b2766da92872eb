"""A word as masks over the scene: drawn with a face, bent, turned, and framed as a tight crop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

Plane = NDArray[np.float32]

# Twice the size of the high-resolution crop.
SCENE_HEIGHT, SCENE_WIDTH = 64, 256
_FONT_SIZE = 56
_MARGIN = 24
_STRIPS = 16


@dataclass(frozen=True)
class Lettering:
    """Masks [64, 256] in [0, 1]; `aspect` is the crop's width over height before it is resized."""

    fill: Plane
    outline: Plane | None
    shadow: Plane | None
    aspect: float


def draw_word(label: str, path: str, rng: np.random.Generator) -> Lettering:
    """Draw `label` with the face at `path` in a random style and pose."""
    spacing = 0.0
    if rng.random() < 0.35:
        spacing = rng.uniform(-2.0, 4.0) if rng.random() < 0.6 else rng.uniform(4.0, 22.0)
    weight = int(rng.random() < 0.12)
    fill = _ink(label, path, spacing, weight)
    box = fill.getbbox()
    if box is None:
        raise ValueError(f"{path} draws nothing for {label!r}")
    outline = None
    if rng.random() < 0.12:
        outline = _ink(label, path, spacing, weight + int(rng.integers(2, 6)))
    shadow = _shadow(outline or fill, rng) if rng.random() < 0.18 else None
    pose = _Pose(box, rng)
    masks = [pose.warp(mask) for mask in (fill, outline, shadow) if mask is not None]
    rest = iter(masks[1:])
    return Lettering(
        masks[0],
        next(rest) if outline is not None else None,
        next(rest) if shadow is not None else None,
        pose.aspect,
    )


def draw_neighbour(label: str, path: str, rng: np.random.Generator) -> Plane:
    """Part of another line of text, cut by the upper or lower border of the scene."""
    ink = _ink(label, path, 0.0, 0)
    box = ink.getbbox()
    if box is None:
        return np.zeros((SCENE_HEIGHT, SCENE_WIDTH), np.float32)
    height = int(rng.integers(28, 60))
    width = max(8, int((box[2] - box[0]) * height / (box[3] - box[1]) * rng.uniform(0.8, 1.8)))
    word = ink.crop(box).resize((width, height), Image.Resampling.BILINEAR)
    shown = int(rng.integers(3, 11))
    top = shown - height if rng.random() < 0.5 else SCENE_HEIGHT - shown
    scene = Image.new("L", (SCENE_WIDTH, SCENE_HEIGHT))
    scene.paste(word, (int(rng.integers(-width // 2, SCENE_WIDTH - width // 2)), top))
    return _plane(scene)


@lru_cache(maxsize=1024)
def _font(path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def _ink(label: str, path: str, spacing: float, stroke: int) -> Image.Image:
    """The word in white on black with `_MARGIN` of black around it."""
    font = _font(path)
    ascent, descent = font.getmetrics()
    if spacing:
        starts = [0.0]
        for letter in label[:-1]:
            starts.append(starts[-1] + max(font.getlength(letter) + spacing, 6.0))
        width = starts[-1] + font.getlength(label[-1])
        pieces = list(zip(label, starts, strict=True))
    else:
        width = font.getlength(label)
        pieces = [(label, 0.0)]
    # Swashes and slanted letters lean out of their advance.
    size = (int(width) + 4 * _MARGIN, ascent + descent + 2 * _MARGIN)
    image = Image.new("L", size)
    draw = ImageDraw.Draw(image)
    for piece, start in pieces:
        at = (2 * _MARGIN + start, float(_MARGIN))
        draw.text(at, piece, font=font, fill=255, stroke_width=stroke)
    return image


def _shadow(mask: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cast or extruded shadow: the mask moved, or smeared all the way there."""
    angle = rng.uniform(0, 2 * np.pi)
    reach = rng.uniform(2.0, 7.0)
    right, down = round(reach * np.cos(angle)), round(reach * np.sin(angle))
    if rng.random() < 0.4:
        steps = max(abs(right), abs(down), 1)
        smeared = mask
        for step in range(1, steps + 1):
            moved = _moved(mask, round(right * step / steps), round(down * step / steps))
            smeared = ImageChops.lighter(smeared, moved)
        return smeared
    moved = _moved(mask, right, down)
    if rng.random() < 0.5:
        return moved.filter(ImageFilter.GaussianBlur(rng.uniform(1.0, 4.0)))
    return moved


def _moved(mask: Image.Image, right: int, down: int) -> Image.Image:
    # The margin is wider than any move, so what wraps around is black.
    return ImageChops.offset(mask, right, down)


def _plane(image: Image.Image) -> Plane:
    return np.asarray(image, np.float32) / np.float32(255)


class _Pose:
    """Where each pixel of the scene lies on the drawn word: arc, slant, turn, perspective, crop."""

    def __init__(self, box: tuple[int, int, int, int], rng: np.random.Generator) -> None:
        left, top, right, bottom = box
        self._centre = (left + right) / 2, (top + bottom) / 2
        width, height = right - left, bottom - top
        # Radians that the word spans on its circle; negative bends the other way.
        bend = 0.0
        if width > 1.8 * height and rng.random() < 0.15:
            bend = rng.uniform(0.15, 0.8 if rng.random() < 0.8 else 1.6) * rng.choice((-1, 1))
        self._radius = width / bend if bend else None
        self._matrix = _homography(width, height, rng)

        u = np.tile(np.linspace(-width / 2, width / 2, _STRIPS + 1), 2)
        v = np.repeat([-height / 2, height / 2], _STRIPS + 1)
        x, y = _apply(self._matrix, *self._bend(u, v))
        frame_left, frame_right = x.min(), x.max()
        frame_top, frame_bottom = y.min(), y.max()
        tall = frame_bottom - frame_top
        # Tight crops: now and then a border cuts into the word.
        over, under = tall * rng.uniform(-0.02, 0.18, 2)
        before, after = tall * rng.uniform(0.0, 0.32, 2)
        frame_top, frame_bottom = frame_top - over, frame_bottom + under
        frame_left, frame_right = frame_left - before, frame_right + after
        tall = frame_bottom - frame_top
        # Words of one or two letters would be stretched beyond reading.
        short_by = tall * rng.uniform(1.5, 2.6) - (frame_right - frame_left)
        if short_by > 0:
            share = rng.uniform(0.25, 0.75)
            frame_left, frame_right = (
                frame_left - short_by * share,
                frame_right + short_by * (1 - share),
            )
        self.aspect = float((frame_right - frame_left) / tall)
        self._frame = np.array(
            [
                [(frame_right - frame_left) / SCENE_WIDTH, 0.0, frame_left],
                [0.0, tall / SCENE_HEIGHT, frame_top],
                [0.0, 0.0, 1.0],
            ]
        )

    def warp(self, mask: Image.Image) -> Plane:
        """The mask as the scene shows it [64, 256]."""
        size = (SCENE_WIDTH, SCENE_HEIGHT)
        back = np.linalg.inv(self._matrix) @ self._frame
        if self._radius is None:
            shift = np.array([[1.0, 0, self._centre[0]], [0, 1.0, self._centre[1]], [0, 0, 1.0]])
            full = shift @ back
            full /= full[2, 2]
            image = mask.transform(
                size,
                Image.Transform.PERSPECTIVE,
                [float(value) for value in full.ravel()[:8]],
                Image.Resampling.BILINEAR,
            )
            return _plane(image)
        edges = np.linspace(0, SCENE_WIDTH, _STRIPS + 1)
        x, y = np.meshgrid(edges, [0.0, SCENE_HEIGHT / 2, SCENE_HEIGHT])
        u, v = self._unbend(*_apply(back, x, y))
        u, v = u + self._centre[0], v + self._centre[1]
        half = SCENE_HEIGHT // 2
        mesh = []
        for row in (0, 1):
            for i in range(_STRIPS):
                target = (int(edges[i]), row * half, int(edges[i + 1]), (row + 1) * half)
                corners = ((row, i), (row + 1, i), (row + 1, i + 1), (row, i + 1))
                mesh.append((target, tuple(float(c[at]) for at in corners for c in (u, v))))
        return _plane(mask.transform(size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR))

    def _bend(
        self, u: NDArray[np.float64], v: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], ...]:
        """From the straight word to its arc; both have their origin at the word's centre."""
        if self._radius is None:
            return u, v
        angle = u / self._radius
        distance = self._radius - v
        return distance * np.sin(angle), self._radius - distance * np.cos(angle)

    def _unbend(
        self, x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if self._radius is None:
            return x, y
        sign = np.sign(self._radius)
        angle = np.arctan2(sign * x, sign * (self._radius - y))
        distance = sign * np.hypot(x, self._radius - y)
        return self._radius * angle, self._radius - distance


def _homography(width: float, height: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Slant, turn and perspective about the word's centre."""
    turn = np.deg2rad(rng.normal(0.0, 2.5 if rng.random() < 0.8 else 7.0))
    # A long word that is turned much would fill a square, not a strip.
    turn = float(np.clip(turn, -1.2 * height / width, 1.2 * height / width))
    slant = rng.normal(0.0, 0.12) if rng.random() < 0.5 else 0.0
    matrix = np.array([[1.0, slant, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    cosine, sine = np.cos(turn), np.sin(turn)
    matrix = np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]]) @ matrix
    if rng.random() < 0.45:
        across = np.clip(rng.normal(0.0, 0.18), -0.45, 0.45) / width
        along = np.clip(rng.normal(0.0, 0.10), -0.25, 0.25) / height
        matrix = np.array([[1.0, 0, 0], [0, 1.0, 0], [across, along, 1.0]]) @ matrix
    return matrix


def _apply(
    matrix: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The plane's points through a 3 x 3 matrix."""
    a = matrix
    w = a[2, 0] * x + a[2, 1] * y + a[2, 2]
    u = (a[0, 0] * x + a[0, 1] * y + a[0, 2]) / w
    v = (a[1, 0] * x + a[1, 1] * y + a[1, 2]) / w
    return u, v
