"""Files of named tensors, ours and published: opened without running code, checked by name.

What the checkpoints of LEMMA and those of the recognisers share. Every error is a CheckpointError
whose message begins with the file, or with what was to be filled.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lemma_fast.atomic import replacing
from lemma_fast.errors import reason

Config = TypeVar("Config")
Value = TypeVar("Value")

# What published files wrap their tensors in.
_WRAPPERS = ("state_dict_G", "model", "state_dict")
# What wrappers of networks put into the names of tensors, at any depth.
_WRAPPER_PARTS = ("_orig_mod", "module")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


class CheckpointMissing(CheckpointError, FileNotFoundError):
    """A checkpoint that is not there: also the FileNotFoundError that one expects of a file."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(f"{path}: no such file")
        self.filename = str(path)

    def __str__(self) -> str:
        """Give the message, where an OSError would give its number too."""
        return str(self.args[0])


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, on the CPU."""
    with _opened(path) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file, of which the tensors are not read."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; raises CheckpointError, also for what fails inside the block."""
    try:
        # Safetensors calls a file that may not be read one that is not there, and takes no name
        # that is not UTF-8; Python knows better.
        with path.open("rb") as plain:
            name: str | Path = path
            if not str(path).isprintable():
                name = f"/proc/self/fd/{plain.fileno()}"
            with safe_open(name, framework="pt") as file:
                yield file
    except FileNotFoundError as error:
        raise CheckpointMissing(path) from error
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error
    # Headers that are damaged make it raise KeyError, TypeError, ValueError and more.
    except Exception as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({reason(error)})"
        ) from error


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a `.safetensors` with its metadata, or of a `torch.save` file, which has none."""
    path = Path(path)
    if is_safetensors(path):
        state, metadata = read_safetensors(path)
        return plain_names(path, state), metadata
    return read_published(path), {}


def read_published(path: Path) -> dict[str, Tensor]:
    """Tensors of a `torch.save` file, out of the wrappers that published code uses."""
    return named_tensors(path, unpickled(path))


def unpickled(path: Path) -> object:
    """What a `torch.save` file holds, if that is tensors and plain values only."""
    try:
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointMissing(path) from error
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to switch this protection off.
        raise CheckpointError(f"{path}: refused, {_what_is_in_the_way(path)}") from error
    # A damaged file makes PyTorch raise RuntimeError, EOFError, KeyError, AttributeError and more.
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason(error)})") from error


def _what_is_in_the_way(path: Path) -> str:
    """Name the Python objects that a `torch.save` file holds, and the safe ways past them."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001  (of a file that is damaged too, this is all there is to say)
        names = []
    if not names:
        return "it is no checkpoint, or holds Python objects beside tensors"
    return (
        f"it holds Python objects beside tensors ({', '.join(sorted(names))}), and loading these "
        "can run code: save its state_dict alone where it was made, or, if you trust these types, "
        "allow them in Python with torch.serialization.add_safe_globals before lemma_fast.load"
    )


def named_tensors(path: Path, content: object) -> dict[str, Tensor]:
    """The tensors in what `unpickled` returned, by `plain_names`, out of a known wrapper."""
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not named tensors")
    state = plain_names(path, {str(name): value for name, value in content.items()})
    if strangers := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{path}: not all entries are tensors: {listed(strangers)}")
    return state


def plain_names(source: object, state: Mapping[str, Value]) -> dict[str, Value]:
    """Take out of the names what wrappers of a network, or of parts of it, put in.

    These are `module.` (DataParallel and its kind) and `_orig_mod.` (torch.compile). `source` is
    for the message of the CheckpointError where two names become one.
    """
    plain: dict[str, Value] = {}
    for name, value in state.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)
        if short in plain:
            raise CheckpointError(f"{source}: has {short} twice, in a wrapper and without")
        plain[short] = value
    return plain


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network in the wrappers of torch.compile and DataParallel, or `model` itself."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_safetensors(path: Path) -> bool:
    """Whether a file is one of safetensors, by its ending in any case."""
    return path.suffix.lower() == ".safetensors"


def check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `state` has exactly the names and shapes of `expected`."""
    problems = []
    if missing := [name for name in expected if name not in state]:
        problems.append(f"missing {listed(missing)}")
    if unexpected := [name for name in state if name not in expected]:
        problems.append(f"unexpected {listed(unexpected)}")
    misshapen = [
        f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if misshapen:
        problems.append(f"misshapen {listed(misshapen)}")
    unusable = [
        f"{name} ({state[name].dtype}, {state[name].layout})"
        for name, tensor in expected.items()
        if name in state and not _usable(state[name], tensor)
    ]
    if unusable:
        problems.append(f"unusable {listed(unusable)}")
    if problems:
        raise CheckpointError("; ".join(problems))


def _usable(tensor: Tensor, like: Tensor) -> bool:
    """Whether values can be copied: dense, present, and of the same kind of number."""
    same_kind = tensor.is_floating_point() == like.is_floating_point() and not tensor.is_complex()
    return tensor.layout == torch.strided and not tensor.is_meta and same_kind


def listed(names: Iterable[str]) -> str:
    """The first ten names, and how many there are."""
    names = list(names)
    shown = ", ".join(names[:10])
    return f"{len(names)} tensors ({shown}{', ...' if len(names) > 10 else ''})"


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` into `model`; raise CheckpointError that names everything that does not fit."""
    try:
        check_fit(state, model.state_dict())
    except CheckpointError as error:
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {error}") from error
    model.load_state_dict(dict(state))


@contextmanager
def config_of(path: str | Path) -> Iterator[None]:
    """Turn what a damaged config makes of a network, inside the block, into CheckpointError.

    It may be no JSON, know other entries, or ask for sizes that cannot be or that no memory holds.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
            RuntimeError, MemoryError) as error:  # fmt: skip
        said = f"it has no {error}" if isinstance(error, KeyError) else reason(error)
        raise CheckpointError(f"{path}: its config cannot be used: {said}") from error


def config_from_json(kind: type[Config], text: str) -> Config:
    """Rebuild a configuration dataclass that was stored as JSON."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(text).items()
    }
    return kind(**fields)


def carried_config(kind: type[Config], recognizer: str, metadata: Mapping[str, str]) -> Config:
    """The configuration that the file of a recogniser carries; the default for a published one."""
    if metadata.get("recognizer") == recognizer:
        return config_from_json(kind, metadata["config"])
    return kind()


def save_weights(model: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the model's tensors and `metadata` as safetensors, all or nothing."""
    tensors = stored_tensors(model)
    with replacing(Path(path)) as partial:
        save_file(tensors, partial, metadata=dict(metadata))


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors as a file holds them: on the CPU, dense, by `plain_names`."""
    state = plain_names(type(model).__name__, model.state_dict())
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def config_to_json(config: Any) -> str:
    """Store a configuration dataclass as JSON."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)
