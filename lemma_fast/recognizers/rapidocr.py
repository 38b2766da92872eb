"""RapidOCR as a reader of words and lines: PP-OCRv6 small, whose models lie in rapidocr's wheel.

Not a recogniser of the published tables, but of the kind that most OCR programs use now. It runs in
ONNX Runtime on the CPU. Every model is given by its path, so that rapidocr, which downloads what it
is not given, has nothing to download.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lemma_fast.recognizers import base
from lemma_fast.recognizers.base import Reading, ReadLine, ReadWord

INSTALL = "pip install 'lemma-fast[ocr]'"
PROVIDER = "CPUExecutionProvider"
MODELS = {"Det": "PP-OCRv6_det_small.onnx", "Rec": "PP-OCRv6_rec_small.onnx"}
# Crops up to this times as wide as tall are padded to one width, so they may share a batch.
_NARROW = 320 / 48
_BATCH = 16


def open_engine(threads: int) -> Any:
    """Make rapidocr's engine for `threads`; its models are loaded when they are first used.

    Raises FileNotFoundError where the package or a model is not installed.
    """
    try:
        import onnxruntime  # noqa: F401
        import rapidocr
    except ImportError as error:
        missing = error.name or "rapidocr"
        raise FileNotFoundError(
            f"no package {missing!r}: {INSTALL}, or leave rapidocr out"
        ) from error
    paths = {part: model_path(part) for part in MODELS}
    return rapidocr.RapidOCR(
        params={
            **{f"{part}.model_path": str(path) for part, path in paths.items()},
            "Global.use_cls": False,
            "Global.text_score": 0.0,
            "Global.log_level": "error",
            "Rec.rec_batch_num": _BATCH,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


@contextmanager
def speaking_plainly() -> Iterator[None]:
    """Turn what rapidocr and its packages raise into RuntimeError with one sentence."""
    try:
        yield
    except MemoryError:
        raise
    # Errors of rapidocr, OpenCV and ONNX Runtime have no base of their own.
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        # Rapidocr puts a whole traceback into the message.
        raise RuntimeError(f"rapidocr failed: {said[-1]}") from error


def model_path(part: str) -> Path:
    """Find the model of "Det" or "Rec" in the installed package; raises FileNotFoundError."""
    import rapidocr

    path = Path(rapidocr.__file__).parent / "models" / MODELS[part]
    if not path.is_file():
        raise FileNotFoundError(
            f"rapidocr {importlib.metadata.version('rapidocr')} has no {path.name}: {INSTALL}"
        )
    return path


def checked_threads(threads: int | None) -> int:
    """Return the threads that ONNX Runtime gets: PyTorch's by default, at most one a core."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return min(threads or torch.get_num_threads(), os.cpu_count() or 1)


class RapidOCR:
    """Reads crops of words and lines with PP-OCRv6 small, on the CPU.

    `provider` is ONNX Runtime's, `threads` its number of threads (PyTorch's by default). Nothing is
    downloaded. What is read in a crop does not depend on the other crops of the call.
    """

    name = "rapidocr"
    provider = PROVIDER
    caution = (
        "PP-OCR learned to read blurred text, and super-resolution often costs it words: of 163 "
        "blurred photographed words it read 68 % as they were and 55 % after small (docs/log.md)"
    )

    def __init__(self, *, threads: int | None = None) -> None:
        """Find the model, which the first reading loads.

        Raise FileNotFoundError, with what to install, where it is missing.
        """
        self.threads = checked_threads(threads)
        self._engine = open_engine(self.threads)
        self._engine.return_word_box = True

    def __repr__(self) -> str:
        """Name what runs."""
        return f"RapidOCR(provider={self.provider!r}, threads={self.threads})"

    def version(self) -> str:
        """Name the packages, the provider and the model: the same read the same in a crop."""
        packages = [
            f"{name} {importlib.metadata.version(name)}" for name in ("rapidocr", "onnxruntime")
        ]
        model = model_path("Rec")
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
        return ", ".join([*packages, self.provider, f"{model.stem} {digest}"])

    def read(self, images: Tensor) -> list[Reading]:
        """Read RGB `images` (N, 3, H, W) in [0, 1], clamped.

        The text is all that was read in the crop; the confidence is the mean of its characters', 0
        where nothing was read.
        """
        base.check_images(images)
        scaled = images.detach().float().clamp(0, 1).mul(255).round().byte()
        pixels = scaled.permute(0, 2, 3, 1).cpu().numpy()
        return [Reading(line.text, line.confidence) for line in self.read_lines(list(pixels))]

    def read_lines(self, crops: Sequence[npt.NDArray[np.uint8]]) -> list[ReadLine]:
        """Read RGB crops [H, W, 3] of whole lines, and find their words; raises RuntimeError."""
        if any(crop.ndim != 3 or crop.shape[2] != 3 or not crop.size for crop in crops):
            raise ValueError("a crop is [H, W, 3], and H and W are at least 1")
        shapes = [crop.shape[1] / crop.shape[0] for crop in crops]
        together = [n for n, shape in enumerate(shapes) if shape <= _NARROW]
        # A wider crop would widen all of its batch, and padding changes what is read.
        alone = [[n] for n, shape in enumerate(shapes) if shape > _NARROW]
        lines: list[ReadLine | None] = [None] * len(crops)
        for group in filter(None, [together, *alone]):
            bgr = [np.ascontiguousarray(crops[n][..., ::-1]) for n in group]
            with speaking_plainly():
                found = self._engine.recognize_txt(bgr)
            for n, text, score, words in zip(
                group, found.txts, found.scores, found.word_results, strict=True
            ):
                lines[n] = _line(text, score, words)
        return [line for line in lines if line is not None]


def _line(text: str, score: float, found: Any) -> ReadLine:
    """Turn rapidocr's words, which name columns of its last layer, into shares of the width."""
    if not text.strip():
        return ReadLine("", 0.0, ())
    columns = [(min(columns), max(columns)) for columns in found.word_cols]
    # The width of a character, where a word has only one: that of the whole line's.
    letters = sum(len(word) for word in found.words)
    usual = found.line_txt_len / max(letters, 1)
    spans = []
    for word, (first, last) in zip(found.words, columns, strict=True):
        half = 0.6 * ((last - first) / (len(word) - 1) if len(word) > 1 else usual)
        spans.append([first + 0.5 - half, last + 0.5 + half])
    for left, right, before, after in zip(spans, spans[1:], columns, columns[1:], strict=False):
        # Two words share the gap between the characters next to it.
        middle = (before[1] + after[0] + 1) / 2
        left[1], right[0] = min(left[1], middle), max(right[0], middle)
    # Spaces have confidences too.
    sure = [value for value, letter in zip(found.confs, text, strict=True) if not letter.isspace()]
    words = []
    for word, span in zip(found.words, spans, strict=True):
        confidence, sure = float(np.mean(sure[: len(word)])), sure[len(word) :]
        left, right = np.clip(span, 0, found.line_txt_len) / found.line_txt_len
        words.append(ReadWord("".join(word), confidence, float(left), float(right)))
    return ReadLine(text.strip(), float(score), tuple(words))
