"""Whether the settings of the losses for Table 3's networks can be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lemma_fast.training.settings.values import SettingsError

if TYPE_CHECKING:
    from lemma_fast.training.settings.schema import LossSettings, OptimizerSettings

#: The networks that read crops by a CRNN.
READING = ("tatt", "c3-stisr")
# What each loss of a network that reads is for.
_OWNERS = {"teaching": READING, "rotation": READING, "spelling": READING[1:]}


def check_baseline_losses(stage: str, loss: LossSettings, optimizer: OptimizerSettings) -> None:
    """Raise SettingsError where a loss has no network or no recogniser to be computed by."""
    if loss.strokes != 0 and loss.stroke_recognizer is None:
        raise SettingsError(
            "loss.strokes needs loss.stroke_recognizer, a checkpoint of the recogniser of strokes; "
            "train one (stage stroke_focus)"
        )
    for name, owners in _OWNERS.items():
        if getattr(loss, name) != 0 and stage not in owners:
            raise SettingsError(
                f"loss.{name} means nothing to stage {stage}, but to {', '.join(owners)}"
            )
    taught = loss.teaching != 0 or (loss.spelling != 0 and loss.spelling_by == "teacher")
    if taught and loss.teacher is None:
        raise SettingsError(
            "loss.teaching and loss.spelling need loss.teacher, a CRNN checkpoint that reads the "
            "true crops"
        )
    if loss.teaching != 0 and optimizer.prior_learning_rate == 0:
        raise SettingsError(
            "loss.teaching teaches the network's reader, but optimizer.prior_learning_rate is 0"
        )
