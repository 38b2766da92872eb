"""The command `lemma-fast`: a file per command, and what commands share."""

from lemma_fast.cli.app import app, main

__all__ = ["app", "main"]
