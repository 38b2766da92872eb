"""`python -m lemma_fast.cli` is the command `lemma-fast`."""

from lemma_fast.cli.app import main

main()
