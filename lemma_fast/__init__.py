"""lemma-fast: LEMMA, the scene-text super-resolution network, as software."""

from lemma_fast.checkpoint import CheckpointError, load
from lemma_fast.config import LemmaConfig, PriorConfig
from lemma_fast.model import LEMMA
from lemma_fast.recognizer import Prior

__version__ = "0.1.0"
__all__ = ["LEMMA", "CheckpointError", "LemmaConfig", "Prior", "PriorConfig", "load", "__version__"]
