import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from lemma_fast import images
from lemma_fast.images import ImageError

DARK, LIGHT = 40, 210


def halves(width=8, height=4):
    """Left half dark, right half light, mode RGB."""
    image = Image.new("RGB", (width, height), (DARK,) * 3)
    image.paste((LIGHT,) * 3, (width // 2, 0, width, height))
    return image


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def palette_with_transparency():
    image = Image.new("P", (8, 4))
    image.putpalette([DARK] * 3 + [LIGHT] * 3)
    image.paste(1, (4, 0, 8, 4))
    return saved(image, "PNG", transparency=bytes([255, 0]))


def deep(white):
    return np.asarray(halves().convert("L"), dtype=np.float64) / 255 * white


MODES = {
    "1": lambda: saved(halves().convert("1", dither=0), "PNG"),
    "L": lambda: saved(halves().convert("L"), "PNG"),
    "P": lambda: saved(halves().quantize(4), "PNG"),
    "RGB": lambda: saved(halves(), "PNG"),
    "CMYK": lambda: saved(halves().convert("CMYK"), "TIFF"),
    "YCbCr": lambda: saved(halves(), "JPEG", quality=100),
    "I;16": lambda: saved(Image.fromarray(deep(65535).astype(np.uint16)), "PNG"),
    "I;16B": lambda: saved(Image.fromarray(deep(65535).astype(">u2")), "TIFF"),
    "I": lambda: saved(Image.fromarray(deep(65535).astype(np.int32)), "TIFF"),
    "F": lambda: saved(Image.fromarray(deep(1).astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_opaque_mode_becomes_the_same_rgb(mode):
    crop = images.open_image(MODES[mode]())
    assert crop.rgb.mode == "RGB"
    assert crop.alpha is None
    pixels = np.asarray(crop.rgb).astype(int)
    left, right = (0, 255) if mode == "1" else (DARK, LIGHT)
    assert abs(pixels[:, :3] - left).max() <= 2
    assert abs(pixels[:, 5:] - right).max() <= 2


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA"])
def test_alpha_is_split_off(mode):
    image = halves().convert("LA" if mode in ("LA", "La") else "RGBA")
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 2, 4))
    image.putalpha(alpha)
    crop = images.from_pillow(image.convert(mode) if mode != "PA" else to_pa(image))
    assert np.asarray(crop.alpha)[0].tolist() == [0, 0] + [255] * 6
    assert np.asarray(crop.rgb)[0, 6].tolist() == pytest.approx([LIGHT] * 3, abs=1)


def to_pa(image):
    pa = image.convert("RGB").quantize(4).convert("PA")
    pa.putalpha(image.getchannel("A"))
    return pa


def test_palette_transparency_becomes_alpha():
    crop = images.open_image(palette_with_transparency())
    assert np.asarray(crop.alpha)[0].tolist() == [255] * 4 + [0] * 4


@pytest.mark.parametrize("mode", ["HSV", "LAB", "YCbCr"])
def test_other_colour_spaces_are_converted(mode):
    source = halves()
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(source, srgb, lab, outputMode="LAB")
    else:
        image = source.convert(mode)
    pixels = np.asarray(images.from_pillow(image).rgb).astype(int)
    assert abs(pixels - np.asarray(source)).max() <= 3


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[0, 257, 65535]], np.uint16), [0, 1, 255]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[-100, -60, 100]], np.int32), [0, 51, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 100, 255]], np.float32), [0, 100, 255]),
        (np.array([[7, 7, 7]], np.float32), [7, 7, 7]),
        (np.array([[-3, -3, -3]], np.float32), [0, 0, 0]),
    ],
    ids=str,
)
def test_deep_pixels_are_scaled_not_clipped(array, expected):
    crop = images.from_pillow(Image.fromarray(array))
    assert np.asarray(crop.rgb)[0, :, 0].tolist() == expected


def test_dark_sixteen_bit_files_stay_dark():
    dark = Image.fromarray(np.full((2, 2), 200, np.uint16))
    assert np.asarray(images.open_image(saved(dark, "PNG")).rgb).max() == 1


def test_pixels_that_are_no_numbers_are_refused():
    with pytest.raises(ImageError, match="not finite"):
        images.from_pillow(Image.fromarray(np.array([[np.nan, 1]], np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = halves()
    upright.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(upright, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    crop = images.open_image(data)
    assert np.array_equal(np.asarray(crop.rgb), np.asarray(expected))
    with images.opened(data) as image:
        assert images.upright_size(image) == crop.rgb.size
    assert crop.rgb.size == ((4, 8) if orientation > 4 else (8, 4))


def test_first_frame_of_an_animation_is_used_and_said_so():
    frames = [Image.new("L", (8, 4), grey) for grey in (50, 150, 250)]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    crop = images.open_image(data)
    assert abs(np.asarray(crop.rgb).astype(int) - 50).max() <= 2
    assert "first" in crop.notes[0]
    assert images.open_image(saved(frames[0], "GIF")).notes == ()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "MPO"])
def test_upright_size_is_that_of_the_crop(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    with images.opened(saved(halves(16, 8), form, exif=exif)) as image:
        size = images.upright_size(image)
        crop = images.from_pillow(image)
    assert size == crop.rgb.size == ((8, 16) if orientation > 4 else (16, 8))


def with_chunk(name, body, after=b"IHDR"):
    """A sound PNG with one more chunk."""
    data = saved(halves(), "PNG")
    at = data.index(after) + 4 + struct.unpack(">I", data[data.index(after) - 4 :][:4])[0] + 4
    chunk = struct.pack(">I", len(body)) + name + body
    return data[:at] + chunk + struct.pack(">I", zlib.crc32(name + body)) + data[at:]


BAD_EXIF = {
    "no TIFF": b"this is no TIFF",
    "empty": b"",
    "cut": b"II*\0\x08\0\0\0",
    "offset outside": b"II*\0\xff\xff\xff\x7f",
    "entries cut": b"MM\0*\0\0\0\x08\0\xff\x01\x12",
    "text as orientation": b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
    "orientation 77": b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x4d\0\0\0\0\0\0\0",
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", BAD_EXIF.values(), ids=BAD_EXIF)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("way", ["file", "memory", "after its size"])
def test_broken_metadata_costs_the_turning_alone(exif, form, way):
    if form == "AVIF" and "AVIF" not in images.readable_formats():
        pytest.skip("this Pillow has no AVIF")
    if form == "PNG":
        data = with_chunk(b"eXIf", exif)
    else:
        data = saved(halves(), form, exif=b"Exif\0\0" + exif if form == "JPEG" else exif)
    if way == "file":
        crop = images.open_image(data)
    else:
        with Image.open(io.BytesIO(data)) as image:
            if way == "after its size":
                assert images.upright_size(image) == (8, 4)
            crop = images.from_pillow(image)
    left = np.asarray(crop.rgb).astype(int)[:, :3]
    assert abs(left - DARK).max() < 30
    if exif[:7] == b"this is":
        assert crop.notes == ("its metadata is damaged: taken as upright",)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        (b"iCCP", b"broken\0\0not deflated"),
        (b"tEXt", b"\xff\xfe no separator"),
        (b"zTXt", b"key\0\0not deflated"),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<not xml tiff:Orientation='x'"),
        (b"pHYs", b"\0"),
        (b"gAMA", b""),
        (b"cHRM", b"\0\0"),
        (b"acTL", b"\0"),
    ],
)
def test_other_metadata_never_costs_the_picture(name, body):
    try:
        crop = images.open_image(with_chunk(name, body))
    except ImageError:
        # Pillow checks these lengths itself before there is an image at all.
        assert name in (b"pHYs", b"gAMA", b"cHRM", b"acTL")
        return
    assert abs(np.asarray(crop.rgb)[:, :3].astype(int) - DARK).max() == 0


@pytest.mark.parametrize("form", ["GIF", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.55, 0.75, 0.95])
def test_a_damaged_second_frame_costs_no_first_one(form, share):
    frames = [Image.fromarray(np.full((40, 60, 3), grey, np.uint8)) for grey in (50, 150)]
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    data = saved(frames[0], form, save_all=True, append_images=[noisy])
    cut = data[: int(len(data) * share)]
    try:
        crop = images.open_image(cut)
    except ImageError:
        # WebP is decoded as a whole, or not at all.
        assert form == "WEBP"
        return
    assert abs(np.asarray(crop.rgb)[0].astype(int) - 50).max() <= 3


def test_pillow_images_that_cannot_be_decoded_are_said_to_be(tmp_path):
    whole = saved(Image.fromarray(noise()), "PNG")
    for data in (whole[:400], whole[: len(whole) // 2]):
        with pytest.raises(ImageError, match="truncated"):
            images.from_pillow(Image.open(io.BytesIO(data)))
    closed = Image.open(io.BytesIO(whole))
    closed.close()
    with pytest.raises(ImageError):
        images.from_pillow(closed)


def png_header(width, height):
    def chunk(name, body):
        packed = struct.pack(">I", len(body)) + name + body
        return packed + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def noise():
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"<html>no image</html>", "not an image"),
        (saved(Image.fromarray(noise()), "PNG")[:400], "truncated"),
        (saved(Image.fromarray(noise()), "JPEG")[:700], "truncated"),
        (png_header(10_000, 10_000), "safety limit"),
        (png_header(60_000, 60_000), "safety limit"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n", "not an image"),
    ],
    ids=["empty", "html", "cut png", "cut jpeg", "bomb", "larger bomb", "postscript"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_decoded_says_why(data, reason, tmp_path):
    with pytest.raises(ImageError, match=reason):
        images.open_image(data)
    path = tmp_path / "crop.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="empty" if not data else reason):
        images.open_image(path)


def test_files_that_are_none_say_why(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        images.open_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="a folder"):
        images.open_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a regular file"):
        images.open_image(tmp_path / "pipe.png")


def test_colour_profile_is_kept_for_rgb_only():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    crop = images.open_image(saved(halves(), "PNG", icc_profile=srgb))
    assert crop.icc_profile == srgb
    result = images.finish(Image.new("RGB", (8, 4)), crop.frame("native", (8, 4)))
    for form in ("png", "jpg", "webp"):
        again = Image.open(io.BytesIO(images.encode(result, form)))
        assert again.info["icc_profile"] == srgb
    ink = srgb[:16] + b"CMYK" + srgb[20:]
    assert images.open_image(saved(halves(), "PNG", icc_profile=ink)).icc_profile is None


def test_folders_are_searched_for_common_endings_only():
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif", ".bmp", ".gif"} <= images.image_suffixes()
    assert not {".eps", ".ps", ".wmf", ".txt", ".mpg", ""} & images.image_suffixes()


WHOLE = [
    saved(halves(), "PNG", exif=b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    saved(halves(), "JPEG"),
    saved(
        halves(),
        "GIF",
        save_all=True,
        append_images=[halves().transpose(Image.Transpose.ROTATE_180)],
    ),
    saved(halves(), "TIFF"),
    saved(halves(), "WEBP"),
    saved(halves(), "BMP"),
    MODES["I;16"](),
    palette_with_transparency(),
]


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_no_bytes_give_anything_but_a_crop_or_an_image_error(data):
    content = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 2 * len(content)))
    reason, crop = "", None
    try:
        with images.opened(bytes(content[:cut])) as image:
            size = images.upright_size(image)
            crop = images.from_pillow(image)
    except ImageError as error:
        reason = str(error)
    if crop is None:
        assert reason
        assert "\n" not in reason
    else:
        assert crop.rgb.mode == "RGB"
        assert crop.rgb.size == size
