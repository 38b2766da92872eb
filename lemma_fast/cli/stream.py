"""Files through the network: reading, the network and writing overlap, whatever the folder's size.

    Inputs --> readers (threads) --> batches --> the network (this thread) --> writers (threads)

Each stage holds at most a few batches, so memory does not depend on the number of files; only the
names of results are remembered, to see when two inputs would become one file. Outcomes come in the
order of the inputs.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from lemma_fast import compare, images
from lemma_fast.atomic import replace_file, replacing
from lemma_fast.cli.inputs import Inputs, Source
from lemma_fast.cli.results import Naming, Outcome
from lemma_fast.cli.targets import Targets
from lemma_fast.errors import reason
from lemma_fast.images import Frame, ImageError, Size
from lemma_fast.outputs import make_folder
from lemma_fast.recognizers import Recognizer
from lemma_fast.upscale import Upscaled, Upscaler

_WORKERS = min(8, (os.cpu_count() or 1) + 1)
# Wider or taller, times the other side, than any word.
_WIDE, _TALL = 12, 3
_ENDINGS = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}


@dataclass
class _Item:
    """One input on its way; `future` is its last stage, once that is under way."""

    outcome: Outcome
    target: Path | None = None
    kept: bool = False
    exists: bool = False
    planes: npt.NDArray[np.float32] | None = None
    frame: Frame | None = None
    preview: Image.Image | None = None
    plain: Image.Image | None = None
    waiting: bool = False
    future: Future[None] | None = None


@dataclass
class Stream:
    """Upscales every input; iterate over it for the outcomes.

    Crops taller than `keep_above` pixels are copied unchanged (0: never). With `to_stdout` the
    result's bytes go to standard output instead of a file. `reader` reads every crop before, as
    bicubic makes it as large as the network's result, and after.
    """

    inputs: Inputs
    naming: Naming
    upscaler: Upscaler
    size: Size = "native"
    keep_above: int = 32
    overwrite: bool = False
    compare: bool = False
    to_stdout: bool = False
    reader: Recognizer | None = None

    def __post_init__(self) -> None:
        self._queue: deque[_Item] = deque()
        self._batch: list[_Item] = []
        self._targets = Targets(self.inputs, self.naming, self.overwrite)
        self._writers: ThreadPoolExecutor

    def __iter__(self) -> Iterator[Outcome]:
        """Yield the outcomes; leaving early, also by an interrupt, lets running writes finish."""
        readers = ThreadPoolExecutor(_WORKERS, "lemma-fast-read")
        self._writers = ThreadPoolExecutor(_WORKERS, "lemma-fast-write")
        try:
            sources = iter(self.inputs)
            reading: deque[Future[_Item]] = deque()
            while True:
                while len(reading) < self.upscaler.batch_size + _WORKERS:
                    source = next(sources, None)
                    if source is None:
                        break
                    reading.append(readers.submit(self._read, source))
                if not reading:
                    break
                self._settle(reading.popleft().result())
                yield from self._finished(4 * self.upscaler.batch_size + 64)
            self._infer_batch()
            yield from self._finished(0)
        finally:
            readers.shutdown(wait=True, cancel_futures=True)
            self._writers.shutdown(wait=True, cancel_futures=True)

    def _read(self, source: Source) -> _Item:
        """Decode one input and make the network's input of it (in a reader thread)."""
        began = time.perf_counter()
        outcome = Outcome(source)
        item = _Item(outcome)
        if source.fault is not None:
            outcome.fail(source.fault)
            return item
        try:
            with images.opened(source.content) as image:
                outcome.input_size = images.upright_size(image)
                item.kept = 0 < self.keep_above < outcome.input_size[1]
                if not self.to_stdout:
                    ending = _own_ending(source, image.format) if item.kept else None
                    item.target = self.naming.result(source, ending)
                    item.exists = os.path.lexists(item.target)
                if item.exists and not self.overwrite:
                    return item
                # What is kept is decoded too: a damaged file shall not pass for a good one.
                crop = images.from_pillow(image)
        except ImageError as error:
            outcome.fail(str(error))
            return item
        outcome.notes.extend([*crop.notes, *self._remarks(crop.rgb.size, item.kept)])
        if item.kept:
            outcome.reason = f"taller than {self.keep_above} pixels, copied as it is"
            if not self._same_format(crop.format):
                item.plain = crop.rgb
                if crop.alpha is not None:
                    item.plain.putalpha(crop.alpha)
        else:
            item.planes = self.upscaler.prepare(crop)
            item.frame = self.upscaler.frame(crop, item.planes, self.size)
            if self.compare:
                item.preview = crop.opaque
                item.preview.thumbnail(compare.panel_size(item.frame.size))
        outcome.milliseconds += 1000 * (time.perf_counter() - began)
        return item

    def _remarks(self, size: tuple[int, int], kept: bool) -> Iterator[str]:
        """Say of what shapes the network can make nothing."""
        width, height = size
        if height > _TALL * width:
            yield "much taller than wide: only words that run from left to right are read; turn it"
        if width > _WIDE * height and not kept:
            rows, columns = self.upscaler.config.size
            yield f"much wider than a word, and seen at {columns}x{rows}: cut a line into its words"

    def _same_format(self, found: str | None) -> bool:
        """Whether a kept file's bytes suit its name: always, unless the user gave the name."""
        wanted = {"jpg": ("JPEG", "MPO"), "png": ("PNG",), "webp": ("WEBP",)}[self.naming.form]
        return self.naming.file is None or found in wanted

    def _settle(self, item: _Item) -> None:
        """Decide in the inputs' order what happens to an item, and pass it on."""
        self._queue.append(item)
        outcome = item.outcome
        if outcome.status == "error":
            return
        if item.target is not None and self._targets.refused(outcome, item.target, item.exists):
            return
        if self.compare and not item.kept:
            self._targets.plan_comparison(outcome)
        if item.kept:
            outcome.status = "kept"
            item.future = self._writers.submit(self._keep, item)
            return
        item.waiting = True
        self._batch.append(item)
        if len(self._batch) == self.upscaler.batch_size:
            self._infer_batch()

    def _infer_batch(self) -> None:
        batch, self._batch = self._batch, []
        if not batch:
            return
        began = time.perf_counter()
        results = self._infer(batch)
        share = 1000 * (time.perf_counter() - began) / len(batch)
        for item, said in zip(batch, results, strict=True):
            item.waiting = False
            item.outcome.milliseconds += share
            if isinstance(said, str):
                item.outcome.fail(said)
            else:
                assert item.frame is not None
                item.outcome.found = said.judged(item.frame)
                item.future = self._writers.submit(self._write, item, said)

    def _infer(self, batch: list[_Item]) -> list[Upscaled | str]:
        """Run the network; a batch that fails is halved, so that at worst single files are lost."""
        planes = np.stack([item.planes for item in batch if item.planes is not None])
        try:
            results = self.upscaler.infer(planes)
        except (RuntimeError, MemoryError) as error:
            why = reason(error)
        else:
            self._read_both(batch, planes, results)
            return [*results]
        if len(batch) == 1:
            return [f"the network failed: {why}"]
        batch[0].outcome.notes.append(f"a batch of {len(batch)} failed and was halved: {why}")
        half = len(batch) // 2
        return self._infer(batch[:half]) + self._infer(batch[half:])

    def _read_both(
        self, batch: list[_Item], planes: npt.NDArray[np.float32], results: list[Upscaled]
    ) -> None:
        """Let the recogniser read the batch twice; the crops before in bicubic's enlargement.

        Where it fails the results stay, and the batch is halved to find the crops to blame.
        """
        if self.reader is None:
            return
        width, height = self.upscaler.native
        small = torch.from_numpy(planes[:, :3]).to(self.upscaler.device)
        before = F.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)
        seen = [
            np.asarray(item.frame.blended(said.image))
            for item, said in zip(batch, results, strict=True)
            if item.frame is not None
        ]
        pixels = torch.from_numpy(np.stack(seen))
        after = pixels.to(self.upscaler.device).permute(0, 3, 1, 2).float() / 255
        try:
            read = self.reader.read
            readings = [*zip(batch, read(before), read(after), strict=True)]
        except (RuntimeError, OSError, ValueError, MemoryError) as error:
            if len(batch) == 1:
                batch[0].outcome.unread = reason(error)
                return
            half = len(batch) // 2
            for part in (slice(half), slice(half, None)):
                self._read_both(batch[part], planes[part], results[part])
            return
        for item, first, second in readings:
            item.outcome.before, item.outcome.after = first, second

    def _finished(self, limit: int) -> Iterator[Outcome]:
        """Yield what is done at the head of the queue, and wait while it is longer than `limit`."""
        while self._queue:
            item = self._queue[0]
            over = len(self._queue) > limit
            if over and item.waiting:
                self._infer_batch()
            if not over and (item.waiting or (item.future and not item.future.done())):
                return
            if item.future is not None:
                item.future.result()
            yield self._queue.popleft().outcome

    def _write(self, item: _Item, said: Upscaled) -> None:
        """Make and store one result (in a writer thread)."""
        assert item.frame is not None
        began = time.perf_counter()
        outcome = item.outcome
        path = item.target
        try:
            image = images.finish(said.image, item.frame)
            self._store(image, item)
            outcome.output_size = image.size
            if outcome.compare is not None and item.preview is not None:
                path = outcome.compare
                after = images.flatten(image, item.frame.backdrop)
                sheet = compare.picture(
                    item.preview,
                    after,
                    said.attention,
                    said.text,
                    outcome.input_size or item.preview.size,
                    _texts(outcome),
                )
                replace_file(path, images.encode(sheet, "png"))
        except (OSError, ValueError, MemoryError) as error:
            outcome.fail(_cannot_write(path, error))
        outcome.milliseconds += 1000 * (time.perf_counter() - began)

    def _keep(self, item: _Item) -> None:
        """Copy a crop that is tall enough as it is (in a writer thread)."""
        began = time.perf_counter()
        outcome, source = item.outcome, item.outcome.source
        try:
            if item.plain is not None:
                self._store(item.plain, item)
            elif self.to_stdout:
                _to_stdout(source.path.read_bytes() if source.data is None else source.data)
            elif item.target is not None:
                make_folder(item.target.parent)
                if source.data is not None:
                    replace_file(item.target, source.data)
                else:
                    with replacing(item.target) as partial:
                        shutil.copyfile(source.path, partial)
                outcome.output = item.target
            outcome.output_size = outcome.input_size
        except (OSError, ValueError, MemoryError) as error:
            outcome.fail(_cannot_write(item.target, error))
        outcome.milliseconds += 1000 * (time.perf_counter() - began)

    def _store(self, image: Image.Image, item: _Item) -> None:
        if self.naming.form == "jpg" and images.has_visible_transparency(image):
            item.outcome.notes.append("JPEG has no transparency: flattened on white")
        data = images.encode(image, self.naming.form)
        if item.target is None:
            _to_stdout(data)
        else:
            make_folder(item.target.parent)
            replace_file(item.target, data)
            item.outcome.output = item.target


def _texts(outcome: Outcome) -> tuple[str, str] | None:
    if outcome.before is None or outcome.after is None:
        return None
    return outcome.before.text, outcome.after.text


def _own_ending(source: Source, found: str | None) -> str:
    if source.data is None and source.path.suffix:
        return source.path.suffix
    name = found or "png"
    return _ENDINGS.get(name, f".{name.lower()}")


def _to_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _cannot_write(path: Path | None, error: BaseException) -> str:
    name = "standard output" if path is None else str(path)
    return f"cannot write {name}: {reason(error)}"
