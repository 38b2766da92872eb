"""The rule that fills a recogniser's weights for its goldens, by the published names.

One PCG64 stream a key, seeded with crc32(key) + seed; float64 draws, cast to float32. The gains
keep activations alive and the strings varied.
"""

import math
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "golden" / "data" / "recognizers"


def _residual_block(key: str) -> bool:
    return key.startswith("encoder.cnn.layer") and key.split(".")[3].isdigit()


# by model: (which key, gain), the first that matches counts
GAINS = {
    "text_focus": [
        (lambda key: key.startswith("encoder.cnn.conv1.weight"), 4.0),
        (_residual_block, 0.8),
        (lambda key: key.startswith("encoder.cnn."), 1.4),
        (lambda key: key in {f"decoder.multihead.linears.{i}.weight" for i in (0, 1)}, 1.5),
        (lambda key: key == "decoder.multihead.linears.3.weight", 3.0),
    ],
    "crnn": [
        (lambda key: key.startswith("cnn.conv0.weight"), 4.0),
        (lambda key: key.startswith("cnn."), 1.6),
        (lambda key: ".rnn.weight_" in key, 2.0),
        (lambda key: key.endswith(".embedding.weight"), 4.0),
    ],
}


def key_rng(key: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()) + seed))


def _value(model: str, key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = key_rng(key, seed)
    last = key.rsplit(".", 1)[-1]
    if len(shape) >= 2:
        gain = next((gain for matches, gain in GAINS[model] if matches(key)), 1.0)
        return gain / math.sqrt(math.prod(shape[1:])) * rng.standard_normal(shape)
    if last in ("a_2", "running_var", "weight"):
        return rng.uniform(0.5, 1.5, shape)
    return 0.1 * rng.standard_normal(shape)


def published_table(model: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Key, shape, dtype of everything in the published state_dict."""
    rows = (DATA / f"{model}.tsv").read_text().splitlines()[1:]
    table = []
    for row in rows:
        key, shape, dtype = row.split("\t")
        sizes = () if shape == "scalar" else tuple(int(size) for size in shape.split("x"))
        table.append((key, sizes, dtype))
    return table


@lru_cache(maxsize=2)
def published_state(model: str, seed: int) -> dict[str, torch.Tensor]:
    """A filled state_dict with every published key; counters and tables are zero.

    It is shared: read only.
    """
    state = {}
    for key, shape, dtype in published_table(model):
        if key.endswith((".num_batches_tracked", ".pe")):
            state[key] = torch.zeros(shape, dtype=getattr(torch, dtype))
        else:
            value = _value(model, key, shape, seed).astype(np.float32)
            state[key] = torch.from_numpy(np.ascontiguousarray(value))
    return state


def images(name: str) -> torch.Tensor:
    """Images "hr", "sr" (4, 4, 32, 128) or "lr" (4, 4, 16, 64) of seed 1 in [0, 1]."""
    with np.load(DATA / "inputs_seed1.npz") as arrays:
        return torch.from_numpy(arrays[f"{name}_u8"]).float() / 255
