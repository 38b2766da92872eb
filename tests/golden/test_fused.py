"""The published numbers through the fused operations, one image, interpreted or on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from published_network import filled_state, golden, images

from lemma_fast import LEMMA, LemmaConfig
from lemma_fast.checkpoint import from_published
from lemma_fast.ops import extension, fused, reference

pytest.importorskip("triton", reason="needs Triton: pip install 'lemma-fast[triton]'")
if why := extension.missing():
    pytest.skip(why, allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def run():
    """What one forward pass of the filled network gives, and how often each operation ran."""
    seen = {"calls": []}

    def recording(name):
        def call(*args):
            seen["calls"].append(name)
            seen[name] = getattr(fused, name)(*args)
            return seen[name]

        return call

    table = SimpleNamespace(**{name: recording(name) for name in reference.__all__})
    model = LEMMA(LemmaConfig.base(), ops=table)
    model.load_state_dict(from_published(filled_state(1)).state_dict())
    model.to(DEVICE).eval()
    for i, block in enumerate(model.blocks):
        name = f"block{i + 2}"
        block.register_forward_hook(lambda _module, _in, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        seen["sr"], seen["prior"] = model(images("eval_seed1")[:1].to(DEVICE))
    seen["guidance"] = seen["sparse_cross_attention"]
    seen["score"] = seen["compress_select"][0].flatten(1)
    return seen


def stored(key: str) -> torch.Tensor:
    return torch.from_numpy(golden("eval_seed1")[key][:1]).to(DEVICE)


def test_every_operation_took_part(run):
    assert {name: run["calls"].count(name) for name in reference.__all__} == {
        "adafm": 5,
        "bigru": 10,
        "compress_select": 1,
        "gather_region": 1,
        "location_enhance": 1,
        "sparse_cross_attention": 1,
    }


def test_selection_is_exactly_the_published_one(run):
    assert torch.equal(run["prior"].pt_lengths, stored("pt_lengths"))
    assert torch.equal(run["compress_select"][1].int(), stored("selected").int())


@pytest.mark.parametrize("key", ["score", "sr", "guidance", *(f"block{i}" for i in range(2, 7))])
def test_values_are_the_published_ones(run, key):
    limit = 3e-5 if key in ("score", "sr") else 1e-4
    assert (run[key] - stored(key)).abs().max() <= limit
