"""ASTER and MORAN against the published modules' numbers."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from recognizer_fill import DATA, images, published_state, published_table
from torch import Tensor

from lemma_fast.model.rectify import ThinPlateSpline
from lemma_fast.recognizers import ASTER, MORAN, MORANConfig, list_recognizers, load_recognizer
from lemma_fast.recognizers.aster import beam_search
from lemma_fast.recognizers.rectified import AttentionDecoder

NOISE = json.loads((DATA / "noise.json").read_text())
KINDS = {"aster": ASTER, "moran": MORAN}
END, CLASSES, STEPS = 94, 97, 100


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}_seed1.npz") as arrays:
        return dict(arrays)


@cache
def filled(name: str) -> dict[str, Tensor]:
    """The published state of seed 1, with the spline of the machine of the goldens."""
    state = dict(published_state(name, 1))
    if name == "aster":
        spline = ThinPlateSpline((32, 100), 20).state_dict()
        state |= {f"tps.{key}": value for key, value in spline.items()}
        state["tps.inverse_kernel"] = torch.from_numpy(golden(name)["tps_inverse_kernel"])
    return state


def near(got: Tensor, name: str, array: str) -> None:
    """Compare within ten times what fp32 itself strays from fp64 there."""
    expected = torch.from_numpy(golden(name)[array])
    torch.testing.assert_close(got, expected, rtol=0, atol=10 * NOISE[name][array])


@pytest.fixture(scope="module")
def aster() -> ASTER:
    model = ASTER()
    model.load_published_state(filled("aster"))
    return model.eval()


@pytest.fixture(scope="module")
def moran() -> MORAN:
    model = MORAN()
    model.load_published_state(filled("moran"))
    return model.eval()


@pytest.fixture(params=KINDS)
def network(request) -> ASTER | MORAN:
    return request.getfixturevalue(request.param)


def forced(aster: ASTER, columns: Tensor, targets: Tensor) -> Tensor:
    """Logits of each step, fed the targets before it."""
    keys, state = aster.decoder.key(columns), aster.decoder.begin(columns, 1)
    rows, steps = torch.full((len(columns), 1), CLASSES), []
    for target in targets.split(1, 1):
        logits, state = aster.decoder(columns, keys, state, rows)
        steps.append(logits)
        rows = target
    return torch.cat(steps, 1)


@pytest.mark.parametrize("which", ["hr", "lr"])
def test_aster_equals_the_published_one(aster, which):
    expected = golden("aster")
    with torch.no_grad():
        x = aster.prepare(images(which)[:, :3])
        columns = aster(x)
        near(aster.control_points(x), "aster", f"ctrl_{which}")
        if which == "hr":
            near(aster.rectify(x), "aster", "rectified_hr")
            near(columns[:, :, ::4], "aster", "feat_c4_hr")
        targets = torch.from_numpy(expected["tf_targets"]).long()
        near(forced(aster, columns, targets), "aster", f"tf_logits_{which}")
        greedy = torch.from_numpy(expected[f"greedy_ids_{which}"]).long()
        scores, ids = forced(aster, columns, greedy).softmax(2).max(2)
        assert torch.equal(ids, greedy)
        near(scores, "aster", f"greedy_score_{which}")
        assert (
            beam_search(aster.decoder, columns).ids.tolist()
            == expected[f"beam_ids_{which}"].tolist()
        )


@pytest.mark.parametrize("which", ["hr", "lr"])
def test_moran_equals_the_published_one(moran, which):
    with torch.no_grad():
        x = moran.prepare(images(which)[:, :3])
        near(x, "moran", f"x_{which}")
        straight = moran.rectify(x)
        for i, offsets in enumerate(straight.offsets, 1):
            near(offsets, "moran", f"offsets{i}_{which}")
        near(straight.strip, "moran", f"rectified_{which}")
        if which == "hr":
            columns = moran.encode(straight.strip).transpose(0, 1)
            near(columns[:, :, ::4], "moran", "rnn_c4_hr")
        near(moran(x), "moran", f"l2r_{which}")


@pytest.mark.parametrize("which", ["hr", "lr"])
def test_reads_as_the_published_one(network, which):
    batch = images(which)[:, :3]
    readings = network.read(batch)
    assert [reading.text for reading in readings] == golden(network.name)[f"text_{which}"].tolist()
    assert all(0 < reading.confidence < 1 for reading in readings)


def test_confidence_is_the_probability_of_the_text(aster, moran):
    """Of its characters and its end, as the pass that is fed the text gives them."""
    batch = images("hr")[:2, :3]
    with torch.no_grad():
        columns = aster(aster.prepare(batch))
        for n, reading in enumerate(aster.read(batch)):
            ids = torch.tensor([[*reading.ids, END]])
            steps = forced(aster, columns[n : n + 1], ids).softmax(2).gather(2, ids[:, :, None])
            assert reading.confidence == pytest.approx(steps.prod().item(), rel=1e-2)
        logits = moran(moran.prepare(batch))
        for probability, reading in zip(logits.softmax(2), moran.read(batch), strict=True):
            steps = probability.amax(1)[: len(reading.ids) + 1]
            assert reading.confidence == pytest.approx(steps.prod().item(), rel=1e-2)


def test_spline_is_the_published_one():
    """But for the rounding of the inverse, which differs by machine."""
    spline = ThinPlateSpline((32, 100), 20)
    expected = torch.from_numpy(golden("aster")["tps_inverse_kernel"])
    torch.testing.assert_close(spline.inverse_kernel, expected, rtol=0, atol=5e-3)


def test_every_published_name_goes_both_ways(network):
    """All names, shapes and dtypes of the published state_dict, and every value comes back."""
    state = network.published_state()
    if network.name == "moran":
        unused = [key for key in filled("moran") if key.startswith("ASRN.attentionR2L.")]
        assert len(unused) == 11
        state |= {key: filled("moran")[key] for key in unused}
    assert sorted((key, tuple(value.shape), str(value.dtype)) for key, value in state.items()) == (
        sorted(
            (key, shape, f"torch.{dtype}") for key, shape, dtype in published_table(network.name)
        )
    )
    for key, value in filled(network.name).items():
        assert torch.equal(state[key], value), key


def test_single_images_read_as_in_the_batch(network):
    """One long and one short text, each alone and with a companion; and no image at all."""
    batch = images("lr")[:2, :3]
    for image, together in zip(batch, network.read(batch), strict=True):
        (alone,) = network.read(image[None])
        assert (alone.text, alone.ids) == (together.text, together.ids)
        assert alone.confidence == pytest.approx(together.confidence, rel=2e-2)
    assert network.read(batch[:0]) == []


def traced_back(decoder: AttentionDecoder, columns: Tensor) -> tuple[list[int], float]:
    """Spell one image as the published beam search does: all the steps, then back through them."""
    keys, state = decoder.key(columns[None]), decoder.begin(columns[None], 5)
    symbols, scores = torch.full((1, 5), CLASSES), torch.tensor([0.0, *[-torch.inf] * 4])
    history = []
    for _ in range(STEPS):
        logits, state = decoder(columns[None], keys, state, symbols)
        scores, chosen = (scores[:, None] + logits[0].log_softmax(1)).flatten().topk(5)
        parents, symbols = chosen // CLASSES, (chosen % CLASSES)[None]
        state = state[:, parents]
        history.append((scores.tolist(), parents.tolist(), symbols[0].tolist()))
        scores = scores.masked_fill(symbols[0] == END, -torch.inf)
    found = [(history[t][0][k], t, k) for t in range(STEPS) for k in range(5)
             if history[t][2][k] == END][:5]  # fmt: skip
    last = sorted(((history[-1][0][k], STEPS - 1, k) for k in range(5)), reverse=True)
    score, t, k = max([*found, *last[: 5 - len(found)]], key=lambda hypothesis: hypothesis[0])
    ids = []
    for _, parents, row in reversed(history[: t + 1]):
        ids.append(row[k])
        k = parents[k]
    return ids[::-1], score


@pytest.mark.parametrize(
    ("width", "gain", "bias", "steps"),
    [(24, 8, 2, 9), (24, 16, 4, 10), (24, 24, 4, STEPS), (8, 16, 4, STEPS), (8, 8, -2, STEPS)],
)
def test_beam_search_stops_early_without_a_change(width, gain, bias, steps):
    """Whether texts end soon, late or never, it finds what the published search finds."""
    decoder = AttentionDecoder(width, CLASSES, biased=True, context_first=False)
    calls = []
    hook = decoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        decoder.classifier.weight.mul_(gain)
        decoder.classifier.bias[END] += bias
        decoder.embedding.weight.mul_(3)
        decoder.cell.weight_ih.mul_(2)
        decoder.cell.weight_hh.mul_(2)
        columns = 3 * torch.randn(8, 7, width)
        early = beam_search(decoder, columns)
        hook.remove()
        assert len(calls) == steps
        full = beam_search(decoder, columns, early=False)
        expected = [traced_back(decoder, column) for column in columns]
    for got in (early, full):
        assert [[v for v in row if v >= 0] for row in got.ids.tolist()] == [e[0] for e in expected]
        assert got.scores.tolist() == pytest.approx([e[1] for e in expected], rel=1e-4)


class Scripted(AttentionDecoder):
    """Says the same at a step whatever came before: `script` [N, steps, classes]."""

    def __init__(self, script: Tensor) -> None:
        super().__init__(8, CLASSES, biased=True, context_first=False)
        self.script = iter(script.unbind(1))

    def forward(self, columns, keys, state, rows):
        return next(self.script)[:, None].expand(-1, rows.shape[1], -1), state


@pytest.mark.parametrize("early", [True, False])
def test_only_the_first_five_ends_of_beam_search_count(early):
    """A likely end, or no end at all, after five unlikely ends comes too late, after four not."""
    probability = torch.full((4, STEPS, CLASSES), 1e-6)
    probability[:, :7, :END] = 5e-4
    probability[:, :7, 10] = 0.9
    probability[::2, :5, END] = probability[1::2, :4, END] = 0.05
    probability[:2, 7, END] = 0.99
    probability[2:, 7:, 10] = 0.99
    spelling = beam_search(Scripted(probability.log()), torch.zeros(4, 3, 8), early=early)
    texts = [[value for value in row if value >= 0] for row in spelling.ids.tolist()]
    assert texts == [[END], [10] * 7 + [END], [END], [10] * STEPS]


def test_moran_stops_early_without_a_change(moran):
    """One text ends after three characters, the other never does."""
    calls = []
    hook = moran.decoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        columns = moran.encode(moran.rectify(moran.prepare(images("hr")[:2, :3])).strip)
        logits = moran.spell(columns)
        short = moran.spell(columns[1:], early=True)
        hook.remove()
        assert (short.shape[1], len(calls)) == (4, 24)
        torch.testing.assert_close(short, logits[1:, :4], rtol=0, atol=1e-2)
        assert moran.spell(columns, early=True).shape == logits.shape


def test_moran_corrected_input_is_normalised(tmp_path, moran):
    crops = 3 * torch.rand(1, 3, 32, 128) - 1
    model = MORAN(MORANConfig(corrected=True)).eval()
    torch.testing.assert_close(model.prepare(crops), 2 * moran.prepare(crops) - 1)
    model.save(tmp_path / "moran.safetensors")
    path = tmp_path / "moran.safetensors"
    assert load_recognizer("moran", path, device="cpu").config.corrected
    assert not load_recognizer("moran", path, device="cpu", corrected=False).config.corrected


def test_aster_input_is_scaled_and_keeps_its_size(aster):
    crops = 3 * torch.rand(1, 3, 20, 50) - 1
    torch.testing.assert_close(aster.prepare(crops), 2 * crops - 1)
    assert len(aster.read(crops)) == 1


def published_file(name: str) -> dict[str, object]:
    """As the authors stored it: ASTER under "state_dict", MORAN with "module." in every name.

    MORAN's is from before batch norm counted its batches.
    """
    state = filled(name)
    if name == "aster":
        return {"state_dict": state, "iters": 1}
    return {
        f"{key.partition('.')[0]}.module.{key.partition('.')[2]}": value
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }


def test_published_checkpoints_open(network, tmp_path):
    torch.save(published_file(network.name), tmp_path / "network.pth")
    reader = load_recognizer(network.name, tmp_path / "network.pth", device="cpu")
    assert type(reader) is type(network)
    assert not reader.training
    reader.save(tmp_path / "network.safetensors")
    again = load_recognizer(network.name, tmp_path / "network.safetensors", device="cpu")
    for key, value in network.state_dict().items():
        assert torch.equal(reader.state_dict()[key], value), key
        assert torch.equal(again.state_dict()[key], value), key


def test_every_missing_and_strange_weight_is_named():
    state = dict(filled("moran"))
    state["ASRN.extra"] = state.pop("ASRN.rnn.0.embedding.bias")
    state["MORN.cnn.16.bias"] = torch.zeros(2)
    message = (
        r"missing 1 tensors \(lstm.0.embedding.bias\); unexpected 1 tensors \(ASRN.extra\);"
        r" misshapen 1 tensors \(morph.convs.4.norm.bias \[2\] instead of \[1\]\)$"
    )
    with pytest.raises(ValueError, match=message):
        MORAN().load_published_state(state)


@pytest.mark.parametrize("crops", [torch.rand(1, 4, 32, 128), torch.rand(3, 32, 128)])
def test_wrong_use_is_refused(network, crops):
    with pytest.raises(ValueError, match="expected RGB images"):
        network.read(crops)
    with pytest.raises(RuntimeError, match="eval"):
        KINDS[network.name]().read(torch.rand(1, 3, 32, 128))


def test_registry_has_them():
    assert set(KINDS) <= set(list_recognizers())
