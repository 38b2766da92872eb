"""Pairs of crops: reading, writing, checking, and making batches of them."""

from lemma_fast.training.data.pairs import (
    HR_SIZE,
    LR_SIZE,
    BenchmarkDataset,
    Crop,
    FolderDataset,
    Pair,
    PairDataset,
    Skipped,
    TextZoomDataset,
)

__all__ = [
    "HR_SIZE",
    "LR_SIZE",
    "BenchmarkDataset",
    "Crop",
    "FolderDataset",
    "Pair",
    "PairDataset",
    "Skipped",
    "TextZoomDataset",
]
