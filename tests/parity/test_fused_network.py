"""The accelerated network as CUDA runs it, on the CPU: kernels interpreted, cuDNN's part stood in.

What a GPU's plan has that a CPU's has not: sums, biases and activations inside convolutions and
products or in one pass after them, and the Triton kernels around them.
"""

from dataclasses import replace

import cudnn_stand_in
import pytest
import torch
from closeness import FORWARD, assert_close
from tiny_network import lived_in, tiny_config

pytest.importorskip("triton", reason="needs Triton: pip install 'lemma-fast[triton]'")

from lemma_fast import LEMMA, PriorConfig
from lemma_fast.acceleration.layers import Plan
from lemma_fast.acceleration.swap import folded
from lemma_fast.ops import extension

LIMITS = {torch.float32: FORWARD, torch.float16: 5e-3}


def plan_for(dtype: torch.dtype, **changes: bool) -> Plan:
    if compiled := extension.missing() is None:
        from lemma_fast.ops import adafm  # noqa: F401
    plan = Plan(torch.device("cpu"), dtype, packed=False, cpp=False, fused=True, compiled=compiled)
    return replace(plan, **changes)


@pytest.fixture(scope="module")
def model() -> LEMMA:
    prior = PriorConfig(
        stem_width=8,
        widths=(8, 8, 16, 16, 16),
        depths=(1, 1, 2, 1, 1),
        heads=2,
        feedforward=16,
        encoder_layers=1,
        key_width=8,
        language_layers=2,
    )
    return lived_in(tiny_config(alignment_layers=2, prior=prior))


def crops(count: int) -> torch.Tensor:
    return torch.rand(count, 4, 16, 64, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def compare(model: LEMMA, plan: Plan) -> None:
    lr = crops(2)
    sr, prior = folded(model, plan)(lr)
    expected, wanted = model(lr)
    assert torch.equal(prior.pt_lengths, wanted.pt_lengths)
    for got, right in zip((sr, *prior[:3]), (expected, *wanted[:3]), strict=True):
        assert_close(got.float(), right, LIMITS[plan.dtype])


@pytest.mark.parametrize(
    ("dtype", "cudnn"), [(torch.float32, True), (torch.float16, False)], ids=["cuDNN", "one pass"]
)
def test_it_is_the_reference(model, dtype, cudnn, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return cudnn_stand_in.convolution_add_relu(*arguments)

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", counted)
    compare(model, plan_for(dtype, cudnn=cudnn))
    # Each residual block has one.
    assert len(calls) == (sum(model.config.prior.depths) if cudnn else 0)
