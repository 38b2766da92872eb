"""The records of a suite in the form of other files of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from suite.records import Record, read

Content = dict[str, Any]


def gather(path: Path) -> Content:
    """The records of a suite's runs by their kinds, in the form of `lemma-fast bench -o`'s file.

    What was measured again in a later run takes the place of what was there. Where the reference
    was timed too, rows say how many times as fast they are.
    """
    content: Content = {"kind": "records", "environment": {}, "stages": []}
    found: dict[str, dict[object, Record]] = {"rows": {}, "training": {}, "ops": {}, "steps": {}}
    for record in read(path):
        if record["part"] == "suite":
            content["environment"] = content["environment"] or record["environment"]
            continue
        key = record.get("name"), record.get("compile_mode")
        found.setdefault(record["part"], {})[key] = record
    content |= {part: list(records.values()) for part, records in found.items()}
    # As pytest-benchmark has them.
    content["benchmarks"] = [
        {**record, "stats": record["seconds"], "extra_info": record} for record in content["ops"]
    ]
    for part in ("rows", "training"):
        for row in content[part]:
            row |= _ratio(row, content[part], part == "training")
    return content


def _ratio(row: Record, rows: list[Record], training: bool) -> Record:
    """How many times as fast a row is as the reference: in its own precision where it trains."""
    if "seconds" not in row:
        return {}
    kinds = [row["precision"]] if training else ["tf32", "float32"]
    bases = [
        other["seconds"]["median"]
        for kind in kinds
        for other in rows
        if (other["variant"], other["precision"]) == ("reference", kind)
        and (other["model"], other["batch"]) == (row["model"], row["batch"])
        and "seconds" in other
    ]
    return {"ratio": {"median": bases[0] / row["seconds"]["median"]}} if bases else {}
