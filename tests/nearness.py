"""Whether a network answers as the reference does, given how far the reference strays from itself.

Rounding is not all that two right answers differ by: where scores nearly tie another position is
selected, and where a unit is nearly zero its gradient is or is not let through. So a limit is the
type's or twice what the reference itself strays: in the lower precision, or in fp32 with its input
moved by 1e-6. The packaged trained network is compared, since a random one nearly ties everywhere.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from lemma_fast import LEMMA, load

# Relative errors. In fp32 cuDNN may choose Winograd's or Fourier's way on one side; a single TF32
# product would stray by 3e-4.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
GRADIENT = 1e-2
# One position exchanged among the selected moves an image of the packaged network by up to 4e-4. In
# half precision another length may be read: text logits see other characters, and are others.
EXCHANGED = {"sr": 1e-3}
EXCHANGED_HALF = {"sr": 0.1, "text_logits": 1.0}
MOVED = 1e-6
PRIOR = ("attn_map", "img_logits", "text_logits")


def crops(count: int, device: str = "cpu") -> Tensor:
    """Noise [count, 4, 16, 64] in [0, 1), the same for a count."""
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 4, 16, 64, generator=generator).to(device)


def moved(lr: Tensor) -> Tensor:
    """`lr` with every value changed by about one part in a million."""
    generator = torch.Generator().manual_seed(0)
    return lr * (1 + MOVED * torch.randn(lr.shape, generator=generator).to(lr.device))


def errors(got: Tensor, expected: Tensor) -> Tensor:
    """Relative error of each image, [N] in fp64."""
    got, expected = (x.double().flatten(1) for x in (got, expected))
    return (got - expected).norm(dim=1) / expected.norm(dim=1)


def assert_outputs_near(
    network: nn.Module, reference: LEMMA, lr: Tensor, dtype: torch.dtype = torch.float32
) -> None:
    """Compare all outputs for crops `lr` with those of the fp32 `reference`."""
    half = dtype != torch.float32
    with torch.no_grad():
        expected, prior = reference(lr)
        with torch.autocast(lr.device.type, dtype, enabled=half):
            strayed, same = reference(lr if half else moved(lr))
        sr, read = network(lr)
    exchanged = EXCHANGED_HALF if half else EXCHANGED
    rows = {name: [getattr(each, name) for each in (read, prior, same)] for name in PRIOR}
    for name, row in {**rows, "sr": [sr, expected, strayed]}.items():
        _near(name, *row, LIMITS[dtype], exchanged.get(name, 0.0))
    if not half:
        assert torch.equal(read.pt_lengths, prior.pt_lengths)


def _near(
    name: str,
    got: Tensor,
    expected: Tensor,
    strayed: Tensor,
    limit: float,
    exchanged: float,
) -> None:
    """One image in four, or one, may be as far as `exchanged`."""
    assert got.shape == expected.shape, name
    assert got.dtype == torch.float32, name
    error = errors(got, expected)
    allowed = (2 * errors(strayed, expected)).clamp(min=limit)
    far = ~(error <= allowed)
    few = int(far.sum()) <= max(1, len(far) // 4)
    assert not far.any() or (few and bool((error <= allowed.clamp(min=exchanged)).all())), (
        f"{name}: relative errors {error.tolist()}, allowed {allowed.tolist()}"
    )


def trainable_reference(device: str = "cpu") -> LEMMA:
    """The packaged network in training mode, without dropout."""
    trained = load("small")
    config = trained.config
    prior = dataclasses.replace(config.prior, dropout=0.0)
    model = LEMMA(dataclasses.replace(config, dropout=0.0, prior=prior))
    model.load_state_dict(trained.state_dict())
    return model.to(device).train()


def gradients(network: nn.Module, lr: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients by parameter of the mean square of `sr`; `network` itself is left alone."""
    network = copy.deepcopy(network)
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(lr.device.type, dtype if half else None, enabled=half):
        sr, _ = network(lr)
    sr.double().square().mean().backward()
    return {n: p.grad.double() for n, p in network.named_parameters() if p.grad is not None}


def assert_gradients_near(
    network: nn.Module, reference: LEMMA, lr: Tensor, dtype: torch.dtype = torch.float32
) -> None:
    """Compare the gradients of one training step with those in fp64, parameter by parameter.

    A gradient may stray twice as far as the reference's own: biases before a batch norm have none
    but rounding, and others are small differences of large sums.
    """
    exact = gradients(copy.deepcopy(reference).double(), lr.double(), torch.float64)
    got, same, strayed = (
        gradients(each, given, dtype)
        for each, given in ((network, lr), (reference, lr), (reference, moved(lr)))
    )
    assert got.keys() == exact.keys()
    # Nothing that small decides where a step leads.
    least = 1e-6 * torch.stack([grad.norm() for grad in exact.values()]).norm()
    wrong = []
    for name, right in exact.items():
        error, *own = ((x[name] - right).norm() for x in (got, same, strayed))
        allowed = max(GRADIENT * right.norm(), *(2 * each for each in own)) + least
        if not error <= allowed:
            wrong.append(f"{name}: {error:.1e} off {right.norm():.1e}, allowed {allowed:.1e}")
    assert not wrong, "\n".join(wrong)
