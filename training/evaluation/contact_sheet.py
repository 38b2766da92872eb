"""A picture of the crops that gained most, least and the median: what went in and came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from lemma_fast.baselines import Baseline
from lemma_fast.compare import overlay, sheet
from lemma_fast.devices import device_of
from lemma_fast.model import LEMMA
from lemma_fast.model.prior import Prior
from lemma_fast.recognizers import Recognizer
from lemma_fast.training.data.pairs import HR_SIZE, PairDataset
from lemma_fast.training.evaluation.evaluate import ROWS, Subset, views

_PANEL = (2 * HR_SIZE[1], 2 * HR_SIZE[0])


def notable(subsets: Sequence[Subset], count: int = 4) -> dict[str, list[tuple[int, int]]]:
    """The crops that gained most, least and the median in PSNR, as (subset, crop).

    Each group has `count`, fewer where that would show a crop twice.
    """
    places = [(s, i) for s, subset in enumerate(subsets) for i in range(len(subset.gain))]
    gains = np.concatenate([subset.gain for subset in subsets])
    order = [places[i] for i in np.argsort(-gains, kind="stable")]
    count = max(1, min(count, len(order) // 3))
    middle = (len(order) - count) // 2
    return {
        "best": order[:count],
        "median": order[middle : middle + count],
        "worst": order[-count:],
    }


def contact_sheet(
    model: LEMMA | Baseline,
    subsets: Sequence[Subset],
    sets: Sequence[PairDataset],
    readers: Mapping[str, Recognizer],
    count: int = 4,
) -> Image.Image:
    """Input, bicubic, SR, HR and attention of notable crops, with the strings that were read.

    A baseline has no attention to show.
    """
    titles = ("input", *ROWS, *(() if isinstance(model, Baseline) else ("attention",)))
    rows: list[list[tuple[Image.Image | None, str]]] = [[(None, title) for title in ("", *titles)]]
    for group, places in notable(subsets, count).items():
        for s, i in places:
            subset = subsets[s]
            about = (group, subset.name, repr(subset.labels[i]), f"{subset.gain[i]:+.2f} dB")
            row: list[tuple[Image.Image | None, str]] = [(None, "\n".join(about))]
            for title, image in zip(titles, _panels(model, sets[s], i), strict=True):
                read = [
                    f"{reader}: {subset.rows[title].texts[reader][i]}"
                    for reader in (readers if title in ROWS else ())
                ]
                row.append((image, "\n".join(read)))
            rows.append(row)
    return sheet(rows)


def attention(prior: Prior) -> npt.NDArray[np.float32]:
    """Where the first crop's characters are [H, W]: the largest of its maps, none negative."""
    live = prior.attn_map[0, : int(prior.pt_lengths[0])]
    shown: npt.NDArray[np.float32] = live.amax(0).clamp(min=0).float().cpu().numpy()
    return shown


def _panels(model: LEMMA | Baseline, crops: PairDataset, index: int) -> list[Image.Image]:
    lr, hr, _, _ = crops.raw([index])
    device = device_of(model)
    seen = views(model, lr.to(device), hr.to(device))
    small = _picture(lr[0].float() / 255)
    shown = [small, *(_picture(seen.images[row][0]) for row in ROWS)]
    nearest = Image.Resampling.NEAREST
    panels = [image.resize(_PANEL, nearest) for image in shown]
    if seen.prior is None:
        return panels
    return [*panels, overlay(small.resize(_PANEL, nearest), attention(seen.prior))]


def _picture(image: Tensor) -> Image.Image:
    pixels = image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)
