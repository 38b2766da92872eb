"""Images in and out: any mode Pillow reads to RGB and alpha, the network's input, results."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from lemma_fast.errors import reason

Size = Literal["native", "x2"]
Format = Literal["png", "jpg", "webp"]

# Pillow hands EPS and WMF to other programs, and names the rest without being able to decode them.
_NOT_CROPS = frozenset({"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"})
_SIXTEEN_BIT = 65535.0
# What makes an image of each EXIF orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be used; the message is one sentence that gives the reason."""


@dataclass(frozen=True, eq=False)
class Crop:
    """A decoded, upright image.

    `rgb` is of mode RGB; `alpha` of mode L, or None where the image has no transparency; `notes`
    says what a user should know about the decoding; `format` is Pillow's name, None for an image
    that came from memory; `icc_profile` describes the colours of `rgb`.
    """

    rgb: Image.Image
    alpha: Image.Image | None = None
    notes: tuple[str, ...] = ()
    format: str | None = None
    icc_profile: bytes | None = None

    @property
    def opaque(self) -> Image.Image:
        """The image as the network should see it [RGB]: laid on its `backdrop`."""
        return self.rgb if self.alpha is None else _laid(self.rgb, self.alpha, self.backdrop)

    @functools.cached_property
    def backdrop(self) -> int:
        """Grey level behind transparent pixels: white, or black where what is visible is light.

        Transparent pixels often hide black, on which black letters would vanish.
        """
        if self.alpha is None:
            return 255
        weight = np.asarray(self.alpha, dtype=np.float64)
        grey = np.asarray(self.rgb.convert("L"), dtype=np.float64)
        visible = weight.sum()
        return 0 if visible and (grey * weight).sum() / visible > 127.5 else 255

    def frame(
        self, size: Size, native: tuple[int, int], sharpness: float = 0.0, share: float = 1.0
    ) -> Frame:
        """Keep what `finish` needs; `native` is the network's own result size, width first.

        `sharpness` is the crop's and `share` what the network gets of the result, see
        `lemma_fast.sharpness`.
        """
        target = native if size == "native" else (2 * self.rgb.width, 2 * self.rgb.height)
        alpha = self.alpha
        if alpha is not None and target[0] * target[1] < alpha.width * alpha.height:
            # A frame waits while others are read: let it be small.
            alpha = resize(alpha, target)
        plain = self.opaque if share < 1 else None
        if plain is not None and target[0] * target[1] < plain.width * plain.height:
            plain = resize(plain, target)
        return Frame(target, alpha, self.backdrop, self.icc_profile, sharpness, share, plain)


@dataclass(frozen=True, eq=False)
class Frame:
    """What of a crop goes beside the network: the result's size, and how to give alpha back.

    `share` of the result is the network's; the rest is `plain` (RGB), enlarged by bicubic.
    """

    size: tuple[int, int]
    alpha: Image.Image | None
    backdrop: int
    icc_profile: bytes | None
    sharpness: float = 0.0
    share: float = 1.0
    plain: Image.Image | None = None

    def blended(self, image: Image.Image) -> Image.Image:
        """Blend the network's image (RGB, any size) with the crop by `share`."""
        if self.plain is None:
            return image
        return Image.blend(resize(self.plain, image.size), image, self.share)


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - _NOT_CROPS))


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Lower-case file name endings, with the dot, that a folder is searched for."""
    formats = set(readable_formats())
    return frozenset(
        ending for ending, name in Image.registered_extensions().items() if name in formats
    )


def open_image(source: str | os.PathLike[str] | bytes) -> Crop:
    """Decode a file, or the bytes of one; raises ImageError without the file's name."""
    with opened(source) as image:
        return from_pillow(image)


@contextlib.contextmanager
def opened(source: str | os.PathLike[str] | bytes) -> Iterator[Image.Image]:
    """Open an image and read its header alone; ImageError also for what fails inside the block."""
    with (
        _one_sentence(),
        _stream(source) as file,
        Image.open(file, formats=readable_formats()) as image,
    ):
        _refuse_bombs(image)
        yield image


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn whatever a decoder raises into ImageError."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image that can be read") from None
    except Image.DecompressionBombError:
        raise ImageError(_too_many_pixels()) from None
    except MemoryError:
        raise ImageError("not enough memory to decode it") from None
    # Pillow's parsers let out whatever a damaged file makes them trip over: SyntaxError,
    # struct.error, IndexError, zlib.error and more. All of them mean this one file.
    except Exception as error:
        raise ImageError(f"damaged or truncated: {reason(error)}") from error


@contextlib.contextmanager
def _stream(source: str | os.PathLike[str] | bytes) -> Iterator[BinaryIO]:
    if isinstance(source, bytes):
        if not source:
            raise ImageError("no data: zero bytes")
        yield io.BytesIO(source)
        return
    path = Path(source)
    try:
        # A pipe or a device would block a reader forever.
        if path.exists() and not path.is_file():
            raise ImageError("a folder" if path.is_dir() else "not a regular file")
        file = path.open("rb")
    except OSError as error:
        raise ImageError(reason(error)) from None
    with file:
        if not os.fstat(file.fileno()).st_size:
            raise ImageError("the file is empty")
        yield file


def _too_many_pixels(found: str = "far more pixels") -> str:
    limit = Image.MAX_IMAGE_PIXELS
    return f"{found} than Pillow's safety limit of {limit:,}; see PIL.Image.MAX_IMAGE_PIXELS"


def _refuse_bombs(image: Image.Image) -> None:
    # Pillow itself only warns up to twice its limit.
    pixels = image.width * image.height
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        raise ImageError(_too_many_pixels(f"{pixels:,} pixels, more"))
    if not pixels:
        raise ImageError("the image has no pixels")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height once EXIF orientation is applied, from the header alone."""
    turned = orientation(image) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else (image.width, image.height)


def orientation(image: Image.Image) -> int | None:
    """Read the EXIF orientation, 1 to 8, 1 where there is none; None where it cannot be read."""
    if image.format == "TIFF":
        # Pillow turns these itself as it decodes them, and drops the tag.
        image.load()
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        # That raises once at most, and not in every format; this does.
        Image.Exif().load(image.info.get("exif", b""))
    # As for pixels, a damaged block can raise anything; but here the pixels may be sound.
    except Exception:  # noqa: BLE001
        return None
    return value if value in range(1, 9) else 1


def from_pillow(image: Image.Image) -> Crop:
    """Turn an image of any mode upright and split it into RGB and alpha.

    Frames after the first are ignored, and said so; metadata that cannot be read costs the turning
    alone, and is said too. 16-bit and float pixels are scaled to 8 bits, see `_eight_bits`. Raises
    ImageError, also where an image that Pillow opened cannot be decoded.
    """
    with _one_sentence():
        return _decoded(image)


def _decoded(image: Image.Image) -> Crop:
    if not image.width or not image.height:
        raise ImageError("the image has no pixels")
    notes = []
    if _has_frames(image):
        notes.append("several frames or pages: the first is used")
    name, profile = image.format, image.info.get("icc_profile")
    turning = orientation(image)
    if turning is None:
        notes.append("its metadata is damaged: taken as upright")
    if turning in _TURNS:
        image = image.transpose(_TURNS[turning])
    alpha: Image.Image | None = None
    if image.mode.startswith("I") or image.mode == "F":
        rgb = _eight_bits(image, sixteen=image.mode != "F" and name == "PNG").convert("RGB")
    elif image.has_transparency_data and image.mode != "CMYK":
        # Premultiplied grey has no direct way to RGBA.
        image = image.convert("LA") if image.mode == "La" else image
        rgba = image.convert("RGBA")
        rgb, alpha = rgba.convert("RGB"), rgba.getchannel("A")
    else:
        rgb = image.convert("RGB")
    # A profile of ink or grey says nothing about RGB pixels.
    usable = isinstance(profile, bytes) and profile[16:20] == b"RGB "
    return Crop(rgb, alpha, tuple(notes), name, profile if usable else None)


def _has_frames(image: Image.Image) -> bool:
    """Whether there is more than one frame; one that is damaged counts."""
    try:
        return bool(getattr(image, "is_animated", False))
    # Formats look for a second frame here, and trip over it where it is damaged.
    except Exception:  # noqa: BLE001
        return True


def _eight_bits(image: Image.Image, *, sixteen: bool) -> Image.Image:
    """Scale pixels of mode I;16, I or F to mode L, which Pillow's own conversion would clip.

    White is 65535 for 16-bit files, else the least of 1 (mode F only), 255 and 65535 that no pixel
    exceeds. Where values are negative or larger still, their own range is stretched.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise ImageError("some pixels are not finite numbers")
    whites = [_SIXTEEN_BIT]
    if not sixteen and not image.mode.startswith("I;16"):
        whites = [1.0, 255.0, _SIXTEEN_BIT] if image.mode == "F" else [255.0, _SIXTEEN_BIT]
    fitting = [white for white in whites if low >= 0 and high <= white]
    black, white = (0.0, fitting[0]) if fitting else (low, max(high, low + 1e-12))
    return Image.fromarray(np.rint((values - black) * (255 / (white - black))).astype(np.uint8))


def network_input(rgb: Image.Image, height: int = 16, width: int = 64) -> npt.NDArray[np.float32]:
    """Resize an RGB image (bicubic) and append its mask: float32 [4, height, width] in [0, 1].

    The mask is 0 where the resized image's grey level exceeds its own mean, else 1.
    """
    small = rgb.resize((width, height), Image.Resampling.BICUBIC)
    grey = np.asarray(small.convert("L"))
    planes = np.empty((4, height, width), dtype=np.float32)
    planes[:3] = np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 255
    planes[3] = grey <= grey.mean()
    return planes


def finish(image: Image.Image, frame: Frame) -> Image.Image:
    """Make the result of the network's image (RGB): in its size, RGB, or RGBA as `frame` has it.

    What `frame.backdrop` lent to the colours of transparent pixels is taken out again.
    """
    image = frame.blended(resize(image, frame.size))
    if frame.alpha is not None:
        alpha = resize(frame.alpha, frame.size)
        share = np.asarray(alpha, dtype=np.float32)[..., None] / 255
        mixed = np.asarray(image, dtype=np.float32)
        own = (mixed - (1 - share) * frame.backdrop) / np.maximum(share, 1 / 255)
        image = Image.fromarray(np.rint(own.clip(0, 255)).astype(np.uint8))
        image.putalpha(alpha)
    if frame.icc_profile is not None:
        image = image.copy()
        image.info["icc_profile"] = frame.icc_profile
    return image


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize (bicubic) to (width, height); the image itself where it has that size."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def has_visible_transparency(image: Image.Image) -> bool:
    """Whether some pixel of an RGBA image is not fully opaque."""
    return image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255)


def flatten(image: Image.Image, grey: int) -> Image.Image:
    """Lay an RGB or RGBA image on a plain ground [RGB]."""
    if image.mode != "RGBA":
        return image
    return _laid(image.convert("RGB"), image.getchannel("A"), grey)


def _laid(rgb: Image.Image, alpha: Image.Image, grey: int) -> Image.Image:
    return Image.composite(rgb, Image.new("RGB", rgb.size, (grey, grey, grey)), alpha)


def encode(image: Image.Image, form: Format) -> bytes:
    """Encode an RGB or RGBA image; JPEG has no alpha, so it is flattened on white there."""
    buffer = io.BytesIO()
    profile = image.info.get("icc_profile")
    if form == "png":
        image.save(buffer, "PNG", icc_profile=profile)
    elif form == "webp":
        # Text suffers most from lossy coding, and crops are small.
        image.save(buffer, "WEBP", lossless=True, exact=True, icc_profile=profile)
    else:
        plain = flatten(image, 255)
        plain.save(buffer, "JPEG", quality=95, subsampling=0, icc_profile=profile)
    return buffer.getvalue()
