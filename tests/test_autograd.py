"""The noise is a constant: gradients are those of a lookup and its scale alone, to the bit."""

import warnings

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import require_native
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from neftune_kernels import NEFTuneEmbedding, add_noise, noisy_embedding
from neftune_kernels.lookup import IN_PLACE_LIMIT

SMALL, LARGE = (2, 5), (40, 60)  # on both sides of the shorter eager path


def plain(ids, weight, padding_idx, scale):
    embedded = F.embedding(ids, weight, padding_idx)
    return embedded if scale == 1 else embedded * scale


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("scale", [1.0, 11.3125])
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_weight_gradient_is_the_rounded_sum(backend, dtype, shape, scale, padding_idx, ids_dtype):
    assert (torch.Size(shape).numel() * 300 > IN_PLACE_LIMIT) == (shape == LARGE)
    ids = torch.randint(0, 50, shape).to(ids_dtype)  # repeats: sums are exercised
    values, grad = torch.randn(50, 300).to(dtype), torch.randn(*shape, 300).to(dtype)
    weight = values.requires_grad_()
    noisy_embedding(
        ids, weight, 5.0, padding_idx=padding_idx, embed_scale=scale, backend=backend
    ).backward(grad)
    truth = oracle.embedding_gradient(
        grad.double().flatten(0, 1).numpy(),
        ids.flatten().tolist(),
        50,
        str(dtype).removeprefix("torch."),
        49 if padding_idx == -1 else padding_idx,
        scale,
    )
    assert np.array_equal(weight.grad.double().numpy(), truth)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("by", ["compile", "grad", "vmap of grad", "double backward"])
def test_scale_in_traced_gradients(by, backend):
    """Where the gradient is traced, transformed or differentiated again, it is torch's own of
    F.embedding(...) * embed_scale.
    """
    torch._dynamo.reset()
    ids, values, scale = torch.randint(0, 50, SMALL), torch.randn(50, 300), 11.3125
    weights = torch.stack((values, values + 1))
    factor = torch.randn(*SMALL, 300)

    def noisy(weight):
        return noisy_embedding(ids, weight, 5.0, seed=1, embed_scale=scale, backend=backend)

    def gradient(embed):
        def loss(weight):
            return (embed(weight) * factor).sum()

        if by == "grad":
            return torch.func.grad(loss)(values)
        if by == "vmap of grad":
            return torch.func.vmap(torch.func.grad(loss))(weights)
        weight = values.clone().requires_grad_()
        if by == "compile":
            torch.compile(loss, backend="aot_eager", fullgraph=True)(weight).backward()
            return weight.grad
        return torch.autograd.grad(loss(weight), weight, create_graph=True)[0].detach()

    expected = gradient(lambda weight: plain(ids, weight, None, scale))
    assert torch.equal(gradient(noisy), expected) and expected.abs().max() > 0


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_forward_bits_do_not_depend_on_requires_grad(shape):
    ids, weight = torch.randint(0, 50, shape), torch.randn(50, 300)
    frozen = noisy_embedding(ids, weight, 5.0, seed=1)
    assert torch.equal(noisy_embedding(ids, weight.clone().requires_grad_(), 5.0, seed=1), frozen)
    with torch.no_grad():
        assert torch.equal(
            noisy_embedding(ids, weight.clone().requires_grad_(), 5.0, seed=1), frozen
        )
    with torch.inference_mode():
        assert torch.equal(noisy_embedding(ids, weight, 5.0, seed=1), frozen)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_frozen_weight_has_no_graph_and_no_gradient(shape, monkeypatch):
    monkeypatch.setattr(
        "neftune_kernels.gradients.dense",
        lambda *args: pytest.fail("a frozen weight's gradient was computed"),
    )
    ids, weight = torch.randint(0, 50, shape), torch.randn(50, 300)
    out = noisy_embedding(ids, weight, 5.0)
    assert not out.requires_grad and out.grad_fn is None
    head = torch.randn(300, requires_grad=True)
    (out @ head).sum().backward()
    assert torch.equal(head.grad, torch.autograd.grad((out @ head).sum(), head)[0])


def test_inputs_embeds_gradient_passes_through():
    embeds = torch.randn(3, 6, 20, requires_grad=True)
    grad = torch.randn(3, 6, 20)
    add_noise(embeds, 5.0, lengths=torch.tensor([2, 0, 6])).backward(grad)
    assert torch.equal(embeds.grad, grad)
    leaf = torch.randn(3, 6, 20, requires_grad=True)
    strided = add_noise(leaf.transpose(0, 1), 5.0)
    strided.backward(grad.transpose(0, 1))
    assert torch.equal(leaf.grad, grad)


def test_gradcheck():
    weight = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 2, 2], [9, 0, 1]])
    assert gradcheck(
        lambda w: noisy_embedding(ids, w, 5.0, seed=1, embed_scale=3.0, padding_idx=3), (weight,)
    )
    assert gradgradcheck(
        lambda w: noisy_embedding(ids, w, 5.0, seed=1, embed_scale=3.0) ** 2, (weight,)
    )
    embeds = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda e: add_noise(e, 5.0, seed=1), (embeds,))


def test_noise_is_not_a_function_of_the_weight():
    """A second derivative through the noise would be nonzero if the noise were traced."""
    ids, weight = torch.tensor([[1, 2]]), torch.randn(4, 8, requires_grad=True)
    (first,) = torch.autograd.grad(
        noisy_embedding(ids, weight, 5.0, seed=1).sum(), weight, create_graph=True
    )
    assert (
        not first.requires_grad
        or not torch.autograd.grad(first.sum(), weight, allow_unused=True)[0]
    )


@pytest.mark.parametrize("kind", ["max_norm", "scale_grad_by_freq", "sparse"])
def test_slow_path(kind):
    option = {"max_norm": 0.5, "scale_grad_by_freq": True, "sparse": True}[kind]
    ids = torch.tensor([[1, 2, 2, 0], [1, 1, 3, 3]])
    values = torch.randn(5, 16)
    noisy = NEFTuneEmbedding(5, 16, padding_idx=0, _weight=values.clone(), **{kind: option})
    clean = torch.nn.Embedding(5, 16, padding_idx=0, _weight=values.clone(), **{kind: option})
    out = noisy(ids, seed=5)
    reference = clean(ids)
    assert torch.equal(noisy.weight, clean.weight)  # max_norm renormalises in place
    assert torch.equal(out, add_noise(reference, 5.0, attention_mask=ids != 0, seed=5))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_recomputes_the_same_noise(use_reentrant):
    module = NEFTuneEmbedding(50, 16)
    ids = torch.randint(0, 50, (2, 7))
    seen = []

    def segment(scale):
        out = module(ids)
        seen.append(out.detach().clone())
        return (out * scale).sum()

    scale = torch.ones((), requires_grad=True)
    torch.utils.checkpoint.checkpoint(segment, scale, use_reentrant=use_reentrant).backward()
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("with_mask", [False, True])
def test_small_call_with_padding_idx_has_no_gradient_there(with_mask):
    """The quick way of a mask alone too: real tokens may have the padding's id."""
    ids, mask = torch.tensor([[1, 2, 3, 2]]), torch.tensor([[1, 1, 1, 0]])
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    plain = weight.detach().clone().requires_grad_()
    given = {"attention_mask": mask} if with_mask else {}
    grad = torch.arange(32.0).view(1, 4, 8)
    noisy_embedding(ids, weight, 5.0, padding_idx=2, seed=torch.tensor(3), **given).backward(grad)
    F.embedding(ids, plain, 2).backward(grad)
    assert torch.equal(weight.grad, plain.grad) and not weight.grad[2].any()


def test_transforms_of_torch_func():
    """Nothing is said but the seed, where a plain call takes the shortest way."""
    generator = torch.Generator().manual_seed(0)
    weight, seed = torch.randn(7, 16, generator=generator), torch.tensor(1)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])

    def call(ids, weight):
        return noisy_embedding(ids, weight, 5.0, seed=seed)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap has no rule of its own for our operators
        rows = torch.func.vmap(call, in_dims=(0, None))(ids[:, None], weight)
    assert torch.equal(rows, torch.stack([call(row[None], weight) for row in ids]))
    grad = torch.func.grad(lambda weight: call(ids, weight).square().sum())(weight)
    expected = torch.zeros_like(weight)
    expected[ids] = 2 * call(ids, weight)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("trainable, name", [(False, "out"), (True, "default")])
def test_dispatch_modes_see_the_whole_operator(trainable, name):
    """Who counts or replaces operators gets the same as without the shorter ways."""
    require_native()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    module = NEFTuneEmbedding(7, 16, noise_alpha=5.0).requires_grad_(trainable)
    seed, ids = torch.tensor(1), torch.tensor([[1, 2, 3]])
    for call in (module, lambda ids, seed: noisy_embedding(ids, module.weight, 5.0, seed=seed)):
        names = []
        with Seen():
            call(ids, seed=seed)
        ours = [one for one in names if one.startswith("neftune_kernels.")]
        assert ours == [f"neftune_kernels.noisy_embedding.{name}"]
