"""What `make demo` runs: the crops beside this file, upscaled and compared with bicubic."""

import sys
import tempfile
from pathlib import Path

import torch

from lemma_fast import LEMMA, LemmaConfig, checkpoint
from lemma_fast.cli import app

EXAMPLES = Path(__file__).parent


def main(output: str) -> None:
    """Write the pictures to the folder `output`."""
    options = [str(EXAMPLES / "crops"), "-o", output, "--compare", "--overwrite"]
    with tempfile.TemporaryDirectory() as folder:
        if "small" not in checkpoint.packaged():
            print(
                "No trained weights are packaged in this version. The network of this demo has "
                "random ones: its pictures show that everything runs, not what LEMMA can do."
            )
            torch.manual_seed(0)
            weights = Path(folder) / "untrained.safetensors"
            checkpoint.save(LEMMA(LemmaConfig.small()), weights)
            options += ["--model", str(weights)]
        app(args=["upscale", *options], prog_name="lemma-fast", standalone_mode=False)
    print(f"The pictures are in {output}/; those named *_compare.png show before and after.")


if __name__ == "__main__":
    main(*sys.argv[1:])
