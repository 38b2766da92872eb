"""Pixels, strings and intervals."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recognizer_fill import images

from lemma_fast.training.evaluation import metrics
from lemma_fast.training.evaluation.metrics import (
    TEXTZOOM_COUNTS,
    bootstrap_interval,
    edit_scores,
    official_average,
    official_psnr,
    official_ssim,
    psnr,
    ssim,
    textzoom_average,
    textzoom_interval,
    word_hits,
)

# the published functions' own numbers on these images
PUBLISHED = {
    "four images": (slice(0, 4), 20.654005451, 0.8791499296),
    "image 0": (slice(0, 1), 19.631535772, 0.8173148370),
    "image 2": (slice(2, 3), 23.182537590, 0.9455563747),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_official_forms_equal_the_published_ones(case):
    rows, expected_psnr, expected_ssim = PUBLISHED[case]
    sr, hr = images("sr")[rows], images("hr")[rows]
    assert official_psnr(sr, hr) == pytest.approx(expected_psnr, abs=1e-4)
    assert official_ssim(sr, hr) == pytest.approx(expected_ssim, abs=1e-5)
    assert official_psnr(sr.double(), hr.double()) == pytest.approx(expected_psnr, abs=1e-6)
    assert official_ssim(sr.double(), hr.double()) == pytest.approx(expected_ssim, abs=1e-6)


def test_official_forms_of_the_bicubic_baseline():
    bicubic = F.interpolate(images("lr")[:, :3], (32, 128), mode="bicubic", align_corners=False)
    assert official_psnr(bicubic, images("hr")) == pytest.approx(40.015903641, abs=1e-3)
    assert official_ssim(bicubic, images("hr")) == pytest.approx(0.9967570408, abs=1e-5)


def test_official_average_depends_on_the_batches():
    sr, hr = images("sr"), images("hr")
    whole = official_psnr(sr, hr)
    split = official_average([official_psnr(sr[:3], hr[:3]), official_psnr(sr[3:], hr[3:])])
    assert abs(whole - split) > 0.05
    assert official_psnr(hr, hr) == math.inf


def test_psnr_is_per_image_and_clamped():
    sr, hr = images("sr"), images("hr")
    values = psnr(sr, hr)
    assert values.shape == (4,)
    for n in range(4):
        # one image in range: both protocols agree
        assert values[n].item() == pytest.approx(
            official_psnr(sr[n : n + 1], hr[n : n + 1]), abs=1e-4
        )
    white = torch.ones(1, 3, 32, 128)
    assert psnr(1.5 * white, 0.9 * white).item() == pytest.approx(20.0, abs=1e-4)
    assert psnr(white, white).item() == math.inf


def test_ssim_is_per_image_and_by_the_definition():
    """Against NumPy, where the window lies inside the image."""
    sr, hr = images("sr"), images("hr")
    values = ssim(sr, hr)
    assert values.shape == (4,)
    assert ssim(sr[1:2], hr[1:2]).tolist() == pytest.approx(values[1:2].tolist(), abs=1e-6)
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def blur(x: np.ndarray) -> np.ndarray:
        return (np.lib.stride_tricks.sliding_window_view(x, (11, 11)) * window).sum((-1, -2))

    for n in range(4):
        channels = []
        for x, y in zip(sr[n, :3].double().numpy(), hr[n, :3].double().numpy(), strict=True):
            mx, my = blur(x), blur(y)
            top = (2 * mx * my + 0.01**2) * (2 * (blur(x * y) - mx * my) + 0.03**2)
            bottom = (mx**2 + my**2 + 0.01**2) * (
                blur(x * x) - mx**2 + blur(y * y) - my**2 + 0.03**2
            )
            channels.append((top / bottom).mean())
        assert values[n].item() == pytest.approx(np.mean(channels), abs=1e-5)


def test_half_types_are_measured_in_fp32():
    sr, hr = images("sr"), images("hr")
    rounded = sr.half()
    torch.testing.assert_close(psnr(rounded, hr), psnr(rounded.float(), hr))
    torch.testing.assert_close(ssim(rounded, hr), ssim(rounded.float(), hr))


def test_unequal_batches_are_refused():
    with pytest.raises(ValueError, match="of one size"):
        psnr(images("lr"), images("hr"))


def test_word_hits_filter_both_sides_and_count_two_empty_strings():
    hits = word_hits(["Don't", "a-b", "!", "x", ""], ["dont", "ab", "?", "y", "a"])
    assert hits.tolist() == [1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="zip"):
        word_hits(["a"], ["a", "b"])


def test_edit_scores():
    scores = edit_scores(["Kitten!", "", "", "abc"], ["sitting", "", "ab", "a"])
    assert scores.distances.tolist() == [3, 0, 2, 2]
    assert scores.lengths.tolist() == [7, 0, 2, 1]
    assert scores.one_ned.tolist() == pytest.approx([1 - 3 / 7, 1, 0, 1 - 2 / 3])
    assert scores.cer == pytest.approx(7 / 10)
    assert math.isnan(edit_scores([""], [""]).cer)


def test_textzoom_average_is_weighted():
    values = {"easy": 1.0, "medium": 0.5, "hard": 0.0}
    assert textzoom_average(values) == pytest.approx((1619 + 0.5 * 1411) / 4373)
    assert sum(TEXTZOOM_COUNTS.values()) == 4373
    with pytest.raises(ValueError, match="expected easy, medium, hard; got easy"):
        textzoom_average({"easy": 1.0})


def test_bootstrap_interval_is_near_the_textbook_one():
    values = np.random.default_rng(1).random(400) < 0.3
    mean, low, high = bootstrap_interval(values)
    half = 1.96 * math.sqrt(mean * (1 - mean) / 400)
    assert mean == values.mean()
    assert low == pytest.approx(mean - half, abs=0.01)
    assert high == pytest.approx(mean + half, abs=0.01)
    assert bootstrap_interval(values) == (mean, low, high)
    assert bootstrap_interval(values, seed=1) != (mean, low, high)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow.low < mean < narrow.high < high


def test_bootstrap_of_a_ratio():
    scores = edit_scores(["ab", "cd", ""] * 20, ["ab", "ce", ""] * 20)
    interval = bootstrap_interval(scores.distances, scores.lengths)
    assert interval.mean == pytest.approx(scores.cer) == 0.25
    assert interval.low < 0.25 < interval.high
    # where each image has the same rate, so has each resample, whatever the lengths
    lengths = np.arange(1.0, 30)
    assert bootstrap_interval(lengths / 4, lengths) == pytest.approx([0.25] * 3)


def test_draws_too_many_to_keep_give_the_same_interval(monkeypatch):
    rng = np.random.default_rng(0)
    values, counts = rng.random(50), rng.integers(1, 9, 50)
    sets = {name: rng.random(20 + n) for n, name in enumerate(TEXTZOOM_COUNTS)}
    kept = bootstrap_interval(values, counts), textzoom_interval(sets)
    # As it was before draws were kept: resample after resample.
    again = np.random.default_rng(0)
    picks = [again.integers(50, size=50) for _ in range(2000)]
    ratios = [values[pick].sum() / counts[pick].sum() for pick in picks]
    np.testing.assert_allclose(kept[0][1:], np.quantile(ratios, [0.025, 0.975]), rtol=1e-12)
    monkeypatch.setattr(metrics, "_DRAWS_KEPT", 0)
    monkeypatch.setattr(metrics, "_drawn", None)
    np.testing.assert_allclose(
        [bootstrap_interval(values, counts), textzoom_interval(sets)], kept, rtol=1e-12
    )


def test_bootstrap_refuses_nothing_to_measure():
    with pytest.raises(ValueError, match="N > 0"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="counts"):
        bootstrap_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval([1.0], confidence=95)


def test_textzoom_interval_resamples_each_subset():
    """Subsets without spread have none, whatever lies between them."""
    flat = {"easy": np.ones(50), "medium": np.zeros(40), "hard": np.zeros(30)}
    assert textzoom_interval(flat) == pytest.approx([1619 / 4373] * 3)
    varied = flat | {"hard": np.arange(30) % 2}
    interval = textzoom_interval(varied)
    assert interval.low < interval.mean < interval.high
