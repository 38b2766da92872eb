"""A folder of pairs to an LMDB in TextZoom's layout, and back; image bytes are never re-encoded."""

from __future__ import annotations

import json
from pathlib import Path

from lemma_fast.training.data.lmdb import PairWriter, RecordError, Records, decode
from lemma_fast.training.data.pairs import Skipped
from lemma_fast.training.data.places import new_folder
from lemma_fast.training.data.tables import find_table, is_image_file, read_table

_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"BM": ".bmp"}


def pack(
    folder: str | Path, out: str | Path, *, overwrite: bool = False
) -> tuple[int, list[Skipped]]:
    """Write the pairs of `folder` (columns hr, lr, label) to the LMDB `out`.

    Returns how many were written, and which rows were left out and why. Raises what `PairWriter`
    does, and SetError where the table cannot be read.
    """
    table = find_table(Path(folder))
    skipped: list[Skipped] = []
    with PairWriter(out, overwrite=overwrite, inputs=[folder]) as writer:
        for line, row in read_table(table):
            place = f"{table}:{line}"
            if not row.get("hr") or not row.get("lr") or row.get("label") is None:
                skipped.append(Skipped(place, "needs hr, lr and label, no more fields"))
                continue
            try:
                label = row["label"].encode("utf-8").decode()
                hr, lr = (_checked(table.parent / row[column]) for column in ("hr", "lr"))
            except (OSError, ValueError) as wrong:
                skipped.append(Skipped(place, str(wrong)))
                continue
            writer.add(label, hr, lr)
        if writer.count == 0:
            raise ValueError(f"{table} has no complete pair: {_first(skipped)}")
    return writer.count, skipped


def unpack(root: str | Path, folder: str | Path) -> tuple[int, list[Skipped]]:
    """Write the LMDB's pairs to `folder`, new or empty: hr/, lr/ and labels.jsonl.

    Returns how many were written, and which records were left out and why. The folder appears when
    it is complete.
    """
    records = Records(root)
    skipped: list[Skipped] = []
    with new_folder(Path(folder), inputs=[Path(root)]) as new:
        for name in ("hr", "lr"):
            (new / name).mkdir()
        with (new / "labels.jsonl").open("w", encoding="utf-8") as table:
            for record in range(1, records.count + 1):
                try:
                    row, images = _unpacked(records, record)
                except RecordError as wrong:
                    skipped.append(Skipped(f"{root}#{record:09d}", str(wrong)))
                    continue
                for path, data in images.items():
                    (new / path).write_bytes(data)
                table.write(json.dumps(row, ensure_ascii=False) + "\n")
    return records.count - len(skipped), skipped


def _unpacked(records: Records, record: int) -> tuple[dict[str, str], dict[str, bytes]]:
    """A row of the table, and the images that it names."""
    row: dict[str, str] = {}
    images: dict[str, bytes] = {}
    for name in ("hr", "lr"):
        key = b"image_%s-%09d" % (name.encode(), record)
        data = records.get(key)
        if data is None:
            raise RecordError(f"{key.decode()} is missing")
        decode(data, key.decode())
        row[name] = f"{name}/{record:09d}{_suffix(data)}"
        images[row[name]] = data
    row["label"] = records.text(b"label-%09d" % record)
    return row, images


def _checked(path: Path) -> bytes:
    if not is_image_file(path):
        raise RecordError(f"{path} is missing, or no file")
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
