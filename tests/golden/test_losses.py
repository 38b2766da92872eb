"""The text-focus loss and its gradients against the published code's numbers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recognizer_fill import DATA, images, key_rng, published_state

from lemma_fast.recognizers import TextFocus
from lemma_fast.training.data.labels import encode_focus_labels, encode_prior_labels
from lemma_fast.training.losses.confusion import confusion_weights
from lemma_fast.training.losses.lemma import LemmaLoss, LossTerms

NOISE = json.loads((DATA / "noise.json").read_text())["text_focus"]
LABELS = ["classics", "hokkaido", "a", "42nd"]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(DATA / "text_focus_seed1.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


@pytest.fixture(scope="module")
def prior() -> SimpleNamespace:
    def logits(kind: str) -> torch.Tensor:
        drawn = key_rng(f"finetune:{kind}", 1).standard_normal((4, 26, 37))
        return torch.from_numpy(drawn.astype(np.float32))

    return SimpleNamespace(img_logits=logits("img"), text_logits=logits("text"))


@pytest.fixture(scope="module")
def loss() -> LemmaLoss:
    recognizer = TextFocus()
    recognizer.load_published_state(published_state("text_focus", 1))
    return LemmaLoss(recognizer)


def assert_terms(terms: LossTerms, golden: dict[str, torch.Tensor]) -> None:
    named = {
        "mse": terms.pixel,
        "attention_l1": terms.attention,
        "wce": terms.confusion,
        "finetune_ce": terms.fine_tune,
        "loss": terms.total,
    }
    for name, value in named.items():
        expected = golden[f"{name}_f64"].item()
        assert value.item() == pytest.approx(expected, abs=10 * NOISE[name], rel=0), name


def test_terms_and_gradients_equal_the_published_ones(loss, golden, prior):
    sr = images("sr").requires_grad_()
    label_ids = encode_prior_labels(LABELS)
    assert torch.equal(label_ids, golden["label_id"])
    terms = loss(sr, images("hr"), encode_focus_labels(LABELS), prior, label_ids)
    assert_terms(terms, golden)
    gradients = {"attention": terms.attention, "wce": terms.confusion, "loss": terms.total}
    for name, value in gradients.items():
        (gradient,) = torch.autograd.grad(value, sr, retain_graph=True)
        tolerance = 10 * NOISE[f"grad_sr_{name}"]
        torch.testing.assert_close(gradient, golden[f"grad_sr_{name}"], rtol=0, atol=tolerance)


def test_padding_labels_to_a_fixed_length_changes_no_term(loss, golden, prior):
    labels = encode_focus_labels(LABELS, pad_to=13)
    with torch.no_grad():
        terms = loss(images("sr"), images("hr"), labels, prior, encode_prior_labels(LABELS))
    assert_terms(terms, golden)


def test_confusion_weights_equal_the_published_ones_bit_for_bit():
    rows = [row.split("\t") for row in (DATA / "wce_weights.tsv").read_text().splitlines()]
    assert "".join(rows[0][1:]) == "".join(row[0] for row in rows[1:])
    expected = np.array([row[1:] for row in rows[1:]], dtype=np.float64).astype(np.float32)
    assert torch.equal(confusion_weights(), torch.from_numpy(expected))
