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
from published_network import GAINS as PRIOR_GAINS
from published_network import edge_points

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
    "abinet": [(lambda key: key == "alignment.cls.weight", 5.0)],
    "matrn": [(lambda key: key == "semantic_visual.cls.weight", 5.0)],
    "parseq": [(lambda key: key == "head.weight", 3.0)],
    "aster": [
        (lambda key: key.startswith("stn_head.stn_fc2.weight"), 5.0),
        (lambda key: key.startswith("encoder.layer") and ".conv2." in key, 1.0),
        (lambda key: key.startswith("encoder.layer"), 1.2),
        (lambda key: key.startswith("encoder.rnn.weight_"), 1.5),
        (lambda key: key.startswith("decoder.decoder.gru.weight_"), 2.5),
        (lambda key: key == "decoder.decoder.attention_unit.wEmbed.weight", 8.0),
        (lambda key: key == "decoder.decoder.fc.weight", 6.0),
    ],
    "moran": [
        (lambda key: key == "MORN.cnn.15.weight", 0.3),
        (lambda key: key.startswith("ASRN.cnn."), 1.2),
        (lambda key: ".rnn.weight_" in key, 2.5),
        (lambda key: key.endswith("attention_cell.score.weight"), 8.0),
        (lambda key: key.endswith("generator.weight"), 6.0),
    ],
}
# standard deviation of the tables, which are no factors of a product
TABLES = {
    "encoder.pos_embed": 0.5,
    "pos_queries": 1.0,
    "decoder.decoder.tgt_embedding.weight": 1.0,
    "ASRN.attentionL2R.char_embeddings": 1.0,
    "ASRN.attentionR2L.char_embeddings": 1.0,
}
# by model and key: (element, what is added to it), so that the lengths of texts vary
BOOST = {
    ("abinet", "vision.cls.bias"): (0, 11.7),
    ("abinet", "alignment.cls.bias"): (0, 15.3),
    ("matrn", "vision.cls.bias"): (0, 11.7),
    ("matrn", "language.cls.bias"): (0, 6.3),
    ("matrn", "semantic_visual.cls.bias"): (0, 14.9),
    ("parseq", "head.bias"): (0, 3.0),
    ("aster", "decoder.decoder.fc.bias"): (94, 1.0),
    ("moran", "ASRN.attentionL2R.generator.bias"): (36, 5.0),
}


def key_rng(key: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()) + seed))


def _gain(model: str, key: str) -> float:
    for matches, gain in GAINS.get(model, ()):
        if matches(key):
            return gain
    # ABINet and MATRN have the prior's parts, and its gains.
    both = (key, f"position_prior.{key}")
    matching = (
        g
        for name in both
        for start, end, g in PRIOR_GAINS
        if name.startswith(start) and name.endswith(end)
    )
    return next(matching, 1.0)


def value(model: str, key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = key_rng(key, seed)
    last = key.rsplit(".", 1)[-1]
    if key in TABLES:
        return TABLES[key] * rng.standard_normal(shape)
    if len(shape) >= 2:
        return _gain(model, key) / math.sqrt(math.prod(shape[1:])) * rng.standard_normal(shape)
    if last == "weight" and shape == (1,):
        return rng.uniform(0.1, 0.4, shape)
    if last in ("a_2", "running_var", "weight"):
        return rng.uniform(0.5, 1.5, shape)
    if key == "stn_head.stn_fc2.bias":
        return edge_points() + 0.02 * rng.standard_normal(shape)
    drawn = 0.1 * rng.standard_normal(shape)
    if (model, key) in BOOST:
        element, boost = BOOST[model, key]
        drawn[element] += boost
    return drawn


def published_table(model: str, folder: Path = DATA) -> list[tuple[str, tuple[int, ...], str]]:
    """Key, shape, dtype of everything in the published state_dict."""
    rows = (folder / f"{model}.tsv").read_text().splitlines()[1:]
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
        if key.endswith((".num_batches_tracked", ".pe")) or key.startswith("tps."):
            state[key] = torch.zeros(shape, dtype=getattr(torch, dtype))
        else:
            filled = value(model, key, shape, seed).astype(np.float32)
            state[key] = torch.from_numpy(np.ascontiguousarray(filled))
    return state


def images(name: str) -> torch.Tensor:
    """Images "hr", "sr" (4, 4, 32, 128) or "lr" (4, 4, 16, 64) of seed 1 in [0, 1]."""
    with np.load(DATA / "inputs_seed1.npz") as arrays:
        return torch.from_numpy(arrays[f"{name}_u8"]).float() / 255
