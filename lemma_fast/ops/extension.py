"""The compiled operations, `lemma_fast/_C.abi3.so`: loaded once, when the first of them is called.

Loading registers them as `torch.ops.lemma_fast.*`; `setup.py` builds the library.
"""

from __future__ import annotations

import ctypes
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parents[1]
_LIBRARY, _MISSING = "_C.abi3.so", "_C.missing.txt"
# The release in setup.py's TORCH_TARGET.
_OLDEST_TORCH = (2, 11)


@cache
def load() -> Path:
    """Load the library and return its path; ImportError, with what to do, where that cannot be."""
    why = missing()
    if why is not None:
        raise ImportError(f"{why} (or use ops.reference, which needs no extension)")
    path = _FOLDER / _LIBRARY
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"{path} does not load with torch {torch.__version__} ({error}): build it again with "
            "`pip install --no-build-isolation .`, or use ops.reference"
        ) from error
    return path


def missing() -> str | None:
    """Say in a sentence why there is no library to load; None where there is one."""
    release = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if release < _OLDEST_TORCH:
        return (
            f"the C++ extension needs torch {_OLDEST_TORCH[0]}.{_OLDEST_TORCH[1]} or later, this "
            f"is {torch.__version__}: install a newer one"
        )
    if (_FOLDER / _LIBRARY).is_file():
        return None
    note = _FOLDER / _MISSING
    if note.is_file():
        reason = note.read_text(encoding="utf-8").strip()
        return f"the C++ extension was not built: {reason}"
    return (
        "the C++ extension is not built: in lemma-fast's folder, "
        "run `pip install --no-build-isolation .`"
    )


@cache
def library() -> ctypes.CDLL:
    """Return the loaded library's plain C functions, with their types."""
    functions = ctypes.CDLL(str(load()))
    functions.lemma_fast_build_info.restype = ctypes.c_char_p
    functions.lemma_fast_cpu_level.restype = ctypes.c_char_p
    functions.lemma_fast_adafm_max_cuda_channels.restype = ctypes.c_int64
    return functions


def build_info() -> dict[str, Any]:
    """Tell what was compiled: `torch` (the release built with), `flags`, `cuda` (architectures).

    `cuda` is None for a library of the CPU alone. `cpu` names the vector instructions that every
    operation on the CPU takes here; LEMMA_FAST_CPU (baseline, avx2 or avx512) asks for less.
    `adafm_cuda_channels` is the largest number of channels that AdaFM takes on CUDA. Raises
    ImportError as `load` does, and ValueError for another value of LEMMA_FAST_CPU.
    """
    cpu = library().lemma_fast_cpu_level()
    if cpu is None:
        wish = os.environ.get("LEMMA_FAST_CPU")
        raise ValueError(f"LEMMA_FAST_CPU is {wish!r}: it can be baseline, avx2 or avx512")
    info: dict[str, Any] = json.loads(library().lemma_fast_build_info().decode())
    channels = library().lemma_fast_adafm_max_cuda_channels()
    return {**info, "cpu": cpu.decode(), "adafm_cuda_channels": channels}
