"""How sharp a crop is already, and how much of the network's result it gets for that."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Between these the network's share falls from 1 to `SHARP_SHARE`. Measured on photographed words:
# docs/log.md, 2026-11-28.
BLURRED, SHARP = 0.45, 0.55
SHARP_SHARE = 0.5
# ITU-R BT.601, as Pillow's mode L.
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def sharpness(planes: npt.NDArray[np.float32]) -> float:
    """Measure the steepest vertical step of the network's input, as a share of its contrast.

    `planes` is float32 [C, H, W] in [0, 1], RGB first. Steps between neighbouring rows are those of
    grey levels, their 99th percentile counts; the contrast lies between the 1st and the 99th
    percentile. About 0.3 for a blurred photograph of a word, 0.7 for a sharp one; 0 for a crop of
    one colour.
    """
    grey = np.tensordot(_GREY, planes[:3], axes=1)
    dark, light = np.percentile(grey, (1, 99))
    if light - dark < 1e-3:
        return 0.0
    return float(np.percentile(np.abs(np.diff(grey, axis=0)), 99) / (light - dark))


def network_share(sharpness: float) -> float:
    """Return how much of the network's result a crop gets, 0.5 to 1; bicubic gives the rest.

    1 up to a sharpness of 0.45, 0.5 from 0.55 on, linear between them.
    """
    blurred = (SHARP - sharpness) / (SHARP - BLURRED)
    return SHARP_SHARE + (1 - SHARP_SHARE) * min(max(blurred, 0.0), 1.0)
