"""Markdown tables of benchmarks' results: a function for each, from a file's content to text.

A row whose result differs from the reference's by more than is allowed has a "!".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

#: The batch size of the operations' table; the largest where a file has no such one.
OPS_BATCH = 64
#: So many kernels of a profile.
KERNELS = 25
_ENDS = ("mean", "low", "high")

Content = dict[str, Any]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, whose first column is on the left and the others on the right."""
    head = list(head)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def caption(about: Content) -> str:
    """What the numbers were measured with."""
    versions = about.get("versions", {})
    parts = [about.get("device", "unknown machine")]
    if about.get("device_type") == "cuda":
        parts.append(f"driver {about['driver']}, CUDA {about['cuda']}")
    else:
        threads = about.get("threads") or 1
        parts.append(f"{threads} threads" if threads > 1 else "1 thread")
    names = {"torch": "PyTorch", "triton": "Triton", "onnxruntime": "ONNX Runtime"}
    names["openvino"] = "OpenVINO"
    parts += [f"{shown} {versions[name]}" for name, shown in names.items() if versions.get(name)]
    parts.append(f"{about.get('date', 'unknown date')[:10]}, commit {short(about.get('commit'))}")
    return "; ".join(parts) + "."


def short(commit: str | None) -> str:
    """A commit as people write it; a + stays: the tree had changes."""
    return commit[:9] + commit[40:] if commit else "unknown"


def duration(seconds: float) -> str:
    """Three figures and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            return f"{figures(seconds / scale)} {unit}"
    raise AssertionError


def figures(value: float) -> str:
    """Three significant figures, never in powers of ten."""
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"


def model_table(content: Content) -> str:
    """Median time of a batch by variant and batch size, with the ratio to the reference."""
    batches = sorted({row["batch"] for row in content["rows"]})
    lines: dict[tuple[str, str, str], dict[int, Content]] = {}
    for row in content["rows"]:
        key = row["model"], variant_name(row), row["precision"]
        lines.setdefault(key, {})[row["batch"]] = row
    head = ["network, variant, precision", *(f"batch {batch}" for batch in batches), "off by"]
    shown = []
    for (model, variant, precision), cells in lines.items():
        if all(row["status"] == "unavailable" for row in cells.values()):
            continue
        off = [row["deviation"] for row in cells.values() if "deviation" in row]
        name = f"{model}, {variant}, {precision}"
        timed = [timing(cells.get(batch)) for batch in batches]
        shown.append([name, *timed, f"{max(off):.0e}" if off and max(off) else ""])
    return table(head, shown)


def variant_name(row: Content) -> str:
    """A variant as tables name it, with the mode of torch.compile where the row says it."""
    mode = row.get("compile_mode")
    if mode is None:
        return str(row["variant"])
    limits = "".join(f", {value}" for value in row.get("limits", {}).values())
    return f"{row['variant']} ({mode}{limits})"


def timing(row: Content | None) -> str:
    """Median and ratio of a row, or why there is none."""
    if row is None:
        return ""
    if "seconds" not in row:
        return str(row["status"])
    ratio = f" ({figures(row['ratio']['median'])}x)" if "ratio" in row else ""
    mark = " !" if row.get("status") == "differs" or row.get("differs") else ""
    return duration(row["seconds"]["median"]) + ratio + mark


def stage_table(content: Content) -> str:
    """Share of a forward pass by stage, a column for each network and batch size."""
    rows = content["stages"]
    names = list(dict.fromkeys(stage for row in rows for stage in row["stages"]))
    head = ["stage", *(f"{r['model']}, {r['variant']}, batch {r['batch']}" for r in rows)]
    shares = [stage_shares(row) for row in rows]
    lines = [[name, *(f"{share.get(name, 0):.0%}" for share in shares)] for name in names]
    whole = [duration(sum(s["median"] for s in row["stages"].values())) for row in rows]
    return table(head, [*lines, ["in all", *whole]])


def stage_shares(row: Content) -> dict[str, float]:
    """Stages as parts of one."""
    whole = sum(stage["median"] for stage in row["stages"].values())
    return {name: stage["median"] / whole for name, stage in row["stages"].items()}


def training_table(content: Content) -> str:
    """Median time and memory of a training step."""
    lines = []
    for row in content["training"]:
        if row["status"] == "unavailable":
            continue
        peak = row.get("peak_bytes")
        name = f"{row['model']}, {variant_name(row)}, {row['precision']}, batch {row['batch']}"
        memory = f"{figures(peak / 2**30)} GiB" if peak is not None else ""
        off = f"{row['deviation']:.0e}" if row.get("deviation") else ""
        lines.append([name, timing(row), memory, off])
    return table(["network, variant, precision", "a step", "memory", "off by"], lines)


def ops_table(content: Content) -> str:
    """Operations by implementation at each batch size, and how many floors ours takes."""
    cases: dict[tuple[int, str], dict[str, Content]] = {}
    for entry in content["benchmarks"]:
        params = dict(entry["params"] or {})
        way, batch = params.get("implementation"), int(params.get("N", 0))
        if way is None:
            continue
        operation = entry["name"].partition("[")[0].removeprefix("bench_")
        # Parameters that are no plain values, such as dtypes, stand in the test's id alone.
        found = re.search(r"\[(.*)\]", entry["name"])
        words = [word.removeprefix("torch.") for word in found[1].split("-")] if found else []
        words = [word for word in words if word not in (way, str(batch))]
        cases.setdefault((batch, f"{operation} {' '.join(words)}"), {})[way] = entry
    # A file of all sizes shows one; a suite's, which has two, shows both.
    wanted = {OPS_BATCH if any(b == OPS_BATCH for b, _ in cases) else max(b for b, _ in cases)}
    wanted |= {batch for batch, _ in cases} if content.get("kind") == "records" else set()
    lines = []
    for (batch, name), ways in sorted(cases.items(), key=lambda item: -item[0][0]):
        if batch not in wanted:
            continue
        times = {way: entry["stats"]["median"] for way, entry in ways.items()}
        base = times.get("reference", times.get("torch"))
        own = next((way for way in ("fused", "cpp", "native") if way in times), None)
        about = ways[own].get("extra_info", {}) if own else {}
        cells = [base, times.get("compiled"), times[own] if own else None]
        against = [
            figures(cell / cells[2]) + "x" if cell and cells[2] else "" for cell in cells[:2]
        ]
        shown = [duration(cell) if cell else "" for cell in cells]
        shown[2] += " !" if about.get("differs") else ""
        floors = figures(about["floors"]) if "floors" in about else ""
        lines.append([f"{name}, batch {batch}", *shown, *against, floors])
    head = ["operation", "reference", "compiled", "ours", "to reference", "to compiled", "floors"]
    return table(head, lines)


def kernel_table(content: Content) -> str:
    """Where a call's time goes on the device: the kernels of each profile, by time."""
    parts = []
    for row in content["profile"]:
        whole = row["kernel_seconds"]
        head = [f"{row['model']}, batch {row['batch']}, {row['precision']}", "calls", "time", ""]
        lines = [
            [short_kernel(k["kernel"]), str(k["calls"]), duration(k["seconds"]),
             f"{k['seconds'] / whole:.0%}"]
            for k in row["kernels"][:KERNELS]
        ]  # fmt: skip
        lines.append(["in all", str(row["launches"]), duration(whole), ""])
        parts.append(table(head, lines))
    return "\n\n".join(parts)


def short_kernel(name: str) -> str:
    """A kernel's name without what templates add to it."""
    return name.replace("void ", "").partition("<")[0].replace("|", "/")[:60]


def suite_table(content: Content) -> str:
    """How each step of a suite went, and the tests that failed."""
    tests = content.get("tests", [])
    lines = [
        [step["name"], step["status"], f"{step['seconds']:.0f} s" if "seconds" in step else ""]
        for step in content["steps"]
    ]
    for tool in content.get("tools", []):
        counted = f"{tool['errors']} errors" if "errors" in tool else tool.get("reason", "")
        lines.append([tool["name"], tool["status"], counted])
    for outcome in ("passed", "failed", "skipped"):
        count = sum(test["outcome"] == outcome for test in tests)
        lines += [[f"tests {outcome}", str(count), ""]] if count else []
    failures = [test["name"] for test in tests if test["outcome"] == "failed"]
    errors = [f"{error['name']}: {error['reason']}" for error in content.get("errors", [])]
    said = "".join(f"\n- {line}" for line in (*failures, *errors))
    return table(["step", "", ""], lines) + (f"\n{said}" if said else "")


def golden_table(content: Content) -> str:
    """Deviations from the published network's numbers, as the file has them."""
    return table(content["columns"], content["rows"])


def results_table(content: Content) -> str:
    """The evaluation table of all sets together."""
    parts = ("results", "gain_over_bicubic")
    return evaluation_table({part: {"all": content[part]["average"]} for part in parts})


def evaluation_table(content: Content) -> str:
    """Word accuracy, PSNR and SSIM with 95 % intervals, a line for each set and image."""
    results, gains = content["results"], content["gain_over_bicubic"]
    columns = list(next(iter(gains.values())))
    lines = []
    for name, rows in results.items():
        for row, found in (*rows.items(), ("gain over bicubic", gains[name])):
            gain = row not in rows
            cells = [quality(c, found[c], gain) if c in found else "" for c in columns]
            lines.append([f"{name}, {row}", *cells])
    return table(["crops, image", *columns], lines)


def quality(column: str, value: Content, gain: bool) -> str:
    """A mean with its interval: words in percent, PSNR in dB."""
    percent = column.endswith("accuracy")
    scale, digits = (100, 1) if percent else (1, 2 if column == "PSNR" else 4)
    sign = "+" if gain else ""
    mean, *ends = (format(scale * value[key], f"{sign}.{digits}f") for key in _ENDS)
    unit = " %" if percent and not gain else ""
    return f"{mean}{unit} ({ends[0]} to {ends[1]})"
