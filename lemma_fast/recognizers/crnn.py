"""CRNN: seven convolutions, two bidirectional LSTMs, CTC; the field's smallest reader.

The attributes bear the published names, so a published checkpoint is our state_dict.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemma_fast.checkpoint import files
from lemma_fast.config import CRNNConfig
from lemma_fast.recognizers import base
from lemma_fast.recognizers.charset import FOCUS, collapse_ctc


class BidirectionalLSTM(nn.Module):
    """LSTM in both directions over (T, N, C), then a linear layer."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, bidirectional=True)
        self.embedding = nn.Linear(2 * hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x)
        out: Tensor = self.embedding(states)
        return out


@torch.no_grad()
def _reset_lstm(lstm: nn.LSTM) -> None:
    """Xavier inputs, orthogonal recurrence gate by gate, gates that start by remembering."""
    for name, parameter in lstm.named_parameters():
        if name.startswith("weight_ih"):
            nn.init.xavier_uniform_(parameter)
        elif name.startswith("weight_hh"):
            for gate in parameter.chunk(4):
                nn.init.orthogonal_(gate)
        else:
            nn.init.zeros_(parameter)
            if name.startswith("bias_ih"):
                parameter.chunk(4)[1].fill_(1.0)


def _convolutions(channels: tuple[int, ...]) -> nn.Sequential:
    """Grey [N, 1, 32, 100] to [N, C, 1, 26]; the pools after 3 and 5 halve the height alone."""
    normalised = {2, 4, 6}
    pools: dict[int, nn.Module] = {
        0: nn.MaxPool2d(2),
        1: nn.MaxPool2d(2),
        3: nn.MaxPool2d(2, (2, 1), (0, 1)),
        5: nn.MaxPool2d(2, (2, 1), (0, 1)),
    }
    layers = nn.Sequential()
    inputs = 1
    for i, outputs in enumerate(channels):
        last = i == len(channels) - 1
        conv = nn.Conv2d(inputs, outputs, 2 if last else 3, padding=0 if last else 1)
        layers.add_module(f"conv{i}", conv)
        if i in normalised:
            layers.add_module(f"batchnorm{i}", nn.BatchNorm2d(outputs))
        layers.add_module(f"relu{i}", nn.ReLU())
        if i in pools:
            layers.add_module(f"pool{i}", pools[i])
        inputs = outputs
    return layers


class CRNN(nn.Module):
    """The recogniser; freshly built it is ready to be trained from scratch."""

    name = "crnn"

    def __init__(self, config: CRNNConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or CRNNConfig()
        self.cnn = _convolutions(config.channels)
        self.rnn = nn.Sequential(
            BidirectionalLSTM(config.channels[-1], config.hidden, config.hidden),
            BidirectionalLSTM(config.hidden, config.hidden, FOCUS.size),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights; with PyTorch's own LSTM weights the CTC plateau takes far longer."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.LSTM):
                _reset_lstm(module)

    def prepare(self, images: Tensor) -> Tensor:
        """Turn RGB (N, 3, H, W) in [0, 1] into the grey (N, 1, 32, 100) input.

        Bicubic, not clamped: values may leave [0, 1] a little, as in the published protocol.
        """
        base.check_images(images)
        resized = F.interpolate(images, (32, 100), mode="bicubic", align_corners=False)
        grey = base.grey(resized)
        return (grey - 0.5) / 0.5 if self.config.corrected else grey

    def forward(self, grey: Tensor) -> Tensor:
        """Turn the input of `prepare` into logits (26, N, 37), time first; class 0 is blank."""
        features = self.cnn(grey)
        out: Tensor = self.rnn(features.squeeze(2).permute(2, 0, 1))
        return out

    @torch.no_grad()
    def read(self, images: Tensor) -> list[base.Reading]:
        """Read RGB `images` (N, 3, H, W) in [0, 1] by greedy CTC decoding.

        The confidence is the probability of the greedy path: the product over the 26 steps.
        """
        if self.training:
            raise RuntimeError("call eval() before read(): batch statistics are on")
        probability, path = self(self.prepare(images)).float().softmax(-1).max(-1)
        readings = []
        for steps, value in zip(path.T.tolist(), probability.prod(0).tolist(), strict=True):
            ids = collapse_ctc(steps, FOCUS.end)
            readings.append(base.Reading(FOCUS.decode(ids), value, tuple(ids)))
        return readings

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `load` opens, sizes included."""
        metadata = {"recognizer": self.name, "config": files.config_to_json(self.config)}
        files.save_weights(self, path, metadata)


def load(checkpoint: str | Path, *, corrected: bool | None = None) -> CRNN:
    """Open a checkpoint that `save` wrote, or the published one, on the CPU, for reading.

    `corrected` overrides what the checkpoint says about the normalisation of the input.
    """
    state, metadata = files.read_weights(checkpoint)
    with files.config_of(checkpoint):
        config = files.carried_config(CRNNConfig, CRNN.name, metadata)
        if corrected is not None:
            config = replace(config, corrected=corrected)
        model = CRNN(config)
    files.load_strictly(model, state, str(checkpoint))
    return model.eval()
