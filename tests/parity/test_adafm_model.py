"""The compiled AdaFM as PyTorch and the model see it: operators, compilation, folding, goldens."""

from types import SimpleNamespace

import pytest
import torch
from published_network import filled_state, golden, images
from torch import nn

from lemma_fast import LEMMA, LemmaConfig
from lemma_fast.checkpoint import from_published
from lemma_fast.model.blocks import AdaFM
from lemma_fast.ops import extension, fused, reference

if (why := extension.missing()) is not None:
    pytest.skip(why, allow_module_level=True)

from lemma_fast.ops.adafm import _TRAINED
from lemma_fast.ops.weights import flat

C, SIZE = 20, (3, 5)


@pytest.fixture
def made():
    module = AdaFM(SimpleNamespace(channels=C, size=SIZE), reference)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.bias)
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.3, 2)
    return module


@pytest.fixture
def inputs():
    return torch.randn(2, C, *SIZE, requires_grad=True), torch.randn(2, C, *SIZE)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_opcheck(made, inputs, training):
    features, guidance = inputs
    last = features.detach().to(memory_format=torch.channels_last).requires_grad_()
    tensors = list(flat(made.weights()))
    ops = torch.ops.lemma_fast
    torch.library.opcheck(ops.adafm, (last, guidance, tensors, training, False))
    plain = [tensor.detach() for tensor in tensors]
    _, saved, _ = ops.adafm(last.detach(), guidance, plain, training, False)
    trained = [plain[i] for i in _TRAINED]
    arguments = (
        torch.ones_like(guidance),
        last.detach(),
        guidance,
        trained,
        saved,
        training,
        False,
    )
    torch.library.opcheck(ops.adafm_backward, arguments)


def test_opcheck_of_inference(made, inputs):
    dtype = torch.float64
    features, guidance = (x.detach().to(dtype) for x in inputs)
    plain = [tensor.detach().to(dtype) for tensor in flat(made.weights())]
    torch.library.opcheck(torch.ops.lemma_fast.adafm_fold, (plain, dtype))
    folded = torch.ops.lemma_fast.adafm_fold(plain, dtype)
    torch.library.opcheck(torch.ops.lemma_fast.adafm_inference, (features, guidance, folded, False))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_without_a_break(made, inputs, training):
    features, guidance = inputs
    compiled = torch.compile(fused.adafm, fullgraph=True, backend="aot_eager")
    results = []
    state = {name: x.clone() for name, x in made.state_dict().items()}
    for call in (fused.adafm, compiled):
        made.load_state_dict(state)
        with torch.no_grad():
            inference = call(features, guidance, made.weights(), False)
        out = call(features, guidance, made.weights(), training)
        grads = torch.autograd.grad(out.square().sum(), (features, *made.parameters()))
        results.append((inference, out, *grads, *(x.clone() for x in made.buffers())))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_folding(made):
    """The first matrices and biases hold three norms and the guidance's, as the modules say."""
    folded = torch.ops.lemma_fast.adafm_fold(
        [tensor.detach() for tensor in flat(made.weights())], torch.float32
    ).view(torch.float32)
    padded = 32
    matrices = folded[: 14 * padded**2].view(14, padded, padded)
    vectors = folded[-12 * padded :].view(12, padded)
    reduce = torch.stack([matrices[i : i + 2].flatten(0, 1) for i in (0, 3, 8)], dim=1)
    bias = vectors[:3]
    weights = made.eval().weights()
    identity = torch.eye(2 * C).view(2 * C, 2 * C, 1, 1)
    zero = torch.zeros(1, 2 * C, 1, 1)

    def first(branch, x):
        features, guidance = x[:, :C], made.guidance_norm(x[:, C:])
        return branch.norm(branch.reduce(torch.cat([features, guidance], 1))).flatten(1)

    with torch.no_grad():
        for i, branch in enumerate((made.branch1, made.branch2, made.branch3)):
            torch.testing.assert_close(bias[i, :C], first(branch, zero)[0])
            rows = torch.cat([reduce[:C, i, :C], reduce[padded : padded + C, i, :C]])
            torch.testing.assert_close(rows, first(branch, identity) - first(branch, zero))
            assert not reduce[C:padded, i].any()
            assert not bias[i, C:].any()
    slopes = vectors[11, :4]
    expected = [*(branch.slope for branch in weights.branches), weights.aggregate.slope]
    torch.testing.assert_close(slopes, torch.cat(expected).detach())


def test_backward_twice_is_equal(made, inputs):
    features, guidance = inputs
    first, second = (
        torch.autograd.grad(
            fused.adafm(features, guidance, made.weights(), True).square().sum(),
            (features, *made.parameters()),
        )
        for _ in range(2)
    )
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_frozen_norms_and_frozen_parameters(made, inputs):
    """Gradients in evaluation mode, of the guidance alone."""
    made.requires_grad_(False)
    features, guidance = inputs[0].detach(), inputs[1].requires_grad_()
    got, expected = (
        torch.autograd.grad(ops.adafm(features, guidance, made.weights(), False).sum(), guidance)[0]
        for ops in (fused, reference)
    )
    torch.testing.assert_close(got, expected)


def test_what_is_kept_for_backward(made, inputs):
    """Both inputs, the parameters, and five maps with the statistics; not the result."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = fused.adafm(*inputs, made.weights(), True)
    assert len(kept) == 3 + len(_TRAINED)
    assert out.data_ptr() not in kept
    (saved,) = (x for x in kept.values() if x.dtype == torch.uint8)
    N, _, H, W = inputs[0].shape
    assert saved.numel() == 4 * 32 * (12 + N + 5 * N * H * W)


@pytest.fixture(scope="module")
def published():
    """The filled published network with this one operation compiled, and what its blocks give."""
    table = SimpleNamespace(**{name: getattr(reference, name) for name in reference.__all__})
    table.adafm = fused.adafm
    model = LEMMA(LemmaConfig.base(), ops=table)
    model.load_state_dict(from_published(filled_state(1)).state_dict())
    seen = {}
    for i, block in enumerate(model.eval().blocks):
        name = f"block{i + 2}"
        block.register_forward_hook(lambda _module, _in, out, name=name: seen.update({name: out}))
    lr = images("eval_seed1")[:2]
    with torch.no_grad():
        seen["sr"] = model(lr)[0]
    # Once more with what training in evaluation mode computes: nothing folded, gradients wanted.
    folded = {name: value.clone() for name, value in seen.items()}
    seen["sr"] = model(lr)[0].detach()
    return folded, {name: value.detach() for name, value in seen.items()}


@pytest.mark.parametrize("key", ["sr", *(f"block{i}" for i in range(2, 7))])
def test_published_numbers(published, key):
    expected = torch.from_numpy(golden("eval_seed1")[key][:2])
    for seen in published:
        assert (seen[key] - expected).abs().max() <= (3e-5 if key == "sr" else 1e-4)
