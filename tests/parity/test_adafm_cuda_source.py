"""AdaFM's CUDA source, run on an emulator (tests/emulator), against the reference."""

import numpy as np
import pytest
import torch
from adafm_case import (
    Pass,
    draw_weights,
    flatten,
    is_statistic,
    map_weights,
    named,
    reference_pass,
)
from closeness import BACKWARD, FORWARD, relative
from emulator import build
from torch import Tensor

from lemma_fast.ops import reference
from lemma_fast.ops.weights import AdaFMWeights

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Relative errors ||a - b|| / ||b|| by what is multiplied; gradients may stray five times as far.
TOLERANCE = {"fp32": FORWARD, "tf32": 2e-3, "fp16": 5e-3, "bf16": 2e-2}
DTYPE = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@pytest.fixture(scope="module")
def emulator():
    return build.load()


# One thread far ahead of all others, or far behind: what is not synchronised shows in one of them.
@pytest.fixture(params=[False, True], ids=["lowest-first", "highest-first"])
def ordered(request, emulator):
    emulator.run_highest_first(request.param)
    return emulator


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory; 16-bit numbers as integers, because NumPy has no bf16."""
    assert tensor.is_contiguous()
    return tensor.view(torch.int16).numpy() if tensor.element_size() == 2 else tensor.numpy()


def arrays(weights: AdaFMWeights) -> list[np.ndarray]:
    return [array(tensor) for tensor in flatten(weights)]


def shape_of(emulator, features: Tensor, kind: str):
    N, C, H, W = features.shape
    return emulator.Shape(N, C, H * W, NUMBERS[features.dtype], kind == "tf32")


def draw(N: int, C: int, H: int, W: int, kind: str) -> tuple[Tensor, Tensor, AdaFMWeights]:
    # The guidance is far from its mean of 0, which is hard on a variance.
    features = torch.randn(N, C, H, W).to(DTYPE[kind])
    guidance = (2 * torch.randn(N, C, H, W) + 5).to(DTYPE[kind])
    return features, guidance, draw_weights(C, H, W)


def infer(
    emulator,
    features: Tensor,
    guidance: Tensor,
    weights: AdaFMWeights,
    kind: str,
    channels_last: bool = False,
) -> Tensor:
    shape = shape_of(emulator, features, kind)
    if channels_last:
        features, guidance = (x.permute(0, 2, 3, 1).contiguous() for x in (features, guidance))
    out = torch.full_like(features, float("nan"))
    maps = array(features), array(guidance)
    emulator.inference(shape, channels_last, *maps, arrays(weights), array(out))
    return out.permute(0, 3, 1, 2) if channels_last else out


def run(
    emulator,
    features: Tensor,
    guidance: Tensor,
    weights: AdaFMWeights,
    training: bool,
    grad: Tensor,
    kind: str,
) -> Pass:
    shape = shape_of(emulator, features, kind)
    weights = map_weights(weights, torch.clone)
    out = torch.full_like(features, float("nan"))
    given = (array(features), array(guidance))
    saved = emulator.forward(shape, training, *given, arrays(weights), array(out))
    found = map_weights(weights, lambda tensor: torch.full_like(tensor, float("nan")))
    inputs = torch.full_like(features, float("nan")), torch.full_like(guidance, float("nan"))
    emulator.backward(
        shape,
        training,
        array(grad),
        *given,
        arrays(weights),
        saved,
        *map(array, inputs),
        arrays(found),
    )
    gradients = {name: x for name, x in named(found).items() if not is_statistic(name)}
    return Pass(
        out,
        {name: x for name, x in named(weights).items() if is_statistic(name)},
        {"features": inputs[0], "guidance": inputs[1]} | gradients,
    )


# 15 positions are less than a warp's tile and cannot be read in one access; 288 are more than a
# block's, and 20 channels fewer than the tile has.
@pytest.mark.parametrize("size", [(2, 64, 3, 5), (1, 20, 4, 72)], ids=str)
@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_inference(ordered, size, kind, last):
    features, guidance, weights = draw(*size, kind)
    out = infer(ordered, features, guidance, weights, kind, last)
    expected = reference.adafm(features.double(), guidance.double(), widened(weights), False)
    assert relative(out, expected) <= TOLERANCE[kind]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_inference_of_an_odd_number_of_channels_last(emulator, kind):
    """They cannot be moved in pairs."""
    features, guidance, weights = draw(2, 7, 3, 5, kind)
    out = infer(emulator, features, guidance, weights, kind, True)
    expected = reference.adafm(features.double(), guidance.double(), widened(weights), False)
    assert relative(out, expected) <= TOLERANCE[kind]


def widened(weights: AdaFMWeights) -> AdaFMWeights:
    return map_weights(weights, Tensor.double)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_forward_and_backward(ordered, training):
    """Output, running statistics and every gradient, in fp32."""
    features, guidance, weights = draw(2, 20, 3, 28, "fp32")
    grad = torch.randn_like(features)
    got = run(ordered, features, guidance, weights, training, grad, "fp32")
    expected = reference_pass(features, guidance, weights, training, grad)
    assert relative(got.out, expected.out) <= FORWARD
    for name, statistic in expected.statistics.items():
        assert relative(got.statistics[name], statistic) <= FORWARD, name
    # Biases before a norm have a gradient of zero in training: rounding alone is left of them.
    rounding = 1e-7 * max(float(gradient.norm()) for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        error = float((got.gradients[name].double() - gradient).norm())
        assert error <= BACKWARD * float(gradient.norm()) + rounding, name


def test_statistics_of_many_parts(emulator):
    """Five images leave more partial statistics than a warp has lanes."""
    features, guidance, weights = draw(5, 4, 2, 3, "fp32")
    expected = reference_pass(features, guidance, weights, True, torch.zeros_like(features))
    out = torch.full_like(features, float("nan"))
    shape, given = shape_of(emulator, features, "fp32"), (array(features), array(guidance))
    emulator.run_highest_first(False)
    emulator.forward(shape, True, *given, arrays(weights), array(out))
    assert relative(out, expected.out) <= FORWARD
    for name, statistic in expected.statistics.items():
        assert relative(named(weights)[name], statistic) <= FORWARD, name


@pytest.mark.parametrize("kind", ["tf32", "fp16", "bf16"])
def test_forward_and_backward_at_low_precision(emulator, kind):
    """All gradients as one vector, with slopes near 1: a kink would multiply the rounding."""
    features, guidance, weights = draw(2, 64, 3, 12, kind)
    for name, tensor in named(weights).items():
        if name.endswith("slope"):
            tensor.fill_(0.95)
    grad = torch.randn_like(features)
    got = run(emulator, features, guidance, weights, True, grad, kind)
    expected = reference_pass(features, guidance, weights, True, grad)
    assert relative(got.out, expected.out) <= TOLERANCE[kind]
    for name, statistic in expected.statistics.items():
        assert relative(got.statistics[name], statistic) <= TOLERANCE[kind], name
    both = [
        torch.cat([part.gradients[name].double().flatten() for name in expected.gradients])
        for part in (got, expected)
    ]
    assert relative(*both) <= 5 * TOLERANCE[kind]


def test_both_orders_give_the_same_bits(emulator):
    features, guidance, weights = draw(1, 8, 2, 9, "fp32")
    grad = torch.randn_like(features)
    results = []
    for highest_first in (False, True):
        emulator.run_highest_first(highest_first)
        one = run(emulator, features, guidance, weights, True, grad, "fp32")
        results.append([one.out, *one.statistics.values(), *one.gradients.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nan_stays_in_its_image(emulator):
    features, guidance, weights = draw(3, 64, 3, 5, "bf16")
    clean = infer(emulator, features, guidance, weights, "bf16")
    features[1, 7, 2, 1] = float("nan")
    out = infer(emulator, features, guidance, weights, "bf16")
    assert out[1].isnan().all()
    assert torch.equal(out[::2], clean[::2])


def test_nothing_is_done_for_no_images(emulator):
    features, guidance, weights = draw(0, 64, 3, 5, "fp32")
    assert infer(emulator, features, guidance, weights, "fp32").shape == (0, 64, 3, 5)
    found = run(emulator, features, guidance, weights, False, features, "fp32")
    assert all(torch.equal(x, named(weights)[n]) for n, x in found.statistics.items())


@pytest.mark.parametrize(("C", "P"), [(64, 1024), (7, 15)])
@pytest.mark.parametrize("number", [0, 1])
def test_what_is_kept_is_linear_in_the_images(emulator, C, P, number):
    """So that its size can be computed for a number of images that is a symbol."""
    none, one, many = (
        emulator.saved_bytes(emulator.Shape(N, C, P, number, False)) for N in (0, 1, 13)
    )
    assert many == none + 13 * (one - none)


def test_limits_are_named(emulator):
    features, guidance, weights = draw(1, 65, 1, 2, "fp32")
    with pytest.raises(RuntimeError, match="1 to 64 channels"):
        infer(emulator, features, guidance, weights, "fp32")
    features, guidance, weights = draw(1, 4, 1, 1, "fp32")
    with pytest.raises(RuntimeError, match="more than one value a channel"):
        run(emulator, features, guidance, weights, True, features, "fp32")
