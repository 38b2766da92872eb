"""`lemma-fast doctor`: what this installation is made of, and what it would choose."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

PACKAGES = ("lemma-fast", "torch", "numpy", "pillow", "safetensors", "huggingface_hub", "triton")


def lines() -> Iterator[tuple[str, str, bool]]:
    """Yield (subject, finding, is in order), one a line."""
    import torch

    yield "python", f"{platform.python_version()} on {platform.platform()}", True
    for package in PACKAGES:
        if package != "triton":
            yield package, _version(package) or "not installed", True
    yield "triton", *_triton()
    yield "extension", *_extension()
    yield "CPU", f"{torch.get_num_threads()} threads", True
    yield from _devices()
    yield "device auto", _device_choice(), True
    yield "dtype auto", "float32, on CUDA with PyTorch's TF32 setting; bfloat16 if asked for", True
    yield "backend auto", "reference (plain PyTorch): the only backend of this version", True
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


def _device_choice() -> str:
    from lemma_fast.upscale import choose_device

    device = choose_device("auto")
    why = "the first CUDA device" if device.type == "cuda" else "there is no CUDA device"
    return f"{device}: {why}"


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
