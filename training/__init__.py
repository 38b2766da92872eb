"""Training, data and evaluation; needs the `train` extra."""

# Imported from the repository's root this folder would be a second copy of lemma_fast.training.
if __name__ != "lemma_fast.training":
    raise ImportError(f"this folder is lemma_fast.training; do not import it as {__name__!r}")
