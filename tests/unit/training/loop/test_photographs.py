"""Stages whose low-resolution crops are made in each step, with a modern reader in the loss."""

import pytest
import torch
from tiny_reader import write_reader
from tiny_training import stage_of, write_config

from lemma_fast.training.data.batches import EncodedCrops
from lemma_fast.training.data.pairs import TextZoomDataset
from lemma_fast.training.loop.fit import fit
from lemma_fast.training.loop.stages import RestorationStage
from lemma_fast.training.settings.values import SettingsError

pytestmark = pytest.mark.usefixtures("one_thread")
CAMERA = "data.degrade=camera"


@pytest.fixture
def begun(tmp_path):
    """A stage that is photographed for, and a batch of three crops."""
    stage = RestorationStage(stage_of(write_config(tmp_path), "lemma", CAMERA))
    crops = EncodedCrops(TextZoomDataset(tmp_path / "train.lmdb"), 26)
    return stage.eval(), crops.__getitems__([0, 3, 5])


@torch.no_grad()
def test_a_step_sees_what_its_seed_photographs(begun):
    stage, batch = begun
    first, again, other = (stage.terms(batch, 0, seed)["pixel"] for seed in (1, 1, 2))
    assert first == again and first != other
    unseen = batch._replace(lr=torch.zeros_like(batch.lr))
    assert stage.terms(unseen, 0, 1)["pixel"] == first


@torch.no_grad()
def test_a_validation_photographs_a_crop_alike_in_any_batch(begun):
    stage, batch = begun
    alone = batch._replace(lr=batch.lr[2:], hr=batch.hr[2:], labels=batch.labels[2:])
    alone = alone._replace(prior_ids=batch.prior_ids[2:])
    torch.testing.assert_close(stage.scores(batch)["psnr"][2:], stage.scores(alone)["psnr"])


def test_chunks_make_the_same_photographs(tmp_path):
    config = write_config(tmp_path)
    curves = []
    for name, chunks in (("whole", 1), ("chunks", 2)):
        chosen = stage_of(config, "lemma", CAMERA, "run.steps=2", f"output={tmp_path / name}")
        for _ in range(chunks):
            outcome = fit(chosen, steps=2 // chunks)
        assert outcome.finished
        curves.append((tmp_path / name / "lemma" / "metrics.csv").read_text())
    assert curves[0] == curves[1]


def test_the_reader_of_the_loss_teaches_the_network(tmp_path):
    reader = write_reader(tmp_path / "reader.onnx")
    config = write_config(tmp_path)
    given = (CAMERA, "loss.reader=0.5", f"loss.reader_onnx={reader}", "loss.weights.fine_tune=0")
    stage = RestorationStage(stage_of(config, "lemma", *given))
    assert not any("reader" in name for name in stage.state_dict())
    batch = EncodedCrops(TextZoomDataset(tmp_path / "train.lmdb"), 26).__getitems__([0, 3])
    terms = stage.terms(batch, 0, 1)
    torch.testing.assert_close(terms["loss"], terms["pixel"] + 0.5 * terms["reader"])
    terms["reader"].backward()
    assert stage.network.stem.weight.grad.abs().sum() > 0


def test_a_reader_that_cannot_be_used_is_one_sentence(tmp_path):
    (tmp_path / "reader.onnx").write_text("not found")
    given = ("loss.reader=0.5", f"loss.reader_onnx={tmp_path / 'reader.onnx'}")
    with pytest.raises(SettingsError, match=r"loss.reader_onnx: .*reader.onnx is not an ONNX file"):
        RestorationStage(stage_of(write_config(tmp_path), "lemma", *given))
