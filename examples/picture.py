"""Draw README's picture: `python examples/picture.py [FOLDER OF RESULTS]`.

Columns: the crop, bicubic, the results of `lemma-fast upscale examples/crops -o FOLDER` where a
folder is given, and the high-resolution original.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

EXAMPLES = Path(__file__).parent
CELL, GAP, TITLE = (256, 64), 6, 20
NEAREST, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BICUBIC


def main(results: str | None = None) -> None:
    """Write examples/picture.png."""
    crops = sorted((EXAMPLES / "crops").glob("*.png"))
    columns = {"input 64x16": [], "bicubic 128x32": []}
    if results:
        columns["lemma-fast 128x32"] = []
    columns["original 128x32"] = []
    for crop in crops:
        image = Image.open(crop).convert("RGB")
        row = [image, image.resize((128, 32), BICUBIC)]
        if results:
            row.append(Image.open(Path(results) / f"{crop.stem}_x2.png"))
        row.append(Image.open(EXAMPLES / "hr" / crop.name))
        for cells, cell in zip(columns.values(), row, strict=True):
            cells.append(cell.convert("RGB").resize(CELL, NEAREST))
    width = len(columns) * (CELL[0] + GAP) + GAP
    sheet = Image.new("RGB", (width, len(crops) * (CELL[1] + GAP) + TITLE + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, cells) in enumerate(columns.items()):
        left = GAP + i * (CELL[0] + GAP)
        draw.text((left, GAP), title, fill=(40, 40, 40), font=ImageFont.load_default())
        for j, cell in enumerate(cells):
            sheet.paste(cell, (left, TITLE + GAP + j * (CELL[1] + GAP)))
    sheet.save(EXAMPLES / "picture.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
