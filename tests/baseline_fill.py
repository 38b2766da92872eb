"""The published baselines' weights by the goldens' fill rule, the stored numbers, and comparisons.

The rule is `recognizer_fill`'s with gains of its own; a network's tensors are listed in its table
in `golden/data/baselines/`.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import recognizer_fill
import torch
from published_network import golden as network_golden
from recognizer_fill import images, key_rng, published_table
from torch import Tensor

from lemma_fast.baselines import Baseline, build_baseline, from_published
from lemma_fast.baselines.rcan import MEAN_COLOUR
from lemma_fast.checkpoint.published import published_name
from lemma_fast.recognizers import CRNN

DATA = Path(__file__).parent / "golden" / "data" / "baselines"
NOISE = json.loads((DATA / "noise.json").read_text())
_ATTENTION = ("multihead.linears.0.weight", "multihead.linears.1.weight")

# (network, start of the key, its ends, gain): the first that matches counts, otherwise the
# recognisers' rule; for tensors of two dimensions and more
GAINS: list[tuple[str, str, tuple[str, ...], float]] = [
    *((name, "block8.1.weight", ("",), 0.3) for name in ("tbsrn", "tg", "tatt", "c3stisr", "pcan")),
    ("tbsrn", "", _ATTENTION, 2.0),
    ("tatt", "infoGen.fc_in.weight", ("",), 12.0),
    ("tatt", "infoGen.init_factor.weight", ("",), 4.0),
    ("tatt", "infoGen.transformer.decoder", ("multihead_attn.in_proj_weight",), 1.5),
    ("c3stisr", "", (".tconv1.weight",), 120.0),
    ("c3stisr", "", (".tconv2.weight", ".tconv3.weight", ".tconv4.weight"), 2.5),
    ("c3stisr", "lm.proj.weight", ("",), 16.0),
    ("c3stisr", "lm.model.", (".out_proj.weight",), 0.4),
    ("c3stisr", "lm.model.", (".linear2.weight",), 0.3),
    ("c3stisr", "lm.cls.weight", ("",), 3.0),
    ("c3stisr", "", (".conv_du.0.weight", ".conv_du.2.weight"), 2.0),
    ("rcan", "", ("conv_du.0.weight", "conv_du.2.weight"), 3.0),
    ("rcan", "body.", (".body.2.weight",), 0.7),
    ("rcan", "body.", (".body.20.weight",), 0.3),
    ("rcan", "tail.1.weight", ("",), 0.3),
    ("san", "", ("conv_du.0.weight", "conv_du.2.weight"), 4.0),
    ("san", "", ("conv_first.2.weight",), 0.3),
    ("san", "RG.", (".conv_last.weight",), 0.5),
    ("san", "non_local.non_local.theta.weight", ("",), 1.5),
    ("san", "tail.1.weight", ("",), 0.3),
    ("pcan", "", ("fs.fc.0.weight", "fs.fc.2.weight", "se.fc.0.weight", "se.fc.2.weight"), 3.0),
    ("pcan", "spatial_attention.conv4.weight", ("",), 3.0),
]
_LANGUAGE_TABLE = "position_prior.vision.attention.pos_encoder.pe"
_RECOGNIZERS = {"stroke_focus": "text_focus"}


def value(model: str, key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    if key.endswith(".weight_g"):
        return key_rng(key, seed).uniform(0.5, 1.5, shape)
    if len(shape) >= 2:
        for name, start, ends, gain in GAINS:
            if name == model and key.startswith(start) and key.endswith(ends):
                draws = key_rng(key, seed).standard_normal(shape)
                return gain / math.sqrt(math.prod(shape[1:])) * draws
    return recognizer_fill.value(_RECOGNIZERS.get(model, model), key, shape, seed)


@cache
def published_state(model: str, seed: int = 1, channels: int | None = None) -> dict[str, Tensor]:
    """A filled state_dict with every published key; counters and tables are zero.

    The spline's buffers are those of the machine that made the goldens. `channels` is that of the
    images, where it is not the table's. It is shared: read only.
    """
    tps = network_golden("tps_buffers")
    state = {}
    for key, listed, dtype in published_table(model, DATA):
        shape = listed if channels is None else with_channels(key, listed, channels)
        if key in tps.files:
            state[key] = torch.from_numpy(tps[key])
        elif key == "lm.pos_encoder.pe":
            state[key] = torch.from_numpy(network_golden("position_tables")[_LANGUAGE_TABLE])
        elif key.endswith((".num_batches_tracked", ".pe")):
            state[key] = torch.zeros(shape, dtype=getattr(torch, dtype))
        elif key.startswith(("sub_mean.", "add_mean.")):
            # As they start; with a mask there are none.
            if channels != 4:
                mean = torch.tensor(MEAN_COLOUR) * (-1 if key.startswith("sub") else 1)
                state[key] = mean if key.endswith("bias") else torch.eye(3)[:, :, None, None]
        else:
            filled = value(model, key, shape, seed).astype(np.float32)
            state[key] = torch.from_numpy(np.ascontiguousarray(filled))
    return state


def with_channels(key: str, shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """The shape of a tensor of TSRN's frame, or of RCAN and SAN, for images of so many channels."""
    if key in ("block1.0.weight", "stn_head.stn_convnet.0.0.weight", "head.0.weight"):
        return (shape[0], channels, *shape[2:])
    if key in ("block8.1.weight", "block8.1.bias", "tail.1.weight", "tail.1.bias"):
        return (channels, *shape[1:])
    return shape


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def assert_near(got: Tensor, model: str, array: str) -> None:
    """Within ten times what fp32 itself strays from fp64 there; for the crops that are stored."""
    expected = torch.from_numpy(golden(f"{model}_seed1")[array])
    got = got.detach()[: len(expected)]
    torch.testing.assert_close(got, expected, rtol=0, atol=10 * NOISE[model][array])


def check_fill(model: str) -> None:
    """The fill rule is the one of the goldens."""
    state = published_state(model)
    rows = [row.split("\t") for row in (DATA / "fill_check_seed1.tsv").read_text().splitlines()]
    mine = [row for row in rows if row[0] == model and row[2] != "skipped"]
    assert len(mine) > 10
    for _, key, first, mean in mine:
        assert state[key].flatten()[0].item() == pytest.approx(float(first), rel=1e-6)
        assert state[key].double().mean().item() == pytest.approx(float(mean), rel=1e-5, abs=1e-9)


@dataclasses.dataclass
class Step:
    """One forward and backward pass in fp64 with dropout off, as the stored numbers were made."""

    network: Baseline
    sr: Tensor
    loss: Tensor
    seen: dict[str, Tensor]

    def check(self, stored: dict[str, np.ndarray]) -> None:
        """Loss, output and rectification, every gradient's norm, the statistics after the step."""
        assert float(self.loss) == pytest.approx(float(stored["loss"]), rel=1e-8)
        published = type(self.network).published
        assert published is not None
        names = published.names(self.network.config)
        actual = {
            published_name(n, names): p.grad
            for n, p in self.network.named_parameters()
            if p.requires_grad
        }
        zero, none = set(stored["zero_grad"].tolist()), set(stored["none_grad"].tolist())
        keys = stored["param_keys"].tolist()
        # What the published network has without using it is not here at all.
        assert set(actual) == set(keys) - none
        assert all(published.is_unused(key) for key in none)
        for key, norm in zip(keys, stored["grad_norm"], strict=True):
            if key in none:
                continue
            grad = actual[key]
            assert grad is not None, key
            if key in zero:
                assert float(grad.norm()) < 1e-7, key
            else:
                assert float(grad.norm()) == pytest.approx(norm, rel=1e-5), key
        for key in (name for name in stored if name.startswith("grad/")):
            expected = torch.from_numpy(stored[key])
            grad = actual[key.removeprefix("grad/")]
            assert grad is not None
            assert float((grad - expected).norm() / expected.norm()) < 1e-5, key
        for key, got in {**self.seen, "sr": self.sr}.items():
            expected = torch.from_numpy(stored[key]).double()
            torch.testing.assert_close(got[: len(expected)], expected, rtol=0, atol=1e-7)
        state = {published_name(n, names): t for n, t in self.network.state_dict().items()}
        filled = published_state(self.network.config.name.replace("-", ""))
        sizes = [len(filled[key]) for key in stored["bn_keys"]]
        expected = np.split(stored["bn_values"], np.cumsum(sizes)[:-1])
        for key, values in zip(stored["bn_keys"], expected, strict=True):
            if not published.is_unused(key):
                np.testing.assert_allclose(state[key], values, rtol=0, atol=1e-8)


def in_training(
    model: str, reader: CRNN | None = None, count: int = 4
) -> tuple[Baseline, Tensor, Tensor, dict[str, Tensor]]:
    """The filled network in fp64 without dropout, `lr`, `hr`, and what its rectifier returns."""
    filled = from_published(published_state(model), reader=reader)
    network = build_baseline(dataclasses.replace(filled.config, dropout=0.0))
    network.load_state_dict(filled.state_dict())
    network.double().train()
    seen: dict[str, Tensor] = {}
    rectifier = getattr(network, "rectifier", None)
    if rectifier is not None:
        rectifier.register_forward_hook(lambda _m, _i, out: seen.update(rectified=out.detach()))
        rectifier.localization.register_forward_hook(
            lambda _m, _i, out: seen.update(control_points=out.detach())
        )
    channels = network.config.in_channels
    lr, hr = (images(name)[:count, :channels].double() for name in ("lr", "hr"))
    return network, lr, hr, seen


def step(
    model: str, forward: Callable[[Baseline, Tensor], Tensor] | None = None, count: int = 4
) -> Step:
    """A step of mean squared error; `forward` stands for calling the network."""
    reader = CRNN().eval() if model == "tatt" else None
    network, lr, hr, seen = in_training(model, reader, count)
    sr = network(lr) if forward is None else forward(network, lr)
    loss = (sr - hr).square().mean()
    loss.backward()
    return Step(network, sr.detach(), loss.detach(), seen)
