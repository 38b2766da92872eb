"""Pictures side by side with captions: that of `--compare`, and sheets of many crops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from lemma_fast.images import resize

_MARGIN = 8
_CAPTION = 18
_LEAST_HEIGHT, _MOST_WIDTH = 64, 1024
# From black over red and yellow to white.
_HEAT = np.array([[0, 0, 0], [180, 20, 20], [250, 200, 40], [255, 255, 255]], dtype=np.float64)


def panel_size(size: tuple[int, int]) -> tuple[int, int]:
    """Size of each panel for a result of `size`: enlarged by a whole factor, or made to fit."""
    width, height = size
    if width > _MOST_WIDTH:
        return _MOST_WIDTH, max(1, round(height * _MOST_WIDTH / width))
    factor = min(max(1, -(-_LEAST_HEIGHT // height)), max(1, _MOST_WIDTH // width))
    return width * factor, height * factor


def picture(
    before: Image.Image,
    after: Image.Image,
    attention: npt.NDArray[np.float32],
    text: str,
    input_size: tuple[int, int],
    read: tuple[str, str] | None = None,
) -> Image.Image:
    """Draw one row of four panels with captions.

    `before` [RGB] the input, which may have been reduced from `input_size`; `after` [RGB] the
    result, `attention` [H, W] not negative, `text` the prior's guess, `read` what a recogniser
    reads in the bicubic crop and in the result.
    """
    enlarged, ours = f"bicubic {after.width}x{after.height}", "lemma-fast"
    if read is not None:
        enlarged, ours = (
            f"{words}: {said or '(no text)'}"
            for words, said in zip((enlarged, ours), read, strict=True)
        )
    panel = panel_size(after.size)
    plain = resize(before, after.size)
    nearest = Image.Resampling.NEAREST
    panels = [
        (before.resize(panel, nearest), f"input {input_size[0]}x{input_size[1]}"),
        (plain.resize(panel, nearest), enlarged),
        (after.resize(panel, nearest), ours),
        (overlay(before.resize(panel, nearest), attention), f"attention: {text or '(no text)'}"),
    ]
    return sheet([panels])


def sheet(rows: Sequence[Sequence[tuple[Image.Image | None, str]]]) -> Image.Image:
    """Lay out rows of pictures on white, each with a caption of one or more lines below.

    A panel without a picture has its caption in the picture's place. A column is as wide as the
    widest of its pictures and captions.
    """
    font = ImageFont.load_default()
    lines = [[caption.split("\n") for _, caption in row] for row in rows]
    count = max((len(row) for row in rows), default=0)
    columns, tops = [0] * count, [_MARGIN]
    for row, captions in zip(rows, lines, strict=True):
        for i, ((image, _), words) in enumerate(zip(row, captions, strict=True)):
            text = max(int(font.getlength(line)) + 1 for line in words)
            columns[i] = max(columns[i], text, 0 if image is None else image.width)
        heights = [
            (0 if image is None else image.height) + _CAPTION * len(words)
            for (image, _), words in zip(row, captions, strict=True)
        ]
        tops.append(tops[-1] + max(heights, default=0) + _MARGIN)
    drawn = Image.new("RGB", (sum(columns) + _MARGIN * (count + 1), tops[-1]), (255, 255, 255))
    draw = ImageDraw.Draw(drawn)
    for row, captions, top in zip(rows, lines, tops, strict=False):
        left = _MARGIN
        for (image, _), words, column in zip(row, captions, columns, strict=False):
            below = top
            if image is not None:
                drawn.paste(image, (left, top))
                below += image.height + 4
            for number, line in enumerate(words):
                draw.text((left, below + _CAPTION * number), line, fill=(40, 40, 40), font=font)
            left += column + _MARGIN
    return drawn


def overlay(image: Image.Image, attention: npt.NDArray[np.float32]) -> Image.Image:
    """Lay a map [H, W] over a grey version of the image, its largest value brightest."""
    peak = float(attention.max())
    scaled = attention / peak if peak > 0 else np.zeros_like(attention)
    heat = Image.fromarray(np.rint(255 * scaled).astype(np.uint8))
    level = np.asarray(resize(heat, image.size), dtype=np.float64) / 255
    stops = np.linspace(0, 1, len(_HEAT))
    colour = np.stack([np.interp(level, stops, _HEAT[:, i]) for i in range(3)], axis=-1)
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None] * 0.6
    share = 0.75 * level[..., None]
    return Image.fromarray(np.rint(grey * (1 - share) + colour * share).astype(np.uint8))
