"""The training loop: stages, the Lightning module, checkpoints and resumption."""
