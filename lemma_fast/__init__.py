"""lemma-fast: LEMMA, the scene-text super-resolution network, as software."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lemma_fast.acceleration import accelerate
    from lemma_fast.checkpoint import CheckpointError, load
    from lemma_fast.config import LemmaConfig, PriorConfig
    from lemma_fast.model import LEMMA, Prior
    from lemma_fast.reading import Page, Reader
    from lemma_fast.upscale import Upscaled, Upscaler

__version__ = "0.1.0"
__all__ = [
    "LEMMA", "CheckpointError", "LemmaConfig", "Page", "Prior", "PriorConfig", "Reader", "Upscaled",
    "Upscaler", "__version__", "accelerate", "load",
]  # fmt: skip

# Torch is imported with the first of these names, so that `lemma-fast --help` need not wait for it.
_HOMES = {
    "LEMMA": "model",
    "CheckpointError": "checkpoint",
    "LemmaConfig": "config",
    "Page": "reading",
    "Prior": "model",
    "PriorConfig": "config",
    "Reader": "reading",
    "Upscaled": "upscale",
    "Upscaler": "upscale",
    "accelerate": "acceleration",
    "load": "checkpoint",
}


def __getattr__(name: str) -> object:
    """Import what is asked for from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lemma_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lemma_fast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
