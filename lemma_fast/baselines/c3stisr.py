"""C3-STISR: TSRN's frame, led by what a CRNN reads and what a language model makes of that."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from lemma_fast.baselines.clues import CLUE, Clues
from lemma_fast.baselines.config import BaselineConfig
from lemma_fast.baselines.frame import CONVOLUTIONS, GRUS
from lemma_fast.baselines.published import Published, frame_sizes
from lemma_fast.baselines.reading import Look, ReadingFrame
from lemma_fast.baselines.tsrn import SequentialBlock
from lemma_fast.checkpoint.published import FRAME
from lemma_fast.config import PriorConfig
from lemma_fast.ops import Operations

_CLUES = """
clues.centre                            down_conv
clues.language.embed                    lm.proj
clues.language.layers.<layer>           lm.model.layers.<layer>@cross
clues.language.classifier               lm.cls
clues.language.positions                lm.pos_encoder.pe
clues.recognition.convs.<layer>         infoGen.tconv<layer+1>
clues.recognition.norms.<layer>         infoGen.bn<layer+1>
clues.linguistic.convs.<layer>          infoGen_ling.tconv<layer+1>
clues.linguistic.norms.<layer>          infoGen_ling.bn<layer+1>
clues.fusion.branches.<clue>.<part>.direction  gated.gated<clue+1>.<part>.weight_v
clues.fusion.branches.<clue>.<part>.scale      gated.gated<clue+1>.<part>.weight_g
clues.fusion.branches.<clue>.<part>.bias       gated.gated<clue+1>.<part>.bias
clues.fusion.compress.direction         gated.compress.1.weight_v
clues.fusion.compress.scale             gated.compress.1.weight_g
"""
_ATTENTION = """
clues.{ours}_attention.reduce           dsta_{theirs}.conv1
clues.{ours}_attention.shrink           dsta_{theirs}.conv2
clues.{ours}_attention.first            dsta_{theirs}.conv_max
clues.{ours}_attention.second           dsta_{theirs}.conv3
clues.{ours}_attention.third            dsta_{theirs}.conv3_
clues.{ours}_attention.down             dsta_{theirs}.down_conv2.0
clues.{ours}_attention.taps             dsta_{theirs}.mask
clues.{ours}_attention.coarse_taps      dsta_{theirs}.mask2
clues.{ours}_attention.deform           dsta_{theirs}.dcn
clues.{ours}_attention.gate1            dsta_{theirs}.conv_du.0
clues.{ours}_attention.gate2            dsta_{theirs}.conv_du.2
clues.{ours}_attention.beside           dsta_{theirs}.conv_f
clues.{ours}_attention.restore          dsta_{theirs}.conv4
"""


class C3STISR(ReadingFrame):
    """C3-STISR: Zhao et al., C3-STISR: Scene Text Image Super-resolution with Triple Clues.

    `reader`, a CRNN, reads the crop; where it learns, it learns by the result too. Of the three
    clues the authors released two. The released code fuses them and then feeds the blocks with the
    enlarged reading alone: so does `config.committed`, otherwise it is the fused clue, as in the
    paper.
    """

    published: ClassVar[Published] = Published(
        repository="github.com/JingyeChen/C3-STISR",
        signature="infoGen_ling.tconv1.weight",
        modules=FRAME
        + CONVOLUTIONS
        + GRUS
        + _CLUES
        + _ATTENTION.format(ours="recognition", theirs="rec")
        + _ATTENTION.format(ours="linguistic", theirs="ling"),
        counters={"layer": 4, "clue": 2, "part": 6},
        sizes=frame_sizes,
        unused=r"lm\.token_encoder\.pe"
        r"|(infoGen_visual|dsta_vis|vis_rec_fuser|correction_model|gated\.gated3)\..*",
    )

    def __init__(self, config: BaselineConfig, ops: Operations) -> None:
        channels = config.channels
        super().__init__(config, lambda _: SequentialBlock(channels, ops, guided=CLUE))
        self.clues = Clues(replace(config.lemma, prior=PriorConfig(dropout=config.dropout)))

    def look(self, lr: Tensor) -> Look:
        read = shown = self.read(lr)
        if self.reader.training:
            # The published language model is shown what the reader sees in evaluation.
            self.reader.eval()
            with torch.no_grad():
                shown = self.read(lr)
            self.reader.train()
        spelled = self.clues.spell(shown)
        return Look(torch.stack([read, spelled.softmax(2)]), read, spelled)

    def deepen(self, shallow: Tensor, prior: Tensor | None) -> Tensor:
        """As in every frame; `prior` [2, N, 26, 37] is what is read and what is spelled."""
        assert prior is not None
        clue = self.clues(shallow, prior, fused=not self.config.committed)
        features = shallow
        for block in self.blocks:
            features = block(features, clue)
        return features
