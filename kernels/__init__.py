"""Triton kernels, one operation a file; `lemma_fast.ops.fused` imports them when it is used."""

# Imported from the repository's root this folder would be a second copy of lemma_fast.kernels.
if __name__ != "lemma_fast.kernels":
    raise ImportError(f"this folder is lemma_fast.kernels; do not import it as {__name__!r}")
