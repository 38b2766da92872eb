"""Dropout masks that can be replayed: Philox-4x32-10 as Triton's `tl.philox`, in plain torch.

An element's random number depends on the seed, the image, the site (which mask of which layer) and
the element's number within them alone; not on the size of the batch or on what ran before.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_ROUNDS = (0xD2511F53, 0xCD9E8D57)
_KEYS = (0x9E3779B9, 0xBB67AE85)


def dropout_mask(seed: Tensor, site: int, images: int, shape: tuple[int, ...], p: float) -> Tensor:
    """Masks [images, *shape] in fp32: 0 with probability `p`, else 1 / (1 - p).

    `seed` is one non-negative int64 number on the device that the masks are for.
    """
    elements = torch.Size(shape).numel()
    counter = torch.arange(elements, device=seed.device).expand(images, -1)
    image = torch.arange(images, device=seed.device)[:, None].expand(-1, elements)
    bits = philox(seed.reshape(()), counter, image, torch.full_like(counter, site))
    # As Triton's uint_to_uniform_float: fold the sign, then scale to [0, 1).
    folded = torch.where(bits > _LOW >> 1, _LOW - bits, bits).to(torch.int32)
    uniform = folded.float() * 4.6566127342e-10
    limit = torch.full_like(uniform, p)
    return torch.where(uniform >= limit, 1 / (1 - limit), 0.0).view(images, *shape)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """Return the first 32 bits, as int64, of Philox-4x32-10 at the counter (c0, c1, c2, 0)."""
    c0, c1, c2, c3 = c0 & _LOW, c1 & _LOW, c2 & _LOW, torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(_ROUNDS[0], c0)
        high2, low2 = _multiply(_ROUNDS[1], c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEYS[0]) & _LOW, (k1 + _KEYS[1]) & _LOW
    return c0


def _multiply(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of a 32-bit product; by 16 bits, since int64 cannot hold it."""
    low, high = a * (x & 0xFFFF), a * (x >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _LOW
