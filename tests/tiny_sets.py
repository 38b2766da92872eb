"""Small data sets as others publish them, not as `PairWriter` writes them."""

import csv
import io
import os
import struct
import zlib

import lmdb
import numpy as np
from PIL import Image

SIZES = [(70, 21), (128, 32), (33, 40)]


def picture(number, size):
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def claiming(width, height):
    """A PNG file whose header gives this size, with no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"0"))


def write_lmdb(root, entries):
    environment = lmdb.open(str(root), map_size=1 << 24)
    with environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode(), value)
    return root


def textzoom_entries(count, first=0):
    """A set as TextZoom publishes it: images of any size, in any format Pillow reads."""
    made = {"num-samples": str(count).encode()}
    for n in range(1, count + 1):
        width, height = SIZES[n % 3]
        made[f"label-{n:09d}"] = f"Wörd-{first + n}!".encode()
        made[f"image_hr-{n:09d}"] = encoded(picture(first + n, (width, height)), "JPEG")
        made[f"image_lr-{n:09d}"] = encoded(picture(-(first + n) % 97, (width // 2, height // 2)))
    return made


def folder_of_pairs(root, columns=("hr", "lr", "label"), rows=None):
    """Three pairs of pictures and a table, which names them all by default."""
    for folder in ("hr", "lr"):
        (root / folder).mkdir(parents=True)
    for n in range(1, 4):
        picture(n, (60, 20)).save(root / "hr" / f"{n}.png")
        picture(n, (30, 10)).save(root / "lr" / f"{n}.png")
    if rows is None:
        rows = [[f"hr/{n}.png", f"lr/{n}.png", word] for n, word in enumerate(("a", "b", "c"), 1)]
    with (root / "labels.csv").open("w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([columns, *rows])
    return root


def other_lmdb(root):
    """An LMDB that is no set, and its bytes."""
    environment = lmdb.open(str(root), map_size=1 << 20, max_dbs=1)
    with environment, environment.begin(write=True) as transaction:
        transaction.put(b"cat", b"meow")
    return (root / "data.mdb").read_bytes()


def in_a_child(work):
    """The exit code of a forked process that does `work`; 3 for a refusal, 9 for a traceback."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except (ValueError, OSError):
            os._exit(3)
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
