"""Recognisers that read word crops: to measure super-resolution with, and to train it against.

reader = load_recognizer("crnn", "crnn.pth")
for reading in reader.read(images):      # (N, 3, H, W) in [0, 1]
    print(reading.text, reading.confidence)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lemma_fast.checkpoint.files import CheckpointError
from lemma_fast.config import CRNNConfig
from lemma_fast.devices import choose_device
from lemma_fast.recognizers import (
    abinet,
    aster,
    crnn,
    matrn,
    moran,
    parseq,
    rapidocr,
    tesseract,
    text_focus,
)
from lemma_fast.recognizers.abinet import ABINet
from lemma_fast.recognizers.aster import ASTER
from lemma_fast.recognizers.base import Reading, Recognizer
from lemma_fast.recognizers.crnn import CRNN
from lemma_fast.recognizers.matrn import MATRN
from lemma_fast.recognizers.moran import MORAN, MORANConfig
from lemma_fast.recognizers.parseq import PARSeq, PARSeqConfig
from lemma_fast.recognizers.rapidocr import RapidOCR
from lemma_fast.recognizers.tesseract import Tesseract
from lemma_fast.recognizers.text_focus import TextFocus, TextFocusConfig

__all__ = [
    "ABINet",
    "ASTER",
    "CRNN",
    "CRNNConfig",
    "MATRN",
    "MORAN",
    "MORANConfig",
    "PARSeq",
    "PARSeqConfig",
    "RapidOCR",
    "Reading",
    "Recognizer",
    "Tesseract",
    "TextFocus",
    "TextFocusConfig",
    "list_recognizers",
    "load_recognizer",
]

_Network: TypeAlias = ABINet | ASTER | CRNN | MATRN | MORAN | PARSeq | TextFocus
# A network's loader takes its checkpoint and options; a new recogniser is one more line here.
_NETWORKS: dict[str, Callable[..., _Network]] = {
    "abinet": abinet.load,
    "aster": aster.load,
    "crnn": crnn.load,
    "matrn": matrn.load,
    "moran": moran.load,
    "parseq": parseq.load,
    "text_focus": text_focus.load,
}
# The weights of the published evaluation: the file, as the published LEMMA's configuration calls
# it, and the repository that its README sends one to.
_PUBLISHED: dict[str, tuple[str, str]] = {
    "abinet": ("best-train-abinet.pth", "github.com/FangShancheng/ABINet"),
    "aster": ("aster.pth.tar", "github.com/ayumiymk/aster.pytorch"),
    "crnn": ("crnn.pth", "github.com/meijieru/crnn.pytorch"),
    "matrn": ("best-train-matrn.pth", "github.com/byeonghu-na/MATRN"),
    "moran": ("moran.pth", "github.com/Canjie-Luo/MORAN_v2"),
    "parseq": ("PARSeq.pth", "github.com/baudm/parseq"),
    "text_focus": ("pretrain_transformer.pth", "github.com/FudanVI/FudanOCR"),
}
# A program's constructor takes options alone: what it knows is installed with it.
_PROGRAMS: dict[str, Callable[..., Recognizer]] = {
    "rapidocr": rapidocr.RapidOCR,
    "tesseract": tesseract.Tesseract,
}


def list_recognizers() -> list[str]:
    """Return the names that `load_recognizer` knows, sorted."""
    return sorted([*_NETWORKS, *_PROGRAMS])


def load_recognizer(
    name: str,
    checkpoint: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    **options: Any,
) -> Recognizer:
    """Return the recogniser `name`, ready to read.

    A network needs a `checkpoint`, ours (`.safetensors`) or the published one, and goes to
    `device`, where "auto" is CUDA if there is any, else the CPU. A program such as Tesseract, or
    RapidOCR with its own models, has neither. `options` are the recogniser's own: `corrected` of
    crnn and moran, `jobs` of tesseract, `threads` of rapidocr.
    Nothing is downloaded: without its checkpoint a network raises CheckpointError, a ValueError,
    that says which file it wants and whose it is.
    """
    if name in _PROGRAMS:
        if checkpoint is not None:
            raise ValueError(f"{name} is installed with what it knows and takes no checkpoint")
        return _PROGRAMS[name](**options)
    if name not in _NETWORKS:
        raise ValueError(f"no recogniser {name!r}; there are {', '.join(list_recognizers())}")
    if checkpoint is None:
        file, repository = _PUBLISHED[name]
        raise CheckpointError(
            f"{name} is a network and needs a checkpoint: the published one ({file} in LEMMA's "
            f"configuration, from {repository}) or one trained here. Nothing is downloaded: get "
            f"the file and name it, {name}={file} on the command line, "
            f'load_recognizer("{name}", "{file}") in Python'
        )
    return _NETWORKS[name](checkpoint, **options).to(choose_device(device))
