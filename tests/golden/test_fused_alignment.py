"""The published numbers through the fused alignment and GRU, one image, interpreted or on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from published_network import filled_state, golden, images

from lemma_fast import LEMMA, LemmaConfig
from lemma_fast.checkpoint import from_published
from lemma_fast.ops import fused, reference

pytest.importorskip("triton", reason="needs Triton: pip install 'lemma-fast[triton]'")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = ("bigru", "sparse_cross_attention")


def test_values_are_the_published_ones():
    called = []

    def counting(name):
        def call(*args):
            called.append(name)
            return getattr(fused, name)(*args)

        return call

    table = {name: getattr(reference, name) for name in reference.__all__}
    table |= {name: counting(name) for name in FUSED}
    model = LEMMA(LemmaConfig.base(), ops=SimpleNamespace(**table))
    model.load_state_dict(from_published(filled_state(1)).state_dict())
    model.to(DEVICE).eval()
    seen = {}
    for name, module in (
        ("guidance", model.guidance),
        *zip((f"block{i}" for i in range(2, 7)), model.blocks, strict=True),
    ):
        module.register_forward_hook(lambda _module, _in, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        seen["sr"], _ = model(images("eval_seed1")[:1].to(DEVICE))
    assert called == ["sparse_cross_attention"] + ["bigru"] * 10
    limits = {"sr": 3e-5, "guidance": 1e-4, **{f"block{i}": 1e-4 for i in range(2, 7)}}
    for key, limit in limits.items():
        stored = torch.from_numpy(golden("eval_seed1")[key][:1]).to(DEVICE)
        assert float((seen[key] - stored).abs().max()) <= limit, key
