"""What TATT and C3-STISR share: TSRN's frame, led by what a CRNN reads in the crop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from lemma_fast.baselines.config import BaselineConfig
from lemma_fast.baselines.frame import Frame
from lemma_fast.recognizers.crnn import CRNN


class Look(NamedTuple):
    """What was seen in a crop: `prior` is what `restore` takes, the others are for the loss."""

    prior: Tensor
    read: Tensor
    """[N, 26, 37], the reader's probabilities of the CTC classes; 0 is blank."""
    spelled: Tensor | None = None
    """[N, 26, 37], the language model's logits, where there is one."""


class ReadingFrame(Frame):
    """A frame with a `reader`, which is frozen and in evaluation unless its parameters learn."""

    def __init__(self, config: BaselineConfig, block: Callable[[int], nn.Module]) -> None:
        super().__init__(config, block)
        self.reader = CRNN(config.crnn).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ReadingFrame:
        """As any module, but a frozen reader stays as it is."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.reader.parameters()):
            self.reader.eval()
        return self

    def upscale(self, lr: Tensor) -> Tensor:
        return self.restore(lr, self.look(lr).prior)

    def read(self, lr: Tensor) -> Tensor:
        """Probabilities [N, 26, 37] of the CTC classes that the reader sees in `lr`; 0 is blank."""
        steps: Tensor = self.reader(self.reader.prepare(lr[:, :3]))
        return steps.softmax(2).transpose(0, 1)

    @abstractmethod
    def look(self, lr: Tensor) -> Look:
        """Read a crop [N, C, 16, 64]."""
