"""TBSRN, TG, TATT and PCAN against the published modules' numbers."""

import dataclasses

import pytest
import recognizer_fill
import torch
import torch.nn.functional as F
from baseline_fill import Step, assert_near, check_fill, golden, in_training, published_state, step
from recognizer_fill import images
from torch import nn

from lemma_fast.baselines import TATT, build_baseline, from_published
from lemma_fast.checkpoint.files import load_strictly
from lemma_fast.recognizers import CRNN, TextFocus
from lemma_fast.training.data.labels import encode_focus_labels
from lemma_fast.training.losses import LemmaLoss, LossWeights
from lemma_fast.training.losses.baselines import (
    edge_loss,
    rotate,
    teaching_loss,
    triple_similarity,
)
from lemma_fast.training.losses.lemma import gradient_profile_loss

LABELS = ["classics", "hokkaido", "a", "42nd"]


def recording(parts: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """What these modules return, by name, once they are called."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(_module, _inputs, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, part in parts.items():
        part.register_forward_hook(keep(name))
    return seen


@pytest.mark.parametrize("name", ["tbsrn", "tg", "pcan", "tatt"])
def test_fill_rule_is_the_one_of_the_goldens(name):
    check_fill(name)


@torch.no_grad()
@pytest.mark.parametrize(("channels", "count"), [(3, 4), (4, 1)])
@pytest.mark.parametrize("name", ["tbsrn", "tg"])
def test_colours_with_and_without_the_mask(name, channels, count):
    model = from_published(published_state(name, channels=channels))
    assert model.config.in_channels == channels
    assert_near(model(images("lr")[:count, :channels]), name, f"sr_c{channels}")


@torch.no_grad()
def test_parts_of_tbsrn():
    model = from_published(published_state("tbsrn"))
    seen = recording({"enhancer": model.blocks[0].enhancer, "block6": model.blocks[4]})
    model(images("lr")[:1, :3])
    for part, output in seen.items():
        assert_near(output[:, ::8], "tbsrn", f"{part}_c8")


@torch.no_grad()
def test_pcan():
    model = from_published(published_state("pcan"))
    first, last = model.blocks[0], model.blocks[4]
    seen = recording({"block2": first, "block6": last, "gru1": first.horizontal})
    others = recording({"gru2": first.vertical, "hota": model.attention})
    assert_near(model(images("lr")), "pcan", "sr")
    for part, output in seen.items():
        assert_near(output[:, ::8], "pcan", f"{part}_c8")
    assert_near(others["gru2"][:, ::8].transpose(2, 3), "pcan", "gru2_transposed_c8")
    assert_near(others["hota"][:, ::32], "pcan", "hota_c32")


@pytest.fixture(scope="module")
def tatt() -> TATT:
    reader = CRNN().eval()
    load_strictly(reader, recognizer_fill.published_state("crnn", 1), "state")
    return from_published(published_state("tatt"), reader=reader)


def stored_prior(name: str) -> torch.Tensor:
    """Published [N, 37, 1, 26] as ours [N, 26, 37]."""
    return torch.from_numpy(golden("tatt_seed1")[name])[:, :, 0].transpose(1, 2)


@torch.no_grad()
def test_tatt_and_its_interpreter(tatt):
    interpreter = tatt.interpreter
    seen = recording(
        {
            "encoder": interpreter.encoder,
            "gru": interpreter.query_gru,
            "map": interpreter,
            "block6": tatt.blocks[4],
        }
    )
    asked = {}
    attention = interpreter.decoder[1].attention
    hook = attention.register_forward_pre_hook(lambda _m, inputs: asked.update(inputs=inputs))
    sr = tatt.restore(images("lr"), stored_prior("prior"))
    hook.remove()
    assert_near(sr, "tatt", "sr")
    assert_near(seen["encoder"].transpose(0, 1), "tatt", "encoder")
    assert_near(seen["gru"][:, :, ::64], "tatt", "query_gru_c64")
    assert_near(seen["map"][:, ::8], "tatt", "prior_map_c8")
    assert_near(seen["block6"][:, ::8], "tatt", "block6_c8")
    query, key = (
        F.linear(x, weight, bias).unflatten(2, (4, 16)).transpose(1, 2)
        for x, weight, bias in zip(
            asked["inputs"][:2],
            attention.in_proj_weight.chunk(3),
            attention.in_proj_bias.chunk(3),
            strict=False,
        )
    )
    weights = (query @ key.transpose(2, 3) / 4).softmax(3).mean(1)
    assert_near(weights[:, ::16], "tatt", "attention_r16")


@torch.no_grad()
def test_what_a_crop_gets_of_tatt_depends_on_its_batch_unless_corrected(tatt):
    lr, prior = images("lr")[:2], stored_prior("prior")[:2]
    alone = torch.cat([tatt.restore(lr[i : i + 1], prior[i : i + 1]) for i in range(2)])
    assert_near(alone, "tatt", "sr_batch1")
    together = tatt.restore(lr, prior)
    assert (together - alone).abs().max() > 1e-3
    corrected = build_baseline(dataclasses.replace(tatt.config, corrected=True)).eval()
    corrected.load_state_dict(tatt.state_dict())
    assert_near(corrected.restore(lr, prior), "tatt", "sr_batch1")


@torch.no_grad()
def test_tatt_reads_by_its_crnn(tatt):
    lr = images("lr")
    torch.testing.assert_close(tatt.read(lr), stored_prior("prior_crnn"), rtol=0, atol=2e-5)
    assert_near(tatt(lr[:2]), "tatt", "sr_crnn")
    nothing = torch.zeros(1, 26, 37)
    assert_near(tatt.restore(lr[:1], nothing), "tatt", "sr_zero_prior")


def test_a_step_of_tg_with_squared_error():
    step("tg").check(golden("tg_train_seed1"))


@pytest.mark.slow
def test_a_step_of_tbsrns_own_loss():
    recognizer = TextFocus()
    recognizer.load_published_state(recognizer_fill.published_state("text_focus", 1))
    weights = LossWeights(text_focus=1.0, fine_tune=0.0)
    objective = LemmaLoss(recognizer.double().eval(), weights)
    network, lr, hr, seen = in_training("tbsrn")
    sr = network(lr)
    terms = objective(sr, hr, encode_focus_labels(LABELS))
    (100 * terms.total).backward()
    stored = golden("tbsrn_train_seed1")
    for term, name in ((terms.attention, "attention_l1"), (terms.confusion, "wce")):
        assert float(term.detach()) == pytest.approx(float(stored[name]), rel=1e-8)
    Step(network, sr.detach(), 100 * terms.total.detach(), seen).check(stored)


def test_a_step_of_pcans_own_loss():
    network, lr, hr, seen = in_training("pcan")
    sr = network(lr)
    loss = 100 * (F.mse_loss(sr, hr) + 1e-4 * edge_loss(sr[:, :3], hr[:, :3]))
    loss.backward()
    Step(network, sr.detach(), loss.detach(), seen).check(golden("pcan_train_seed1"))


@pytest.mark.slow
def test_a_step_of_tatts_own_loss():
    stored = golden("tatt_train_seed1")
    prior, angle, offset = (
        stored_prior("prior").double(),
        *(torch.from_numpy(stored[name]).double() for name in ("angle", "offset")),
    )
    network, lr, hr, seen = in_training("tatt", CRNN().eval())
    lr, hr = rotate(lr, angle, offset), rotate(hr, angle, offset)
    sr = network.restore(lr, prior)
    first = dict(seen)
    back = rotate(lr, -angle, offset)
    again = rotate(network.restore(back, prior), angle, offset)
    image = 100 * (F.mse_loss(sr, hr) + 1e-4 * gradient_profile_loss(sr[:, :3], hr[:, :3]))
    similarity = 10 * (1 - triple_similarity(again, sr, hr))
    teacher = torch.from_numpy(stored["prior_teacher"])[:, :, 0].transpose(1, 2).double()
    taught = 100 * teaching_loss(prior, teacher)
    for term, name in ((image, "image"), (similarity, "tssim"), (taught, "semantic")):
        assert float(term.detach()) == pytest.approx(float(stored[f"{name}_loss"]), rel=1e-8)
    loss = image + similarity + taught
    loss.backward()
    made = {
        **first,
        **{f"{name}2": value for name, value in seen.items()},
        "lr_rotated": lr,
        "lr_back": back,
        "sr2_rotated": again.detach(),
    }
    Step(network, sr.detach(), loss.detach(), made).check(stored)
