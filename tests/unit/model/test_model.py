"""The network as a PyTorch citizen: shapes, modes, dtypes, compile, export, copies, ablations."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lemma_fast import LEMMA, LemmaConfig
from lemma_fast.ops import reference

ONE_BLOCK = replace(LemmaConfig.small(), num_blocks=1, rectification=True)


@pytest.fixture
def model() -> LEMMA:
    return LEMMA(ONE_BLOCK).eval()


def crops(count: int) -> torch.Tensor:
    return torch.rand(count, 4, 16, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_shapes_and_dtypes(model: LEMMA, count: int) -> None:
    with torch.no_grad():
        sr, prior = model(crops(count))
    assert sr.shape == (count, 4, 32, 128)
    assert prior.attn_map.shape == (count, 26, 16, 64)
    assert prior.img_logits.shape == prior.text_logits.shape == (count, 26, 37)
    assert prior.pt_lengths.shape == (count,)
    assert prior.pt_lengths.dtype == torch.int64
    assert (sr.abs() < 1).all()


@pytest.mark.parametrize("shape", [(4, 16, 64), (1, 3, 16, 64), (1, 4, 32, 128)])
def test_another_shape_is_refused_in_words(model: LEMMA, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"lr must be \[N, 4, 16, 64\], got"):
        model(torch.rand(shape))


def test_an_image_does_not_depend_on_its_batch(model: LEMMA) -> None:
    lr = crops(3)
    with torch.no_grad():
        together = model(lr)[0]
        alone = torch.cat([model(crop[None])[0] for crop in lr])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_nan_stays_in_its_image(model: LEMMA) -> None:
    lr = crops(3)
    with torch.no_grad():
        clean = model(lr)[0]
        lr[1, 0, 5, 5] = torch.nan
        dirty = model(lr)[0]
    assert dirty[1].isnan().any()
    torch.testing.assert_close(dirty[[0, 2]], clean[[0, 2]], atol=1e-5, rtol=0)


def test_training_reaches_every_parameter() -> None:
    model = LEMMA(ONE_BLOCK).train()
    sr, prior = model(crops(2))
    # The vision classifier is reached by the fine-tuning loss alone: its output is detached.
    (sr.square().mean() + prior.img_logits.square().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert int(model.blocks[0].get_submodule("fusion.out_norm").num_batches_tracked) == 1


def test_autocast_keeps_score_maps_in_fp32(model: LEMMA) -> None:
    seen: list[torch.Tensor] = []

    def spy(h_attn, lengths, num_selected, size):
        score, index = reference.compress_select(h_attn, lengths, num_selected, size)
        seen.extend([h_attn, score])
        return score, index

    model.guidance.compress_select = spy
    with torch.no_grad():
        exact = model(crops(2))[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded, prior = model(crops(2))
    assert {tensor.dtype for tensor in (*seen, prior.attn_map)} == {torch.float32}
    assert (rounded.float() - exact).abs().mean() < 0.02


def test_autocast_trains() -> None:
    model = LEMMA(ONE_BLOCK).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sr, _ = model(crops(2))
    sr.float().square().mean().backward()
    assert model.stem.weight.grad is not None
    assert model.stem.weight.grad.isfinite().all()


def test_fp64_stays_fp64(model: LEMMA) -> None:
    with torch.no_grad():
        sr, prior = model.double()(crops(1).double())
    assert sr.dtype == prior.attn_map.dtype == torch.float64


def test_compiles_without_a_graph_break(model: LEMMA) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(crops(2))[0], model(crops(2))[0])


def test_training_forward_has_no_graph_break() -> None:
    model = LEMMA(ONE_BLOCK).train()
    sr, _ = torch.compile(model, fullgraph=True, backend="eager")(crops(2))
    sr.square().mean().backward()
    assert model.stem.weight.grad is not None


def test_exports_with_any_batch_size(model: LEMMA) -> None:
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(model, (crops(2),), dynamic_shapes={"lr": {0: batch}})
        for count in (1, 5):
            torch.testing.assert_close(
                program.module()(crops(count))[0], model(crops(count))[0], atol=1e-5, rtol=0
            )


def test_copies_and_pickles(model: LEMMA, tmp_path) -> None:
    with torch.no_grad():
        expected = model(crops(1))[0]
        torch.testing.assert_close(copy.deepcopy(model)(crops(1))[0], expected)
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        torch.testing.assert_close(again(crops(1))[0], expected)


@pytest.mark.parametrize(
    "switches",
    [
        {"character_attention": False},
        {"feature_selection": False},
        {"character_attention": False, "feature_selection": False},
        {"expansion": False},
        {"pixel_to_region": False},
        {"expansion": False, "pixel_to_region": False},
        {"alignment": "none"},
        {"alignment": "unidirectional"},
        {"location_enhancement": False},
        {"multimodal_alignment": False},
        {"adaptive_fusion": False},
        {"rectification": False},
        {"location_enhancement": False, "multimodal_alignment": False, "adaptive_fusion": False},
    ],
    ids=lambda switches: "+".join(f"{k}={v}" for k, v in switches.items()),
)
def test_ablations_run_and_leave_no_parameter_idle(switches: dict[str, object]) -> None:
    model = LEMMA(replace(ONE_BLOCK, **switches)).train()
    sr, prior = model(crops(2))
    assert sr.shape == (2, 4, 32, 128)
    losses = (sr, prior.img_logits, prior.text_logits)
    sum(x.square().mean() for x in losses).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        assert model.eval()(crops(1))[0].isfinite().all()


def test_unidirectional_has_as_many_layers_as_bidirectional() -> None:
    one_way = LEMMA(replace(ONE_BLOCK, alignment="unidirectional")).guidance
    assert (len(one_way.image_to_text), len(one_way.text_to_image)) == (0, 6)


def recorded_dropout(model: LEMMA, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Probability of every dropout of one forward pass, attention's own included."""
    seen: list[float] = []
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def spy(x, p=0.5, training=True, inplace=False):
        seen.append(p if training else 0.0)
        return dropout(x, p, training, inplace)

    def spy_attention(*args, dropout_p=0.0, **options):
        seen.append(dropout_p)
        return attention(*args, dropout_p=dropout_p, **options)

    monkeypatch.setattr(F, "dropout", spy)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy_attention)
    model(crops(1) if not model.training else crops(2))
    return [p for p in seen if p > 0]


def test_dropout_is_where_the_published_network_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = replace(ONE_BLOCK.prior, dropout=0.25)
    model = LEMMA(replace(ONE_BLOCK, prior=prior))
    seen = recorded_dropout(model.train(), monkeypatch)
    # Positions of the image and the language model's memory; four places a layer.
    assert seen.count(0.25) == 2 + 4 * (prior.encoder_layers + prior.language_layers)
    # Positions of the map; four places a layer of the text encoder and of both alignments.
    assert seen.count(0.1) == 1 + 4 * (2 + 3 + 3)
    assert len(seen) == seen.count(0.25) + seen.count(0.1)


def test_no_dropout_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        assert recorded_dropout(LEMMA(ONE_BLOCK).eval(), monkeypatch) == []


def test_rectifier_stays_in_fp32() -> None:
    rectifier = LEMMA(ONE_BLOCK).train().rectifier
    assert rectifier is not None
    with torch.no_grad():
        # Away from the start, where the sampling grid hardly depends on the image.
        rectifier.localization.points.weight.normal_(std=0.2)
        lr = crops(4)
        exact = rectifier(lr)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(rectifier(lr), exact, atol=1e-4, rtol=0)


def test_frozen_batch_norms_stay_frozen_in_training() -> None:
    model = LEMMA(ONE_BLOCK).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = {name: buffer.clone() for name, buffer in model.blocks.named_buffers()}
    model(crops(2))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.blocks.named_buffers())


def test_batch_norms_that_the_fusion_cannot_compute_are_refused() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(LEMMA(ONE_BLOCK)).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="AdaFM takes nn.BatchNorm2d"):
        model.blocks[0].fusion(torch.rand(1, 64, 16, 64), torch.rand(1, 64, 16, 64))
