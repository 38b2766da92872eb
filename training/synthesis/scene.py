"""Procedural surroundings of a word [3, 64, 256]: paint and walls, clutter, light."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lemma_fast.training.synthesis.lettering import SCENE_HEIGHT, SCENE_WIDTH, Plane

Colour = NDArray[np.float32]
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_X = np.linspace(-1, 1, SCENE_WIDTH, dtype=np.float32)[None, :]
_Y = np.linspace(-1, 1, SCENE_HEIGHT, dtype=np.float32)[:, None]


@dataclass(frozen=True)
class Palette:
    """Colours [3] in [0, 1]: the ground, what varies it, the text, its second colour, its edge."""

    ground: Colour
    ground_variation: Colour
    text: Colour
    text_end: Colour
    edge: Colour


def draw_palette(contrast: tuple[float, float], rng: np.random.Generator) -> Palette:
    """Dark on light or light on dark, `contrast` apart in luma; now and then apart in hue alone."""
    low, high = contrast
    apart = low + (high - low) * rng.beta(1.6, 1.6)
    darker = rng.uniform(0.02, 0.98 - apart)
    lumas = (darker, darker + apart)
    ground_luma, text_luma = lumas if rng.random() < 0.5 else lumas[::-1]
    ground = _colour(ground_luma, rng)
    text = _colour(text_luma, rng)
    variation = np.clip(ground + rng.normal(0, 0.10, 3).astype(np.float32), 0, 1)
    if rng.random() < 0.35:
        # Darker or lighter, away from the text.
        step = np.float32(rng.uniform(0, 0.3) * np.sign(ground_luma - text_luma))
        variation = np.clip(variation + step, 0, 1)
    end = text
    if rng.random() < 0.15:
        end = _colour(float(np.clip(text_luma + rng.normal(0, 0.12), 0, 1)), rng)
    edge = _colour(float(rng.uniform(0, 1)), rng)
    return Palette(ground, variation, text, end, edge)


def draw_ground(palette: Palette, rng: np.random.Generator) -> NDArray[np.float32]:
    """A surface whose pattern moves between the palette's two ground colours, with grain."""
    pattern = _PATTERNS[rng.choice(len(_PATTERNS), p=_PATTERN_ODDS)](rng)
    step = (palette.ground_variation - palette.ground)[:, None, None]
    ground = palette.ground[:, None, None] + step * pattern
    if rng.random() < 0.5:
        strength = np.float32(rng.uniform(0.005, 0.04))
        grain = rng.standard_normal((SCENE_HEIGHT, SCENE_WIDTH), dtype=np.float32)
        ground = ground + strength * grain
    return ground


def add_clutter(scene: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Rules, frames, bars, dots and stains behind the word."""
    image = Image.new("L", (SCENE_WIDTH, SCENE_HEIGHT))
    draw = ImageDraw.Draw(image)
    kind = rng.integers(5)
    thick = int(rng.integers(1, 6))
    if kind == 0:
        # A sign's frame, partly inside the crop.
        inset = rng.integers(-4, 7, 4)
        box = (inset[0], inset[1], SCENE_WIDTH - 1 - inset[2], SCENE_HEIGHT - 1 - inset[3])
        draw.rounded_rectangle([int(v) for v in box], int(rng.integers(1, 14)), None, 255, thick)
    elif kind == 1:
        for _ in range(int(rng.integers(1, 4))):
            ends = rng.uniform(-0.2, 1.2, 4) * (2 * (SCENE_WIDTH, SCENE_HEIGHT))
            draw.line([float(v) for v in ends], 255, thick)
    elif kind == 2:
        # The edge of another surface.
        at = int(rng.integers(SCENE_WIDTH))
        lean = int(rng.integers(-30, 31))
        side = SCENE_WIDTH + 60 if rng.random() < 0.5 else -60
        corners = [(at, -1), (at + lean, SCENE_HEIGHT), (side, SCENE_HEIGHT), (side, -1)]
        draw.polygon(corners, 255)
    elif kind == 3:
        at = int(rng.integers(-6, 12))
        top = at if rng.random() < 0.5 else SCENE_HEIGHT - at
        draw.rectangle((-1, min(top, top + thick), SCENE_WIDTH, max(top, top + thick)), 255)
    else:
        for _ in range(int(rng.integers(1, 7))):
            x, y = int(rng.integers(SCENE_WIDTH)), int(rng.integers(SCENE_HEIGHT))
            wide, high = int(rng.integers(2, 26)), int(rng.integers(2, 14))
            draw.ellipse((x - wide, y - high, x + wide, y + high), 255)
    cover = np.asarray(image, np.float32) / np.float32(255) * np.float32(rng.uniform(0.2, 1.0))
    reach = 0.45 if kind != 4 else 0.2
    near = scene.mean(axis=(1, 2)) + rng.normal(0, reach, 3).astype(np.float32)
    return scene + cover * (np.clip(near, 0, 1)[:, None, None] - scene)


def text_colour(palette: Palette, rng: np.random.Generator) -> NDArray[np.float32]:
    """Colour of the letters [3, 64, 256] or [3, 1, 1]."""
    if palette.text_end is palette.text:
        return palette.text[:, None, None]
    along = _X if rng.random() < 0.4 else _Y
    share = np.broadcast_to((along + 1) / 2, (SCENE_HEIGHT, SCENE_WIDTH))
    start, end = palette.text[:, None, None], palette.text_end[:, None, None]
    return start + share * (end - start)


def worn(mask: Plane, rng: np.random.Generator) -> Plane:
    """The mask with paint come off in patches."""
    patches = _field(rng, 24, 64) + _field(rng, 8, 24)
    return mask * np.clip(1.3 + np.float32(rng.uniform(0.4, 1.2)) * patches, 0, 1)


def light_up(scene: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Uneven light, the edge of a shadow, a reflection."""
    if rng.random() < 0.6:
        slope = rng.normal(0, 0.13, 2).astype(np.float32)
        scene = scene * (1 + slope[0] * _X + slope[1] * _Y)
    if rng.random() < 0.08:
        x, y, lean = rng.uniform(-0.8, 0.8), rng.uniform(-0.5, 0.5), rng.uniform(-1, 1)
        side = (_X - np.float32(x)) + np.float32(lean) * (_Y - np.float32(y))
        edge = np.clip(0.5 + side * np.float32(rng.uniform(2, 20)), 0, 1)
        scene = scene * (1 - np.float32(rng.uniform(0.2, 0.5)) * edge)
    if rng.random() < 0.06:
        x, y = rng.uniform(-1, 1, 2)
        wide, high = rng.uniform(0.1, 0.6), rng.uniform(0.3, 1.2)
        away = ((_X - np.float32(x)) / np.float32(wide)) ** 2
        away = away + ((_Y - np.float32(y)) / np.float32(high)) ** 2
        spot = np.float32(rng.uniform(0.2, 0.7)) / (1 + away * away)
        scene = scene + np.asarray(spot, np.float32) * (1 - scene)
    if rng.random() < 0.3:
        tint = rng.normal(1.0, 0.06, 3).astype(np.float32)
        scene = scene * tint[:, None, None]
    return np.clip(scene, 0, 1)


def _colour(luma: float, rng: np.random.Generator) -> Colour:
    """A colour of this luma: mostly greyish, else saturated."""
    vivid = rng.random() < 0.4
    saturation = rng.uniform(0.35, 1.0) if vivid else rng.uniform(0.0, 0.2)
    full = np.array(colorsys.hsv_to_rgb(rng.random(), saturation, 1.0), np.float32)
    own = float(full[0] * _LUMA[0] + full[1] * _LUMA[1] + full[2] * _LUMA[2])
    if luma <= own:
        return np.asarray(full * np.float32(luma / own), np.float32)
    # Brighter than the pure hue can be: towards white.
    share = np.float32((luma - own) / max(1.0 - own, 1e-6))
    return np.asarray(full + share * (1 - full), np.float32)


def _field(rng: np.random.Generator, rows: int, columns: int) -> Plane:
    """Smooth noise of `rows` x `columns` cells, of about unit deviation."""
    cells = rng.standard_normal((rows, columns), dtype=np.float32)
    image = Image.fromarray(cells)
    size = (SCENE_WIDTH, SCENE_HEIGHT)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32)


def _plain(rng: np.random.Generator) -> Plane:
    return np.zeros((SCENE_HEIGHT, SCENE_WIDTH), np.float32)


def _gradient(rng: np.random.Generator) -> Plane:
    right, down = rng.normal(0, 1, 2).astype(np.float32)
    return 0.5 + 0.5 * (right * _X + down * _Y)


def _clouds(rng: np.random.Generator) -> Plane:
    coarse = _field(rng, int(rng.integers(2, 5)), int(rng.integers(3, 10)))
    fine = _field(rng, int(rng.integers(6, 24)), int(rng.integers(16, 80)))
    return 0.5 + 0.5 * coarse + np.float32(rng.uniform(0.1, 0.5)) * fine


def _brushed(rng: np.random.Generator) -> Plane:
    rows, columns = int(rng.integers(20, 50)), int(rng.integers(2, 8))
    if rng.random() < 0.4:
        rows, columns = int(rng.integers(2, 4)), int(rng.integers(60, 160))
    return 0.5 + 0.5 * _field(rng, rows, columns)


def _stripes(rng: np.random.Generator) -> Plane:
    angle, count = rng.uniform(0, np.pi), rng.uniform(1.0, 8.0)
    phase = np.float32(count * np.cos(angle)) * _X * 4 + np.float32(count * np.sin(angle)) * _Y
    # A triangle wave needs no sine, whose last bits differ between processors.
    wave = np.abs((phase + np.float32(rng.random())) % 2 - 1)
    hard = np.float32(rng.uniform(1, 8))
    return np.clip(0.5 + (wave - 0.5) * hard, 0, 1)


def _bricks(rng: np.random.Generator) -> Plane:
    high, wide = int(rng.integers(8, 32)), int(rng.integers(16, 90))
    joint = int(rng.integers(1, 4))
    y, x = np.mgrid[0:SCENE_HEIGHT, 0:SCENE_WIDTH] + rng.integers(0, 90, 2)[:, None, None]
    shifted = x + (y // high % 2) * (wide // 2) * int(rng.random() < 0.6)
    joints = (y % high < joint) | (shifted % wide < joint)
    return joints.astype(np.float32) + np.float32(0.15) * _field(rng, 12, 40)


def _shapes(rng: np.random.Generator) -> Plane:
    """Soft heaps of boxes and discs: what is behind a shop window, out of focus."""
    image = Image.new("L", (SCENE_WIDTH // 4, SCENE_HEIGHT // 4), 128)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 16))):
        x, y = int(rng.integers(-8, 64)), int(rng.integers(-6, 16))
        box = (x, y, x + int(rng.integers(3, 28)), y + int(rng.integers(3, 14)))
        (draw.rectangle if rng.random() < 0.6 else draw.ellipse)(box, int(rng.integers(256)))
    size = (SCENE_WIDTH, SCENE_HEIGHT)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32) / np.float32(128)


_PATTERNS: tuple[Callable[[np.random.Generator], Plane], ...] = (
    _plain,
    _gradient,
    _clouds,
    _brushed,
    _stripes,
    _bricks,
    _shapes,
)
_PATTERN_ODDS = (0.24, 0.20, 0.22, 0.09, 0.06, 0.06, 0.13)
