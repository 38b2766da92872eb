"""The camera that makes low-resolution crops while training, and its JPEG."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from lemma_fast.training.synthesis import camera, jpeg
from lemma_fast.training.synthesis.camera import photograph, weights

WORDS = ("shop", "EXIT", "2024", "bakery", "Main", "no", "telephone", "Open 24")


@pytest.fixture(scope="module")
def crops():
    """uint8 [48, 3, 32, 128]: sharp words in colour, as wide as the crop."""
    rng = np.random.default_rng(3)
    font = ImageFont.load_default(40)
    made = []
    for number in range(48):
        ground, ink = rng.integers(150, 256, 3), rng.integers(0, 90, 3)
        if number % 3 == 0:
            ground, ink = ink, ground
        word = WORDS[number % len(WORDS)]
        left, top, right, bottom = font.getbbox(word)
        image = Image.new("RGB", (right - left + 8, bottom - top + 8), tuple(ground.tolist()))
        ImageDraw.Draw(image).text((4 - left, 4 - top), word, tuple(ink.tolist()), font)
        made.append(np.asarray(image.resize((128, 32), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(made).transpose(0, 3, 1, 2).copy())


@pytest.fixture(scope="module")
def labels(crops):
    return [WORDS[number % len(WORDS)] for number in range(len(crops))]


def only(monkeypatch, name, **changes):
    """Let every crop be of one camera, and no colours be inverted."""
    chosen = camera.CAMERAS[name]
    fields = {**{n: getattr(chosen, n) for n in chosen.__dataclass_fields__}, **changes}
    monkeypatch.setattr(camera, "CAMERAS", {name: camera.Camera(**fields)})
    monkeypatch.setattr(camera, "INVERTED", 0.0)


def steepest(lr):
    """Median over crops of the steepest step over the contrast: down, and across."""
    grey = (lr.float() / 255 * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    flat = grey.flatten(1)
    contrast = flat.quantile(0.95, 1) - flat.quantile(0.05, 1)
    steps = [grey.diff(dim=dim).abs().flatten(1).amax(1) / contrast for dim in (1, 2)]
    return [float(step.median()) for step in steps]


def test_a_crop_depends_on_its_seed_alone(crops, labels):
    whole = photograph(crops[:6], labels[:6], range(6))
    part = photograph(crops[4:6], labels[4:6], [4, 5])
    assert whole.lr.shape == (6, 3, 16, 64) and whole.lr.dtype == torch.uint8
    for one, other in zip(whole, part, strict=True):
        assert torch.equal(one[4:], other)
    others = photograph(crops[:6], labels[:6], range(10, 16)).lr
    assert all(not torch.equal(a, b) for a, b in zip(whole.lr, others, strict=True))


def test_half_of_the_crops_are_inverted_on_both_sides(crops, labels):
    made = photograph(crops, labels, range(len(crops)))
    inverted = (made.hr == 255 - crops).flatten(1).all(1)
    assert torch.equal(made.hr[~inverted], crops[~inverted])
    assert 0.35 < inverted.float().mean() < 0.65
    coarse = torch.nn.functional.avg_pool2d(made.hr.float(), 2).flatten(1)
    alike = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(
        coarse, made.lr.float().flatten(1), strict=True)])  # fmt: skip
    assert alike.median() > 0.7 and alike.min() > 0


def test_a_lens_brightens_inverted_crops_too(monkeypatch, crops, labels):
    only(monkeypatch, "camera", contrast=(1.0, 1.0))
    monkeypatch.setattr(camera, "INVERTED", 0.5)
    made = photograph(crops, labels, range(len(crops)))
    inverted = (made.hr != crops).flatten(1).any(1)
    change = made.lr.float().mean((1, 2, 3)) - made.hr.float().mean((1, 2, 3))
    assert change[inverted].median() > 3 and change[~inverted].median() > 3
    flat = photograph(torch.full_like(crops[:8], 100), labels[:8], range(8))
    change = flat.lr.float().mean((1, 2, 3)) - flat.hr.float().mean((1, 2, 3))
    assert change.abs().max() < 4


def test_the_odds_of_the_cameras_are_kept(monkeypatch, crops, labels):
    assert sum(kind.odds for kind in camera.CAMERAS.values()) == pytest.approx(1)
    seen = []

    def taken(canvas, size, aspect, cameras, kind, draws):
        if len(cameras) > 1:
            seen.append(kind)
        return canvas, size

    monkeypatch.setattr(camera, "_taken", taken)
    for start in range(0, 960, 48):
        photograph(crops, labels, range(start, start + 48))
    kinds = torch.cat(seen)
    shares = torch.bincount(kinds, minlength=3) / len(kinds)
    for share, kind in zip(shares.tolist(), camera.CAMERAS.values(), strict=True):
        assert share == pytest.approx(kind.odds, abs=0.045)


def test_cameras_are_as_soft_as_photographs(monkeypatch, crops, labels):
    """Photographed words, down and across: sharp 0.76 and 0.69, camera 0.39 and 0.23."""
    found = {}
    for name in ("sharp", "camera", "hard"):
        with monkeypatch.context() as patch:
            only(patch, name)
            found[name] = steepest(photograph(crops, labels, range(len(crops))).lr)
    assert 0.60 < found["sharp"][0] < 0.95 and 0.50 < found["sharp"][1] < 0.95
    for name in ("camera", "hard"):
        down, across = found[name]
        assert 0.30 < down < 0.70 and 0.15 < across < 0.50
        # Narrow words are stretched, so that they are blurred more across.
        assert across < 0.85 * down


def test_narrow_words_are_blurred_more_across(monkeypatch, crops):
    only(monkeypatch, "camera")
    monkeypatch.setattr(camera, "LETTER_SPREAD", 0.0)
    narrow = photograph(crops, ["abc"] * len(crops), range(len(crops)))
    wide = photograph(crops, ["abcdefghij"] * len(crops), range(len(crops)))
    assert float(narrow.aspect[0]) == pytest.approx(3 * camera.LETTER_WIDTH)
    assert steepest(narrow.lr)[1] < 0.7 * steepest(wide.lr)[1]
    assert steepest(narrow.lr)[0] == pytest.approx(steepest(wide.lr)[0], rel=0.15)


def test_the_veil_takes_contrast_away(monkeypatch, crops, labels):
    spread = []
    for contrast in (1.0, 0.5):
        with monkeypatch.context() as patch:
            only(patch, "sharp", contrast=(contrast, contrast), direct=1.0, twice=0.0)
            lr = photograph(crops, labels, range(len(crops))).lr
        spread.append(float((lr.float() / 255).square().flatten(1).std(1).mean()))
    assert spread[1] == pytest.approx(0.5 * spread[0], rel=0.1)


def test_a_sharp_crop_is_what_pillow_shrinks(monkeypatch, crops, labels):
    quiet = {
        "direct": 1.0, "shot": (0.0, 0.0), "read": (0.0, 0.0), "chroma": (0.0, 0.0),
        "lens": (-1.0, -0.5), "sharpened": 0.0, "compressed": 0.0, "twice": 0.0,
    }  # fmt: skip
    only(monkeypatch, "sharp", **quiet)
    lr = photograph(crops, labels, range(len(crops))).lr.numpy().transpose(0, 2, 3, 1)
    hr = crops.numpy().transpose(0, 2, 3, 1)
    found = []
    for small, crop in zip(lr.astype(int), hr, strict=True):
        for method in (Image.Resampling.BICUBIC, Image.Resampling.BOX):
            wanted = np.asarray(Image.fromarray(crop).resize((64, 16), method))
            # Pillow rounds and clips between its two passes.
            if np.abs(small - wanted).mean() <= 0.8:
                found.append(method)
    assert len(found) == len(lr)
    assert 0.2 < found.count(Image.Resampling.BOX) / len(lr) < 0.8


@pytest.mark.parametrize(
    ("kernel", "inputs", "outputs"),
    [("area", 32, 16), ("area", 128, 37), ("bicubic", 128, 37), ("bicubic", 19, 64)],
)
def test_weights_are_pillows(kernel, inputs, outputs):
    line = np.random.default_rng(1).random((1, inputs)).astype(np.float32)
    method = Image.Resampling.BOX if kernel == "area" else Image.Resampling.BICUBIC
    wanted = np.asarray(Image.fromarray(line).resize((outputs, 1), method))[0]
    matrix = weights(torch.tensor([inputs]), torch.tensor([outputs]), 144, kernel)[0]
    padded = torch.zeros(144)
    padded[:inputs] = torch.from_numpy(line[0])
    made = matrix @ padded
    # Pillow's box has no part of a pixel.
    tolerance = 0.12 if kernel == "area" and inputs % outputs else 1e-5
    np.testing.assert_allclose(made[:outputs].numpy(), wanted, atol=tolerance)
    assert torch.equal(made[outputs:], made[outputs - 1].expand(144 - outputs))


@pytest.mark.parametrize("quality", [20, 50, 80, 95])
def test_jpeg_is_pillows(crops, quality):
    """On average within a tenth of what JPEG costs, or half a level: libjpeg's rounding."""
    tiles = crops.permute(0, 2, 3, 1).numpy()
    noise = np.random.default_rng(2).integers(0, 256, (16, 4, 16, 3), dtype=np.uint8)
    smooth = [
        np.asarray(Image.fromarray(x).resize((128, 32), Image.Resampling.BICUBIC)) for x in noise
    ]
    images = np.concatenate((tiles[:48], np.stack(smooth)))
    coded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        coded.append(np.asarray(Image.open(buffer)))
    wanted = np.stack(coded).astype(float)
    given = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float()
    made = jpeg.compress(given, torch.full((len(given),), quality)).permute(0, 2, 3, 1).numpy()
    cost = np.abs(wanted - images).mean()
    assert np.abs(made - wanted).mean() < max(0.1 * cost, 0.5)
    assert np.abs(made - images).mean() == pytest.approx(cost, rel=0.05)


def test_jpeg_takes_a_quality_a_picture():
    images = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(1)).mul(255).round()
    both = jpeg.compress(images, torch.tensor([20, 90]))
    assert torch.equal(both[1:], jpeg.compress(images[1:], torch.tensor([90])))
    with pytest.raises(ValueError, match="multiples of 16, not \\(15, 32\\)"):
        jpeg.compress(images[:, :, 1:], torch.tensor([20, 90]))


def test_a_label_or_a_seed_that_is_missing_is_named(crops):
    with pytest.raises(ValueError, match="2 crops, 1 labels, 2 seeds"):
        photograph(crops[:2], ["a"], [1, 2])


def test_the_manual_has_the_same_numbers():
    manual = Path(__file__).parents[4] / "docs" / "training.md"
    cells = [line.split("|")[1:-1] for line in manual.read_text("utf-8").splitlines()]
    rows = {row[0].strip(" `"): row[1:] for row in cells if len(row) == 5}
    for name in camera.FIRST.__dataclass_fields__:
        for cell, kind in zip(rows[name], (*camera.CAMERAS.values(), camera.FIRST), strict=True):
            value = getattr(kind, name)
            wanted = value if isinstance(value, tuple) else (value,)
            given = tuple(float(number) for number in cell.split(" to "))
            assert given == pytest.approx(wanted, abs=1e-3), name
