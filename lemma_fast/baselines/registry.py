"""From a name, a config or a published state dict to a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lemma_fast.baselines.base import Baseline
from lemma_fast.baselines.bicubic import Bicubic
from lemma_fast.baselines.c3stisr import C3STISR
from lemma_fast.baselines.config import BaselineConfig
from lemma_fast.baselines.pcan import PCAN
from lemma_fast.baselines.published import Published
from lemma_fast.baselines.rcan import RCAN
from lemma_fast.baselines.san import SAN
from lemma_fast.baselines.srcnn import SRCNN
from lemma_fast.baselines.srresnet import SRResNet
from lemma_fast.baselines.tatt import TATT
from lemma_fast.baselines.tbsrn import TBSRN
from lemma_fast.baselines.tsrn import TSRN
from lemma_fast.ops import Operations, reference

# A class that computes by LEMMA's operations takes their table, the others the config alone.
_PLAIN: dict[str, type[Baseline]] = {
    "bicubic": Bicubic,
    "srcnn": SRCNN,
    "srresnet": SRResNet,
    "rcan": RCAN,
    "san": SAN,
}
_WITH_OPERATIONS: dict[str, Callable[[BaselineConfig, Operations], Baseline]] = {
    "tsrn": TSRN,
    "tbsrn": TBSRN,
    "tg": TSRN,
    "tatt": TATT,
    "pcan": PCAN,
    "c3-stisr": C3STISR,
}
# In the order in which a state dict is tried: TSRN's tensors are in those of others too.
_PUBLISHED: dict[str, Published] = {
    "tbsrn": TBSRN.published,
    "tatt": TATT.published,
    "pcan": PCAN.published,
    "c3-stisr": C3STISR.published,
    "rcan": RCAN.published,
    "san": SAN.published,
    "tg": TSRN.published,
}


def create_baseline(name: str, *, ops: Operations = reference, **changes: int | bool) -> Baseline:
    """An untrained baseline with its paper's sizes, or entries of BaselineConfig changed."""
    return build_baseline(BaselineConfig.paper(name, **changes), ops)


def build_baseline(config: BaselineConfig, ops: Operations = reference) -> Baseline:
    """The network of a config; `ops` is LEMMA's table of operations."""
    if config.name in _PLAIN:
        return _PLAIN[config.name](config)
    return _WITH_OPERATIONS[config.name](config, ops)


def recognized(state: Mapping[str, Tensor]) -> tuple[str, Published] | None:
    """Which network's published state dict this is, None where it is no baseline's."""
    for name, published in _PUBLISHED.items():
        if published.signature in state:
            return name, published
    return None
