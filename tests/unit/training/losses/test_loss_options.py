"""The losses: corrected forms, switches, and where gradients go."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lemma_fast.recognizers import TextFocus, TextFocusConfig
from lemma_fast.training.data.labels import (
    encode_ctc_labels,
    encode_focus_labels,
    encode_prior_labels,
)
from lemma_fast.training.evaluation.metrics import psnr
from lemma_fast.training.losses.confusion import confusion_distances, confusion_weights
from lemma_fast.training.losses.lemma import (
    LemmaLoss,
    LossWeights,
    TextFocusLoss,
    attention_l1,
    confusion_cross_entropy,
    crnn_ctc_loss,
    fine_tune_loss,
    pixel_distance,
)

LABELS = ["don't", "a"]


def tiny_recognizer() -> TextFocus:
    return TextFocus(TextFocusConfig((4, 4), (8, 8), (1, 1), width=16, heads=2, hidden=16))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, 4, 32, 128, requires_grad=True), torch.rand(2, 4, 32, 128)


def logits(T: int = 8) -> SimpleNamespace:
    return SimpleNamespace(img_logits=torch.randn(2, T, 37), text_logits=torch.randn(2, T, 37))


def test_total_is_the_weighted_sum():
    sr, hr = batch()
    weights = LossWeights(pixel=2.0, text_focus=3.0, attention=5.0, confusion=7.0, fine_tune=11.0)
    loss = LemmaLoss(tiny_recognizer(), weights)
    terms = loss(sr, hr, encode_focus_labels(LABELS), logits(), encode_prior_labels(LABELS, 8))
    assert min(terms.pixel, terms.attention, terms.confusion, terms.fine_tune) > 0
    by_hand = (
        2 * terms.pixel + 3 * (5 * terms.attention + 7 * terms.confusion) + 11 * terms.fine_tune
    )
    torch.testing.assert_close(terms.total, by_hand)


def test_without_recogniser_and_prior_only_pixels_count():
    sr, hr = batch()
    terms = LemmaLoss()(sr, hr)
    torch.testing.assert_close(terms.total, F.mse_loss(sr, hr))
    assert terms.attention == terms.confusion == terms.fine_tune == 0


def test_the_logarithm_of_the_error_is_psnr_and_knows_no_mask():
    hr = torch.rand(3, 4, 32, 128, dtype=torch.float64) / 2 + 0.25
    noise = torch.randn_like(hr) * torch.tensor([0.01, 0.03, 0.05])[:, None, None, None]
    sr = (hr + noise).requires_grad_()
    value = LemmaLoss(distance="log_mse")(sr, hr).total
    mean = psnr(sr.detach(), hr).mean()
    # the floor under the logarithm counts for 0.15 dB where the error is a hundredth
    torch.testing.assert_close(-10 / math.log(10) * value, mean.to(value), atol=0.2, rtol=0)
    (gradient,) = torch.autograd.grad(value, sr)
    assert gradient[:, 3].eq(0).all()
    # a crop counts by its ratio, not by its size: faint ones are not outweighed
    torch.testing.assert_close(
        gradient.flatten(1).norm(dim=1) * (sr - hr)[:, :3].flatten(1).norm(dim=1),
        torch.full((3,), 2 / 3, dtype=torch.float64),
        atol=0.07,
        rtol=0,
    )


def test_equal_crops_have_a_finite_distance():
    hr = torch.rand(1, 3, 32, 128)
    sr = hr.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pixel_distance(sr, hr, "log_mse"), sr)
    assert torch.isfinite(gradient).all()


def test_weight_zero_skips_the_recogniser():
    """A warm-up on pixels must not pay for the recogniser; its labels are not needed either."""
    sr, hr = batch()
    terms = LemmaLoss(tiny_recognizer(), LossWeights(text_focus=0))(sr, hr)
    assert terms.attention == terms.confusion == 0


def test_labels_are_asked_for():
    sr, hr = batch()
    with pytest.raises(ValueError, match="needs labels"):
        LemmaLoss(tiny_recognizer())(sr, hr)
    with pytest.raises(ValueError, match="needs label_ids"):
        LemmaLoss()(sr, hr, prior=logits())


def test_gradients_flow_to_sr_alone():
    recognizer = tiny_recognizer()
    loss = TextFocusLoss(recognizer)
    sr, hr = batch()
    hr.requires_grad_()
    terms = loss(sr, hr, encode_focus_labels(LABELS))
    (terms.attention + terms.confusion).backward()
    # the mask channel is no business of the recogniser's
    assert sr.grad[:, :3].abs().min() > 0
    assert sr.grad[:, 3].abs().max() == 0
    assert hr.grad is None
    assert all(p.grad is None and not p.requires_grad for p in recognizer.parameters())


def test_recogniser_is_frozen_and_no_part_of_the_state():
    loss = LemmaLoss(tiny_recognizer().train())
    loss.train()
    recognizer = loss.text_focus.recognizer
    assert not recognizer.training
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []
    loss.double()
    assert next(recognizer.parameters()).dtype == torch.float64


def test_attention_of_padding_counts_only_when_asked():
    labels = encode_focus_labels(["abc", "a"])
    hr = torch.rand(2, 3, 4, 6)
    sr = hr.clone()
    # behind the end of "a": padding
    sr[1, :, 2:] += 0.5
    faithful = attention_l1(sr, hr, labels)
    torch.testing.assert_close(faithful, (sr - hr).abs().mean())
    assert attention_l1(sr, hr, labels, include_padding=False) == 0
    sr[0, :, 3] += 0.25
    corrected = attention_l1(sr, hr, labels, include_padding=False)
    torch.testing.assert_close(corrected, torch.tensor(0.25 / (4 + 2)))


def test_confusion_equals_the_published_formula():
    labels = encode_focus_labels(LABELS, pad_to=7)
    predicted = torch.randn(2, 7, 37, dtype=torch.float64)
    weights = confusion_weights().double()
    terms = []
    for p, g in zip(predicted[labels.live()], labels.targets[labels.live()], strict=True):
        top = weights[g, g] * p[g].exp()
        terms.append(-(top / (weights[g] * p.exp()).sum()).log())
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(confusion_cross_entropy(predicted, labels, weights), expected)


def test_confusion_does_not_overflow():
    labels = encode_focus_labels(["a"])
    predicted = torch.zeros(1, 2, 37)
    predicted[..., 5] = 500.0
    loss = confusion_cross_entropy(predicted, labels, confusion_weights())
    assert 450 < loss < 550


def test_confusion_table():
    distances = confusion_distances()
    assert distances.shape == (62, 62)
    assert (distances == distances.T).all()
    assert (distances.diagonal() == 0).all()
    faithful, corrected = confusion_weights(), confusion_weights(unit_diagonal=True)
    assert (corrected.diagonal() == 1).all()
    # m: its two cases are 0.03 apart
    assert faithful[23, 23].item() == pytest.approx(1 / 0.03)
    off_diagonal = ~torch.eye(37, dtype=torch.bool)
    assert torch.equal(faithful[off_diagonal], corrected[off_diagonal])
    assert TextFocusLoss(unit_diagonal=True).confusion.diagonal().eq(1).all()


def test_fine_tuning_forms():
    """Softmax twice or once; with the nulls after the word or without."""
    prior = logits()
    ids = encode_prior_labels(LABELS, 8)
    pair = (prior.img_logits, prior.text_logits)

    def cross_entropy(scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scores[keep], ids[keep])

    everything = torch.ones_like(ids, dtype=torch.bool)
    # "don't" has its null inside the word, and six positions with its end; "a" has two
    words = torch.arange(8) < torch.tensor([[6], [2]])
    torch.testing.assert_close(
        fine_tune_loss(*pair, ids), sum(cross_entropy(x.softmax(-1), everything) for x in pair)
    )
    torch.testing.assert_close(
        fine_tune_loss(*pair, ids, double_softmax=False, include_padding=False),
        sum(cross_entropy(x, words) for x in pair),
    )
    loss = LemmaLoss(double_softmax=False, fine_tune_padding=False)
    sr, hr = batch()
    torch.testing.assert_close(
        loss(sr, hr, prior=prior, label_ids=ids).fine_tune,
        fine_tune_loss(*pair, ids, double_softmax=False, include_padding=False),
    )


def test_ctc_of_a_word_that_cannot_be_spelled_is_zero():
    assert crnn_ctc_loss(torch.randn(3, 1, 37), encode_ctc_labels(["aaa"])) == 0
    assert crnn_ctc_loss(torch.randn(5, 1, 37), encode_ctc_labels(["aaa"])) > 0


def test_compiles_in_one_graph():
    loss = LemmaLoss(tiny_recognizer())
    sr, hr = batch()
    rest = (encode_focus_labels(LABELS, 8), logits(), encode_prior_labels(LABELS, 8))
    eager = loss(sr, hr, *rest)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(sr, hr, *rest)
    torch.testing.assert_close(compiled.total, eager.total)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.total, sr), torch.autograd.grad(eager.total, sr)
    )
