"""How feature maps [N, C, H, W] lie in memory: NCHW or channels-last."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_map(like: Tensor, channels: int) -> Tensor:
    """An uninitialised map [N, channels, H, W] that lies in memory as `like` does.

    Type and device are those of `like`. What could be either layout counts as NCHW.
    """
    N, _, H, W = like.shape
    if like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        return like.new_empty(N, H, W, channels).permute(0, 3, 1, 2)
    return like.new_empty(N, channels, H, W)
