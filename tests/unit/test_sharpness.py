"""How sharp a crop is already, and what share of the result the network gets for it."""

import numpy as np
import pytest

from lemma_fast.sharpness import network_share, sharpness


def crop(rows, dark=0.2, light=0.9):
    """A crop whose rows have these shares of the way from dark to light."""
    levels = dark + (light - dark) * np.asarray(rows, dtype=np.float32)
    return np.broadcast_to(levels[None, :, None], (4, 16, 64)).astype(np.float32)


@pytest.mark.parametrize("contrast", [(0.2, 0.9), (0.9, 0.2), (0.4, 0.5)])
def test_a_step_is_measured_against_the_contrast(contrast):
    assert sharpness(crop([0] * 8 + [1] * 8, *contrast)) == pytest.approx(1, abs=1e-3)
    ramp = [0] * 6 + [0.2, 0.4, 0.6, 0.8] + [1] * 6
    assert sharpness(crop(ramp, *contrast)) == pytest.approx(0.2, abs=1e-3)


def test_only_steps_from_row_to_row_count():
    stripes = crop([0] * 8 + [1] * 8).transpose(0, 2, 1)[:, :16].repeat(4, axis=2)
    assert sharpness(np.ascontiguousarray(stripes)) == 0
    assert sharpness(crop([0.5] * 16)) == 0


def test_a_few_wild_pixels_do_not_count():
    ramp = crop([0] * 6 + [0.2, 0.4, 0.6, 0.8] + [1] * 6).copy()
    ramp[:, 0, :4] = 0.9
    assert sharpness(ramp) == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize(
    ("sharp", "share"), [(0, 1), (0.45, 1), (0.5, 0.75), (0.55, 0.5), (0.8, 0.5)]
)
def test_the_share_falls_with_sharpness(sharp, share):
    assert network_share(sharp) == pytest.approx(share)
