"""The plot of a file of results: throughput, and the share of each stage."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from tables import Content, stage_shares, variant_name


def plot(content: Content, path: Path) -> None:
    """Throughput by batch size, and the share of each stage, of one file."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in content["rows"]:
        if "seconds" in row:
            name = f"{row['model']}, {variant_name(row)}, {row['precision']}"
            point = row["batch"], row["batch"] / row["seconds"]["median"]
            lines.setdefault(name, []).append(point)
    for name, points in lines.items():
        left.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="batch size", ylabel="crops a second")
    left.set_title(content["environment"]["device"], fontsize="medium")
    if lines:
        left.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    names = list(dict.fromkeys(n for row in content["stages"] for n in row["stages"]))
    bars = [f"{r['model']}, {r['variant']}, {r['batch']}" for r in content["stages"]]
    shares = [stage_shares(row) for row in content["stages"]]
    bottom = [0.0] * len(bars)
    for name in names:
        heights = [share.get(name, 0.0) for share in shares]
        right.bar(range(len(bars)), heights, bottom=bottom, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    right.set_xticks(range(len(bars)), bars, fontsize="x-small", rotation=40, ha="right")
    right.set_ylabel("share of a forward pass")
    if names:
        right.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    # Without the date that matplotlib writes, the same JSON makes the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
