"""The losses of Table 3's networks: what they promise, and the stages that they teach."""

import pytest
import torch
import yaml
from tiny_training import VALUES, stage_of, write_config

from lemma_fast.recognizers import CRNN, CRNNConfig, TextFocus, TextFocusConfig
from lemma_fast.recognizers.text_focus import STROKES
from lemma_fast.training.data.batches import EncodedCrops, split
from lemma_fast.training.data.labels import encode_ctc_labels
from lemma_fast.training.data.strokes import encode_stroke_labels, stroke_table
from lemma_fast.training.loop.stages import ReaderStage, RestorationStage
from lemma_fast.training.losses.baselines import (
    draw_rotation,
    edge_loss,
    edges,
    rotate,
    teaching_loss,
    triple_similarity,
)
from lemma_fast.training.losses.lemma import pixel_distance
from lemma_fast.training.losses.teaching import cut_labels
from lemma_fast.training.settings.values import SettingsError

pytestmark = pytest.mark.usefixtures("one_thread")

READER = VALUES["stages"]["crnn"]["recognizer"]
PIXELS = {"weights": {"text_focus": 0}}
NETWORK = {"channels": 8, "blocks": 1}
STAGES = {
    "stroke_focus": {
        "recognizer": VALUES["stages"]["text_focus"]["recognizer"],
        "select": {"metric": "loss"},
    },
    "rcan": {
        "baseline": {"channels": 16, "groups": 1, "blocks": 1},
        "loss": {**PIXELS, "distance": "l1", "edges": 0.5},
    },
    "tg": {
        "baseline": NETWORK,
        "loss": {**PIXELS, "strokes": 50, "stroke_recognizer": "strokes.safetensors"},
    },
    "tatt": {
        "baseline": {**NETWORK, "crnn": READER},
        "start": {"prior": ["crnn.safetensors"]},
        "loss": {**PIXELS, "teaching": 1, "teacher": "crnn.safetensors", "rotation": 0.1},
    },
    "c3-stisr": {
        "baseline": {**NETWORK, "crnn": READER},
        "start": {"prior": ["crnn.safetensors"]},
        "loss": {**PIXELS, "spelling": 0.01, "spelling_by": "ctc"},
    },
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config of all stages, and the checkpoints that they name, in the current folder."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    path = tmp_path / "table3.yaml"
    path.write_text(yaml.safe_dump({"base": "tiny.yaml", "stages": STAGES}))
    CRNN(
        CRNNConfig(**{name: tuple(x) if name == "channels" else x for name, x in READER.items()})
    ).save("crnn.safetensors")
    sizes = {name: tuple(x) if isinstance(x, list) else x
             for name, x in STAGES["stroke_focus"]["recognizer"].items()}  # fmt: skip
    TextFocus(TextFocusConfig(**sizes, classes=STROKES)).save("strokes.safetensors")
    return path


def first_step(config, name, *overrides):
    """A stage, and the terms of its first step."""
    settings = stage_of(config, name, *overrides)
    stage = RestorationStage(settings)
    crops = EncodedCrops(split(settings.data)[0], 26, encodings=stage.encodings)
    torch.manual_seed(0)
    return stage, stage.terms(crops.__getitems__([0, 1, 2, 3]), 0, 0)


def reaches(term, module):
    """Whether a term has a gradient in all, or else in none, of a module's parameters."""
    parameters = list(module.parameters())
    if not term.requires_grad or not parameters[0].requires_grad:
        return False
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    there = {gradient is not None for gradient in found}
    assert len(there) == 1
    return there.pop()


def test_the_absolute_distance():
    sr, hr = torch.rand(2, 4, 32, 128), torch.rand(2, 4, 32, 128)
    torch.testing.assert_close(pixel_distance(sr, hr, "l1"), (sr - hr).abs().mean())


def test_edges_of_a_ramp():
    ramp = (torch.arange(8.0) / 10).expand(1, 3, 6, 8)
    # Half of Sobel's filter on three colours: 3 x 0.1 x (1 + 2 + 1) x 2 / 2, away from the border.
    torch.testing.assert_close(edges(ramp)[:, :, 1:-1, 1:-1], torch.full((1, 1, 4, 6), 1.2))
    assert edge_loss(ramp, ramp) == 0
    # The sum of the colours counts: what one gains and another loses is no edge.
    assert edge_loss(ramp[:, [0]] * torch.tensor([1.0, -1, 0]).view(3, 1, 1), 0 * ramp) < 1e-3


def test_strokes_are_spelled_as_they_are_written():
    assert {stroke for strokes in stroke_table().values() for stroke in strokes} == set(range(10))
    labels = encode_stroke_labels(["C c!", "", "B"], pad_to=5)
    assert labels.targets.tolist() == [[8, 8, 0, 0, 0], [0] * 5, [2, 9, 9, 0, 0]]
    assert labels.inputs.tolist() == [[0, 8, 8, 0, 0], [0] * 5, [0, 2, 9, 9, 0]]
    assert labels.lengths.tolist() == [3, 1, 4]
    with pytest.raises(ValueError, match="'B' and its end need 4 positions, pad_to is 3"):
        encode_stroke_labels(["C", "B"], pad_to=3)


def test_a_pupil_that_knows_all_has_nothing_to_learn():
    right, wrong = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert teaching_loss(right, right) == 0
    # Half of |0.5| + |0.5|, and half of 0.5 log 0.5 + 0.5 log (0.5 / 1e-20).
    expected = 0.5 + (torch.tensor(0.5).log() + 0.5 * torch.tensor(1e20).log()) / 2
    torch.testing.assert_close(teaching_loss(wrong, right), expected)
    assert torch.isfinite(teaching_loss(right, wrong))


def test_rotations():
    angles, offsets = draw_rotation(1000, 5.0, torch.Generator().manual_seed(0))
    assert 0.08 < angles.abs().max() <= 5 * torch.pi / 180
    assert 0 <= offsets.min() < 0.01
    assert 0.99 < offsets.max() <= 1
    images = torch.rand(2, 3, 16, 64)
    torch.testing.assert_close(rotate(images, torch.zeros(2), torch.rand(2)), images)
    # A quarter turn, clockwise, of a square whose ratio is 1 (offset 0.5).
    square = torch.rand(1, 1, 8, 8)
    turned = rotate(square, torch.tensor([torch.pi / 2]), torch.tensor([0.5]))
    torch.testing.assert_close(turned, square.rot90(-1, (2, 3)), atol=1e-5, rtol=0)


def test_the_similarity_of_three():
    one, two = torch.rand(2, 3, 16, 64), torch.rand(2, 3, 16, 64)
    torch.testing.assert_close(triple_similarity(one, one, one), torch.tensor(1.0))
    orders = [triple_similarity(*order) for order in ((one, one, two), (one, two, one))]
    torch.testing.assert_close(*orders)
    assert orders[0] < 0.9


def test_labels_are_cut_for_the_language_model():
    labels = cut_labels(encode_ctc_labels(["abc", "", "a" * 20]), 2)
    assert labels.lengths.tolist() == [2, 0, 2]
    assert labels.targets.tolist() == encode_ctc_labels(["abaa"]).targets.tolist()


def test_the_recogniser_of_strokes_learns(config):
    settings = stage_of(config, "stroke_focus")
    stage = ReaderStage(settings)
    assert stage.network.config.classes == STROKES
    crops = EncodedCrops(split(settings.data)[0], 26, encodings=stage.encodings)
    batch = crops.__getitems__([0, 1])
    assert batch.focus is None
    assert reaches(stage(batch, 0, 0)["loss"], stage.network)
    assert set(stage.eval().scores(batch)) == {"loss"}


def test_strokes_count_in_the_objective(config):
    _, terms = first_step(config, "tg")
    assert terms["strokes"] > 0
    torch.testing.assert_close(terms["loss"], terms["pixel"] + 50 * terms["strokes"])
    message = "strokes.safetensors names 10 classes, the loss wants 37"
    with pytest.raises(SettingsError, match=message):
        first_step(config, "tg", "loss.recognizer=strokes.safetensors", "loss.weights.text_focus=1")


def test_edges_count_in_the_objective(config):
    _, terms = first_step(config, "rcan")
    torch.testing.assert_close(terms["loss"], terms["pixel"] + 0.5 * terms["edges"])


def test_tatts_reader_learns_from_its_teacher_alone(config):
    stage, terms = first_step(config, "tatt")
    expected = terms["pixel"] + terms["teaching"] + 0.1 * terms["rotation"]
    torch.testing.assert_close(terms["loss"], expected)
    network = stage.network
    assert network.reader.training
    assert reaches(terms["teaching"], network.reader)
    assert not reaches(terms["pixel"], network.reader)
    assert not reaches(terms["rotation"], network.reader)
    reader = {id(p) for p in stage.network.reader.parameters()}
    clipped = {id(p) for p in stage.clipped()}
    assert clipped == {id(p) for p in stage.network.parameters()} - reader
    (_, rate), (second, own) = stage.parameter_groups()
    assert {id(p) for p in second} == reader
    assert (rate, own) == (1e-3, 1e-4)
    assert not any(p.requires_grad for p in stage.teaching.recognizer.parameters())
    # In evaluation nothing is turned.
    crops = EncodedCrops(split(stage.settings.data)[0], 26, encodings=stage.encodings)
    scores = stage.eval().scores(crops.__getitems__([0, 1]))
    assert "teaching" in scores
    assert "rotation" not in scores


def test_a_reader_without_a_teacher_stays_as_it_is(config):
    stage, terms = first_step(config, "tatt", "loss.teaching=0", "loss.rotation=0")
    torch.testing.assert_close(terms["loss"], terms["pixel"])
    assert not stage.network.reader.training
    assert not reaches(terms["loss"], stage.network.reader)


def test_c3stisrs_reader_learns_from_the_result_too(config, monkeypatch):
    stage, terms = first_step(config, "c3-stisr")
    torch.testing.assert_close(terms["loss"], terms["pixel"] + 0.01 * terms["spelling"])
    network = stage.network
    assert network.reader.training
    assert reaches(terms["pixel"], network.reader)
    # What is spelled is taught by its own loss and by the result, but does not teach the reader.
    assert reaches(terms["pixel"], network.clues.language)
    assert reaches(terms["spelling"], network.clues.language)
    assert not reaches(terms["spelling"], network.reader)
    # Labels are cut at 15 characters, which the words here do not have.
    crops = EncodedCrops(split(stage.settings.data)[0], 26, encodings=stage.encodings)
    batch = crops.__getitems__([0, 1])
    whole = stage.eval().scores(batch)["spelling"]
    monkeypatch.setattr("lemma_fast.training.losses.teaching._SPELLED", 1)
    assert (stage.scores(batch)["spelling"] - whole).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("tg", "loss.stroke_recognizer=null", "loss.strokes needs loss.stroke_recognizer"),
        ("tg", "loss.teaching=1", "loss.teaching means nothing to stage tg, but to tatt, c3-stisr"),
        ("tatt", "loss.spelling=1", "loss.spelling means nothing to stage tatt"),
        ("tatt", "loss.teacher=null", "need loss.teacher, a CRNN"),
        ("tatt", "optimizer.prior_learning_rate=0", "loss.teaching teaches the network's reader"),
        ("c3-stisr", "loss.spelling_by=teacher", "need loss.teacher, a CRNN"),
    ],
)
def test_losses_that_cannot_be_computed(config, stage, override, message):
    with pytest.raises(SettingsError, match=message):
        stage_of(config, stage, override)


def test_clues_that_are_dropped(config):
    """In training a quarter of the batch is led by nothing; in evaluation none is."""
    stage, _ = first_step(config, "c3-stisr")
    clues = stage.network.clues
    shallow, read = torch.rand(4, 8, 16, 64), torch.rand(2, 4, 26, 37).softmax(3)
    seen = []
    for projection in (clues.recognition, clues.linguistic):
        projection.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    clues.train()(shallow, read, fused=True)
    clues.eval()(shallow, read, fused=True)
    for dropped, whole, given in zip(seen[:2], seen[2:], read, strict=True):
        assert torch.equal(whole, given)
        assert torch.equal(dropped[1:], given[1:])
        assert not dropped[0].any()
