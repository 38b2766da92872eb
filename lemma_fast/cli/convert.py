"""The command `lemma-fast convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lemma_fast.cli.exits import fail, interruptible, misused, say
from lemma_fast.errors import reason
from lemma_fast.outputs import OutputError, check_output


def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Checkpoint to read: a file or a packaged name.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Checkpoint to write.")],
    text_prior: Annotated[
        Path | None,
        typer.Option(help="The CRNN that a published TATT or C3-STISR reads with; goes into OUT."),
    ] = None,
    corrected: Annotated[
        bool,
        typer.Option(
            "--corrected", help="Of a published TATT, PCAN or SAN: do right what its code does not."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing OUT.")
    ] = False,
) -> None:
    """Convert a checkpoint: published .pth to .safetensors, or back, by OUT's ending.

    A LEMMA is known by the names of its tensors, and so are the networks of the paper's Table 3,
    which go to .safetensors alone. Nothing but tensors is ever unpickled, and what does not fit is
    named. Weights that are not finite numbers are converted as they are, with a warning.
    """
    try:
        check_output(
            target,
            overwrite=overwrite,
            inputs=[source, *([] if text_prior is None else [text_prior])],
            endings=(".safetensors", ".pth", ".pt"),
        )
    except OutputError as error:
        misused(error)
    from lemma_fast import baselines, checkpoint
    from lemma_fast.checkpoint.files import listed

    try:
        with interruptible("nothing was written"):
            model = baselines.convert(source, target, text_prior=text_prior, corrected=corrected)
    except checkpoint.CheckpointError as error:
        fail(str(error))
    except (OSError, RuntimeError) as error:
        # Torch reports a full disk as RuntimeError.
        fail(f"cannot write {target}: {reason(error)}")
    if strange := checkpoint.not_finite(model):
        say(
            f"warning: {listed(strange)} hold NaN or infinity: what this network "
            "returns cannot be used",
            err=True,
        )
    say(f"wrote {target}")
