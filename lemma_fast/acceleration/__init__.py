"""The network as fast as its device allows: `accelerate` and what it is made of."""

from lemma_fast.acceleration.accelerated import Accelerated, accelerate, training_operations
from lemma_fast.ops.precision import tensor_cores

__all__ = ["Accelerated", "accelerate", "tensor_cores", "training_operations"]
