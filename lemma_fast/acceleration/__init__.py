"""The network as fast as its device allows: `accelerate` and what it is made of."""

from lemma_fast.acceleration.accelerated import Accelerated, accelerate

__all__ = ["Accelerated", "accelerate"]
