"""When cuDNN's convolution with a sum and a ReLU is used, and what is said where it is not."""

import cudnn_stand_in  # noqa: F401
import pytest
import torch

from lemma_fast.acceleration.epilogues import cudnn_missing
from lemma_fast.acceleration.folding import Affine
from lemma_fast.acceleration.layers import Conv, Plan, Product

CPU = torch.device("cpu")


@pytest.fixture
def hopper(monkeypatch):
    """A device with cuDNN; the tests' deterministic algorithms are off."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    torch.use_deterministic_algorithms(False)


def test_it_is_for_half_types_from_ampere_on(hopper, monkeypatch):
    assert cudnn_missing(CPU, torch.bfloat16) is None
    assert cudnn_missing(CPU, torch.float16) is None
    assert "not torch.float32" in cudnn_missing(CPU, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "not 7.5" in cudnn_missing(CPU, torch.float16)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert "no cuDNN" in cudnn_missing(CPU, torch.float16)


def test_deterministic_algorithms_leave_it_out(hopper, monkeypatch):
    torch.use_deterministic_algorithms(True)
    assert "deterministic" in cudnn_missing(CPU, torch.bfloat16)
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert "deterministic" in cudnn_missing(CPU, torch.bfloat16)


def test_without_a_plan_it_says_so(hopper, monkeypatch):
    def no_plan(x, weight, z, alpha, bias, stride, *rest):
        if stride == [2, 2]:
            raise RuntimeError("Unable to find an engine")
        return z

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", no_plan)
    assert cudnn_missing(CPU, torch.bfloat16) == (
        "cuDNN has no plan for it: Unable to find an engine"
    )


def test_the_schemas_are_those_that_the_layers_use():
    """Private names: 2.11's native_functions.yaml has the same."""
    where = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor"
    assert str(torch.ops.aten.cudnn_convolution_add_relu.default._schema) == (
        "aten::cudnn_convolution_add_relu(Tensor self, Tensor weight, Tensor z, Scalar? alpha, "
        f"Tensor? bias, {where}"
    )
    assert str(torch.ops.aten._addmm_activation.default._schema) == (
        "aten::_addmm_activation(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, "
        "Scalar alpha=1, bool use_gelu=False) -> Tensor"
    )


@pytest.mark.parametrize(
    ("C", "D", "activation", "used"),
    [(8, 16, "relu", True), (4, 16, "relu", False), (8, 12, "relu", False), (8, 16, "none", False)],
)
def test_channels_in_eights_and_a_relu(C, D, activation, used):
    plan = Plan(CPU, torch.float32, packed=False, cpp=False, fused=True, compiled=False, cudnn=True)
    weight = torch.zeros(D, C, 3, 3, dtype=torch.float64)
    affine = Affine(weight, torch.zeros(D, dtype=torch.float64))
    assert Conv(affine, plan, activation=activation).cudnn == used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(3, 8), (2, 3, 8), (0, 8)], ids=str)
def test_a_product_with_its_relu(dtype, rows):
    plan = Plan(CPU, dtype, packed=False, cpp=False, fused=True, compiled=False)
    affine = Affine(torch.randn(5, 8).double(), torch.randn(5).double())
    x = torch.randn(rows).to(dtype)
    expected = torch.nn.functional.linear(x, *(part.to(dtype) for part in affine)).relu()
    out = Product(affine, plan, relu=True)(x)
    torch.testing.assert_close(
        out, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )
