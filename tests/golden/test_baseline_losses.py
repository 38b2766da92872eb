"""The losses of Table 3's networks against the published code's numbers.

Their training steps, with these losses, are in test_baselines.py.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from baseline_fill import NOISE, check_fill, golden, published_state
from recognizer_fill import images
from torch import Tensor

from lemma_fast.recognizers import TextFocus, load_recognizer
from lemma_fast.recognizers.text_focus import STROKES, UNUSED, TextFocusConfig
from lemma_fast.training.data.strokes import encode_stroke_labels
from lemma_fast.training.losses.baselines import (
    StrokeFocusLoss,
    edge_loss,
    edges,
    rotate,
    teaching_loss,
)
from lemma_fast.training.losses.lemma import gradient_profile_loss

LABELS = ["classics", "hokkaido", "a", "42nd"]


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(x)) for name, x in golden("losses_seed1").items()}


@pytest.fixture(scope="module")
def strokes() -> TextFocus:
    model = TextFocus(TextFocusConfig(classes=STROKES))
    model.load_published_state(published_state("stroke_focus"))
    return model.eval()


def test_fill_rule_is_the_one_of_the_goldens():
    check_fill("stroke_focus")


def test_labels_are_spelled_in_strokes_as_published(stored):
    labels = encode_stroke_labels(LABELS)
    assert torch.equal(labels.inputs, stored["text_input"])
    assert torch.equal(labels.lengths, stored["length"])
    assert torch.equal(labels.targets[labels.live()], stored["text_gt"])


@pytest.mark.slow
def test_the_recogniser_of_strokes_has_every_published_name(strokes, tmp_path):
    state, filled = strokes.published_state(), published_state("stroke_focus")
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in filled.items()
    }
    for key in filled.keys() - {"pe.pe", *UNUSED}:
        assert torch.equal(state[key], filled[key]), key
    torch.save(filled, tmp_path / "strokes.pth")
    opened = load_recognizer("text_focus", tmp_path / "strokes.pth", device="cpu")
    assert opened.config == strokes.config
    with pytest.raises(ValueError, match="strokes, which do not make a text"):
        opened.read(images("sr")[:, :3])


@torch.no_grad()
def test_stroke_focus_and_its_recogniser(strokes, stored):
    sr, hr = (images(name)[:, :3] for name in ("sr", "hr"))
    labels = encode_stroke_labels(LABELS)
    outputs = []
    hook = strokes.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    loss = StrokeFocusLoss(strokes)(sr, hr, labels)
    hook.remove()
    logits, attention = outputs[-1]
    for got, name in ((logits[labels.live()], "sr_pred"), (attention[:, :1], "sr_attn_h4")):
        torch.testing.assert_close(got, stored[name], rtol=0, atol=10 * NOISE["tg"][name])
    total = F.mse_loss(sr, hr) + 50 * loss
    for got, name in ((loss, "attention_l1"), (total, "loss")):
        expected = stored[f"{name}_f64"].item()
        assert got.item() == pytest.approx(expected, abs=10 * NOISE["tg"][name], rel=0), name


@pytest.mark.slow
def test_gradient_of_stroke_focus(strokes, stored):
    """In fp64, of the crop with the longest label alone, which is a quarter of the mean."""
    loss = StrokeFocusLoss(strokes).double()
    sr, hr = (images(name)[1:2, :3].double() for name in ("sr", "hr"))
    sr.requires_grad_()
    try:
        (gradient,) = torch.autograd.grad(loss(sr, hr, encode_stroke_labels(LABELS[1:2])), sr)
    finally:
        loss.float()
    expected = 4 * stored["grad_sr_attention"].double()
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-6


def test_edges_and_gradient_profiles(stored):
    sr, hr = images("sr"), images("hr")
    noise = NOISE["pcan"]
    named = {
        "loss_edge": edge_loss(sr[:, :3], hr[:, :3]),
        "loss_gradient": gradient_profile_loss(sr[:, :3], hr[:, :3]),
        "loss_mse": F.mse_loss(sr, hr),
        "edge_map": edges(hr[:1, :3]),
    }
    for name, got in named.items():
        expected = stored[name].view_as(got)
        torch.testing.assert_close(got, expected, rtol=0, atol=10 * noise[name])


def test_the_teachers_lesson(stored):
    student, teacher = (
        stored[name].double()[:, :, 0].transpose(1, 2) for name in ("prior", "prior_teacher")
    )
    found = 100 * teaching_loss(student, teacher).item()
    assert found == pytest.approx(stored["semantic_loss"].item(), rel=1e-10)


def test_turned_crops(stored):
    angles, offsets = stored["angle"].double(), stored["offset"].double()
    turned = rotate(images("lr").double(), angles, offsets)
    back = rotate(turned, -angles, offsets)
    for got, name in ((turned, "lr_rotated"), (back, "lr_back")):
        torch.testing.assert_close(got[:1], stored[name], rtol=0, atol=1e-12)
