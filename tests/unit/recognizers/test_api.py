"""The recognisers as a user meets them: training, saving, loading, reading, refusals."""

import pytest
import torch

from lemma_fast.recognizers import (
    CRNN,
    CRNNConfig,
    Reading,
    TextFocus,
    TextFocusConfig,
    list_recognizers,
    load_recognizer,
)
from lemma_fast.training.data.labels import encode_ctc_labels, encode_focus_labels
from lemma_fast.training.losses.lemma import crnn_ctc_loss, text_focus_cross_entropy

TINY_FOCUS = TextFocusConfig((8, 8), (8, 16), (1, 1), width=16, heads=2, hidden=32, max_length=6)
TINY_CRNN = CRNNConfig((8, 8, 16, 16, 16, 16, 16), hidden=32, corrected=True)
LABELS = ["ab", "Cab!", "a"]


def build(name: str) -> CRNN | TextFocus:
    return CRNN(TINY_CRNN) if name == "crnn" else TextFocus(TINY_FOCUS)


@pytest.fixture(params=["crnn", "text_focus"])
def model(request):
    return build(request.param)


def stripes() -> torch.Tensor:
    """Three images (3, 3, 32, 128), easily told apart."""
    x = torch.arange(128) / 128
    waves = torch.stack([(2 * torch.pi * k * x).sin() > 0 for k in (1, 4, 10)])
    return waves.float()[:, None, None].expand(3, 3, 32, 128).contiguous()


def loss_of(model: CRNN | TextFocus, images: torch.Tensor) -> torch.Tensor:
    x = model.prepare(images)
    if isinstance(model, CRNN):
        return crnn_ctc_loss(model(x), encode_ctc_labels(LABELS))
    labels = encode_focus_labels(LABELS)
    return text_focus_cross_entropy(model(x, labels.inputs).logits, labels)


def assert_path_is_the_forced_one(
    model: TextFocus, images: torch.Tensor, readings: list[Reading]
) -> None:
    """Each step's best class, and the confidence, are those of the pass fed the whole reading."""
    labels = encode_focus_labels([reading.text for reading in readings])
    with torch.no_grad():
        probability, best = model(model.prepare(images), labels.inputs).logits.softmax(-1).max(-1)
    for n, reading in enumerate(readings):
        steps = min(len(reading.ids) + 1, model.config.max_length)
        assert best[n, :steps].tolist() == [*reading.ids, 0][:steps]
        assert reading.confidence == pytest.approx(probability[n, :steps].prod().item(), rel=1e-4)


def test_learns_three_words(model):
    """Every parameter gets a gradient, and what was learned is read."""
    images = stripes()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss_of(model, images).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    for _ in range(400):
        optimiser.zero_grad()
        loss = loss_of(model, images)
        loss.backward()
        optimiser.step()
        if loss < 0.02:
            break
    # running statistics of the final weights, as a long training would have them
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        loss_of(model, images)
    readings = model.eval().read(images)
    assert [reading.text for reading in readings] == ["ab", "cab", "a"]
    assert all(0.3 < reading.confidence <= 1 for reading in readings)
    assert readings[0].ids == (11, 12)
    if isinstance(model, TextFocus):
        assert_path_is_the_forced_one(model, images, readings)


def test_save_and_load_keep_sizes_and_numbers(model, tmp_path):
    model.eval().save(tmp_path / "model.safetensors")
    again = load_recognizer(model.name, tmp_path / "model.safetensors", device="cpu")
    assert again.config == model.config
    images = torch.rand(2, 3, 16, 64)
    assert again.read(images) == model.read(images)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_published_form_of_any_size_comes_back(tmp_path):
    model = build("text_focus")
    again = build("text_focus")
    again.load_published_state(model.published_state())
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_greedy_reading_agrees_with_the_teacher_forced_pass():
    model = build("text_focus").eval()
    images = torch.rand(8, 3, 32, 128)
    assert_path_is_the_forced_one(model, images, model.read(images))


def test_text_focus_does_not_see_the_future():
    model = build("text_focus").eval()
    grey = torch.rand(1, 1, 32, 128)
    with torch.no_grad():
        short, _ = model(grey, torch.tensor([[0, 11, 12]]))
        long, _ = model(grey, torch.tensor([[0, 11, 30, 5]]))
    torch.testing.assert_close(short[:, :2], long[:, :2])
    assert not torch.allclose(short[:, 2], long[:, 2])


def test_corrected_input_is_normalised(tmp_path):
    model = build("crnn")
    model.save(tmp_path / "model.safetensors")
    plain = load_recognizer("crnn", tmp_path / "model.safetensors", device="cpu", corrected=False)
    images = torch.rand(1, 3, 32, 128)
    torch.testing.assert_close(model.prepare(images), 2 * plain.prepare(images) - 1)


def test_single_images_read_as_in_the_batch(model):
    images = torch.rand(5, 3, 32, 128)
    last = model.rnn[1].embedding if isinstance(model, CRNN) else model.classifier
    with torch.no_grad():
        # Unsure of every step, all confidences would be as good as nothing.
        last.weight.mul_(30)
    together = model.eval().read(images)
    alone = [reading for image in images for reading in model.read(image[None])]
    assert [reading.ids for reading in together] == [reading.ids for reading in alone]
    assert len({reading.confidence for reading in together}) == 5
    for one, other in zip(together, alone, strict=True):
        assert one.confidence == pytest.approx(other.confidence, rel=1e-3, abs=0)


def test_reading_in_train_mode_is_refused(model):
    with pytest.raises(RuntimeError, match="eval"):
        model.read(torch.rand(1, 3, 32, 128))


@pytest.mark.parametrize("images", [torch.rand(1, 4, 32, 128), torch.rand(3, 32, 128),
                                    torch.zeros(1, 3, 32, 128, dtype=torch.uint8)],
                         ids=["four channels", "no batch", "uint8"])  # fmt: skip
def test_wrong_images_are_refused(model, images):
    with pytest.raises(ValueError, match="expected RGB images"):
        model.eval().read(images)


def test_registry():
    assert {"crnn", "tesseract", "text_focus"} <= set(list_recognizers())
    with pytest.raises(ValueError, match="no recogniser 'crn'; there are .*crnn"):
        load_recognizer("crn")
    with pytest.raises(ValueError, match="takes no checkpoint"):
        load_recognizer("tesseract", "weights.pth")


def test_what_does_not_fit_is_named(tmp_path):
    state = CRNN(TINY_CRNN).state_dict()
    state["extra"] = state.pop("cnn.conv0.bias")
    torch.save(state, tmp_path / "crnn.pth")
    with pytest.raises(
        ValueError,
        match=r"crnn.pth does not fit CRNN: missing 1 tensors \(cnn.conv0.bias\); "
        r"unexpected 1 tensors \(extra\); misshapen \d+ tensors \(cnn.conv0.weight",
    ):
        load_recognizer("crnn", tmp_path / "crnn.pth")


class Payload:
    pass


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": Payload()}, tmp_path / "crnn.pth")
    with pytest.raises(ValueError, match="crnn.pth: refused, .* beside tensors"):
        load_recognizer("crnn", tmp_path / "crnn.pth")


def test_small_sizes_are_as_documented():
    def millions(model: CRNN | TextFocus) -> float:
        return round(sum(p.numel() for p in model.parameters()) / 1e6, 1)

    assert millions(TextFocus(TextFocusConfig.small())) == 1.3
    assert millions(CRNN(CRNNConfig.small())) == 0.7
