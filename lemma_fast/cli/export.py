"""The command `lemma-fast export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lemma_fast.cli.exits import fail, interruptible, misused, say
from lemma_fast.cli.options import MODEL_HELP
from lemma_fast.outputs import OutputError, check_output


def export(
    model: Annotated[
        str,
        typer.Option(help=MODEL_HELP),
    ] = "small",
    output: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads this on Python 3.10 too)
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="The file to write. Default: the model's name with the ending .onnx.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing FILE.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(help="Run the file in ONNX Runtime and compare it with PyTorch."),
    ] = True,
) -> None:
    """Write the network as an ONNX file, for any batch size from 1 on (extra: onnx).

    The input lr is [N, 4, 16, 64] in [0, 1], RGB and a mask, N at least 1 (ONNX Runtime's GRU ends
    the process at N = 0: leave empty batches out); the outputs are sr, attn_map,
    img_logits, text_logits and pt_lengths. A file that does not compute what PyTorch does is not
    written.
    """
    target = output if output is not None else Path(f"{Path(model).stem}.onnx")
    try:
        check_output(target, "-o", overwrite=overwrite, inputs=[model], endings=(".onnx",))
    except OutputError as error:
        misused(error)
    from lemma_fast.checkpoint import CheckpointError, load
    from lemma_fast.onnx import ExportError, export_onnx

    try:
        with interruptible("nothing was written"):
            written = export_onnx(load(model), target, check=check)
    except (CheckpointError, ExportError) as error:
        fail(str(error))
    megabytes = target.stat().st_size / 1e6
    say(f"wrote {target}: {megabytes:.1f} MB, {written.grus} GRU nodes")
    if written.deviations is not None:
        name, worst = max(written.deviations.items(), key=lambda item: item[1])
        say(f"checked in ONNX Runtime: at most {worst:.1e} from PyTorch ({name})")
    elif check:
        say("not checked: ONNX Runtime is not installed (pip install 'lemma-fast[onnx]')")
