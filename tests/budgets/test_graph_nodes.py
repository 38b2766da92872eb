"""The captured network keeps its budget of kernels, and has no dealings with the host."""

import json

import graph_nodes
import pytest
import torch
from graph_nodes import BUDGET, DTYPES, count

from lemma_fast.acceleration.swap import folded
from lemma_fast.ops import extension

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


def test_the_goal_is_kept():
    assert json.loads(BUDGET.read_text(encoding="utf-8"))["bfloat16"]["all"] <= 250


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_graph_keeps_its_budget(dtype):
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))[str(dtype).removeprefix("torch.")]
    one, many = count(dtype, (1, 64))
    found = many.by_stage()
    assert one.by_stage() == found
    assert one.host == many.host == []
    assert found.keys() == budget.keys()
    for stage, nodes in found.items():
        said = f"{stage}: {nodes} nodes, {budget[stage]} in {BUDGET.name}"
        assert nodes <= budget[stage], said
        assert nodes == budget[stage], f"{said}; lower it: python tests/graph_nodes.py --write"


class Chatty(torch.nn.Module):
    """A residual network that sees its input on the host, adds a number from there, and waits."""

    def __init__(self, module, how):
        super().__init__()
        self.module, self.how = module, how

    def forward(self, image):
        tokens = self.module(image)
        if self.how == "addition":
            return tokens + 1
        if self.how == "from the host":
            return tokens + torch.ones(tokens.shape[-1], dtype=tokens.dtype).to(tokens.device)
        if self.how == "to the host":
            tokens.cpu()
        return tokens


@pytest.mark.parametrize("how", ["addition", "from the host", "to the host"])
def test_what_is_added_is_seen(how, monkeypatch):
    def chatty(*given):
        network = folded(*given)
        network.prior.vision.resnet = Chatty(network.prior.vision.resnet, how)
        return network

    monkeypatch.setattr(graph_nodes, "folded", chatty)
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))["bfloat16"]
    (log,) = count(torch.bfloat16)
    assert log.by_stage()["residual network"] > budget["residual network"]
    assert bool(log.host) == (how != "addition")
