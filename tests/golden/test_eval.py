"""Evaluation mode against the published network: every stored tensor of both seeds, and ties."""

from types import SimpleNamespace

import pytest
import torch
from published_network import filled_state, golden, images, largest_deviation
from torch import Tensor

from lemma_fast import LEMMA, Prior
from lemma_fast.checkpoint import from_published
from lemma_fast.ops import reference

# Absolute, from the published network's own fp32 noise (2.5e-5 at most).
TOLERANCE = {
    "sr": 3e-5,
    "attn_map": 3e-5,
    "score": 3e-5,
    "img_logits": 2e-4,
    "text_logits": 2e-4,
    "guidance": 1e-4,
    **{f"block{i}": 1e-4 for i in range(1, 9)},
    "pt_lengths": 0,
    "selected": 0,
}
INPUTS = {"seed", "lr_u8", "selection_gap"}


def recorded_forward(model: LEMMA, lr: Tensor) -> dict[str, Tensor]:
    """What the published code calls its intermediates, from one forward pass."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda _module, _inputs, output: seen.update({name: output})

    modules = {"block1": model.stem_act, "guidance": model.guidance}
    modules |= {f"block{i + 2}": block for i, block in enumerate(model.blocks)}
    # The published block 7 ends before the sum that `tail` makes.
    modules |= {"block7": model.tail.norm, "block8": model.upsampler}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    compress_select = model.guidance.compress_select

    def recording(*args):
        score, index = compress_select(*args)
        seen.update(score=score.flatten(1), selected=index)
        return score, index

    model.guidance.compress_select = recording
    sr, prior = model(lr)
    model.guidance.compress_select = compress_select
    for handle in handles:
        handle.remove()
    return {**seen, "sr": sr, **prior._asdict()}


@pytest.mark.parametrize("seed", [1, 2])
def test_every_stored_tensor(seed: int) -> None:
    name = f"eval_seed{seed}"
    with torch.no_grad():
        actual = recorded_forward(from_published(filled_state(seed)), images(name))
    for key in set(golden(name).files) - INPUTS:
        assert largest_deviation(actual[key], name, key) <= TOLERANCE[key], key


def test_ties_go_to_the_lower_raster_index() -> None:
    stored, evaluation = golden("ties_seed1"), golden("eval_seed1")
    attn_map = torch.from_numpy(stored["attn_map"])
    lengths = torch.from_numpy(stored["pt_lengths"])
    logits = torch.from_numpy(evaluation["text_logits"][:2])
    features = torch.from_numpy(evaluation["block1"])
    guidance = from_published(filled_state(1)).guidance
    with torch.no_grad():
        index = reference.compress_select(attn_map, lengths, 500, (16, 64))[1]
        actual = guidance(features, Prior(attn_map, logits, logits, lengths), attn_map)
    assert index.tolist() == stored["selected"].tolist()
    assert largest_deviation(actual, "ties_seed1", "guidance") <= 1e-4


def test_any_table_with_the_six_functions_serves() -> None:
    called: list[str] = []

    def spying(name: str):
        def spy(*args, **kwargs):
            called.append(name)
            return getattr(reference, name)(*args, **kwargs)

        return spy

    table = SimpleNamespace(**{name: spying(name) for name in reference.__all__})
    model = LEMMA(ops=table)
    model.load_state_dict(from_published(filled_state(1)).state_dict())
    with torch.no_grad():
        sr, _ = model.eval()(images("eval_seed1")[:1])
    expected = torch.from_numpy(golden("eval_seed1")["sr"][:1])
    torch.testing.assert_close(sr, expected, atol=TOLERANCE["sr"], rtol=0)
    assert set(called) == set(reference.__all__)
