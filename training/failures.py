"""Failures that come from outside the work: memory that runs out, processes that are killed."""

from __future__ import annotations

import re

import torch

# How libraries say, in a RuntimeError, that a device or the machine has no memory left.
_FULL = re.compile(
    "out of memory|can't allocate memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", re.IGNORECASE
)
_ASKED = re.compile(r"tried to allocate (\d[\d.]* \w+)", re.IGNORECASE)
_KILLED = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal)")


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _FULL.search(str(error)) is not None
    )


def in_short(error: BaseException) -> str:
    """The message of an error, without the traceback that a loading process puts before it."""
    said = str(error)
    if said.startswith("Caught ") and "Traceback" in said:
        # Its last line is "module.Kind: message".
        return said.strip().splitlines()[-1].partition(": ")[2] or said
    return said


def explained(error: BaseException, advice: str) -> str | None:
    """One sentence for such a failure, None for another error; `advice` is what to lower."""
    said = " ".join(str(error).split())
    if is_lack_of_memory(error):
        where = "GPU" if "CUDA" in said or isinstance(error, torch.OutOfMemoryError) else "machine"
        asked = _ASKED.search(said)
        wanted = f" (it was asked for {asked[1]} more)" if asked else ""
        return f"the {where} has not enough memory{wanted}: {advice}"
    if _KILLED.search(said):
        return (
            "a process that loads crops was killed, as happens where memory runs out: lower "
            "data.workers or run.batch_size"
        )
    return None
