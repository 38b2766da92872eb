"""Synthetic pairs in TextZoom's form: a word in a scene, seen by a good camera and by a poor one.

Every crop is drawn from its own generator, seeded with (seed, index): what is at an index depends
neither on how many crops are asked for nor on how many processes draw them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from functools import lru_cache
from itertools import chain
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, features

from lemma_fast.training.data.lmdb import PairWriter, encode_png
from lemma_fast.training.synthesis import degrade, scene
from lemma_fast.training.synthesis.degrade import STRENGTHS, Array, Bytes, Strength
from lemma_fast.training.synthesis.faces import Face, digest, find_faces, punctuation_of
from lemma_fast.training.synthesis.lettering import (
    SCENE_HEIGHT,
    SCENE_WIDTH,
    Lettering,
    Plane,
    draw_neighbour,
    draw_word,
)
from lemma_fast.training.synthesis.words import Split, Vocabulary

Difficulty = Literal["easy", "medium", "hard", "mixed"]
HR_SIZE = (32, 128)
LR_SIZE = (16, 64)
# Raised whenever the same seed gives other crops than before.
RECIPE = 1
_CHUNK = 64


class Sample(NamedTuple):
    """High-resolution crop uint8 [32, 128, 3], low-resolution crop uint8 [16, 64, 3], label."""

    hr: Bytes
    lr: Bytes
    label: str


class Renderer:
    """Draws samples from a set of faces and a vocabulary."""

    def __init__(
        self, faces: Sequence[Face], vocabulary: Vocabulary, difficulty: Difficulty = "mixed"
    ) -> None:
        if difficulty != "mixed" and difficulty not in STRENGTHS:
            known = ", ".join(STRENGTHS)
            raise ValueError(f"difficulty {difficulty!r} is none of {known}, mixed")
        self.faces = tuple(faces)
        self.vocabulary = vocabulary
        self.difficulty = difficulty
        self._odds = _face_odds(self.faces)

    def render(self, seed: int, index: int) -> Sample:
        """The sample at `index` of the set with this seed."""
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index))))
        strength = self._strength(rng)
        face = self.faces[int(np.searchsorted(self._odds, rng.random(), side="right"))]
        label = self.vocabulary.draw(rng, punctuation_of(face.path))
        if face.is_script and label.isupper():
            # Joined letters are not written in capitals.
            label = label.capitalize()
        word = draw_word(label, face.path, rng)
        picture = self._scene(face, word, strength, rng)
        light = np.square(picture.astype(np.float64))
        return Sample(
            _photograph_hr(light, rng), _photograph_lr(light, word.aspect, strength, rng), label
        )

    def _strength(self, rng: np.random.Generator) -> Strength:
        names = tuple(STRENGTHS)
        # Drawn even where it is given, so that a set's words are the same at every difficulty.
        drawn = names[rng.integers(len(names))]
        return STRENGTHS[drawn if self.difficulty == "mixed" else self.difficulty]

    def _scene(
        self, face: Face, word: Lettering, strength: Strength, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        palette = scene.draw_palette(strength.contrast, rng)
        picture = scene.draw_ground(palette, rng)
        while rng.random() < 0.3:
            picture = scene.add_clutter(picture, rng)
        if rng.random() < 0.15:
            other = self.vocabulary.draw(rng, "")
            colour = palette.text if rng.random() < 0.7 else palette.edge
            picture = _painted(
                picture, draw_neighbour(other, face.path, rng), colour[:, None, None]
            )
        if word.shadow is not None:
            depth = np.float32(rng.uniform(0.3, 0.95))
            dark = palette.ground * (1 - depth) if rng.random() < 0.75 else palette.edge
            picture = _painted(picture, word.shadow, dark[:, None, None])
        if word.outline is not None:
            picture = _painted(picture, word.outline, palette.edge[:, None, None])
        fill = scene.worn(word.fill, rng) if rng.random() < 0.05 else word.fill
        picture = _painted(picture, fill, scene.text_colour(palette, rng))
        return scene.light_up(picture, rng)


@lru_cache(maxsize=8)
def renderer(
    fonts: str | tuple[str, ...] = "train",
    words: Split = "train",
    difficulty: Difficulty = "mixed",
    dictionary: str = "system",
) -> Renderer:
    """The renderer of these options; faces and words are looked up once a process."""
    return Renderer(find_faces(fonts), Vocabulary(dictionary, words), difficulty)


def render(
    seed: int,
    index: int,
    *,
    fonts: str | tuple[str, ...] = "train",
    words: Split = "train",
    difficulty: Difficulty = "mixed",
    dictionary: str = "system",
) -> Sample:
    """One sample in memory, the same that `synthesize` writes as record `index + 1`."""
    return renderer(fonts, words, difficulty, dictionary).render(seed, index)


def synthesize(
    out: str | Path,
    n: int,
    seed: int,
    jobs: int = 1,
    *,
    fonts: str | Sequence[str | Path] = "train",
    words: Split = "train",
    difficulty: Difficulty = "mixed",
    dictionary: str = "system",
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, object]:
    """Write `n` samples to the LMDB `out` and return its recipe, which the set also carries.

    Records do not depend on `jobs`. `progress` is told how many are written. The set appears at
    `out` when it is complete; for what is there already, see `PairWriter`.
    """
    if n < 1 or jobs < 1:
        raise ValueError(f"n and jobs are at least 1, not {n} and {jobs}")
    source = fonts if isinstance(fonts, str) else tuple(str(folder) for folder in fonts)
    options: _Options = (source, words, difficulty, dictionary)
    # Entered first, because looking up fonts takes longer than judging the place.
    with PairWriter(out, overwrite=overwrite) as writer:
        made = renderer(*options)
        recipe: dict[str, object] = {
            "recipe": RECIPE,
            "seed": seed,
            "samples": n,
            "difficulty": difficulty,
            "words": words,
            "dictionary_sha256": made.vocabulary.digest,
            "fonts": source if isinstance(source, str) else "folders",
            "faces": len(made.faces),
            "faces_sha256": digest(made.faces),
            "pillow": PIL.__version__,
            "freetype": str(features.version("freetype2")),
            "libjpeg": str(features.version("libjpeg_turbo") or features.version("jpg")),
            "numpy": np.__version__,
        }
        # Closed also where what a signal raises keeps a hold on it.
        with closing(_encoded(options, seed, n, jobs)) as samples:
            for hr, lr, label in samples:
                writer.add(label, hr, lr)
                if writer.count % _CHUNK == 0 or writer.count == n:
                    progress(writer.count)
        writer.describe(recipe)
    return recipe


_Options = tuple[str | tuple[str, ...], Split, Difficulty, str]
_Encoded = tuple[bytes, bytes, str]
_Task = tuple[_Options, int, int, int]


def _encoded(options: _Options, seed: int, n: int, jobs: int) -> Generator[_Encoded, None, None]:
    """PNG bytes of every sample in order, drawn by `jobs` processes."""
    tasks = [(options, seed, at, min(at + _CHUNK, n)) for at in range(0, n, _CHUNK)]
    if jobs == 1:
        yield from chain.from_iterable(map(_draw_chunk, tasks))
        return
    with _single_threaded(), _processes(jobs) as draw:
        yield from chain.from_iterable(draw(tasks))


@contextmanager
def _processes(jobs: int) -> Iterator[Callable[[Sequence[_Task]], Iterator[list[_Encoded]]]]:
    """Yield what draws chunks, in order; at the end no process is left, nor waited for.

    Raises OSError where one was killed.
    """
    others = set(multiprocessing.active_children())
    # Spawned, because the parent may hold threads (torch, a progress bar) that a fork would lose.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))

    def draw(tasks: Sequence[_Task]) -> Iterator[list[_Encoded]]:
        # Its start, which a process asks for otherwise, would let the signal through.
        resource_tracker.ensure_running()
        # The terminal sends Ctrl-C to all: this process ends the others, which inherit the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.map(_draw_chunk, tasks)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield draw
    except BrokenProcessPool as error:
        raise OSError(
            "a process that draws was killed, as happens where memory runs out: try fewer --jobs"
        ) from error
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Processes started within use one thread each: NumPy's own would fight over the cores."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _draw_chunk(task: _Task) -> list[_Encoded]:
    options, seed, start, stop = task
    made = renderer(*options)
    samples = (made.render(seed, index) for index in range(start, stop))
    return [(encode_png(s.hr), encode_png(s.lr), s.label) for s in samples]


def _face_odds(faces: Sequence[Face]) -> NDArray[np.float64]:
    """Cumulative odds of each face: a package counts as the root of how many faces it has.

    Big families would crowd out the rest otherwise, and a package's one odd face would be as common
    as a whole family of text faces the other way round.
    """
    sizes = Counter(face.package for face in faces)
    odds = np.cumsum([sizes[face.package] ** -0.5 for face in faces])
    odds /= odds[-1]
    # The last must exceed every draw from [0, 1).
    odds[-1] = 1.0
    return odds


def _painted(
    picture: NDArray[np.float32], mask: Plane, colour: NDArray[np.float32]
) -> NDArray[np.float32]:
    return picture + mask * (colour - picture)


def _photograph_hr(light: Array, rng: np.random.Generator) -> Bytes:
    """The good camera: a little soft, hardly any noise, mild compression."""
    blur = rng.uniform(0.30, 0.70)
    rows = degrade.axis_matrix(SCENE_HEIGHT, HR_SIZE[0], blur)
    columns = degrade.axis_matrix(SCENE_WIDTH, HR_SIZE[1], blur)
    image = degrade.project(light, rows, columns)
    image = degrade.expose(image, rng.uniform(0, 8e-5), rng.uniform(0, 1.5e-3), rng)
    crop = degrade.to_bytes(image)
    if rng.random() < 0.5:
        crop = degrade.compress(crop, int(rng.integers(90, 99)), _phase(rng))
    return crop


def _photograph_lr(
    light: Array, aspect: float, strength: Strength, rng: np.random.Generator
) -> Bytes:
    """The poor camera: few pixels in the crop's own shape, resized to 16 x 64 afterwards."""
    height = int(rng.integers(strength.height[0], strength.height[1] + 1))
    width = int(np.clip(round(height * aspect), 14, 110))
    blur = rng.uniform(*strength.blur)
    motion = [0.0, 0.0]
    if rng.random() < strength.motion:
        motion[int(rng.integers(2))] = rng.uniform(0.8, 2.5)
    rows = degrade.axis_matrix(SCENE_HEIGHT, height, blur, motion[0])
    columns = degrade.axis_matrix(SCENE_WIDTH, width, blur, motion[1])
    image = degrade.project(light, rows, columns)
    shot = rng.uniform(*strength.shot)
    image = degrade.expose(image, shot, rng.uniform(*strength.read), rng)
    if rng.random() < 0.35:
        image = degrade.sharpen(image, rng.uniform(0.3, 1.2))
    crop = degrade.compress(degrade.to_bytes(image), int(rng.integers(*strength.jpeg)), _phase(rng))
    small = Image.fromarray(crop).resize((LR_SIZE[1], LR_SIZE[0]), Image.Resampling.BICUBIC)
    return np.asarray(small)


def _phase(rng: np.random.Generator) -> tuple[int, int]:
    down, right = rng.integers(0, 8, 2)
    return int(down), int(right)
