"""The published network's numbers from its accelerated form, made from its state dict alone."""

import pytest
from closeness import FORWARD, assert_close
from published_network import filled_state, images, largest_deviation
from torch import Tensor, nn

from lemma_fast import accelerate

# As for the reference: absolute, from the published network's own fp32 noise.
TOLERANCE = {"sr": 3e-5, "attn_map": 3e-5, "img_logits": 2e-4, "text_logits": 2e-4, "pt_lengths": 0}


class Published(nn.Module):
    """What is known of the published class from outside: its parameters' names and shapes."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


@pytest.mark.parametrize("seed", [1, 2])
def test_stored_outputs_and_selection(seed: int) -> None:
    name = f"eval_seed{seed}"
    fast = accelerate(Published(filled_state(seed)))
    chosen = {}
    select = fast.network.guidance._select

    def recording(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score, chosen["selected"], order = select(*args)
        return score, chosen["selected"], order

    fast.network.guidance._select = recording
    sr, prior = fast(images(name))
    for key, value in {"sr": sr, **prior._asdict(), **chosen}.items():
        assert largest_deviation(value, name, key) <= TOLERANCE.get(key, 0), key
    # One image alone takes other forms of the largest convolutions.
    alone, _ = fast(images(name)[:1])
    assert_close(alone, sr[:1], FORWARD)
