"""`Upscaler`: word crops in, crops of twice the size out, whatever form they come in."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from lemma_fast import images
from lemma_fast.acceleration import accelerate as make_fast
from lemma_fast.baselines import Baseline, BaselineConfig, open_network
from lemma_fast.checkpoint.files import unwrapped
from lemma_fast.config import LemmaConfig
from lemma_fast.devices import choose_device, device_of
from lemma_fast.images import Crop, Frame, ImageError, Size
from lemma_fast.model import LEMMA
from lemma_fast.model.prior import Prior
from lemma_fast.sharpness import network_share, sharpness

PathLike: TypeAlias = str | os.PathLike[str]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Picture: TypeAlias = Image.Image | PathLike | Bytes | Tensor

DTYPES = ("auto", "float32", "bfloat16")
# The process in which PyTorch's threads are.
_home = os.getpid()


@dataclass(frozen=True, eq=False)
class Upscaled:
    """What the network says of one crop.

    `image` is the result; that of `Upscaler.infer` has the network's own size, 128x32. `text` is
    what the prior reads, in lower case; `length` counts the positions it holds valid, end mark
    included; `attention` float32 [16, 64] is the largest attention that a valid position pays to
    each pixel: where the characters are. A baseline says none of this: no text, length 0, zeros.
    `sharpness` is that of the crop, and `share` of the result is the network's (the rest is
    bicubic's), see `lemma_fast.sharpness`.
    """

    image: Image.Image
    text: str
    length: int
    attention: npt.NDArray[np.float32]
    sharpness: float = 0.0
    share: float = 1.0

    def judged(self, frame: Frame) -> Upscaled:
        """Add the crop's sharpness and the network's share, which its frame holds."""
        return replace(self, sharpness=frame.sharpness, share=frame.share)


class Upscaler:
    """Doubles low-resolution word crops.

        up = Upscaler("small", device="auto")
        image = up("crop.png")                          # a PIL image
        arrays = up([array_a, array_b])                 # uint8 [H, W, 3], in RGB order
        record = up.run("crop.png")                     # .image, .text, .length, .attention

    `model` is what `lemma_fast.load` takes, a baseline's file or "bicubic", or a network; one that
    is in training mode, of another type than float32 or on another device than asked for is copied,
    not changed. `device` "auto" is the first CUDA device where there is one, else the CPU; for a
    network, the device it is on.
    `dtype` "auto" is float32, on CUDA with PyTorch's TF32 setting; bfloat16 is only used when
    asked for.
    `batch_size` None is 32 on the CPU and 256 elsewhere. With `accelerate`, what runs is the copy
    that `lemma_fast.accelerate` makes (the attribute `network`), else the model itself.

    With `always`, every result is the network's. Without it, as in the command `upscale`, half of
    the result of a crop that is sharp already is its bicubic enlargement, because it has little to
    gain and letters to lose (`lemma_fast.sharpness`).

    Every crop goes through the network at 16x64. `size` "native" returns its 32x128, which is what
    recognisers take; "x2" twice the crop's own width and height. One object may serve many threads,
    and may be copied and pickled. In a process that was forked from one that had imported this
    module PyTorch is set to one thread, because the others stay behind.
    """

    def __init__(
        self,
        model: PathLike | LEMMA | Baseline = "small",
        device: str | torch.device = "auto",
        dtype: str = "auto",
        batch_size: int | None = None,
        size: Size = "native",
        accelerate: bool = True,
        always: bool = True,
    ) -> None:
        _heed_fork()
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is less than 1")
        self.dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        self.model = _load(model, device)
        # It may be in a wrapper, which has no config.
        inner = unwrapped(self.model)
        self.config = config = cast(LemmaConfig | BaselineConfig, inner.config)
        if isinstance(config, LemmaConfig) and config.in_channels != 4:
            raise ValueError(
                f"the model takes {config.in_channels} channels; crops give 4, RGB and a mask"
            )
        self.device = device_of(self.model)
        # What only looks like a LEMMA is called as it is.
        self.accelerated = accelerate and isinstance(inner, LEMMA | Baseline)
        self.network: nn.Module = self._made_fast()
        self.batch_size = batch_size or (32 if self.device.type == "cpu" else 256)
        self.size = size
        self.always = always

    @property
    def size(self) -> Size:
        """Size of the results where a call does not say: "native" or "x2"."""
        return self._size

    @size.setter
    def size(self, size: Size) -> None:
        self._size = _checked(size)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: the accelerated copy is left out, and made again after."""
        return {name: value for name, value in self.__dict__.items() if name != "network"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, with an accelerated copy of its own."""
        self.__dict__.update(state)
        self.network = self._made_fast()

    def _made_fast(self) -> nn.Module:
        return make_fast(self.model, self.dtype) if self.accelerated else self.model

    def __repr__(self) -> str:
        """Name what was chosen."""
        return (
            f"Upscaler(device={str(self.device)!r}, dtype={str(self.dtype).split('.')[1]!r}, "
            f"batch_size={self.batch_size}, size={self.size!r})"
        )

    @overload
    def __call__(
        self, pictures: Image.Image | PathLike, *, size: Size | None = None
    ) -> Image.Image: ...
    @overload
    def __call__(self, pictures: Bytes, *, size: Size | None = None) -> Bytes: ...
    @overload
    def __call__(self, pictures: Tensor, *, size: Size | None = None) -> Tensor: ...
    @overload
    def __call__(
        self,
        pictures: list[str] | tuple[str, ...] | Sequence[os.PathLike[str]] | Sequence[Image.Image],
        *,
        size: Size | None = None,
    ) -> list[Image.Image]: ...
    @overload
    def __call__(self, pictures: Sequence[Bytes], *, size: Size | None = None) -> list[Bytes]: ...
    @overload
    def __call__(self, pictures: Sequence[Tensor], *, size: Size | None = None) -> list[Tensor]: ...
    def __call__(
        self, pictures: Picture | Sequence[Picture], *, size: Size | None = None
    ) -> Image.Image | Bytes | Tensor | list[Image.Image] | list[Bytes] | list[Tensor]:
        """Double one picture, or a list of them, and return the same kind.

        PIL images (any mode) and paths give PIL images, RGB or RGBA. uint8 arrays [H, W] grey,
        [H, W, 1], [H, W, 3] in RGB order (OpenCV's are BGR: pass `array[..., ::-1]`) or [H, W, 4]
        give arrays with as many channels. Float tensors in [0, 1], [C, H, W] or [N, C, H, W] with
        C 1 or 3, give tensors of that dtype and device, by way of 8-bit pixels. Raises ImageError
        (a ValueError) or TypeError for what cannot be used.
        """
        if isinstance(pictures, Tensor) and pictures.ndim == 4:
            results = [result for _, result in self._each(list(pictures), size)]
            if not results:
                raise ImageError("the tensor has no images")
            return torch.stack(results)  # type: ignore[arg-type]
        if isinstance(pictures, list | tuple):
            return [result for _, result in self._each(pictures, size)]  # type: ignore[return-value]
        return self._each([pictures], size)[0][1]  # type: ignore[list-item]

    @overload
    def run(self, pictures: Picture, *, size: Size | None = None) -> Upscaled: ...
    @overload
    def run(
        self,
        pictures: list[str] | tuple[str, ...] | Sequence[os.PathLike[str]] | Sequence[Image.Image],
        *,
        size: Size | None = None,
    ) -> list[Upscaled]: ...
    @overload
    def run(
        self, pictures: Sequence[Bytes] | Sequence[Tensor], *, size: Size | None = None
    ) -> list[Upscaled]: ...
    def run(
        self, pictures: Picture | Sequence[Picture], *, size: Size | None = None
    ) -> Upscaled | list[Upscaled]:
        """Double one picture, or each of a list, and tell what the text prior saw in it."""
        if isinstance(pictures, list | tuple):
            return [record for record, _ in self._each(pictures, size)]
        return self._each([pictures], size)[0][0]  # type: ignore[list-item]

    def _each(
        self, pictures: Sequence[Picture], size: Size | None
    ) -> list[tuple[Upscaled, Image.Image | Bytes | Tensor]]:
        chosen = self.size if size is None else _checked(size)
        results = []
        for start in range(0, len(pictures), self.batch_size):
            taken = [take_picture(picture) for picture in pictures[start : start + self.batch_size]]
            planes = np.stack([self.prepare(crop) for crop, _ in taken])
            for k, said in enumerate(self.infer(planes)):
                crop, give_back = taken[k]
                frame = self.frame(crop, planes[k], chosen)
                image = images.finish(said.image, frame)
                results.append((replace(said.judged(frame), image=image), give_back(image)))
        return results

    @property
    def native(self) -> tuple[int, int]:
        """Width and height of what the network returns."""
        height, width = self.config.size
        return self.config.scale * width, self.config.scale * height

    def prepare(self, crop: Crop) -> npt.NDArray[np.float32]:
        """Make the network's input of a crop: float32 [4, 16, 64]."""
        return images.network_input(crop.opaque, *self.config.size)

    def frame(self, crop: Crop, planes: npt.NDArray[np.float32], size: Size) -> Frame:
        """Keep what a result needs of its crop, whose `prepare` gave `planes`."""
        sharp = sharpness(planes)
        share = 1.0 if self.always else network_share(sharp)
        return crop.frame(size, self.native, sharp, share)

    def infer(self, crops: npt.NDArray[np.float32]) -> list[Upscaled]:
        """Run the network once on [N, 4, 16, 64], in one batch.

        Raises RuntimeError where the network fails, also where its result is not finite.
        """
        _heed_fork()
        half = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with torch.inference_mode(), half:
            lr = torch.from_numpy(crops[:, : self.config.in_channels]).to(self.device)
            result = self.network(lr)
            sr, prior = (result, None) if isinstance(result, Tensor) else result
            if not bool(sr.isfinite().all()):
                raise RuntimeError("the network's result is not finite; float32 may help")
            pixels = sr[:, :3].float().clamp(0, 1).mul(255).round().to(torch.uint8)
            said = self._said(prior, len(sr))
        pictures = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return [
            Upscaled(Image.fromarray(picture), *rest)
            for picture, rest in zip(pictures, said, strict=True)
        ]

    def _said(
        self, prior: Prior | None, count: int
    ) -> list[tuple[str, int, npt.NDArray[np.float32]]]:
        """Text, length and attention of each crop."""
        if prior is None or not isinstance(self.config, LemmaConfig):
            return [("", 0, np.zeros(self.config.size, np.float32)) for _ in range(count)]
        lengths = prior.pt_lengths
        index = torch.arange(prior.attn_map.shape[1], device=lengths.device)
        live = (index < lengths[:, None])[:, :, None, None]
        attention = (prior.attn_map.float() * live).amax(1).clamp(min=0)
        classes = prior.img_logits.argmax(-1)
        return [
            (self.config.spell(row), int(length), heat)
            for row, length, heat in zip(
                classes.tolist(), lengths.tolist(), attention.cpu().numpy(), strict=True
            )
        ]


def _heed_fork() -> None:
    """In a forked process, set PyTorch to one thread: a second one would be waited for for ever."""
    global _home
    if os.getpid() != _home:
        torch.set_num_threads(1)
        _home = os.getpid()


def _checked(size: Size) -> Size:
    if size not in ("native", "x2"):
        raise ValueError(f'size {size!r} is neither "native" nor "x2"')
    return size


def _load(model: PathLike | LEMMA | Baseline, device: str | torch.device) -> LEMMA | Baseline:
    """Open or take a model, in evaluation mode and float32, on the device."""
    if isinstance(model, str | os.PathLike):
        # A text may be a packaged name, a path never is.
        source = model if isinstance(model, str) else Path(model)
        model = open_network(source, choose_device(device))
        device = "auto"
    here = device_of(model)
    there = here if device == "auto" else choose_device(device)
    narrow = any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters())
    if model.training or narrow or here != torch.empty(0, device=there).device:
        model = copy.deepcopy(model).to(there, torch.float32).eval()
    return model


def take_picture(
    picture: Picture,
) -> tuple[Crop, Callable[[Image.Image], Image.Image | Bytes | Tensor]]:
    """Decode one picture, and say how its result is turned back into the same kind."""
    if isinstance(picture, Image.Image):
        return images.from_pillow(picture), lambda image: image
    if isinstance(picture, str | os.PathLike):
        try:
            return images.open_image(picture), lambda image: image
        except ImageError as error:
            raise ImageError(f"{os.fspath(picture)}: {error}") from error
    if isinstance(picture, np.ndarray):
        return _take_array(picture)
    if isinstance(picture, Tensor):
        return _take_tensor(picture)
    raise TypeError(
        "a picture is a PIL image, a path, a uint8 array or a float tensor, "
        f"not {type(picture).__name__}"
    )


def _take_array(array: Bytes) -> tuple[Crop, Callable[[Image.Image], Bytes]]:
    if array.dtype != np.uint8:
        raise TypeError(f"an array must be uint8, not {array.dtype} (float tensors are taken)")
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise ImageError(f"an array is [H, W] or [H, W, 1, 3 or 4], not {list(array.shape)}")
    flat = array[..., 0] if array.shape[2:] == (1,) else array
    mode = {2: "L", 3: "RGB"}.get(flat.ndim if flat.ndim == 2 else flat.shape[2], "RGBA")

    def give_back(image: Image.Image) -> Bytes:
        return np.array(image.convert(mode)).reshape(image.height, image.width, *array.shape[2:])

    return images.from_pillow(Image.fromarray(np.ascontiguousarray(flat))), give_back


def _take_tensor(tensor: Tensor) -> tuple[Crop, Callable[[Image.Image], Tensor]]:
    if not tensor.is_floating_point():
        raise TypeError(f"a tensor must be float in [0, 1], not {tensor.dtype}")
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ImageError(
            f"a tensor is [C, H, W], or [N, C, H, W] by itself, with 1 or 3 channels, not "
            f"{list(tensor.shape)}; what the network takes, mask included, goes to the model itself"
        )
    values = tensor.detach().float().cpu()
    if values.numel() and not (values.min() >= 0 and values.max() <= 1):
        raise ImageError(f"a tensor's values lie in [0, 1], not {values.min():g}..{values.max():g}")
    pixels = values.mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    crop, give_back = _take_array(pixels)

    def give_tensor(image: Image.Image) -> Tensor:
        planes = torch.from_numpy(give_back(image)).permute(2, 0, 1).contiguous()
        return (planes.to(torch.float32) / 255).to(tensor)

    return crop, give_tensor
