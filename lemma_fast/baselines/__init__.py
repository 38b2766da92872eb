"""What LEMMA is compared with (the paper's Table 3), as far as it is small and fully described.

    model = create_baseline("srresnet")                  # the paper's sizes, untrained
    sr = model(lr)                                       # [N, 4, 16, 64] to [N, 4, 32, 128]
    model = open_network("runs/small/srresnet/best.safetensors")    # or a LEMMA, or "bicubic"

All take the three colours, or four channels with LEMMA's mask, and double both sides.
"""

from lemma_fast.baselines.config import (
    NOT_IMPLEMENTED,
    BaselineConfig,
    check_name,
    list_baselines,
)
from lemma_fast.baselines.files import load_baseline, open_network, save_baseline
from lemma_fast.baselines.networks import (
    SRCNN,
    TSRN,
    Baseline,
    Bicubic,
    SRResNet,
    build_baseline,
    create_baseline,
)

__all__ = [
    "NOT_IMPLEMENTED",
    "SRCNN",
    "TSRN",
    "Baseline",
    "BaselineConfig",
    "Bicubic",
    "SRResNet",
    "build_baseline",
    "check_name",
    "create_baseline",
    "list_baselines",
    "load_baseline",
    "open_network",
    "save_baseline",
]
