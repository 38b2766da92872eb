"""A folder of pairs to an LMDB in TextZoom's layout, and back; image bytes are never re-encoded."""

from __future__ import annotations

import json
from pathlib import Path

from lemma_fast.training.data.lmdb import PairWriter, RecordError, Records, decode
from lemma_fast.training.data.pairs import Skipped
from lemma_fast.training.data.tables import find_table, read_table

_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"BM": ".bmp"}


def pack(
    folder: str | Path, out: str | Path, *, overwrite: bool = False
) -> tuple[int, list[Skipped]]:
    """Write the pairs of `folder` (columns hr, lr, label) to the LMDB `out`.

    Returns how many were written, and which rows were left out and why.
    """
    table = find_table(Path(folder))
    skipped: list[Skipped] = []
    with PairWriter(out, overwrite=overwrite) as writer:
        for number, row in enumerate(read_table(table), start=1):
            place = f"{table}:{number}"
            if not row.get("hr") or not row.get("lr") or row.get("label") is None:
                skipped.append(Skipped(place, "needs hr, lr and label"))
                continue
            try:
                hr, lr = (_checked(table.parent / row[column]) for column in ("hr", "lr"))
            except (RecordError, OSError) as wrong:
                skipped.append(Skipped(place, str(wrong)))
                continue
            writer.add(row["label"], hr, lr)
        if writer.count == 0:
            raise ValueError(f"{table} has no complete pair: {_first(skipped)}")
    return writer.count, skipped


def unpack(root: str | Path, folder: str | Path) -> tuple[int, list[Skipped]]:
    """Write the LMDB's pairs to `folder`, new or empty: hr/, lr/ and labels.jsonl.

    Returns how many were written, and which records were left out and why.
    """
    records = Records(root)
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    for name in ("hr", "lr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    skipped: list[Skipped] = []
    written = 0
    with (folder / "labels.jsonl").open("w", encoding="utf-8") as table:
        for record in range(1, records.count + 1):
            row: dict[str, str] = {}
            images: dict[str, bytes] = {}
            try:
                for name in ("hr", "lr"):
                    key = b"image_%s-%09d" % (name.encode(), record)
                    data = records.get(key)
                    if data is None:
                        raise RecordError(f"{key.decode()} is missing")
                    decode(data, key.decode())
                    row[name] = f"{name}/{record:09d}{_suffix(data)}"
                    images[row[name]] = data
                row["label"] = records.text(b"label-%09d" % record)
            except RecordError as wrong:
                skipped.append(Skipped(f"{root}#{record:09d}", str(wrong)))
                continue
            for path, data in images.items():
                (folder / path).write_bytes(data)
            table.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    return written, skipped


def _checked(path: Path) -> bytes:
    data = path.read_bytes()
    decode(data, str(path))
    return data


def _suffix(data: bytes) -> str:
    for start, suffix in _SUFFIXES.items():
        if data.startswith(start):
            return suffix
    # Pillow decodes by content, so any name reads.
    return ".img"


def _first(skipped: list[Skipped]) -> str:
    return f"{skipped[0].id}: {skipped[0].reason}" if skipped else "it has no row"
