"""The command `lemma-fast doctor`: what this installation is made of, and what it would choose."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import typer

from lemma_fast.cli.exits import say
from lemma_fast.errors import reason

PACKAGES = ("numpy", "pillow", "safetensors", "huggingface_hub")


def doctor() -> None:
    """Show versions, devices, what auto chooses and why, and check the packaged weights.

    Paste the output into a bug report. Exit code 1 where something is broken.
    """
    sound = True
    for subject, finding, in_order in lines():
        sound = sound and in_order
        say(f"{subject:<16} {'' if in_order else 'BROKEN: '}{finding}")
    raise typer.Exit(not sound)


def lines() -> Iterator[tuple[str, str, bool]]:
    """Yield (subject, finding, is in order), one a line."""
    import torch

    yield "python", f"{platform.python_version()} on {platform.platform()}", True
    yield "lemma-fast", _version("lemma-fast") or "not installed", True
    # The package's version may not tell its build, such as +cu130.
    yield "torch", str(torch.__version__), True
    for package in PACKAGES:
        yield package, _version(package) or "not installed", True
    yield "triton", *_triton()
    yield "rapidocr", *_rapidocr()
    yield "extension", *_extension()
    yield "CPU", f"{torch.get_num_threads()} threads", True
    yield from _devices()
    yield from _choices()
    yield from _weights()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton() -> tuple[str, bool]:
    try:
        import triton
    except ImportError:
        return "not installed (pip install 'lemma-fast[triton]'); the reference needs none", True
    return str(triton.__version__), True


def _rapidocr() -> tuple[str, bool]:
    """To have none is in order; one that is there and does not load is not."""
    import torch

    from lemma_fast.recognizers import RapidOCR

    version = _version("rapidocr")
    if version is None:
        return "not installed (pip install 'lemma-fast[ocr]'); upscale needs none", True
    try:
        reader = RapidOCR()
        reader.read(torch.ones(1, 3, 32, 128))
    except (OSError, RuntimeError) as error:
        return f"{version}: {reason(error)}", False
    return f"{version}, {reader!r}", True


def _extension() -> tuple[str, bool]:
    """A library that is there and does not load is out of order; to have none is not."""
    from lemma_fast.ops import extension

    why = extension.missing()
    if why is not None:
        return f"{why}; the reference needs none", True
    try:
        info = extension.build_info()
    except (ImportError, ValueError) as error:
        return str(error), False
    cuda = f"for CUDA ({info['cuda']})" if info["cuda"] else "for the CPU alone"
    return f"built {cuda} with torch {info['torch']}; on the CPU it takes {info['cpu']} here", True


def _devices() -> Iterator[tuple[str, str, bool]]:
    import torch

    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        yield "CUDA", f"no device that torch can use (torch is {build})", True
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = about.total_memory / 2**30
        capability = f"{about.major}.{about.minor}"
        yield f"cuda:{index}", f"{about.name}, {memory:.0f} GiB, capability {capability}", True


def _choices() -> Iterator[tuple[str, str, bool]]:
    """What `upscale` would run with, as a network that is made the same way says it."""
    import torch

    from lemma_fast.acceleration import Accelerated
    from lemma_fast.config import LemmaConfig
    from lemma_fast.devices import choose_device
    from lemma_fast.model import LEMMA
    from lemma_fast.upscale import Upscaler

    device = choose_device("auto")
    on_cuda = device.type == "cuda"
    yield "device auto", f"{device}: {'the first' if on_cuda else 'there is no'} CUDA device", True
    try:
        upscaler = Upscaler(LEMMA(LemmaConfig.small()).to(device))
    except (ImportError, RuntimeError, ValueError) as error:
        yield "backend auto", f"does not start: {reason(error)}", False
        return
    dtype = str(upscaler.dtype).removeprefix("torch.")
    if on_cuda:
        allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        dtype += ", TF32 by PyTorch's setting: products {}, convolutions {}".format(
            *("on" if each else "off" for each in allowed)
        )
    yield "dtype auto", f"{dtype}; bfloat16 if asked for", True
    assert isinstance(upscaler.network, Accelerated)
    used = upscaler.network.describe()
    parts = [f"{part}: {what}" for part, what in used.items() if part not in ("device", "dtype")]
    yield "backend auto", f"the accelerated network; {'; '.join(parts)}", True


def _weights() -> Iterator[tuple[str, str, bool]]:
    from lemma_fast.checkpoint import CheckpointError, packaged, verify

    found = packaged()
    if not found:
        yield "weights", "none packaged: give upscale a checkpoint with --model", True
    for name, path in found.items():
        try:
            yield f"weights {name}", f"{path.name}, SHA-256 {verify(path)[:16]}..., checked", True
        except CheckpointError as error:
            yield f"weights {name}", str(error), False
