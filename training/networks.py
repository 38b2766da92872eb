"""What is trained and evaluated alike: LEMMA, and the baselines that it is compared with."""

from __future__ import annotations

from torch import Tensor

from lemma_fast.baselines import Baseline
from lemma_fast.model import LEMMA
from lemma_fast.model.prior import Prior


def super_resolve(model: LEMMA | Baseline, lr: Tensor) -> tuple[Tensor, Prior | None]:
    """Run either kind on RGB and mask [N, 4, 16, 64]; a baseline has no prior.

    The result has as many channels as the network: three colours, and the mask where it has one.
    """
    if isinstance(model, Baseline):
        return model(lr[:, : model.config.in_channels]), None
    sr, prior = model(lr)
    return sr, prior
