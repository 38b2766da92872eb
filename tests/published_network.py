"""The published network's weights by the goldens' fill rule, and the stored numbers.

The stored numbers were made on a machine whose position tables and spline kernel differ from other
machines' in the last bits; `position_tables.npz` and `tps_buffers.npz` hold that machine's.
"""

import math
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from lemma_fast import LEMMA, LemmaConfig
from lemma_fast.checkpoint import to_published

DATA = Path(__file__).parent / "golden" / "data"
VISION, LANGUAGE = "position_prior.vision", "position_prior.language"

# (start of the key, its end, gain): the first that matches counts, otherwise 1.
GAINS = [
    (f"{VISION}.backbone.resnet.conv1.weight", "", 4.0),
    (f"{VISION}.backbone.resnet.layer", ".conv2.weight", 0.5),
    (f"{VISION}.backbone.transformer.", ".out_proj.weight", 0.25),
    (f"{VISION}.backbone.transformer.", ".linear2.weight", 0.25),
    (f"{VISION}.attention.project.weight", "", 10.0),
    (f"{VISION}.cls.weight", "", 3.0),
    (f"{LANGUAGE}.proj.weight", "", 16.0),
    (f"{LANGUAGE}.model.", ".out_proj.weight", 0.4),
    (f"{LANGUAGE}.model.", ".linear2.weight", 0.3),
    (f"{LANGUAGE}.cls.weight", "", 3.0),
    ("guidanceGen.attn_conv.0.weight", "", 4.0),
    ("guidanceGen.DWC.weight", "", 32.0),
    ("stn_head.stn_fc2.weight", "", 0.5),
]
# Added to class 0 of the two classifiers, so that text lengths vary; by seed.
NULL_BOOST = {
    f"{VISION}.cls.bias": {1: 6.8, 2: 4.0},
    f"{LANGUAGE}.cls.bias": {1: 3.1, 2: 2.0},
}


def _value(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """One float64 array, from a generator of the key's own."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()) + seed))
    last = key.rsplit(".", 1)[-1]
    if last == "running_mean":
        return 0.1 * rng.standard_normal(shape)
    if last == "running_var":
        return rng.uniform(0.5, 1.5, shape)
    if len(shape) >= 2:
        matches = (g for start, end, g in GAINS if key.startswith(start) and key.endswith(end))
        return next(matches, 1.0) / math.sqrt(math.prod(shape[1:])) * rng.standard_normal(shape)
    if key == "stn_head.stn_fc2.bias":
        return edge_points() + 0.02 * rng.standard_normal(shape)
    if last == "weight":
        return rng.uniform(*((0.1, 0.4) if shape == (1,) else (0.5, 1.5)), shape)
    value = 0.1 * rng.standard_normal(shape)
    if key in NULL_BOOST:
        value[0] += NULL_BOOST[key][seed]
    return value


def edge_points() -> np.ndarray:
    """The rectifier's control points before the draws are added, [40]."""
    x = np.linspace(0.01, 0.99, 10)
    edges = [np.stack([x, np.full(10, y)], 1) for y in (0.01, 1.0 - 0.01)]
    return np.concatenate(edges).reshape(-1)


@cache
def golden(name: str) -> NpzFile:
    return np.load(DATA / f"{name}.npz")


@cache
def filled_state(seed: int) -> dict[str, Tensor]:
    """All 1102 published tensors; they are shared: read only."""
    state = to_published(LEMMA(LemmaConfig.base()))
    for name, tensor in state.items():
        if not name.endswith((".num_batches_tracked", ".pe")) and not name.startswith("tps."):
            value = _value(name, tuple(tensor.shape), seed)
            state[name] = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))
    for stored in (golden("position_tables"), golden("tps_buffers")):
        state |= {name: torch.from_numpy(stored[name]) for name in stored.files}
    for name in (f"{LANGUAGE}.pos_encoder.pe", f"{LANGUAGE}.token_encoder.pe"):
        state[name] = state[f"{VISION}.attention.pos_encoder.pe"]
    return state


def images(name: str, which: str = "lr_u8") -> Tensor:
    """The stored input [8, 4, H, W] as the published network was given it."""
    return torch.from_numpy(golden(name)[which].astype(np.float32) / np.float32(255))


def largest_deviation(actual: Tensor, name: str, key: str) -> float:
    """Largest absolute difference from a stored array, which may hold the first images only."""
    stored = torch.from_numpy(np.asarray(golden(name)[key]))
    actual = actual.detach()[: len(stored)] if stored.dim() else actual.detach()
    return float((actual.double().reshape(stored.shape) - stored.double()).abs().max())
