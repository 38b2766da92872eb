"""The estimate of an H100's time: its arithmetic, and that the page shows its table."""

import json
import re
from pathlib import Path

import estimate
import pytest
import torch
from graph_nodes import BUDGET

from lemma_fast.ops import extension

PAGE = Path(__file__).resolve().parents[3] / "docs" / "kernels.md"


def test_a_product_takes_whole_waves():
    sizes = (128 * 132, 128, 1024, 1, True)
    one = estimate.product_us(*sizes)
    assert estimate.product_us(2 * 128 * 132, *sizes[1:]) == pytest.approx(2 * one)
    # One row more begins another wave; a product of few rows does not fill one.
    assert estimate.product_us(128 * 132 + 1, *sizes[1:]) > 1.2 * one
    assert (
        estimate.product_us(16, 16, 4096, 1, True)
        > 4 * estimate.product_us(16, 16, 1024, 1, True) - 1
    )
    flops = 2 * 8192**3
    assert estimate.product_us(8192, 8192, 8192, 1, True) == pytest.approx(flops / 575e6, rel=0.05)
    assert estimate.product_us(8192, 8192, 8192, 1, False) == pytest.approx(flops / 50e6)


def test_what_is_expanded_is_moved_once():
    assert estimate.touched(torch.zeros(3, 5)) == 60
    assert estimate.touched(torch.zeros(1, 5).expand(7, -1)) == 20
    assert estimate.touched(torch.zeros(2, 5, dtype=torch.bfloat16)) == 20


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
def test_the_page_shows_the_estimate():
    found = estimate.rows(torch.bfloat16)
    budget = json.loads(BUDGET.read_text("utf-8"))["bfloat16"]
    assert {row["stage"]: row["nodes"] for row in found}.items() <= budget.items()
    # More images take longer, and no node less than the gap after it.
    for row in found:
        assert row["us 64"] >= row["us 1"] >= row["nodes"]
    shown = re.search(r"<!-- estimate -->\n(.*?)<!-- /estimate -->", PAGE.read_text("utf-8"), re.S)
    assert shown is not None
    assert shown[1].strip() == estimate.as_table(found)
