"""The exponential average of a network's weights, which is what is validated and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_RAMP = 10


class Average:
    """Follows a network's state; with `decay` None it is the network's own, and costs nothing."""

    def __init__(
        self, network: nn.Module, decay: float | None, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """`state` is the average of an earlier chunk; the network is where it will train."""
        self.network, self.decay = network, decay
        self.state: dict[str, Tensor] | None = None
        if decay is not None:
            own = network.state_dict()
            begun = own if state is None else state
            self.state = {name: begun[name].detach().to(x, copy=True) for name, x in own.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after a step, at first fast."""
        if self.state is None or self.decay is None:
            return
        decay = min(self.decay, (1 + step) / (_RAMP + step))
        state = self.network.state_dict()
        floating = [name for name, tensor in state.items() if tensor.is_floating_point()]
        # One launch for all, where a loop would take longer than the step.
        torch._foreach_lerp_(
            [self.state[name] for name in floating], [state[name] for name in floating], 1 - decay
        )
        for name in state.keys() - set(floating):
            self.state[name].copy_(state[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in place of the network's weights."""
        if self.state is None:
            yield
            return
        own = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.network.load_state_dict(self.state)
        try:
            yield
        finally:
            self.network.load_state_dict(own)
