"""The published numbers through the fused location kernels, one image, interpreted or on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from published_network import filled_state, golden, images

from lemma_fast import LEMMA, LemmaConfig
from lemma_fast.checkpoint import from_published
from lemma_fast.ops import fused, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = ("compress_select", "location_enhance", "gather_region")


@pytest.fixture(scope="module")
def run():
    """What one forward pass of the filled network gives with the three operations fused."""
    seen = {}

    def keeping(name):
        def call(*args):
            seen[name] = getattr(fused, name)(*args)
            return seen[name]

        return call

    table = {name: getattr(reference, name) for name in reference.__all__}
    table |= {name: keeping(name) for name in FUSED}
    model = LEMMA(LemmaConfig.base(), ops=SimpleNamespace(**table))
    model.load_state_dict(from_published(filled_state(1)).state_dict())
    model.to(DEVICE).eval()
    model.guidance.register_forward_hook(lambda _module, _in, out: seen.update(guidance=out))
    with torch.no_grad():
        seen["sr"], seen["prior"] = model(images("eval_seed1")[:1].to(DEVICE))
    return seen


def stored(key: str) -> torch.Tensor:
    return torch.from_numpy(golden("eval_seed1")[key][:1]).to(DEVICE)


def test_all_three_took_part(run):
    assert set(FUSED) <= run.keys()


def test_selection_is_exactly_the_published_one(run):
    assert torch.equal(run["prior"].pt_lengths, stored("pt_lengths"))
    assert torch.equal(run["compress_select"][1].int(), stored("selected").int())


@pytest.mark.parametrize(("key", "limit"), [("score", 3e-5), ("guidance", 1e-4), ("sr", 3e-5)])
def test_values_are_the_published_ones(run, key, limit):
    got = run["compress_select"][0].flatten(1) if key == "score" else run[key]
    assert (got - stored(key)).abs().max() <= limit
