"""How close a fused operation must come to its reference; one place for every parity test."""

from torch import Tensor

# ||a - b|| / ||b|| in fp32; gradients may be five times as far.
FORWARD, BACKWARD = 1e-5, 5e-5
# Gradients of many rows through ReLU, PReLU or a maximum: where rounding decides the side of a few
# units, each moves the whole by about 1 / sqrt(units).
KINKS = 2e-3


def relative(got: Tensor, expected: Tensor, floor: float = 1e-6) -> float:
    """||got - expected|| / ||expected||, the divisor at least `floor`."""
    distance = (got.detach().double() - expected.detach().double()).norm()
    return float(distance / expected.detach().double().norm().clamp_min(floor))


def assert_close(got: Tensor, expected: Tensor, limit: float) -> None:
    """Same shape and dtype, finite where expected is, and a relative error within `limit`."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    difference = (got.double() - expected.double()).norm()
    assert difference <= limit * expected.double().norm() + 1e-12, (
        f"relative error {difference / expected.double().norm():.2e}, allowed {limit:.0e}"
    )


def assert_as_good_as(got: Tensor, rounded: Tensor, exact: Tensor) -> None:
    """`got` may stray from `exact` (fp64) at most twice as far as `rounded` does."""
    assert got.dtype == rounded.dtype
    allowed = 2 * (rounded.double() - exact).abs().max() + 1e-6
    assert (got.double() - exact).abs().max() <= allowed
