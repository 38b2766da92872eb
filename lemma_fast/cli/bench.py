"""The command `lemma-fast bench`: how fast the network is here, as lines and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lemma_fast.cli.exits import fail, interruptible, misused, say
from lemma_fast.errors import reason
from lemma_fast.outputs import OutputError, check_output

if TYPE_CHECKING:
    from lemma_fast.model import LEMMA

_EXAMPLES = """
Examples:

  lemma-fast bench --quick                          reference and accelerated, a minute

  lemma-fast bench --model small --batch 1,8 -o here.json

  lemma-fast bench --random base                    the paper's sizes, without any weights
"""


def bench(
    model: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads this on Python 3.10 too)
        typer.Option(
            "--model",
            help="What to time, may be repeated: a packaged name, a file, or a Hub id.",
            show_default=False,
        ),
    ] = None,
    random: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--random",
            metavar="[base|small]",
            help="A network of these sizes with random weights, which are no faster or slower; may "
            "be repeated. Default: base and small.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Only what needs no preparation, and few rounds.")
    ] = False,
    batch: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="N[,N]...", help="Batch sizes.", show_default=False),
    ] = None,
    variants: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="NAME[,NAME]...",
            help="Of reference, reference-cast (weights cast to the half type), compiled, "
            "accelerated, onnxruntime, openvino.",
            show_default=False,
        ),
    ] = None,
    precisions: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="NAME[,NAME]...",
            help="Of float32, tf32, bfloat16, float16.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="For each batch size, without preparation.", show_default=False),
    ] = None,
    compile_mode: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Mode of torch.compile on CUDA.", show_default="max-autotune"),
    ] = None,
    training: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=2, metavar="N", help="Also time a training step of N crops.", show_default=False
        ),
    ] = None,
    stages: Annotated[bool, typer.Option(help="Also time the stages of a forward pass.")] = True,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--output", metavar="FILE", help="Write everything there as JSON."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a FILE that is not of an earlier benchmark."),
    ] = False,
) -> None:
    """Time the network: reference, compiled, accelerated, and in other runtimes.

    A variant that does not return what the reference does is marked. Variants take turns, and
    ratios are those of one run. The file is rewritten after each batch size, so that a run that is
    stopped keeps what it has.
    """
    if output is not None:
        try:
            check_output(
                output, "-o", overwrite=overwrite, inputs=model or [], made_here=_is_record
            )
        except OutputError as error:
            misused(error)
    from lemma_fast.bench.plan import PRECISIONS, VARIANTS, default_plan
    from lemma_fast.bench.run import run
    from lemma_fast.devices import choose_device

    try:
        where = choose_device(device)
    except (ValueError, RuntimeError) as error:
        fail(str(error))
    plan = default_plan(where, quick)
    plan = replace(
        plan,
        batches=_sizes(batch) if batch else plan.batches,
        variants=_words(variants, VARIANTS) if variants else plan.variants,
        precisions=_words(precisions, tuple(PRECISIONS)) if precisions else plan.precisions,
        seconds=plan.seconds if seconds is None else seconds,
        compile_mode=compile_mode or plan.compile_mode,
    )
    networks = _networks(model or [], random or [])
    kept = "nothing was kept"
    if output is not None:
        kept = f"every batch size that was finished is in {output}"
    try:
        with interruptible(kept):
            run(networks, where, plan, training, stages, output, say)
    except OSError as error:
        fail(f"cannot write {output}: {reason(error)}")


def _is_record(path: Path) -> bool:
    """Whether an earlier benchmark wrote this file."""
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"environment", "rows"} <= record.keys()


def _networks(names: Sequence[str], sizes: Sequence[str]) -> list[tuple[str, LEMMA]]:
    from lemma_fast.bench.run import random_network
    from lemma_fast.checkpoint import CheckpointError, load

    if unknown := [size for size in sizes if size not in ("base", "small")]:
        raise typer.BadParameter(f"--random takes base or small, not {unknown[0]!r}")
    try:
        networks = [(Path(name).stem, load(name)) for name in names]
    except CheckpointError as error:
        fail(str(error))
    for size in sizes or (() if names else ("base", "small")):
        networks.append((size, random_network(size)))
    return networks


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise typer.BadParameter(f"--batch {text!r}: whole numbers from 1 on, with commas between")
    return sizes


def _words(text: str, known: Sequence[str]) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if unknown := [word for word in words if word not in known]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(known)}")
    return words
