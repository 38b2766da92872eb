"""The frozen recognisers that the settings name: of the losses, and of the validation."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from lemma_fast.recognizers import CRNN, TextFocus, load_recognizer
from lemma_fast.recognizers.charset import FOCUS
from lemma_fast.training.settings.schema import Settings
from lemma_fast.training.settings.values import SettingsError

M = TypeVar("M", bound=nn.Module)


def open_reader(kind: type[M], settings: Settings, checkpoint: str | None) -> M | None:
    """The recogniser of a checkpoint in the settings, if one is named."""
    if checkpoint is None:
        return None
    name = "crnn" if kind is CRNN else "text_focus"
    reader: object = load_recognizer(name, settings.path(checkpoint), device="cpu")
    assert isinstance(reader, kind)
    return reader


def open_focus(
    settings: Settings, checkpoint: str | None, classes: int = FOCUS.size
) -> TextFocus | None:
    """A recogniser of a loss, of characters or strokes; raises SettingsError for the other kind."""
    reader = open_reader(TextFocus, settings, checkpoint)
    if reader is not None and reader.config.classes != classes:
        raise SettingsError(
            f"{checkpoint} names {reader.config.classes} classes, the loss wants {classes}: 37 are "
            "characters (loss.recognizer), 10 are strokes (loss.stroke_recognizer)"
        )
    return reader
