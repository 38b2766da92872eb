"""Text-focus Transformer and CRNN against the published modules' numbers."""

import json

import numpy as np
import pytest
import torch
from recognizer_fill import DATA, images, published_state, published_table

from lemma_fast.checkpoint.files import load_strictly
from lemma_fast.recognizers import CRNN, TextFocus, load_recognizer
from lemma_fast.recognizers.text_focus import UNUSED
from lemma_fast.training.data.labels import encode_focus_labels

NOISE = json.loads((DATA / "noise.json").read_text())
LABELS = ["classics", "hokkaido", "a", "42nd"]


def golden(model: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{model}_seed1.npz") as arrays:
        return dict(arrays)


def assert_near(got: torch.Tensor, model: str, array: str) -> None:
    """Within ten times what fp32 itself strays from fp64 there."""
    expected = torch.from_numpy(golden(model)[array])
    torch.testing.assert_close(got, expected, rtol=0, atol=10 * NOISE[model][array])


@pytest.fixture(scope="module")
def text_focus() -> TextFocus:
    model = TextFocus()
    model.load_published_state(published_state("text_focus", 1))
    return model.eval()


@pytest.fixture(scope="module")
def crnn() -> CRNN:
    model = CRNN()
    load_strictly(model, published_state("crnn", 1), "state")
    return model.eval()


@pytest.mark.parametrize("model", ["text_focus", "crnn"])
def test_fill_rule_is_the_one_of_the_goldens(model):
    state = published_state(model, 1)
    rows = [row.split("\t") for row in (DATA / "fill_check_seed1.tsv").read_text().splitlines()]
    mine = [row for row in rows if row[0] == model]
    assert mine
    for _, key, first, mean in mine:
        assert state[key].flatten()[0].item() == pytest.approx(float(first), rel=1e-6)
        assert state[key].double().mean().item() == pytest.approx(float(mean), rel=1e-6)


def test_labels_are_encoded_as_published():
    labels = encode_focus_labels(LABELS)
    expected = golden("text_focus")
    assert labels.inputs.tolist() == expected["text_input"].tolist()
    assert labels.lengths.tolist() == expected["length"].tolist()
    assert labels.targets[labels.live()].tolist() == expected["text_gt"].tolist()


@pytest.mark.parametrize("which", ["hr", "sr"])
def test_text_focus_equals_the_published_one(text_focus, which):
    labels = encode_focus_labels(LABELS)
    with torch.no_grad():
        grey = text_focus.prepare(images(which)[:, :3])
        logits, attention = text_focus(grey, labels.inputs)
        features = text_focus.encoder(grey)
    assert_near(logits[labels.live()], "text_focus", f"{which}_pred")
    assert_near(attention[:, ::4], "text_focus", f"{which}_attn_h4")
    if which == "hr":
        assert_near(logits, "text_focus", "word_result")
        assert_near(features[:, ::64], "text_focus", "hr_conv_c64")


def test_text_focus_holds_every_published_name(text_focus):
    table = published_table("text_focus")
    state = text_focus.published_state()
    assert {(key, tuple(value.shape), str(value.dtype)) for key, value in state.items()} == {
        (key, shape, f"torch.{dtype}") for key, shape, dtype in table
    }
    filled = published_state("text_focus", 1)
    for key in filled.keys() - {"pe.pe", *UNUSED}:
        assert torch.equal(state[key], filled[key]), key


@pytest.mark.parametrize("which", ["hr", "lr"])
def test_crnn_equals_the_published_one(crnn, which):
    batch = images(which)[:, :3]
    with torch.no_grad():
        x = crnn.prepare(batch)
        assert_near(x, "crnn", f"x_{which}")
        assert_near(crnn(x), "crnn", f"logits_{which}")
        if which == "hr":
            assert_near(crnn.cnn(x)[:, ::8], "crnn", "conv_c8_hr")
    readings = crnn.read(batch)
    assert [reading.text for reading in readings] == golden("crnn")[f"text_{which}"].tolist()
    assert all(0 < reading.confidence < 1 for reading in readings)


def test_crnn_holds_every_published_name():
    assert [
        (key, tuple(value.shape), str(value.dtype)) for key, value in CRNN().state_dict().items()
    ] == [(key, shape, f"torch.{dtype}") for key, shape, dtype in published_table("crnn")]


def test_published_checkpoints_open(tmp_path, crnn):
    """As published: a plain dictionary, here also under "state_dict" and with "module."."""
    state = published_state("crnn", 1)
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(wrapped, tmp_path / "crnn.pth")
    reader = load_recognizer("crnn", tmp_path / "crnn.pth", device="cpu")
    assert reader.read(images("lr")[:, :3]) == crnn.read(images("lr")[:, :3])


def test_published_text_focus_opens(tmp_path, text_focus):
    torch.save(published_state("text_focus", 1), tmp_path / "focus.pth")
    reader = load_recognizer("text_focus", tmp_path / "focus.pth", device="cpu")
    assert isinstance(reader, TextFocus)
    assert not reader.training
    for key, value in text_focus.state_dict().items():
        assert torch.equal(reader.state_dict()[key], value), key
