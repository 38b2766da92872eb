"""What the options of several commands share."""

from __future__ import annotations

from typing import Any

import typer

MODEL_HELP = (
    "A packaged name, a .safetensors written by lemma-fast, a published .pth, or a Hugging Face "
    "Hub id. A packaged name is never a file: write ./small for a file of that name."
)
ANY_MODEL_HELP = f"{MODEL_HELP} Also the file of a network of the paper's Table 3, and bicubic."


def one_of(*words: str) -> dict[str, Any]:
    """Make typer's arguments for an option that is one of a few words."""

    def parse(text: str) -> str:
        if text not in words:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(words)}")
        return text

    return {"parser": parse, "metavar": f"[{'|'.join(words)}]"}
