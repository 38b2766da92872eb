"""TATT: TSRN's frame, led by what a CRNN reads in the crop."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lemma_fast.baselines.config import BaselineConfig
from lemma_fast.baselines.frame import CONVOLUTIONS, GRUS
from lemma_fast.baselines.published import Published, frame_sizes
from lemma_fast.baselines.reading import Look, ReadingFrame
from lemma_fast.baselines.tsrn import SequentialBlock
from lemma_fast.checkpoint.published import FRAME
from lemma_fast.config import CRNN_STEPS
from lemma_fast.model.layers import TransformerLayer, sinusoid
from lemma_fast.ops import Operations
from lemma_fast.recognizers.charset import FOCUS

HEADS = 4
DECODER_LAYERS = 2


class Interpreter(nn.Module):
    """TP Interpreter: features [N, C, H, W] ask a text distribution [N, 26, 37] for their clue.

    Returns the clue [N, C, H, W]. The queries of the positions, a table, pass a GRU which in the
    published code runs along the batch: what a crop gets depends on the size of the batch and on
    its place in it. `config.corrected` gives each what it gets alone.
    """

    positions: Tensor

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        channels, (height, width) = config.channels, config.size
        self.size, self.alone = config.size, config.corrected

        def layer() -> TransformerLayer:
            return TransformerLayer(channels, HEADS, channels, config.dropout)

        self.embed = nn.Linear(FOCUS.size, channels)
        self.act = nn.PReLU()
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = layer()
        self.query_table = nn.Embedding(height * width, channels)
        column = height * channels
        self.query_gru = nn.GRU(column, column // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.ModuleList(layer() for _ in range(DECODER_LAYERS))
        self.norm = nn.LayerNorm(channels)
        self.register_buffer("positions", sinusoid(CRNN_STEPS, channels), persistent=False)
        for part in (self.encoder, self.query_gru, self.decoder):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    def forward(self, features: Tensor, prior: Tensor) -> Tensor:
        count = len(features)
        steps = self.act(self.embed(prior.to(features.dtype)))
        places = self.dropout(self.positions.to(steps.dtype).expand(count, -1, -1))
        # The published encoder adds its input to itself.
        memory = self.encoder(2 * steps, positions=(places, places))
        queries = self.queries(1 if self.alone else count).expand(count, -1, -1)
        rows = features.flatten(2).transpose(1, 2)
        total = torch.zeros_like(rows)
        for layer in self.decoder:
            rows = layer(rows, memory, positions=(queries, places))
            total = total + self.norm(rows)
        return (total / len(self.decoder)).transpose(1, 2).unflatten(2, self.size)

    def queries(self, count: int) -> Tensor:
        """Queries [N, H * W, C] of a batch of `count`; each column is a batch entry of the GRU."""
        table = self.query_table.weight.unflatten(0, self.size)
        columns = table.transpose(0, 1).flatten(1)[:, None].expand(-1, count, -1)
        states, _ = self.query_gru(columns)
        return states.unflatten(2, (self.size[0], -1)).permute(1, 2, 0, 3).flatten(1, 2)


class TATT(ReadingFrame):
    """TATT: Ma et al., A Text Attention Network for Spatial Deformation Robust [...], 2022.

    What `reader`, a CRNN, reads in the crop reaches every block by the interpreter. A reader that
    learns has no gradient from there.
    """

    published: ClassVar[Published] = Published(
        repository="github.com/mjq11302010044/TATT",
        signature="infoGen.init_factor.weight",
        modules=FRAME
        + CONVOLUTIONS
        + GRUS
        + """
interpreter.embed            infoGen.fc_in
interpreter.act              infoGen.activation
interpreter.encoder          infoGen.transformer.encoder.layers.0@self
interpreter.query_table      infoGen.init_factor
interpreter.query_gru        infoGen.transformer.gru_encoding
interpreter.decoder.<layer>  infoGen.transformer.decoder.layers.<layer>@cross
interpreter.norm             infoGen.transformer.decoder.norm
""",
        counters={"layer": DECODER_LAYERS},
        sizes=frame_sizes,
        unused=r"infoGen\.(fc_feature_in\..*|pe\.pe)"
        r"|infoGen\.transformer\.decoder\.layers\.\d+\.(self_attn|norm1)\..*",
    )

    def __init__(self, config: BaselineConfig, ops: Operations) -> None:
        channels = config.channels
        super().__init__(config, lambda _: SequentialBlock(channels, ops, guided=channels))
        self.interpreter = Interpreter(config)

    def look(self, lr: Tensor) -> Look:
        read = self.read(lr)
        return Look(read.detach(), read)

    def deepen(self, shallow: Tensor, prior: Tensor | None) -> Tensor:
        assert prior is not None
        clue = self.interpreter(shallow, prior)
        features = shallow
        for block in self.blocks:
            features = block(features, clue)
        return features
