"""What recognisers read in the bicubic and the true crops, kept from one evaluation to the next.

Neither depends on the network that is judged, so a second evaluation pays for its results alone. A
recogniser has one file, named by a hash of its kind, its settings and its weights; in it a text is
found by the row and by a hash of the very pixels that the row is made of. So a changed checkpoint
finds nothing, and a changed data set finds what has not changed in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lemma_fast import __version__, checkpoint
from lemma_fast.atomic import replacing
from lemma_fast.errors import reason
from lemma_fast.recognizers import RapidOCR, Recognizer, Tesseract

FORMAT = "lemma-fast readings 1"
_Texts = dict[str, dict[str, str]]


class DamagedReadings(ValueError):
    """A file of readings that is not whole, or is another recogniser's."""


def default_folder() -> Path | None:
    """`lemma-fast/readings` in the user's cache: $XDG_CACHE_HOME, or else ~/.cache.

    None where the user has no home.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # An empty HOME makes it /.cache.
    homeless = cache == "/.cache" and not os.environ.get("HOME")
    return Path(cache, "lemma-fast", "readings") if os.path.isabs(cache) and not homeless else None


def fingerprint(reader: Recognizer) -> str | None:
    """Name all that a reading depends on beside the pixels; None for a reader that has no name.

    For a network these are its settings, its weights, and the kind of device it is on; for
    Tesseract the program's version and its language file, for RapidOCR its packages and its model.
    """
    facts: dict[str, object] = {"lemma-fast": __version__}
    if isinstance(reader, Tesseract | RapidOCR):
        known = reader.version()
        return None if known is None else _digest({**facts, reader.name: known})
    network = reader if isinstance(reader, nn.Module) else getattr(reader, "prior", None)
    if not isinstance(network, nn.Module):
        return None
    state = network.state_dict()
    facts |= {
        "reader": type(reader).__name__,
        "network": type(network).__name__,
        "config": repr(getattr(network, "config", None)),
        "weights": checkpoint.digest(state),
        "device": next(iter(state.values())).device.type,
        "torch": torch.__version__,
    }
    return _digest(facts)


def crop_keys(images: Tensor) -> list[str]:
    """A hash for each crop of uint8 [N, ...], of its pixels."""
    pixels = images.cpu().contiguous().numpy()
    return [hashlib.blake2b(crop.tobytes(), digest_size=16).hexdigest() for crop in pixels]


class Readings:
    """What one recogniser has read; `save` writes it where something was added.

    A file that is damaged is left aside, and replaced at the next `save`; `say` gets a sentence
    about it.
    """

    def __init__(
        self, folder: Path, identity: str, say: Callable[[str], None] = warnings.warn
    ) -> None:
        self.identity = identity
        self.say = say
        self.path = folder / f"{identity[:32]}.json"
        self.changed = False
        self.texts: _Texts = {}
        try:
            self.texts = _read(self.path, identity)
        except FileNotFoundError:
            pass
        except (OSError, DamagedReadings) as error:
            say(f"{self.path} is not used: {error}")

    def read(self, reader: Recognizer, row: str, keys: Sequence[str], images: Tensor) -> list[str]:
        """Texts of `images` [N, 3, H, W] by `keys`; the reader sees those that are not known."""
        known = self.texts.setdefault(row, {})
        unknown = [n for n, key in enumerate(keys) if key not in known]
        if unknown:
            for n, reading in zip(unknown, reader.read(images[unknown]), strict=True):
                known[keys[n]] = reading.text
            self.changed = True
        return [known[key] for key in keys]

    def save(self) -> None:
        """Write the file whole; where that cannot be, the next evaluation reads again."""
        if not self.changed:
            return
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "sha256": _digest(self.texts),
            "texts": self.texts,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as partial:
                partial.write_text(json.dumps(content), encoding="utf-8")
        except OSError as error:
            self.say(f"readings are not kept: {self.path.parent}: {reason(error)}")
            return
        self.changed = False


def open_readings(
    readers: Mapping[str, Recognizer],
    folder: Path,
    say: Callable[[str], None] = warnings.warn,
) -> dict[str, Readings]:
    """The readings kept in `folder`, for those of the readers whose readings can be kept."""
    identities = {name: fingerprint(reader) for name, reader in readers.items()}
    return {name: Readings(folder, known, say) for name, known in identities.items() if known}


def _read(path: Path, identity: str) -> _Texts:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        texts: _Texts = content["texts"]
        sound = (
            content["format"] == FORMAT
            and content["identity"] == identity
            and content["sha256"] == _digest(texts)
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedReadings("not a whole file of readings") from error
    if not sound:
        raise DamagedReadings("damaged, or another recogniser's readings")
    return texts


def _digest(values: object) -> str:
    plain = json.dumps(values, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()
