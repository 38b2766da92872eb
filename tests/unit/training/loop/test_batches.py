"""Batches of a run: the order of crops, what is held out, and how ranks share them."""

import dataclasses
from itertools import chain

import pytest
import torch
from tiny_training import READING, stage_of, write_config

from lemma_fast.training.data.batches import Batches, EncodedCrops, InOrder, split
from lemma_fast.training.data.pairs import TextZoomDataset
from lemma_fast.training.loop.stages import STAGES
from lemma_fast.training.settings.values import SettingsError


def test_an_epoch_shows_each_crop_once_and_the_next_another_order():
    batches = list(Batches(21, 4, seed=3, first=0, last=10))
    first, second = list(chain(*batches[:5])), list(chain(*batches[5:]))
    assert len(set(first)) == len(set(second)) == 20
    assert first != second
    assert list(Batches(21, 4, seed=4, first=0, last=5)) != batches[:5]


def test_a_run_goes_on_in_the_middle_of_an_epoch():
    whole = list(Batches(21, 4, seed=3, first=0, last=12))
    assert list(Batches(21, 4, seed=3, first=7, last=12)) == whole[7:]


def test_ranks_share_the_batches_of_one_device():
    whole = list(Batches(21, 4, seed=3, first=2, last=9))
    parts = [list(Batches(21, 4, 3, 2, 9, rank, 2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(b) for b in whole]
    assert {len(batch) for part in parts for batch in part} == {2}
    judged = [list(InOrder(7, 2, rank, 2)) for rank in range(2)]
    assert sorted(chain(*chain(*judged))) == list(range(7))


def test_batches_that_cannot_be_made_are_refused():
    with pytest.raises(SettingsError, match="there are 3 training crops"):
        Batches(3, 4, 0, 0, 1)
    with pytest.raises(SettingsError, match="not divisible by 3 devices"):
        Batches(9, 4, 0, 0, 1, ranks=3)


def test_validation_is_held_out_of_the_training_data(tmp_path):
    data = stage_of(write_config(tmp_path), "lemma").data
    train, chosen, left_out = split(data)
    assert not left_out
    assert (len(train), len(chosen)) == (16, 4)
    assert not set(train.indices) & set(chosen.indices)
    _, fewer, _ = split(dataclasses.replace(data, validation_crops=2))
    assert set(fewer.indices) < set(chosen.indices)


def test_a_batch_is_of_the_crops_asked_for(tmp_path):
    data = stage_of(write_config(tmp_path), "lemma").data
    train, _, _ = split(data)
    batch = EncodedCrops(train, 26).__getitems__([3, 0])
    whole = TextZoomDataset(*data.train)
    for place, position in enumerate((3, 0)):
        crop = whole[train.indices[position]]
        torch.testing.assert_close(batch.hr[place].float() / 255, crop.hr[:3])
        assert batch.labels[place] == crop.label
    assert batch.prior_ids.shape == (2, 26) == batch.focus.inputs.shape


@pytest.mark.parametrize(
    ("stage", "overrides", "encodings"),
    [
        ("lemma", [], {"prior"}),
        ("lemma", ["loss.weights.fine_tune=0"], set()),
        ("lemma", READING, {"prior"}),
        ("lemma", ["model.text_prior=crnn"], {"ctc"}),
        ("prior", [], {"prior"}),
        ("prior", ["model.text_prior=crnn"], {"ctc"}),
        ("language", [], {"prior"}),
        ("text_focus", [], {"focus"}),
        ("crnn", [], {"ctc"}),
    ],
)
def test_a_stage_asks_for_the_encodings_that_it_uses(tmp_path, stage, overrides, encodings):
    settings = stage_of(write_config(tmp_path), stage, *overrides)
    module = STAGES[stage](settings)
    assert module.encodings == encodings
    train, _, _ = split(settings.data)
    batch = EncodedCrops(train, 26, False, module.encodings).__getitems__([0, 1])
    made = {"focus": batch.focus, "prior": batch.prior_ids, "ctc": batch.ctc}
    assert {name for name, labels in made.items() if labels is not None} == encodings
    # They are all that it needs.
    assert module(batch, 0, 0)["loss"].isfinite()
    assert module.eval().scores(batch)["loss"].isfinite().all()
