"""What a number was measured with: device, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

_PACKAGES = ("torch", "triton", "numpy", "onnx", "onnxruntime", "openvino")


def environment(device: torch.device) -> dict[str, object]:
    """What a number was measured with: device, driver, versions, threads, commit, date."""
    about: dict[str, object] = {
        "device": device_name(device),
        "device_type": device.type,
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["memory_bytes"] = properties.total_memory
        about["capability"] = f"{properties.major}.{properties.minor}"
        about["cudnn"] = torch.backends.cudnn.version()
    return about


def device_name(device: torch.device) -> str:
    """Name of a CUDA device, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _driver() -> str | None:
    return _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def _commit() -> str | None:
    """Commit of the checkout that this runs from, with a + where the tree has changes."""
    if given := os.environ.get("LEMMA_FAST_COMMIT"):
        return given
    # A link leads from an unpacked package to the checkout.
    folder = str(Path(__file__).resolve().parent)
    tracked = _said("git", "-C", folder, "ls-files", "--error-unmatch", Path(__file__).name)
    commit = _said("git", "-C", folder, "rev-parse", "HEAD") if tracked else None
    if commit is None:
        return None
    return commit + ("+" if _said("git", "-C", folder, "status", "--porcelain") else "")


def _said(*command: str) -> str | None:
    """First line of a command's output, None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return run.stdout.strip().partition("\n")[0] or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
