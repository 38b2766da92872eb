"""What LEMMA is compared with: the networks of the paper's Table 3.

    model = create_baseline("srresnet")                  # the paper's sizes, untrained
    sr = model(lr)                                       # [N, 4, 16, 64] to [N, 4, 32, 128]
    model = open_network("runs/small/srresnet/best.safetensors")    # or a LEMMA, or "bicubic"
    model = open_network("tatt.pth", text_prior="crnn.pth")         # published checkpoints

All take the three colours, or four channels with LEMMA's mask, and double both sides.
"""

from lemma_fast.baselines.base import Baseline
from lemma_fast.baselines.bicubic import Bicubic
from lemma_fast.baselines.c3stisr import C3STISR
from lemma_fast.baselines.config import (
    NOT_IMPLEMENTED,
    BaselineConfig,
    check_name,
    list_baselines,
)
from lemma_fast.baselines.files import (
    convert,
    from_published,
    load_baseline,
    open_network,
    save_baseline,
)
from lemma_fast.baselines.pcan import PCAN
from lemma_fast.baselines.rcan import RCAN
from lemma_fast.baselines.registry import build_baseline, create_baseline
from lemma_fast.baselines.san import SAN
from lemma_fast.baselines.srcnn import SRCNN
from lemma_fast.baselines.srresnet import SRResNet
from lemma_fast.baselines.tatt import TATT
from lemma_fast.baselines.tbsrn import TBSRN
from lemma_fast.baselines.tsrn import TSRN

__all__ = [
    "C3STISR",
    "NOT_IMPLEMENTED",
    "PCAN",
    "RCAN",
    "SAN",
    "SRCNN",
    "TATT",
    "TBSRN",
    "TSRN",
    "Baseline",
    "BaselineConfig",
    "Bicubic",
    "SRResNet",
    "build_baseline",
    "check_name",
    "convert",
    "create_baseline",
    "from_published",
    "list_baselines",
    "load_baseline",
    "open_network",
    "save_baseline",
]
