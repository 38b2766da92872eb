"""The weights that come with the package: they load, and do better than bicubic as a rule."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lemma_fast import Upscaler, checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"


def psnr(image, truth):
    error = np.asarray(image, np.float64) - np.asarray(truth, np.float64)
    return 10 * np.log10(255**2 / np.mean(error**2))


def test_it_is_small_and_has_a_card():
    path = checkpoint.packaged()["small"]
    assert path.stat().st_size < 14e6
    assert path.with_suffix(".md").is_file()


@pytest.mark.parametrize("accelerate", [True, False])
def test_it_gains_over_bicubic_on_the_examples(accelerate):
    crops = sorted((EXAMPLES / "crops").glob("*.png"))
    results = Upscaler("small", device="cpu", accelerate=accelerate)(crops)
    gains = []
    for crop, result in zip(crops, results, strict=True):
        truth = Image.open(EXAMPLES / "hr" / crop.name).convert("RGB")
        bicubic = Image.open(crop).convert("RGB").resize(truth.size, Image.Resampling.BICUBIC)
        gains.append(psnr(result, truth) - psnr(bicubic, truth))
    # two of the eight lose: the card says so
    assert np.median(gains) > 1.5, gains
