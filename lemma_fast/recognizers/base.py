"""What the recognisers share: the reading they return, their input checks, their weight files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from safetensors.torch import save_file
from torch import Tensor, nn

from lemma_fast.atomic import replacing
from lemma_fast.weight_files import CheckpointError, check_fit, read_weights

__all__ = [
    "CheckpointError",
    "Reading",
    "Recognizer",
    "check_images",
    "config_from_json",
    "config_to_json",
    "grey",
    "load_strictly",
    "read_weights",
    "save_weights",
]

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read in one image.

    `confidence` is in [0, 1]; each recogniser says how it is made. `ids` are the class ids of the
    characters, empty where the recogniser has none.
    """

    text: str
    confidence: float
    ids: tuple[int, ...] = ()


class Recognizer(Protocol):
    """Anything that reads word crops."""

    def read(self, images: Tensor) -> list[Reading]:
        """Read RGB `images` (N, 3, H, W) in [0, 1], pre-processing included."""
        ...


def check_images(images: Tensor) -> None:
    """Raise ValueError unless `images` is a floating-point (N, 3, H, W) batch."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            "expected RGB images (N, 3, H, W) in floating point,"
            f" got {tuple(images.shape)} {images.dtype}"
        )


def grey(images: Tensor) -> Tensor:
    """Turn RGB (N, 3, H, W) into grey (N, 1, H, W) by 0.299 R + 0.587 G + 0.114 B, unclamped."""
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` into `model`; raise CheckpointError that names everything that does not fit."""
    try:
        check_fit(state, model.state_dict())
    except CheckpointError as error:
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {error}") from error
    model.load_state_dict(dict(state))


def config_from_json(kind: type[Config], text: str) -> Config:
    """Rebuild a configuration dataclass that was stored as JSON."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(text).items()
    }
    return kind(**fields)


def save_weights(model: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the model's tensors and `metadata` as safetensors, all or nothing."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with replacing(Path(path)) as partial:
        save_file(tensors, partial, metadata=dict(metadata))


def config_to_json(config: Any) -> str:
    """Store a configuration dataclass as JSON."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)
