import copy
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from echo_model import EchoModel
from PIL import Image
from tiny_network import tiny_config

from lemma_fast import LEMMA, LemmaConfig, checkpoint, images
from lemma_fast.images import ImageError
from lemma_fast.upscale import Upscaler, choose_device


@pytest.fixture
def echo():
    return EchoModel()


@pytest.fixture
def up(echo):
    return Upscaler(echo)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def expected(array):
    """What the stand-in makes of a picture: 16x64, every pixel twice as large."""
    small = Image.fromarray(array).convert("RGB").resize((64, 16), Image.Resampling.BICUBIC)
    return np.asarray(small).repeat(2, axis=0).repeat(2, axis=1)


def test_pil_image_gives_pil_image(up):
    source = noise(20, 70, 3)
    result = up(Image.fromarray(source))
    assert isinstance(result, Image.Image)
    assert result.mode == "RGB"
    assert np.array_equal(np.asarray(result), expected(source))


@pytest.mark.parametrize("as_text", [False, True])
def test_path_gives_pil_image(up, tmp_path, as_text):
    source = noise(20, 70, 3)
    path = tmp_path / "crop.png"
    Image.fromarray(source).save(path)
    result = up(str(path) if as_text else path)
    assert np.array_equal(np.asarray(result), expected(source))


@pytest.mark.parametrize("shape", [(9, 30), (9, 30, 1), (9, 30, 3), (9, 30, 4)], ids=str)
@pytest.mark.parametrize(("size", "height", "width"), [("native", 32, 128), ("x2", 18, 60)])
def test_array_gives_array_with_as_many_channels(up, shape, size, height, width):
    result = up(noise(*shape), size=size)
    assert result.dtype == np.uint8
    assert result.shape == (height, width, *shape[2:])
    assert result.flags.writeable


def test_grey_and_colour_arrays_hold_the_right_values(up):
    source = noise(16, 64, 3)
    assert np.array_equal(up(source), expected(source))
    assert np.array_equal(up(source[..., 0]), expected(source[..., 0])[..., 0])
    # A view with negative strides, as OpenCV users make one.
    assert np.array_equal(up(source[..., ::-1]), expected(source[..., ::-1].copy()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 64), (3, 16, 64), (2, 3, 16, 64)], ids=str)
def test_tensor_gives_tensor(up, dtype, shape):
    source = torch.from_numpy(noise(*shape)).to(dtype) / 255
    result = up(source)
    assert result.dtype == dtype
    assert result.shape == (*shape[:-2], 32, 128)
    assert result.is_contiguous()
    enlarged = source.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
    torch.testing.assert_close(result, enlarged, rtol=0, atol=1e-3)


def test_lists_keep_their_order_and_kinds(up, echo, tmp_path):
    path = tmp_path / "crop.png"
    arrays = [noise(10 + i, 40, 3, seed=i) for i in range(5)]
    Image.fromarray(arrays[0]).save(path)
    results = up(arrays)
    assert [np.array_equal(r, expected(a)) for r, a in zip(results, arrays, strict=True)] == [
        True
    ] * 5
    mixed = up((path, arrays[1], torch.zeros(3, 8, 8)))
    assert [type(result).__name__ for result in mixed] == ["Image", "ndarray", "Tensor"]
    assert up([]) == []
    assert echo.batches == [5, 3]


def test_batches_are_full_and_no_larger_than_asked(echo):
    Upscaler(echo, batch_size=3)([noise(8, 8, 3)] * 8)
    assert echo.batches == [3, 3, 2]


def test_run_tells_text_length_and_attention(up):
    record = up.run(noise(16, 64, 3))
    assert record.text == "ab1"
    assert record.length == 4
    assert record.attention.shape == (16, 64)
    # Position 25 is brighter, but past the length.
    assert record.attention[3, 5] == 0.5
    assert record.attention.sum() == 0.5
    assert isinstance(record.image, Image.Image)
    assert [r.text for r in up.run([noise(8, 8, 3), noise(9, 9, 3)])] == ["ab1", "ab1"]


def test_alpha_comes_back(up):
    source = noise(10, 40, 4)
    result = up(Image.fromarray(source))
    assert result.mode == "RGBA"
    alpha = Image.fromarray(source[..., 3]).resize((128, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(result)[..., 3], np.asarray(alpha))


def test_size_can_be_set_and_is_checked(up):
    up.size = "x2"
    assert up(Image.new("RGB", (30, 11))).size == (60, 22)
    assert up(Image.new("RGB", (30, 11)), size="native").size == (128, 32)
    with pytest.raises(ValueError, match="native"):
        up.size = "x3"
    with pytest.raises(ValueError, match="native"):
        up(Image.new("RGB", (30, 11)), size="x4")


@pytest.mark.parametrize(
    ("picture", "error", "reason"),
    [
        (np.zeros((4, 4, 3), np.float32), TypeError, "uint8"),
        (np.zeros((4, 4, 2), np.uint8), ImageError, r"\[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), ImageError, "no pixels"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), TypeError, "float"),
        (torch.zeros(4, 16, 64), ImageError, "mask included, goes to the model itself"),
        (torch.full((3, 4, 4), 255.0), ImageError, "0, 1"),
        (torch.full((3, 4, 4), float("nan")), ImageError, "0, 1"),
        (torch.zeros(0, 3, 4, 4), ImageError, "no images"),
        (3, TypeError, "not int"),
        ("absent.png", ImageError, "absent.png: no such file"),
    ],
    ids=lambda value: None if not isinstance(value, str) else value[:20],
)
def test_what_cannot_be_used_says_why(up, picture, error, reason):
    with pytest.raises(error, match=reason):
        up(picture)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"device": "gpu"}, "not a name"),
        ({"device": "cuda:99"}, "not there"),
        ({"size": "x3"}, "native"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(echo, options, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        Upscaler(echo, **options)
    assert "\n" not in str(caught.value)


def test_a_model_of_three_channels_is_refused(echo):
    echo.config = LemmaConfig(in_channels=3)
    with pytest.raises(ValueError, match="3 channels"):
        Upscaler(echo)


def test_results_that_are_not_finite_are_no_images(up, echo, monkeypatch):
    forward = echo.forward
    monkeypatch.setattr(echo, "forward", lambda lr: (forward(lr)[0] * torch.nan, forward(lr)[1]))
    with pytest.raises(RuntimeError, match="not finite"):
        up(noise(8, 8, 3))


def test_results_outside_the_range_are_clamped(up, echo, monkeypatch):
    forward = echo.forward
    monkeypatch.setattr(echo, "forward", lambda lr: (forward(lr)[0] * 4 - 2, forward(lr)[1]))
    result = up(noise(16, 64, 3))
    assert set(np.unique(result)) >= {0, 255}
    assert np.array_equal(result == 255, expected(noise(16, 64, 3)) / 255 * 4 - 2 >= 254.5 / 255)


def test_a_model_in_training_mode_is_copied_not_changed():
    model = LEMMA(LemmaConfig.small())
    up = Upscaler(model)
    assert model.training
    assert not up.model.training
    assert next(up.model.parameters()) is not next(model.parameters())
    assert Upscaler(model.eval()).model is model


def test_auto_device_of_a_model_is_where_it_is(echo):
    assert Upscaler(echo).device.type == "cpu"
    there = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device("auto").type == there


def test_model_by_name_goes_through_load(echo, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "lemma_fast.upscale.open_network",
        lambda name, device: asked.append((name, str(device))) or echo,
    )
    Upscaler(tmp_path / "own.safetensors", device="cpu")
    Upscaler(device="cpu")
    # A path stays one: a text that is a packaged name would not be the file.
    assert asked == [(tmp_path / "own.safetensors", "cpu"), ("small", "cpu")]


def test_many_threads_may_share_one_upscaler(up):
    sources = [noise(16, 64, 3, seed=i) for i in range(24)]
    gate = threading.Barrier(4)

    def work(i):
        if i < 4:
            gate.wait(timeout=10)
        return up(sources[i], size="native" if i % 2 else "x2").shape, up(sources[i])

    with ThreadPoolExecutor(4) as pool:
        for i, (shape, result) in enumerate(pool.map(work, range(24))):
            assert shape == (32, 128, 3)
            assert np.array_equal(result, expected(sources[i]))


@pytest.mark.parametrize(
    ("dtype", "accelerate", "levels"),
    [("float32", False, 0), ("bfloat16", False, 0), ("float32", True, 1), ("bfloat16", True, 4)],
)
def test_the_real_network_gets_the_published_input(dtype, accelerate, levels):
    model = LEMMA(LemmaConfig.small()).eval()
    source = noise(24, 80, 3)
    up = Upscaler(model, dtype=dtype, accelerate=accelerate)
    assert (up.network is up.model) != accelerate
    record = up.run(source)
    lr = torch.from_numpy(images.network_input(Image.fromarray(source)))[None]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32"):
        sr, prior = model(lr)
    wanted = sr[0, :3].float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0)
    apart = np.asarray(record.image).astype(int) - wanted.numpy().astype(int)
    assert np.abs(apart).max() <= levels
    assert record.length == prior.pt_lengths.item()
    assert len(record.text) <= model.config.max_length


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return LEMMA(tiny_config()).eval()


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize(
    "way", [copy.copy, copy.deepcopy, lambda up: pickle.loads(pickle.dumps(up))]
)
def test_copies_and_pickles_give_the_same(tiny, accelerate, way):
    up = Upscaler(tiny, "cpu", size="x2", batch_size=3, accelerate=accelerate)
    again = way(up)
    source = noise(9, 30, 3)
    assert np.array_equal(again(source), up(source))
    assert (again.size, again.batch_size, again.accelerated) == ("x2", 3, accelerate)
    assert (again.network is again.model) != accelerate


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_accelerated_model_says_why_it_is_not_copied(tiny, way):
    with pytest.raises(TypeError, match="with the original, and accelerate the result"):
        way(Upscaler(tiny, "cpu").network)


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_other_types_give_results(tiny, dtype, accelerate):
    source = noise(9, 30, 3)
    expected = Upscaler(tiny, "cpu", accelerate=accelerate)(source).astype(int)
    model = copy.deepcopy(tiny).to(dtype)
    up = Upscaler(model, "cpu", accelerate=accelerate)
    limit = {torch.float64: 1, torch.float16: 3, torch.bfloat16: 12}[dtype]
    assert np.abs(up(source) - expected).max() <= limit
    # It is copied, not changed.
    assert next(model.parameters()).dtype == dtype


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_does_not_matter(tiny, tmp_path, dtype, accelerate):
    checkpoint.save(tiny, tmp_path / "tiny.safetensors")
    source = noise(9, 30, 3)
    expected = Upscaler(tiny, "cpu", accelerate=accelerate).run(source)
    torch.set_default_dtype(dtype)
    try:
        found = Upscaler(tmp_path / "tiny.safetensors", "cpu", accelerate=accelerate).run(source)
    finally:
        torch.set_default_dtype(torch.float32)
    apart = np.asarray(found.image).astype(int) - np.asarray(expected.image)
    assert np.abs(apart).max() <= (12 if dtype == torch.bfloat16 else 1)
    assert found.attention.dtype == np.float32


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_on(tiny, tmp_path):
    """Without care it would wait for threads that stayed behind."""
    code = f"""
import os, signal, numpy as np
from lemma_fast import Upscaler
up = Upscaler({str(tmp_path / "tiny.safetensors")!r}, "cpu")
crops = [np.zeros((16, 64, 3), np.uint8)] * 8
expected = up(crops)[0]
child = os.fork()
if not child:
    signal.alarm(60)
    made = Upscaler({str(tmp_path / "tiny.safetensors")!r}, "cpu", accelerate=False)
    same = np.array_equal(up(crops)[0], expected) and made(crops)[0].shape == expected.shape
    os._exit(0 if same else 1)
print(os.waitpid(child, 0)[1])
"""
    checkpoint.save(tiny, tmp_path / "tiny.safetensors")
    environment = os.environ | {"OMP_NUM_THREADS": "4"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env=environment)  # fmt: skip
    assert ran.stdout == "0\n", ran.stderr


@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_a_pillow_image_that_is_damaged_is_an_image_error(up, tmp_path, keep):
    path = tmp_path / "crop.png"
    Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ImageError, match="truncated"):
        up(Image.open(path))
    with pytest.raises(ImageError, match=r"crop\.png: damaged or truncated"):
        up(path)


def compiled_in_part(model):
    model = copy.deepcopy(model)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    return model


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), compiled_in_part])
@pytest.mark.parametrize("accelerate", [False, True])
def test_wrapped_models_give_the_same(tiny, wrap, accelerate):
    source = noise(9, 30, 3)
    expected = Upscaler(tiny, "cpu", accelerate=accelerate)(source).astype(int)
    up = Upscaler(wrap(tiny), "cpu", accelerate=accelerate)
    assert up.accelerated == accelerate
    assert np.abs(up(source) - expected).max() <= 1


def test_a_parallel_model_is_accelerated(tiny):
    source = noise(9, 30, 3)
    assert np.array_equal(
        Upscaler(torch.nn.DataParallel(tiny).eval(), "cpu")(source), Upscaler(tiny, "cpu")(source)
    )
