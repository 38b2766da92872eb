"""What PyTorch's settings allow the compiled operations, which cuDNN's would have to heed."""

from __future__ import annotations

import torch


# A compiled graph holds the answer; PyTorch compiles it again when the setting changes.
@torch.compiler.assume_constant_result
def convolutions_allow_tf32() -> bool:
    """Whether fp32 products that stand for convolutions may be TF32, as cuDNN's own would be."""
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"
