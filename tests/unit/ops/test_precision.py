"""TF32 settings: right after either of PyTorch's interfaces was used, and left as they were."""

import contextlib

import pytest
import torch

from lemma_fast.kernels.bigru_step import sizes_and_blocks
from lemma_fast.kernels.sparse_cross_attention_backward import Sizes
from lemma_fast.ops.precision import convolutions_allow_tf32, products_allow_tf32, tensor_cores

cudnn, matmul, everything = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends
DEFAULT = ["none", "none", "none", "tf32", "tf32"]


def new() -> list[str]:
    return [part.fp32_precision for part in (everything, cudnn, matmul, cudnn.conv, cudnn.rnn)]


def old() -> list[object]:
    said = []
    for getter in (
        lambda: matmul.allow_tf32,
        lambda: cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            said.append(getter())
        except RuntimeError:
            said.append("refused")
    return said


@pytest.fixture(autouse=True)
def as_imported():
    """What PyTorch's settings are where nobody touched them, before and after."""

    def reset():
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = True
        for part in (everything, cudnn, matmul, torch.backends.mkldnn.matmul):
            part.fp32_precision = "none"
        assert (new(), old()) == (DEFAULT, [False, True, "highest"])

    reset()
    yield
    reset()


def use(part, precision: str):
    return lambda: setattr(part, "fp32_precision", precision)


#: What a user did before; whether it left the CPU's products alone, whose setting has a part in
#: `get_float32_matmul_precision`; what it allows products and convolutions.
USES = {
    "nothing": (lambda: None, True, (False, True)),
    "old, products": (lambda: setattr(matmul, "allow_tf32", True), True, (True, True)),
    "old, convolutions": (lambda: setattr(cudnn, "allow_tf32", False), True, (False, False)),
    "old, high": (lambda: torch.set_float32_matmul_precision("high"), False, (True, True)),
    "old, medium": (lambda: torch.set_float32_matmul_precision("medium"), False, (True, True)),
    "new, products": (use(matmul, "tf32"), True, (True, True)),
    "new, convolutions": (use(cudnn.conv, "ieee"), True, (False, False)),
    "new, recurrences": (use(cudnn.rnn, "ieee"), True, (False, True)),
    "new, CUDA": (use(cudnn, "tf32"), True, (True, True)),
    "new, everything": (use(everything, "tf32"), False, (True, True)),
}
NAMES = list(USES)


@pytest.mark.parametrize("tf32", [True, False, None])
@pytest.mark.parametrize("name", NAMES)
def test_settings_are_read_made_and_restored(name, tf32):
    before, _, allowed = USES[name]
    before()
    settings = new(), old()
    assert (products_allow_tf32(), convolutions_allow_tf32()) == allowed
    with contextlib.suppress(KeyError), tensor_cores(tf32):
        inside = products_allow_tf32(), convolutions_allow_tf32()
        assert inside == (allowed if tf32 is None else (tf32, tf32))
        assert tf32 is None or (cudnn.rnn.fp32_precision == "tf32") == tf32
        raise KeyError
    # What either interface says, errors included.
    assert (new(), old()) == settings


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("name", [name for name in NAMES if USES[name][1]])
def test_with_the_old_interface_its_getters_agree(name, tf32):
    USES[name][0]()
    settings, by_old = new(), old()
    with tensor_cores(tf32, old_interface=True):
        assert (products_allow_tf32(), convolutions_allow_tf32()) == (tf32, tf32)
        assert old() == [tf32, tf32, "high" if tf32 else "highest"]
    assert new() == settings
    assert old() == by_old or "refused" in by_old


def test_what_followed_the_setting_for_everything_still_does():
    everything.fp32_precision = "ieee"
    cudnn.conv.fp32_precision = "none"
    for old_interface in (False, True):
        with tensor_cores(True, old_interface):
            assert (products_allow_tf32(), convolutions_allow_tf32()) == (True, True)
        assert (products_allow_tf32(), convolutions_allow_tf32()) == (False, False)
    everything.fp32_precision = "tf32"
    assert (products_allow_tf32(), convolutions_allow_tf32()) == (True, True)


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("name", ["old, products", "new, convolutions"])
def test_kernels_take_what_products_may(name, tf32):
    USES[name][0]()
    with tensor_cores(tf32):
        features, weights = torch.zeros(1, 32, 4, 4), [torch.zeros(96, 32)] * 2
        taken = (
            sizes_and_blocks(features, 2, weights)[2][3],
            Sizes(*[16] * 7).launch(4)["PRECISION"],
        )
    assert taken == (("tf32", "tf32") if tf32 else ("tf32x3", "tf32x3"))
