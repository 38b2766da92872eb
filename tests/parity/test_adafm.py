"""The compiled AdaFM against the reference on the CPU: values, gradients, statistics, edges."""

from types import SimpleNamespace

import pytest
import torch
from closeness import BACKWARD, FORWARD, assert_as_good_as
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lemma_fast.model.blocks import AdaFM
from lemma_fast.ops import extension, fused, reference
from lemma_fast.ops.precision import convolutions_allow_tf32

if (why := extension.missing()) is not None:
    pytest.skip(why, allow_module_level=True)

# Of these, batch norms take all but rounding away in training: what is left is noise.
SHIFTS = ("reduce.bias", "project.bias", "guidance_norm.bias")
# One number sums up terms of either sign, which may leave next to nothing of them.
SLOPES = ("act.weight",)


def module(C, size, dtype=torch.float32, ops=reference):
    """An AdaFM whose parameters and running statistics are all away from their first values."""
    torch.manual_seed(1)
    made = AdaFM(SimpleNamespace(channels=C, size=size), ops)
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1, 0.3)
            nn.init.normal_(part.bias, 0, 0.3)
            nn.init.normal_(part.running_mean, 0, 0.5)
            nn.init.uniform_(part.running_var, 0.3, 2)
        elif isinstance(part, nn.PReLU):
            nn.init.uniform_(part.weight, -0.5, 0.9)
    return made.to(dtype)


def maps(N, C, size, dtype=torch.float32):
    features = torch.randn(N, C, *size, dtype=torch.float64) * 2 + 0.3
    return features.to(dtype), (torch.randn(N, C, *size, dtype=torch.float64) - 1).to(dtype)


def statistics(made):
    return [buffer for buffer in made.buffers() if buffer.dtype.is_floating_point]


def distance(got, expected):
    return float((got.detach().double() - expected.detach().double()).norm())


def both(features, guidance, weights):
    return [ops.adafm(features, guidance, weights, False) for ops in (fused, reference)]


def assert_parity(features, guidance, training, exact=False):
    """Output, gradients of both maps and every parameter, and running statistics."""
    features, guidance = features.requires_grad_(), guidance.requires_grad_()
    _, C, *size = features.shape
    results = []
    for ops in (fused, reference):
        made = module(C, tuple(size), features.dtype)
        out = ops.adafm(features, guidance, made.weights(), training)
        torch.manual_seed(2)
        grad = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
        names = ["features", "guidance", *(name for name, _ in made.named_parameters())]
        grads = torch.autograd.grad(out, (features, guidance, *made.parameters()), grad)
        results.append((out, grads, statistics(made)))
    (out, grads, running), (expected, expected_grads, expected_running) = results
    forward, backward = (1e-12, 1e-11) if exact else (FORWARD, BACKWARD)
    assert out.dtype == expected.dtype
    assert distance(out, expected) <= forward * expected.norm()
    for got, wanted in zip(running, expected_running, strict=True):
        torch.testing.assert_close(got, wanted)
    for name, got, wanted in zip(names, grads, expected_grads, strict=True):
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        scale = wanted.norm()
        if name.endswith(SLOPES) or (training and name.endswith(SHIFTS)):
            scale = torch.maximum(scale, grad.norm())
        assert distance(got, wanted) <= backward * scale, name


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("N", [1, 3])
def test_parity_at_the_models_sizes(N, training):
    assert_parity(*maps(N, 64, (16, 64)), training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_fp64_is_exact(training):
    assert_parity(*maps(2, 18, (5, 7), torch.float64), training, exact=True)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    N=st.integers(1, 4),
    C=st.integers(1, 70),
    H=st.integers(1, 12),
    W=st.integers(1, 24),
    training=st.booleans(),
)
def test_drawn_shapes(N, C, H, W, training):
    # A handful of positions makes a variance near zero, which magnifies any rounding.
    assume(not training or N * H * W >= 24)
    assert_parity(*maps(N, C, (H, W)), training)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("N", [1, 2, 5])
def test_any_division_of_the_work(N, threads):
    """Fewer images than threads share their tiles; images may straddle two threads' shares."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for training in (False, True):
            assert_parity(*maps(N, 20, (9, 31)), training)
        features, guidance = maps(N, 20, (9, 31))
        weights = module(20, (9, 31)).weights()
        with torch.no_grad():
            got, expected = (
                ops.adafm(features, guidance, weights, False) for ops in (fused, reference)
            )
        assert distance(got, expected) <= FORWARD * expected.norm()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_what_older_processors_run(level, monkeypatch):
    best = extension.build_info()["cpu"]
    monkeypatch.setenv("LEMMA_FAST_CPU", level)
    assert extension.build_info()["cpu"] == ("baseline" if best == "baseline" else level)
    for C, size in ((20, (5, 19)), (64, (4, 33))):
        for training in (False, True):
            assert_parity(*maps(2, C, size), training)
    assert_parity(*maps(1, 9, (3, 9), torch.float64), True, exact=True)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_layouts(training):
    """Channels-last in, channels-last out; odd strides, expanded maps, two layouts at once."""
    dense, guidance = maps(2, 20, (3, 40))
    last = dense.to(memory_format=torch.channels_last)
    odd = torch.randn(3, 3, 23, 80)[1:, :, 2:22, ::2].transpose(1, 2)
    odd = odd.detach()
    expanded = dense[:, :, :1].expand(-1, -1, 3, -1)
    for features, other in (
        (last, guidance),
        (dense, last),
        (last, last.clone()),
        (odd, expanded),
        (dense[:, :, :, ::2], expanded[:, :, :, 1::2]),
    ):
        assert_parity(features.detach(), other.detach(), training)
    weights = module(20, (3, 40)).weights()
    last.requires_grad_()
    out = fused.adafm(last, guidance, weights, training)
    assert out.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(out.square().sum(), last)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        out = fused.adafm(last, guidance, weights, False)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert fused.adafm(dense, guidance, weights, False).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_half_types_round_no_worse_than_the_reference(dtype, training):
    features, guidance = maps(2, 20, (4, 12), dtype)
    rounded, exact, got = (
        ops.adafm(
            features.to(kind),
            guidance.to(kind),
            module(20, (4, 12), dtype).to(kind).weights(),
            training,
        ).detach()
        for ops, kind in ((reference, dtype), (reference, torch.float64), (fused, dtype))
    )
    assert_as_good_as(got, rounded, exact)


def test_half_maps_have_half_gradients():
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        inputs = [x.to(dtype).requires_grad_() for x in maps(2, 20, (4, 12), torch.bfloat16)]
        made = module(20, (4, 12))
        out = fused.adafm(*inputs, made.weights(), True)
        grad = torch.linspace(-1, 1, out.numel()).sin().view(out.shape).to(dtype)
        results.append(torch.autograd.grad(out, (*inputs, *made.parameters()), grad))
    assert [grad.dtype for grad in results[0][:3]] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    ]
    for got, expected in zip(results[0][:2], results[1][:2], strict=True):
        assert distance(got, expected) <= 2e-2 * expected.norm()


def test_autocast_and_mixed_types_give_the_reference_s_type():
    weights = module(20, (4, 12)).weights()
    features, guidance = maps(2, 20, (4, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        got, expected = (
            ops.adafm(features, guidance, weights, False) for ops in (fused, reference)
        )
    assert got.dtype == expected.dtype == torch.bfloat16
    assert distance(got, expected) <= 2e-2 * expected.float().norm()
    with torch.no_grad():
        got, expected = (
            ops.adafm(features, guidance.bfloat16(), weights, False) for ops in (fused, reference)
        )
    assert got.dtype == expected.dtype == torch.float32
    # The reference's norm rounds the guidance once more.
    assert distance(got, expected) <= 1e-2 * expected.norm()


def test_two_training_steps_leave_the_statistics_that_the_reference_leaves():
    """Momentum, unbiased variance, num_batches_tracked; then evaluation with them."""
    both = [module(20, (3, 5), ops=ops) for ops in (fused, reference)]
    for _ in range(2):
        features, guidance = maps(2, 20, (3, 5))
        for made in both:
            made(features, guidance)
    got, expected = (dict(made.named_buffers()) for made in both)
    assert int(got["out_norm.num_batches_tracked"]) == 2
    for name, wanted in expected.items():
        torch.testing.assert_close(got[name], wanted, msg=name)
    got, expected = (made.eval()(features, guidance) for made in both)
    assert distance(got, expected) <= FORWARD * expected.norm()


def test_evaluation_changes_no_statistics():
    made = module(20, (3, 5))
    before = [x.clone() for x in statistics(made)]
    features, guidance = maps(2, 20, (3, 5))
    fused.adafm(features.requires_grad_(), guidance, made.weights(), False).sum().backward()
    for old, new in zip(before, statistics(made), strict=True):
        assert torch.equal(old, new)


def test_nan_stays_in_its_image():
    features, guidance = maps(3, 20, (5, 40))
    weights = module(20, (5, 40)).weights()
    with torch.no_grad():
        clean = fused.adafm(features, guidance, weights, False)
    features[1, 5, 2, 3] = torch.nan
    features.requires_grad_()
    with torch.no_grad():
        folded = fused.adafm(features, guidance, weights, False)
    out = fused.adafm(features, guidance, weights, False)
    (grad,) = torch.autograd.grad(out.sum(), features)
    for result in (folded, out.detach()):
        # Through the gate, one position reaches the whole image.
        assert result[1].isnan().all()
        torch.testing.assert_close(result[[0, 2]], clean[[0, 2]])
    assert grad[1].isnan().any()
    assert not grad[[0, 2]].isnan().any()


def test_tf32_is_cudnns_choice():
    assert not convolutions_allow_tf32()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert not convolutions_allow_tf32()
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert convolutions_allow_tf32()


def test_an_empty_batch_passes():
    features, guidance = (x.requires_grad_() for x in maps(0, 20, (3, 5)))
    made = module(20, (3, 5))
    with torch.no_grad():
        assert fused.adafm(features, guidance, made.weights(), False).shape == (0, 20, 3, 5)
    out = fused.adafm(features, guidance, made.weights(), False)
    assert out.shape == (0, 20, 3, 5)
    for grad in torch.autograd.grad(out.sum(), (features, *made.parameters())):
        assert not grad.any()
    before = [x.clone() for x in statistics(made)]
    assert fused.adafm(features, guidance, made.weights(), True).shape == (0, 20, 3, 5)
    for old, new in zip(before, statistics(made), strict=True):
        assert torch.equal(old, new)


def test_images_beyond_two_to_the_31st_number(tmp_path):
    """The second image begins 2**31 numbers after the first, in a file that is mostly a hole."""
    C, size = 3, (2, 5)
    path = str(tmp_path / "hole")
    far = torch.from_file(path, shared=True, size=2**31 + 30, dtype=torch.float32)
    features = far.as_strided((2, C, *size), (2**31, 10, 5, 1))
    near, guidance = maps(2, C, size)
    features.copy_(near)
    weights = module(C, size).weights()
    with torch.no_grad():
        got, expected = (fused.adafm(x, guidance, weights, False) for x in (features, near))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("features", "guidance", "training", "message"),
    [
        (torch.zeros(2, 20, 4, 5), torch.zeros(2, 20, 4, 5), False, r"features are \(4, 5\)"),
        (
            torch.zeros(2, 20, 3, 5),
            torch.zeros(1, 20, 3, 5),
            False,
            r"5\] and guidance",
        ),
        (torch.zeros(2, 20, 15), torch.zeros(2, 20, 15), False, r"\[N, C, H, W\]"),
        (torch.zeros(2, 21, 3, 5), torch.zeros(2, 21, 3, 5), False, "21 channels"),
        (torch.zeros(2, 20, 3, 5).int(), torch.zeros(2, 20, 3, 5).int(), False, "int32"),
        (torch.zeros(2, 20, 3, 5), torch.zeros(2, 20, 3, 5, device="meta"), False, "meta"),
    ],
    ids=["size", "batch", "axes", "channels", "dtype", "device"],
)
def test_clear_errors(features, guidance, training, message):
    with pytest.raises(ValueError, match=message):
        fused.adafm(features, guidance, module(20, (3, 5)).weights(), training)


def test_one_position_has_no_batch_statistics():
    x = torch.zeros(1, 4, 1, 1)
    for ops in (fused, reference):
        with pytest.raises(ValueError, match="more than (one|1)"):
            ops.adafm(x, x, module(4, (1, 1)).weights(), True)


def test_parameters_of_the_wrong_size_are_refused():
    weights = module(20, (3, 5)).weights()
    broken = weights._replace(gate=(torch.zeros(20, 19, 1, 1), *weights.gate[1:]))
    features, guidance = maps(2, 20, (3, 5))
    for wanted in (False, True):
        with pytest.raises(RuntimeError, match="parameter 33 has 380 numbers, expected 400"):
            fused.adafm(features.requires_grad_(wanted), guidance, broken, False)
