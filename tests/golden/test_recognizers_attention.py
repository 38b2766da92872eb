"""ABINet, MATRN and PARSeq against the published modules' numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from published_network import golden as stored
from recognizer_fill import DATA, images, published_state, published_table
from torch import Tensor

from lemma_fast import LemmaConfig
from lemma_fast.config import PriorConfig
from lemma_fast.recognizers import (
    MATRN,
    ABINet,
    PARSeq,
    PARSeqConfig,
    list_recognizers,
    load_recognizer,
)
from lemma_fast.recognizers.base import read_greedily
from lemma_fast.recognizers.charset import PARSEQ, PRIOR

NOISE = json.loads((DATA / "noise.json").read_text())
KINDS = {"abinet": ABINet, "matrn": MATRN, "parseq": PARSeq}
Network = ABINet | MATRN | PARSeq


def filled(name: str) -> dict[str, Tensor]:
    """The published state of seed 1, with the position tables of the machine of the goldens."""
    state = dict(published_state(name, 1))
    tables = stored("position_tables")
    for key, value in state.items():
        if key.endswith(".pe"):
            part = "backbone" if len(value) == 256 else "attention"
            table = tables[f"position_prior.vision.{part}.pos_encoder.pe"]
            state[key] = torch.from_numpy(table)
    return state


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}_seed1.npz") as arrays:
        return dict(arrays)


def near(name: str) -> Callable[[Tensor, str], None]:
    """Compare the first images within ten times what fp32 itself strays from fp64 there."""
    expected = golden(name)

    def check(got: Tensor, array: str) -> None:
        wanted = torch.from_numpy(expected[array])[: len(got)]
        torch.testing.assert_close(got, wanted, rtol=0, atol=10 * NOISE[name][array])

    return check


def lengths(logits: Tensor) -> list[int]:
    """Characters and the end, without the bounds that the language part is given."""
    return [row.index(0) + 1 if 0 in row else len(row) for row in logits.argmax(2).tolist()]


def tiny(name: str) -> Network:
    """A network of its kind with small random weights, ready to read."""
    torch.manual_seed(1)
    if name == "parseq":
        return PARSeq(PARSeqConfig(width=48, heads=2, layers=1, hidden=32, decoder_heads=4)).eval()
    prior = PriorConfig(
        stem_width=4,
        widths=(8, 16, 32),
        depths=(1, 1, 1),
        strides=(2, 1, 2),
        heads=2,
        feedforward=16,
        encoder_layers=1,
        key_width=8,
        language_layers=1,
        dropout=0.5,
    )
    return KINDS[name](LemmaConfig(prior=prior)).eval()


def scores(model: Network, crops: Tensor) -> Tensor:
    prepared = model.prepare(crops)
    return model(prepared).logits if isinstance(model, PARSeq) else model.read_logits(prepared)


@pytest.fixture(scope="module", params=["abinet", "matrn", "parseq"])
def network(request) -> Network:
    model = KINDS[request.param]()
    state = filled(request.param)
    if isinstance(model, PARSeq):
        model.load_state_dict(state)
    else:
        model.load_published_state(state)
    return model.eval()


def assert_abinet(model: ABINet, prepared: Tensor, which: str) -> None:
    check = near("abinet")
    out = model(prepared)
    check(out.seen.logits, f"vision_logits_{which}")
    check(out.language_logits, f"language_logits_{which}")
    check(out.logits, f"logits_{which}")
    expected = golden("abinet")
    for logits, array in ((out.seen.logits, "vision_len"), (out.logits, "final_len")):
        assert lengths(logits) == expected[f"{array}_{which}"].tolist()[: len(prepared)]
    if which == "hr":
        check(out.seen.attention[:, ::4], "vision_attn_t4_hr")
        check(out.seen.features[:, ::32], "backbone_c32_hr")


def assert_matrn(model: MATRN, prepared: Tensor, which: str) -> None:
    check = near("matrn")
    seen, rounds = model(prepared)
    check(seen.logits, f"vision_logits_{which}")
    assert len(rounds) == 3
    for i, step in enumerate(rounds, 1):
        check(step.language_logits, f"iter{i}_language_logits_{which}")
        check(step.logits, f"iter{i}_logits_{which}")
        expected = golden("matrn")[f"iter{i}_len_{which}"].tolist()
        assert lengths(step.logits) == expected[: len(prepared)]
    if which == "hr":
        check(model.fusion.visual_classifier(rounds[-1].visual), "iter3_v_logits_hr")
        check(model.fusion.semantic_classifier(rounds[-1].semantic), "iter3_s_logits_hr")


def assert_parseq(model: PARSeq, prepared: Tensor, which: str) -> None:
    check = near("parseq")
    out = model(prepared)
    assert out.first_logits.shape[1] == golden("parseq")[f"ar_steps_{which}"].item()
    check(out.first_logits, f"ar_logits_{which}")
    check(out.logits, f"logits_{which}")
    if which == "hr":
        check(out.memory[:, :, ::8], "memory_c8_hr")


def assert_equals_the_published_one(network: Network, which: str, count: int) -> None:
    batch = images(which)[:count, :3]
    check = {"abinet": assert_abinet, "matrn": assert_matrn, "parseq": assert_parseq}
    with torch.no_grad():
        check[network.name](network, network.prepare(batch), which)
    readings = network.read(batch)
    texts = golden(network.name)[f"text_{which}"].tolist()
    assert [reading.text for reading in readings] == texts[:count]
    assert all(0 < reading.confidence <= 1 for reading in readings)


@pytest.mark.parametrize("which", ["hr", "lr"])
def test_equals_the_published_one(network, which):
    count = 4 if network.name == "parseq" else 2 if which == "hr" else 1
    assert_equals_the_published_one(network, which, count)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["hr", "lr"])
@pytest.mark.parametrize("network", ["abinet", "matrn"], indirect=True)
def test_equals_the_published_one_on_all_images(network, which):
    assert_equals_the_published_one(network, which, 4)


def test_every_published_name_goes_both_ways(network):
    """All names, shapes and dtypes of the published state_dict, and every value comes back."""
    published = isinstance(network, PARSeq)
    state = network.state_dict() if published else network.published_state()
    assert sorted((key, tuple(value.shape), str(value.dtype)) for key, value in state.items()) == (
        sorted(
            (key, shape, f"torch.{dtype}") for key, shape, dtype in published_table(network.name)
        )
    )
    for key, value in filled(network.name).items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("name", KINDS)
def test_single_images_read_as_in_the_batch(name):
    model = tiny(name)
    crops = torch.rand(5, 3, 16, 64)
    with torch.no_grad():
        together = scores(model, crops)
        assert together.shape[0] == 5
        for n, alone in enumerate(crops):
            torch.testing.assert_close(scores(model, alone[None])[0], together[n])
    assert model.read(crops[:0]) == []


@pytest.mark.parametrize("name", KINDS)
def test_save_and_load_keep_sizes_and_numbers(name, tmp_path):
    model = tiny(name)
    model.save(tmp_path / "model.safetensors")
    again = load_recognizer(name, tmp_path / "model.safetensors", device="cpu")
    assert again.config == model.config
    assert not again.training
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    crops = torch.rand(2, 3, 20, 50)
    assert again.read(crops) == model.read(crops)


def save_published(network: Network, path: Path) -> None:
    """As the authors did: ABINet and MATRN under "model", PARSeq bare."""
    state = filled(network.name)
    torch.save(state if network.name == "parseq" else {"model": state}, path)


def test_published_checkpoints_open(network, tmp_path):
    save_published(network, tmp_path / "network.pth")
    reader = load_recognizer(network.name, tmp_path / "network.pth", device="cpu")
    assert type(reader) is type(network)
    assert not reader.training
    for key, value in network.state_dict().items():
        assert torch.equal(reader.state_dict()[key], value), key


@pytest.mark.parametrize("change", ["missing", "another"])
def test_second_language_table_has_to_be_the_first(change):
    model = tiny("abinet")
    state = model.published_state()
    model.load_published_state(state)
    table = state.pop("language.token_encoder.pe")
    if change == "another":
        state["language.token_encoder.pe"] = table + 1
    with pytest.raises(ValueError, match=r"token_encoder.pe is missing or not"):
        model.load_published_state(state, "file.pth")


@pytest.mark.parametrize("network", ["parseq"], indirect=True)
def test_parseq_stops_early_without_a_change(network):
    """A text of three letters alone, and beside one of six."""
    prepared = network.prepare(images("hr")[:2, :3])
    with torch.no_grad():
        beside, alone = network(prepared), network(prepared[1:])
    assert beside.first_logits.shape[1] == 7
    assert alone.first_logits.shape[1] == 4
    torch.testing.assert_close(alone.logits[0], beside.logits[1], rtol=0, atol=5e-5)


def test_greedy_reading_stops_at_the_end():
    logits = torch.full((3, 4, PRIOR.size), -1e4)
    for n, row in enumerate([[1, 2, 0, 5], [0, 3, 0, 0], [36, 27, 26, 1]]):
        for t, value in enumerate(row):
            logits[n, t, value] = 0
    logits[0, 1, 7] = logits[0, 3, 7] = logits[0, 3, 8] = 0
    # Here the best class, a character and an end, has a rival; past the end all may be rivals.
    logits[0, 1, 2] = logits[0, 2, 0] = 1
    logits[0, 2, 9] = 0
    surer = torch.e / (1 + torch.e)
    readings = read_greedily(logits, PRIOR)
    assert [reading.text for reading in readings] == ["ab", "", "01za"]
    assert [reading.ids for reading in readings] == [(1, 2), (), (36, 27, 26, 1)]
    assert [reading.confidence for reading in readings] == pytest.approx([surer**2, 1, 1])


@pytest.mark.parametrize("name", KINDS)
def test_input_is_normalised_and_never_clamped(name):
    model = tiny(name)
    crops = 3 * torch.rand(1, 3, 32, 128) - 1
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if name != "parseq" else (0.5, 0.5)
    mean, std = (torch.tensor(value).reshape(-1, 1, 1) for value in (mean, std))
    torch.testing.assert_close(model.prepare(crops) * std + mean, crops)
    with pytest.raises(ValueError, match="expected RGB images"):
        model.read(torch.rand(1, 4, 32, 128))


def test_registry_has_them():
    assert set(KINDS) <= set(list_recognizers())


def test_parseq_reads_both_cases_and_punctuation():
    assert PARSEQ.decode([11, 37, 64, 0, 5]) == 'aA"'
