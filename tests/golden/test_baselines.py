"""TBSRN, TG, TATT and PCAN against the published modules' numbers."""

import pytest
import torch
from baseline_fill import (
    DATA,
    assert_near,
    check_fill,
    golden,
    in_training,
    published_state,
    step,
)
from recognizer_fill import images, published_table

from lemma_fast.baselines import from_published

NAMES = ("tbsrn", "tg", "pcan", "tatt")


@pytest.mark.parametrize("name", NAMES)
def test_fill_rule_is_the_one_of_the_goldens(name):
    check_fill(name)


@pytest.mark.parametrize("name", ["tbsrn", "tg"])
def test_three_and_four_channels(name):
    for channels, count in ((3, 4), (4, 1)):
        model = from_published(published_state(name, channels=channels))
        seen = {}
        model.blocks[4].register_forward_hook(lambda _m, _i, out: seen.update(block=out))
        if name == "tbsrn":
            model.blocks[0].enhancer.register_forward_hook(
                lambda _m, _i, out: seen.update(enhancer=out)
            )
        with torch.no_grad():
            sr = model(images("lr")[:count, :channels])
        assert_near(sr, name, f"sr_c{channels}")
        if name == "tbsrn" and channels == 3:
            assert_near(seen["enhancer"][:, ::8], name, "enhancer_c8")
            assert_near(seen["block"][:, ::8], name, "block6_c8")


@pytest.mark.parametrize("name", ["tbsrn"])
def test_a_training_step(name):
    stored = golden(f"{name}_train_seed1")
    step(name).check(stored, "mse_only/" if "mse_only/loss" in stored else "")
