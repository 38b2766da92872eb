"""The C++ operations for the CPU against PyTorch: values, layouts, edges, every vector width."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from adafm_case import draw_weights
from closeness import FORWARD, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from lemma_fast import LEMMA, LemmaConfig
from lemma_fast.config import PriorConfig
from lemma_fast.ops import cpu, extension, reference
from lemma_fast.ops.weights import BiGRUWeights

pytestmark = pytest.mark.skipif(not cpu.available(), reason=str(extension.missing()))

LAST = torch.channels_last
DRAWN = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["", "baseline", "avx2", "avx512"], ids=lambda level: level or "best")
def level(request, monkeypatch):
    """The instructions that the operations take; they choose themselves where none are named."""
    monkeypatch.setenv("LEMMA_FAST_CPU", request.param)
    if request.param not in ("", extension.build_info()["cpu"]):
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def gru(channels: int, hidden: int) -> BiGRUWeights:
    weights = torch.nn.GRU(channels, hidden, bidirectional=True).parameters()
    return BiGRUWeights(*(weight.detach() for weight in weights))


def widened(weights: BiGRUWeights) -> BiGRUWeights:
    return BiGRUWeights(*(weight.double() for weight in weights))


def exact_bigru(features: torch.Tensor, axis: int, weights: BiGRUWeights) -> torch.Tensor:
    return reference.bigru(features.double(), axis, widened(weights)).float()


def test_one_face():
    for name in reference.__all__:
        of_native, of_reference = getattr(cpu, name), getattr(reference, name)
        assert inspect.signature(of_native) == inspect.signature(of_reference)


# The GRU


@pytest.mark.parametrize("axis", [2, 3])
def test_bigru_at_the_models_sizes(level, axis):
    weights = gru(64, 32)
    features = (2 * torch.randn(2, 64, 16, 64)).to(memory_format=LAST)
    packed = cpu.pack_bigru(weights)
    got = torch.ops.lemma_fast.bigru_cpu(features, packed, 32, axis)
    assert_close(got, exact_bigru(features, axis, weights), FORWARD)


@DRAWN
@given(
    N=st.sampled_from([0, 1, 3]),
    C=st.integers(1, 70),
    hidden=st.sampled_from([1, 15, 16, 17, 32, 64]),
    lines=st.integers(1, 11),
    steps=st.sampled_from([1, 2, 5, 128]),
    axis=st.sampled_from([2, 3]),
    wide=st.booleans(),
)
def test_bigru_of_drawn_shapes(N, C, hidden, lines, steps, axis, wide):
    weights = gru(C, hidden)
    size = (steps, lines) if axis == 2 else (lines, steps)
    features = torch.randn(N, C, *size)
    if N > 0:
        packed = cpu.pack_bigru(weights)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("LEMMA_FAST_CPU", "" if wide else "baseline")
            got = cpu.bigru_packed(features, axis, packed, hidden)
        assert_close(got, exact_bigru(features, axis, weights), FORWARD)
    else:
        assert cpu.bigru(features, axis, weights).shape == (0, 2 * hidden, *size)


def test_bigru_keeps_the_layout():
    weights = gru(12, 16)
    features = torch.randn(3, 12, 4, 6)
    expected = exact_bigru(features, 3, weights)
    padded = torch.randn(5, 24, 9, 7)
    view = padded[1:4, ::2, 2:6, :6].copy_(features)
    mirrored = features.transpose(2, 3).contiguous().transpose(2, 3)
    for given_features, layout in (
        (features, torch.contiguous_format),
        (features.to(memory_format=LAST), LAST),
        (view, torch.contiguous_format),
        (mirrored, torch.contiguous_format),
    ):
        got = cpu.bigru(given_features, 3, weights)
        assert_close(got, expected, FORWARD)
        assert got.is_contiguous(memory_format=layout)


def test_bigru_saturates_as_the_reference(level):
    weights = gru(8, 16)
    features = torch.randn(2, 8, 3, 5) * torch.tensor([1e2, 1e4])[:, None, None, None]
    features[0, 0, 0, 0], features[1, 1, 1, 1] = float("inf"), -float("inf")
    packed = cpu.pack_bigru(weights)
    got = torch.ops.lemma_fast.bigru_cpu(features, packed, 16, 2)
    torch.testing.assert_close(got, exact_bigru(features, 2, weights), equal_nan=True)


@pytest.mark.parametrize("axis", [2, 3])
def test_bigru_confines_nan_to_its_sequence(level, axis):
    weights = gru(8, 16)
    features = torch.randn(2, 8, 7, 9)
    features[1, 3, 4, 5] = float("nan")
    packed = cpu.pack_bigru(weights)
    got = torch.ops.lemma_fast.bigru_cpu(features, packed, 16, axis)
    expected = reference.bigru(features, axis, weights)
    assert expected.isnan().sum() > 0
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_bigru_does_not_depend_on_threads():
    weights, features = gru(20, 16), torch.randn(3, 20, 5, 7)
    before = torch.get_num_threads()
    results = []
    try:
        # With many threads, tiles are narrower.
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            results.append(cpu.bigru(features, 2, weights))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_bigru_refuses_what_it_cannot_take():
    weights, features = gru(8, 16), torch.randn(1, 8, 2, 3)
    packed = cpu.pack_bigru(weights)
    with pytest.raises(RuntimeError, match="axis is 1; 2 runs along the height"):
        cpu.bigru(features, 1, weights)
    with pytest.raises(RuntimeError, match="fp32"):
        cpu.bigru(features.double(), 2, weights)
    with pytest.raises(RuntimeError, match="they have 3 dimensions"):
        cpu.bigru(features[0], 2, weights)
    for wrong in (features[:, :7], torch.randn(1, 9, 2, 3)):
        with pytest.raises(RuntimeError, match="is not what [79] channels and 16 hidden units"):
            cpu.bigru_packed(wrong, 2, packed, 16)
    with pytest.raises(RuntimeError, match="8 channels and 0 hidden|hidden is 0"):
        cpu.bigru_packed(features, 2, packed, 0)
    with pytest.raises(ValueError, match=r"bias_hh_reverse is \(47,\), it must be \(48,\)"):
        cpu.pack_bigru(weights._replace(bias_hh_reverse=weights.bias_hh_reverse[1:]))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="has no gradient"):
        cpu.bigru(features.clone().requires_grad_(), 2, weights)


# Winograd's convolution


def exact_convolution(features, weight, bias, residual=None, activation="none"):
    out = F.conv2d(features.double(), weight.double(), bias.double(), padding=1)
    out = out if residual is None else out + residual
    return {"none": out, "relu": F.relu(out), "mish": F.mish(out)}[activation].float()


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("activation", ["none", "relu", "mish"])
def test_winograd_on_every_vector(level, activation, tile):
    features, residual = torch.randn(2, 24, 8, 11), torch.randn(2, 17, 8, 11)
    weight, bias = torch.randn(17, 24, 3, 3) / 15, torch.randn(17)
    code = {"none": 0, "relu": 1, "mish": 2}[activation]
    packed = cpu.pack_winograd(weight, tile)
    got = torch.ops.lemma_fast.winograd_cpu(features, packed, bias, residual, code)
    assert_close(got, exact_convolution(features, weight, bias, residual, activation), FORWARD)
    assert got.is_contiguous(memory_format=LAST)


@DRAWN
@given(
    N=st.integers(1, 5),
    C=st.integers(16, 70),
    D=st.integers(16, 70),
    H=st.integers(1, 10),
    W=st.integers(1, 10),
    tile=st.sampled_from([2, 4]),
    activation=st.sampled_from(["none", "relu", "mish"]),
    last=st.booleans(),
    added=st.booleans(),
)
def test_winograd_of_drawn_shapes(N, C, D, H, W, tile, activation, last, added):
    features = torch.randn(N, C, H, W)
    features = features.to(memory_format=LAST) if last else features
    weight, bias = torch.randn(D, C, 3, 3) / 15, torch.randn(D)
    residual = torch.randn(N, D, H, W) if added else None
    got = cpu.winograd(features, cpu.pack_winograd(weight, tile), bias, residual, activation)
    assert_close(got, exact_convolution(features, weight, bias, residual, activation), FORWARD)


@pytest.mark.parametrize("tile", [2, 4])
def test_winograd_of_many_images_and_channels(tile):
    """So many that they are taken in several groups, the last one smaller."""
    features = torch.randn(11, 128, 8, 32)
    weight, bias = torch.randn(128, 128, 3, 3) / 34, torch.randn(128)
    got = cpu.winograd(features, cpu.pack_winograd(weight, tile), bias)
    assert_close(got, exact_convolution(features, weight, bias), FORWARD)


def test_winograd_takes_views_and_empty_batches():
    features = torch.randn(2, 40, 9, 9)[:, ::2, 1:7, 2:]
    weight, bias = torch.randn(16, 20, 3, 3) / 13, torch.randn(16)
    packed = cpu.pack_winograd(weight)
    assert_close(
        cpu.winograd(features, packed, bias), exact_convolution(features, weight, bias), FORWARD
    )
    for shape in ((0, 20, 4, 4), (2, 20, 0, 4)):
        got = cpu.winograd(torch.zeros(shape), packed, bias)
        assert got.shape == (shape[0], 16, *shape[2:])


def test_winograd_confines_nan_to_its_image():
    features = torch.randn(3, 16, 8, 8)
    features[1, 2, 3, 4] = float("nan")
    packed = cpu.pack_winograd(torch.randn(16, 16, 3, 3))
    for activation in ("none", "relu", "mish"):
        got = cpu.winograd(features, packed, torch.zeros(16), None, activation)
        assert got[1].isnan().any()
        assert got[[0, 2]].isfinite().all()


def test_winograd_refuses_what_it_cannot_take():
    features, bias = torch.randn(1, 16, 4, 4), torch.zeros(16)
    packed = cpu.pack_winograd(torch.randn(16, 16, 3, 3))
    with pytest.raises(ValueError, match=r"not \[D, C, 3, 3\]"):
        cpu.pack_winograd(torch.randn(16, 16, 1, 3))
    with pytest.raises(ValueError, match="tile is 3"):
        cpu.pack_winograd(torch.randn(16, 16, 3, 3), 3)
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        cpu.winograd(features, packed, bias, None, "gelu")
    for wrong, message in (
        ((features.half(), packed, bias), "fp32"),
        ((features[0], packed, bias), "they have 3 dimensions"),
        ((torch.randn(1, 17, 4, 4), packed, bias), "must be transformed ones"),
        ((features, packed[:35], bias), "must be transformed ones"),
        ((features, packed, bias[1:]), r"the bias must be \[16\]"),
        ((features, packed, bias, features[:, :, 1:]), "of the result's shape"),
        ((features[:, :15], packed[:, :15].contiguous(), bias), "16 channels or more"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cpu.winograd(*wrong)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="has no gradient"):
        cpu.winograd(features, packed, bias.clone().requires_grad_())


# All of them


def test_one_variable_steers_every_operation(monkeypatch):
    """Each level rounds in its own way, so a level that is not taken shows."""
    if extension.build_info()["cpu"] == "baseline":
        pytest.skip("this machine has one level")
    features = torch.randn(2, 64, 16, 64).to(memory_format=LAST)
    packed_gru = cpu.pack_bigru(gru(64, 32))
    packed_weight, bias = cpu.pack_winograd(torch.randn(64, 64, 3, 3) / 24), torch.randn(64)
    weights = draw_weights(64, 16, 64)
    operations = (
        lambda: cpu.bigru_packed(features, 3, packed_gru, 32),
        lambda: cpu.winograd(features, packed_weight, bias, None, "mish"),
        lambda: cpu.adafm(features, features, weights, False),
    )
    for operation in operations:
        results = []
        for level in ("baseline", "avx2", "avx2"):
            monkeypatch.setenv("LEMMA_FAST_CPU", level)
            results.append(operation())
        assert not torch.equal(results[0], results[1])
        assert torch.equal(results[1], results[2])
    monkeypatch.setenv("LEMMA_FAST_CPU", "sse9")
    for operation in operations:
        with pytest.raises(RuntimeError, match="'sse9': it can be baseline, avx2 or avx512"):
            operation()
    with pytest.raises(ValueError, match="'sse9': it can be baseline, avx2 or avx512"):
        extension.build_info()


def test_registration():
    cpu.load()
    checks = ("test_schema", "test_faketensor")
    for last in (False, True):
        features = torch.randn(2, 64, 4, 6)
        features = features.to(memory_format=LAST) if last else features
        for operation, arguments in (
            (torch.ops.lemma_fast.bigru_cpu, (cpu.pack_bigru(gru(64, 16)), 16, 3)),
            (
                torch.ops.lemma_fast.winograd_cpu,
                (cpu.pack_winograd(torch.randn(20, 64, 3, 3)), torch.zeros(20)),
            ),
        ):
            torch.library.opcheck(operation.default, (features, *arguments), test_utils=checks)


def test_compiles_without_a_break():
    weights = gru(16, 8)
    packed, bias = cpu.pack_winograd(torch.randn(16, 16, 3, 3)), torch.zeros(16)
    gru_packed = cpu.pack_bigru(weights)

    def network(x):
        return cpu.bigru_packed(cpu.winograd(x, packed, bias, x, "mish"), 3, gru_packed, 8)

    features = torch.randn(2, 16, 4, 6)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features), network(features))


def test_a_network_takes_the_table():
    config = LemmaConfig(
        num_blocks=2,
        num_selected=40,
        rectification=False,
        prior=PriorConfig(
            widths=(8, 16, 16, 16, 32), depths=(1, 1, 1, 1, 1), feedforward=32, key_width=16
        ),
    )
    model = LEMMA(config).eval()
    fast = LEMMA(config, ops=cpu).eval()
    fast.load_state_dict(model.state_dict())
    image = torch.rand(2, 4, 16, 64)
    assert_close(fast(image)[0], model(image)[0], FORWARD)
