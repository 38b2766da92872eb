"""What the network is given of a crop, and what becomes of its result."""

import io

import numpy as np
import pytest
from PIL import Image

from lemma_fast import images


def test_network_input_follows_the_published_rule():
    source = Image.fromarray(np.random.default_rng(1).integers(0, 256, (23, 91, 3), np.uint8))
    planes = images.network_input(source)
    small = source.resize((64, 16), Image.Resampling.BICUBIC)
    assert planes.shape == (4, 16, 64)
    assert planes.dtype == np.float32
    assert np.array_equal(planes[:3], np.asarray(small).transpose(2, 0, 1) / np.float32(255))
    grey = np.array(small.convert("L"))
    threshold = grey.mean()
    mask = small.convert("L").point(lambda level: 0 if level > threshold else 255)
    assert np.array_equal(planes[3], np.asarray(mask) / 255)
    assert 0 < planes[3].mean() < 1


def test_flat_crop_is_all_mask():
    # No pixel exceeds the mean of equal pixels.
    assert (images.network_input(Image.new("RGB", (64, 16), (9, 9, 9)))[3] == 1).all()


def lettered(letter, hidden):
    """A letter drawn by alpha alone; transparent pixels hide another colour."""
    image = Image.new("RGBA", (8, 4), (*(hidden,) * 3, 0))
    image.paste((*(letter,) * 3, 255), (2, 1, 4, 3))
    return image


@pytest.mark.parametrize(("letter", "ground"), [(0, 255), (255, 0)])
def test_transparent_letters_stand_out_of_their_backdrop(letter, ground):
    # What hides under full transparency is the letter's own colour: invisible if taken as it is.
    crop = images.from_pillow(lettered(letter, hidden=letter))
    pixels = np.asarray(crop.opaque)[..., 0]
    assert pixels[0, 0] == ground
    assert pixels[1, 2] == letter


def test_backdrop_is_taken_out_of_the_result():
    alpha = Image.new("L", (4, 2), 128)
    crop = images.Crop(Image.new("RGB", (4, 2), (0, 0, 0)), alpha)
    seen = np.asarray(crop.opaque)
    result = images.finish(Image.fromarray(seen), crop.frame("native", (4, 2)))
    assert result.mode == "RGBA"
    assert np.asarray(result)[..., :3].max() <= 1
    assert np.asarray(result)[..., 3].tolist() == [[128] * 4] * 2


def test_alpha_is_enlarged_beside():
    crop = images.from_pillow(lettered(0, hidden=0))
    frame = crop.frame("x2", (128, 32))
    result = images.finish(Image.new("RGB", (128, 32)), frame)
    assert result.size == (16, 8)
    expected = crop.alpha.resize((16, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(result.getchannel("A")), np.asarray(expected))


def test_native_and_x2_sizes():
    crop = images.Crop(Image.new("RGB", (30, 11)))
    pixels = Image.new("RGB", (128, 32))
    assert images.finish(pixels, crop.frame("native", (128, 32))).size == (128, 32)
    assert images.finish(pixels, crop.frame("x2", (128, 32))).size == (60, 22)


@pytest.mark.parametrize("form", ["png", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_png_and_webp_are_lossless(form, mode):
    pixels = np.random.default_rng(2).integers(0, 256, (9, 17, len(mode)), np.uint8)
    again = Image.open(io.BytesIO(images.encode(Image.fromarray(pixels), form)))
    assert again.mode == mode
    assert np.array_equal(np.asarray(again), pixels)


def test_jpeg_flattens_on_white():
    again = Image.open(io.BytesIO(images.encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "jpg")))
    assert again.format == "JPEG"
    assert np.asarray(again).min() == 255


def test_visible_transparency():
    assert not images.has_visible_transparency(Image.new("RGBA", (2, 2), (0, 0, 0, 255)))
    assert images.has_visible_transparency(Image.new("RGBA", (2, 2), (0, 0, 0, 254)))
    assert not images.has_visible_transparency(Image.new("RGB", (2, 2)))
