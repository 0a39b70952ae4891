"""Where the noise goes: fused where lookup and noise can be one pass, behind everywhere else, with
the same bits; what is around an embedding changes nothing of it.
"""

import copy
import io
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import same_bits
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)

from neftune_kernels import NEFTuneEmbedding, add_noise, apply_neftune, noisy_embedding

VOCAB, HIDDEN = 64, 32
IDS = torch.randint(1, VOCAB, (3, 8), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 5 + [0] * 3, [0] * 6 + [1] * 2, [1] * 8])


class Scaled(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 3.0


class Own(nn.Module):
    """Somebody's own module in an embedding's place."""

    def __init__(self, *size):
        super().__init__()
        self.table = nn.Parameter(torch.randn(*size))

    def forward(self, tokens):
        return self.table[tokens]


class Model(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embed = embedding
        self.head = nn.Linear(HIDDEN, 2)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        self.arrived = self.embed(input_ids)
        return self.head(self.arrived)


def build(kind=nn.Embedding, **options):
    torch.manual_seed(0)
    return Model(kind(VOCAB, HIDDEN, **options)).train()


def arrived(model, seed=7, **given):
    torch.manual_seed(seed)
    model(IDS, **{"attention_mask": MASK, **given})
    return model.arrived.detach().clone()


def whole_numbers(like):
    """A gradient whose sums are exact in any order, ours or torch's own."""
    return torch.arange(like.numel()).view_as(like).remainder(17).sub(8).to(like.dtype)


def everything(model):
    hooks = [key for key in vars(model) if "hooks" in key]
    return {
        name: (
            type(module),
            [list(vars(module)[key]) for key in hooks],
            sorted(set(vars(module)) - {"arrived"}),
        )
        for name, module in model.named_modules()
    }


def exact(model, embedded):
    """What is to arrive: the embeddings, plus the noise that the functions would draw."""
    torch.manual_seed(7)
    return add_noise(embedded, 5.0, attention_mask=MASK)


# ---- fused and behind


@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 3}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}]
)
@pytest.mark.parametrize("given", [{"attention_mask": MASK}, {"attention_mask": None}])
def test_fused_and_behind_give_the_same_bits(options, given):
    results = []
    for fused in (True, None, False):
        model = build(**options)
        with apply_neftune(model, 5.0, fused=fused):
            assert (type(model.embed) is nn.Embedding) == (fused is False)
            out = arrived(model, **given)
            model.arrived.backward(whole_numbers(out))
        results.append((out, model.embed.weight.grad))
    for out, gradient in results[1:]:
        assert same_bits(out, results[0][0])
        # behind it, torch multiplies by the reciprocal of an id's count
        assert "scale_grad_by_freq" in options or torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("kind", [Scaled, Own])
def test_a_forward_of_its_own_gets_its_noise_behind(kind):
    model = build(kind)
    before, clean = everything(model), arrived(model)
    with pytest.raises(ValueError, match=f"fused=True, but.*{kind.__name__}.*fused=None adds"):
        apply_neftune(model, 5.0, fused=True)
    assert everything(model) == before
    handle = apply_neftune(model, 5.0)
    assert type(model.embed) is kind
    assert torch.equal(arrived(model), exact(model, clean))
    assert handle.stats()["calls"] == 1 and handle.stats()["length_min"] == 2
    with torch.no_grad():
        assert torch.equal(arrived(model), clean)
    assert torch.equal(arrived(model.eval()), clean)
    handle.remove()
    assert everything(model) == before


def test_a_class_swap_keeps_its_names():
    model = build()
    handle = apply_neftune(model, 5.0)
    kind = type(model.embed)
    assert kind is not nn.Embedding and isinstance(model.embed, nn.Embedding)
    assert (kind.__name__, kind.__qualname__) == ("Embedding", "Embedding")
    nn.utils.parametrize.register_parametrization(model.embed, "weight", nn.Identity())
    assert torch.equal(arrived(model), exact(model, F.embedding(IDS, model.embed.weight)))
    assert nn.utils.parametrize.type_before_parametrizations(model.embed) is kind
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        torch.save(model, io.BytesIO())
    nn.utils.parametrize.remove_parametrizations(model.embed, "weight")
    assert type(model.embed) is kind
    handle.remove()
    assert type(model.embed) is nn.Embedding


def test_a_parametrised_embedding_gets_its_noise_behind():
    model = build()
    nn.utils.parametrize.register_parametrization(model.embed, "weight", nn.Tanh())
    kind = type(model.embed)
    with pytest.raises(ValueError, match="is parametrised"):
        apply_neftune(model, 5.0, fused=True)
    handle = apply_neftune(model, 5.0)
    assert torch.equal(arrived(model), exact(model, F.embedding(IDS, model.embed.weight)))
    nn.utils.parametrize.remove_parametrizations(model.embed, "weight")
    assert type(model.embed) is nn.Embedding and kind is not nn.Embedding
    assert torch.equal(arrived(model), exact(model, F.embedding(IDS, model.embed.weight)))
    handle.remove()
    assert everything(model) == everything(build())


def quantised(model):
    """By a tool that looks for nn.Embedding and no class of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        config = {nn.Embedding: torch.ao.quantization.float_qparams_weight_only_qconfig}
        copied = copy.deepcopy(model).eval()
        return torch.ao.quantization.quantize_dynamic(copied, config, torch.quint8)


def test_tools_that_look_at_the_exact_class():
    """With fused=False they find nn.Embedding; with the class swap they do not."""
    model = build()
    handle = apply_neftune(model, 5.0, fused=False)
    assert type(quantised(model).embed) is torch.ao.nn.quantized.Embedding
    assert type(model.embed) is nn.Embedding
    handle.fused = None
    assert type(model.embed) is not nn.Embedding and handle.fused is None
    assert torch.equal(arrived(model), exact(model, F.embedding(IDS, model.embed.weight)))
    handle.remove()
    torch.jit.script(model.embed)


def test_per_sample_gradients_by_torch_func_name_the_remedy():
    """Opacus runs a module whose class it does not know again in backward, under vmap."""
    model = build()
    handle = apply_neftune(model, 5.0)
    embedding = model.embed

    def again(gradient):
        def loss(weight, ids):
            return torch.func.functional_call(embedding, {"weight": weight}, ids).sum()

        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")
        per_sample(embedding.weight.detach(), IDS)

    model(IDS, MASK)
    model.arrived.register_hook(again)
    with pytest.raises(RuntimeError, match="Opacus.*fused=False"):
        model.head(model.arrived).sum().backward()
    handle.remove()


class ByHand(Model):
    def forward(self, input_ids, attention_mask=None):
        return self.head(add_noise(self.embed(input_ids), 5.0, attention_mask=attention_mask))


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_opacus(order, mode):
    """Its hooks know classes exactly: behind, per-sample gradients are those of a plain model with
    the noise; fused, it says what to do or is right (ExpandedWeights need no class).
    """
    from opacus.grad_sample import get_gsm_class

    def gradients(fused):
        model = build()
        handle = apply_neftune(model, 5.0, fused=fused) if order == "before" else None
        wrapped = get_gsm_class(mode)(model)
        handle = handle or apply_neftune(model, 5.0, fused=fused)
        clean = F.embedding(IDS, model.embed.weight)
        torch.manual_seed(7)
        out = wrapped(IDS, MASK)
        assert torch.equal(model.arrived, exact(model, clean)) and handle.stats()["calls"] == 1
        del model.arrived  # Opacus may copy what its hooks reach
        out.square().sum().backward()
        return model.embed.weight.grad_sample

    behind = gradients(False)
    torch.manual_seed(0)
    by_hand = ByHand(nn.Embedding(VOCAB, HIDDEN)).train()
    wrapped = get_gsm_class(mode)(by_hand)
    torch.manual_seed(7)
    wrapped(IDS, MASK).square().sum().backward()
    assert torch.equal(behind, by_hand.embed.weight.grad_sample)
    if mode == "ew":
        assert torch.equal(gradients(None), behind)
    else:
        with pytest.raises(RuntimeError, match="Opacus.*fused=False"):
            gradients(None)


@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("order", ["before", "after"])
def test_opacus_with_ghost_clipping(order, ghost):
    """Two backward passes through one graph, with norms by the exact class or gradients of each
    sample: behind, both are those of a plain model with the noise; fused, it says what to do.
    """
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    def clipped(model, wrapped):
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(wrapped.parameters(), 0.1),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            expected_batch_size=len(IDS),
        )
        torch.manual_seed(7)
        losses = wrapped(IDS, MASK).square().sum((1, 2))
        DPTensorFastGradientClipping(wrapped, optimizer, losses, "mean").backward()
        return wrapped.per_sample_gradient_norms, model.embed.weight.grad

    def forget(model, args, out):  # Opacus may copy what its hooks reach
        del model.arrived

    def ours(fused):
        model = build()
        handle = apply_neftune(model, 5.0, fused=fused) if order == "before" else None
        wrapped = GradSampleModuleFastGradientClipping(model, use_ghost_clipping=ghost)
        handle = handle or apply_neftune(model, 5.0, fused=fused)
        model.register_forward_hook(forget)
        found = clipped(model, wrapped)
        assert handle.stats()["calls"] == 1
        return found

    torch.manual_seed(0)
    by_hand = ByHand(nn.Embedding(VOCAB, HIDDEN)).train()
    norms, gradient = clipped(
        by_hand, GradSampleModuleFastGradientClipping(by_hand, use_ghost_clipping=ghost)
    )
    behind = ours(False)
    assert torch.equal(behind[0], norms) and torch.equal(behind[1], gradient)
    with pytest.raises(RuntimeError, match="Opacus.*fused=False"):
        ours(None)


@pytest.mark.parametrize("fused", [None, False])
def test_hooks_that_know_classes_exactly(fused):
    """As Opacus has them: a formula for nn.Embedding, else the module again inside backward."""
    model = build()
    handle = apply_neftune(model, 5.0, fused=fused)
    samplers = {nn.Embedding: lambda module, ids, gradient: gradient.new_zeros(())}

    def again(module, ids, gradient):
        def loss(weight, ids):
            return torch.func.functional_call(module, {"weight": weight}, ids).sum()

        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")
        return per_sample(module.weight.detach(), ids)

    def sample(module, args, output):
        def hook(gradient):
            samplers.get(type(module), again)(module, args[0], gradient)

        output.register_hook(hook)

    model.embed.register_forward_hook(sample)
    out = model(IDS, MASK).sum()
    if fused is False:
        out.backward()
    else:
        with pytest.raises(RuntimeError, match="Opacus.*fused=False"):
            out.backward()
    handle.remove()


@pytest.mark.parametrize("remedy", ["behind", "removed", "to_embedding"])
def test_remedies_for_tools_that_look_at_the_exact_class(remedy):
    model = build()
    if remedy == "to_embedding":
        model.embed = NEFTuneEmbedding.from_embedding(model.embed).to_embedding()
    else:
        handle = apply_neftune(model, 5.0, fused=False if remedy == "behind" else None)
        if remedy == "removed":
            handle.remove()
    assert type(model.embed) is nn.Embedding
    assert type(quantised(model).embed) is torch.ao.nn.quantized.Embedding
    if remedy != "behind":  # TorchScript compiles no hook with keyword arguments
        scripted = torch.jit.script(model.embed)
        assert torch.equal(scripted(IDS), F.embedding(IDS, model.embed.weight))


# ---- what is around the embedding


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp1(module, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)


WRAPPERS = {
    "FSDP1": fsdp1,
    "FSDP1 of original parameters": lambda module: fsdp1(module, use_orig_params=True),
    "torch.compile": lambda module: torch.compile(module, backend="eager"),
    "checkpoint_wrapper": checkpoint_wrapper,
    "checkpoint in FSDP1": lambda module: fsdp1(checkpoint_wrapper(module)),
    "checkpoint in torch.compile": lambda module: torch.compile(
        checkpoint_wrapper(module), backend="eager"
    ),
}


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_of_the_declared_list(name, order, fused, process_group):
    """Before and after apply_neftune: the noise of a plain embedding, its gradient, and exact
    removal while the wrapper is there.
    """
    torch._dynamo.reset()
    plain = build()
    weight = plain.embed.weight.detach().clone()
    with apply_neftune(plain, 5.0):
        expected = arrived(plain)
        plain.arrived.backward(whole_numbers(expected))
    model = build()
    handle = apply_neftune(model, 5.0, fused=fused) if order == "before" else None
    model.embed = WRAPPERS[name](model.embed)
    twin = build()
    twin.embed = WRAPPERS[name](twin.embed)
    handle = handle or apply_neftune(model, 5.0, fused=fused)
    assert torch.equal(arrived(model), expected)
    model.arrived.backward(whole_numbers(expected))
    (gradient,) = [one.grad for path, one in model.named_parameters() if "embed" in path]
    assert torch.equal(gradient.reshape(-1), plain.embed.weight.grad.reshape(-1))
    assert torch.equal(arrived(model.eval()), F.embedding(IDS, weight))
    handle.remove()
    assert torch.equal(arrived(model.train()), F.embedding(IDS, weight))
    for one, other in zip(model.modules(), twin.modules(), strict=True):
        assert type(one) is type(other) and "_neftune" not in vars(one)
        for hooks in (key for key in vars(one) if key.startswith("_forward_")):
            assert len(vars(one)[hooks]) == len(vars(other)[hooks])


def test_what_is_not_declared_is_not_climbed():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, ids):
            return self.inner(ids) * 5.0

    model = build()
    model.embed = Around(model.embed)
    apply_neftune(model, 5.0)
    expected = exact(model, F.embedding(IDS, model.embed.inner.weight) * 5.0)
    assert torch.equal(arrived(model), expected), "the paper's magnitude behind the factor"
    model = build()
    model.embed = offload_wrapper(model.embed)
    apply_neftune(model, 5.0)
    assert "_neftune" in vars(model.embed), "a wrapper that is not declared is the site itself"


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(ids)


def table_in(wrap):
    def around(model):
        model.shared = model.encoder.embed_tokens = model.decoder.embed_tokens = wrap(model.shared)
        return model

    return around


def blocks_in_fsdp1(model):
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    kinds = {type(block) for block in model.encoder.block}
    return fsdp1(model, auto_wrap_policy=ModuleWrapPolicy(kinds))


ENCODER_DECODER_WRAPPERS = {
    "one table": (table_in(lambda table: table), "Embedding"),
    "own module": (table_in(Around), "Around"),
    "not declared": (table_in(offload_wrapper), "OffloadWrapper"),
    "checkpoint_wrapper": (table_in(checkpoint_wrapper), "CheckpointWrapper"),
    "torch.compile": (table_in(WRAPPERS["torch.compile"]), "Embedding"),
    "FSDP1": (table_in(fsdp1), "Embedding"),
    "checkpoint in FSDP1": (table_in(WRAPPERS["checkpoint in FSDP1"]), "CheckpointWrapper"),
    "the model in FSDP1": (fsdp1, "Embedding"),
    "the model in FSDP1 of original parameters": (
        WRAPPERS["FSDP1 of original parameters"],
        "Embedding",
    ),
    "the model's blocks in FSDP1": (blocks_in_fsdp1, "Embedding"),
}


def encoder_decoder():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    options = {"decoder_start_token_id": 0, "dropout_rate": 0.0, **sizes}
    config = transformers.T5Config(vocab_size=VOCAB, **options)
    return transformers.T5ForConditionalGeneration(config).train()


def arrivals(model, whole):
    """What arrives at the encoder's first block and at the decoder's, of labels like the ids."""
    stacks = (model.encoder, model.decoder)
    found = {}

    def hook(stack):
        return lambda _, args: found.setdefault(stack, args[0].detach().clone())

    hooks = [stack.dropout.register_forward_pre_hook(hook(stack)) for stack in stacks]
    torch.manual_seed(7)
    whole(input_ids=IDS, attention_mask=MASK, labels=IDS)
    for one in hooks:
        one.remove()
    return [found[stack] for stack in stacks]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ENCODER_DECODER_WRAPPERS)
def test_encoder_decoders_are_climbed_alike(name, order, process_group):
    """The decoder's tokens are not the encoder's, though its labels are the same: no mask of the
    encoder's counts there.
    """
    torch._dynamo.reset()
    wrap, site = ENCODER_DECODER_WRAPPERS[name]
    model = encoder_decoder()
    shifted = F.pad(IDS[:, :-1], (1, 0))
    clean = [F.embedding(ids, model.shared.weight.detach().clone()) for ids in (IDS, shifted)]
    if order == "before":
        handle = apply_neftune(model, 5.0)
    whole = wrap(model)
    plain = {name: type(module) for name, module in model.named_modules()}
    if order == "after":
        handle = apply_neftune(whole, 5.0)
        assert {type(one).__name__ for one in handle._sites()} == {site}
    noisy = arrivals(model, whole)
    torch.manual_seed(7)
    assert torch.equal(noisy[0], add_noise(clean[0], 5.0, attention_mask=MASK))
    assert torch.equal(noisy[1], add_noise(clean[1], 5.0))
    handle.remove()
    assert all(map(torch.equal, arrivals(model, whole), clean))
    if order == "after":
        assert plain == {name: type(module) for name, module in model.named_modules()}


def test_a_table_in_an_encoder_that_cannot_be_noised_is_refused():
    """As in any other model, and not passed over because the decoder has one."""
    model = encoder_decoder()
    model.encoder.embed_tokens = nn.Sequential(nn.Embedding(VOCAB, HIDDEN), nn.Identity())
    with pytest.raises(ValueError, match=r"must be an nn.Embedding, got torch\.nn.*Sequential"):
        apply_neftune(model, 5.0)


def test_a_site_behind_in_a_compiled_embedding_survives_copies():
    torch._dynamo.reset()
    model = build(Scaled)
    model.embed = torch.compile(model.embed, backend="eager")
    apply_neftune(model, 5.0)
    clean = F.embedding(IDS, model.embed.weight) * 3.0
    twin = copy.deepcopy(model)
    outer = torch.compile(model, backend="eager")
    for one in (model, twin, outer):
        assert torch.equal(arrived(one), exact(one, clean))


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("fused", [None, False])
def test_a_site_that_comes_after_the_first_compiled_call(kind, fused):
    """Dynamo does not see a hook that comes or goes after it has compiled."""
    torch._dynamo.reset()
    model = build(kind)
    compiled = torch.compile(model, backend="eager")
    clean = arrived(compiled)
    handle = apply_neftune(model, 5.0, fused=fused)
    assert torch.equal(arrived(compiled), exact(model, clean))
    handle.remove()
    assert torch.equal(arrived(compiled), clean)


# ---- accelerate


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("places", [{"": "cpu"}, {"embed": "cpu", "head": "disk"}, "offload"])
@pytest.mark.parametrize("order", ["before", "after", "after and off again"])
def test_accelerate_dispatch(order, places, fused, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_module

    model = build()
    weight = model.embed.weight.detach().clone()
    handle = apply_neftune(model, 5.0, fused=fused) if order == "before" else None
    if places == "offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.dispatch_model(model, places, offload_dir=tmp_path, force_hooks=True)
    if order == "after and off again":
        remove_hook_from_module(model, recurse=True)
    handle = handle or apply_neftune(model, 5.0, fused=fused)
    expected = exact(model, F.embedding(IDS, weight))
    assert torch.equal(arrived(model), expected)
    assert torch.equal(arrived(model.eval()), F.embedding(IDS, weight))
    model.train()
    handle.remove()
    assert torch.equal(arrived(model), F.embedding(IDS, weight))
    assert type(model.embed) is nn.Embedding and "_neftune" not in vars(model.embed)
    assert model.embed.forward.__name__ == "forward", "accelerate's wrapper, named as what it wraps"
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(arrived(model), F.embedding(IDS, weight))
    put = model.embed.__dict__["forward"]
    assert put.__func__ is nn.Embedding.forward, "as accelerate leaves it without us"


def test_hooks_taken_off_while_the_noise_is_on():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_module

    model = build()
    handle = apply_neftune(model, 5.0)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    remove_hook_from_module(model, recurse=True)
    expected = exact(model, F.embedding(IDS, model.embed.weight))
    assert torch.equal(arrived(model), expected)
    assert apply_neftune(model, 5.0) is handle
    assert torch.equal(arrived(model), expected)
    handle.remove()
    assert model.embed.__dict__["forward"].__func__ is nn.Embedding.forward


def test_what_was_fused_inside_hooks_and_is_to_be_behind_has_one_noise():
    """accelerate's hook goes on calling the method that it found."""
    accelerate = pytest.importorskip("accelerate")
    model = build()
    handle = apply_neftune(model, 5.0)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    expected = exact(model, F.embedding(IDS, model.embed.weight))
    for fused in (False, None, False):
        handle.fused = fused
        assert torch.equal(arrived(model), expected)
    assert handle.stats()["calls"] == 3


def test_a_method_that_somebody_kept_has_no_second_noise():
    """transformers' tensor-parallel plan keeps the forward that it found."""
    model = build()
    handle = apply_neftune(model, 5.0)
    kept = model.embed.forward
    handle.fused = False
    assert torch.equal(kept(IDS), F.embedding(IDS, model.embed.weight))
    handle.remove()
    assert torch.equal(kept(IDS), F.embedding(IDS, model.embed.weight))


def test_an_own_bound_method_on_the_instance_is_fused():
    model = build()
    model.embed.forward = model.embed.forward
    put = model.embed.forward
    handle = apply_neftune(model, 5.0, fused=True)
    expected = exact(model, F.embedding(IDS, model.embed.weight))
    assert torch.equal(arrived(model), expected)
    assert vars(model.embed)["forward"] == put, "nothing of it is set"
    del model.arrived
    assert torch.equal(arrived(copy.deepcopy(model)), expected)
    model.embed.forward = lambda ids: F.embedding(ids, model.embed.weight) * 2
    assert model.embed.forward(IDS).max() > 0, "anybody else's counts"
    model.embed.forward = put
    handle.remove()
    assert vars(model.embed)["forward"] == put and type(model.embed) is nn.Embedding


# ---- PEFT


def peft_model(**options):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, **sizes)
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(r=4, **options)
    )
    for name, parameter in model.named_parameters():
        if "lora" in name:  # so that the wrapper does something
            nn.init.normal_(parameter, std=0.5)
    return model.train()


def outputs(model):
    seen = []
    hook = (
        model.get_base_model()
        .get_input_embeddings()
        .register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    )
    torch.manual_seed(7)
    model(input_ids=IDS, attention_mask=MASK)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("fused", [None, False])
def test_around_lora_the_noise_is_inside(fused):
    model = peft_model(target_modules=["embed_tokens"])
    layer = model.get_base_model().get_input_embeddings()
    added = outputs(model) - layer.base_layer(IDS)
    apply_neftune(model, 5.0, fused=fused)
    base = layer.base_layer.weight.detach()
    torch.manual_seed(7)
    inside = noisy_embedding(IDS, base, 5.0, attention_mask=MASK)
    embedding_a = layer.lora_embedding_A["default"].T
    low_rank = F.embedding(IDS, embedding_a) @ layer.lora_embedding_B["default"].T
    assert added.abs().max() > 0.1
    assert torch.equal(outputs(model), inside + low_rank * layer.scaling["default"])


@pytest.mark.parametrize("kind", ["DoRA", "OFT"])
def test_around_what_multiplies_the_noise_is_behind(kind):
    peft = pytest.importorskip("peft")
    if kind == "DoRA":
        model = peft_model(target_modules=["embed_tokens"], use_dora=True)
    else:
        base = peft_model(target_modules=["q_proj"]).merge_and_unload()
        config = peft.OFTConfig(target_modules=["embed_tokens"], oft_block_size=4, r=0)
        model = peft.get_peft_model(base, config).train()
    clean = outputs(model)
    with pytest.raises(ValueError, match="fused=True, but.*is around it"):
        apply_neftune(model, 5.0, fused=True)
    handle = apply_neftune(model, 5.0)
    assert torch.equal(outputs(model), exact(model, clean))
    handle.remove()
    assert torch.equal(outputs(model), clean)


def test_an_adapter_that_begins_to_multiply_moves_the_noise_behind_it():
    peft = pytest.importorskip("peft")
    model = peft_model(target_modules=["embed_tokens"])
    apply_neftune(model, 5.0)
    model.add_adapter("second", peft.LoraConfig(target_modules=["embed_tokens"], use_dora=True))
    model.set_adapter("second")
    with torch.no_grad():
        clean = outputs(model)
    assert torch.equal(outputs(model.train()), exact(model, clean))


def test_a_hook_copied_into_modules_to_save_never_noises_twice():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, **sizes)
    model = transformers.LlamaForCausalLM(config)
    handle = apply_neftune(model, 5.0, fused=False)
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = peft.get_peft_model(model, lora).train()
    clean = F.embedding(IDS, model.get_base_model().get_input_embeddings().weight).detach()
    assert torch.equal(outputs(model), exact(model, clean))
    handle.remove()
    assert torch.equal(outputs(model), clean)
    assert not any("_neftune" in vars(module) for module in model.modules())


# ---- lookups and what is none


class Both(nn.Embedding):
    """A table that is also the output head (MPT)."""

    def forward(self, x, back=False):
        return F.linear(x, self.weight) if back else super().forward(x)


class Tied(Model):
    def forward(self, input_ids, attention_mask=None):
        self.arrived = self.embed(input_ids)
        return self.embed(self.arrived, back=True)


def test_only_ids_are_lookups():
    torch.manual_seed(0)
    model = Tied(Both(VOCAB, HIDDEN)).train()
    handle = apply_neftune(model, 5.0)
    torch.manual_seed(7)
    logits = model(IDS, MASK)
    assert torch.equal(logits, F.linear(model.arrived, model.embed.weight))
    clean = F.embedding(IDS, model.embed.weight)
    assert torch.equal(model.arrived, exact(model, clean)) and handle.stats()["calls"] == 1


def test_a_site_that_makes_no_embeddings_of_its_ids_says_so():
    class Pairs(nn.Embedding):
        def forward(self, input):
            return super().forward(input), None

    class Pooled(nn.Embedding):
        def forward(self, input):
            return super().forward(input).sum(-2)

    for kind, error, message in (
        (Pairs, TypeError, "returns tuple and no tensor"),
        (Pooled, ValueError, r"makes \(3, 32\) of ids \(3, 8\)"),
    ):
        model = build(kind)
        apply_neftune(model, 5.0)
        with pytest.raises(error, match=message):
            model.embed(IDS)
        model.eval().embed(IDS)  # forwards without noise never raise
        with torch.no_grad():
            model.train().embed(IDS)


class Direct(Model):
    """Calls its embedding's forward, which runs no hooks."""

    def forward(self, input_ids=None, attention_mask=None, pixels=None):
        return pixels if input_ids is None else self.embed.forward(input_ids)


def test_a_noisy_forward_whose_site_did_not_run_warns():
    model = Direct(Scaled(VOCAB, HIDDEN)).train()
    apply_neftune(model, 5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(IDS, MASK)
        model.train()(pixels=torch.ones(2))  # no token ids
        with torch.no_grad():
            model(IDS, MASK)
    with pytest.warns(UserWarning, match=r"ended without NEFTune noise.*its forward\(\)"):
        model(IDS, MASK)
    model = Direct(nn.Embedding(VOCAB, HIDDEN)).train()
    apply_neftune(model, 5.0)
    torch.manual_seed(7)
    out = model(IDS, MASK)
    assert torch.equal(out, exact(model, F.embedding(IDS, model.embed.weight))), (
        "fused: it is there"
    )


def test_a_compiled_embedding_is_seen_to_run():
    torch._dynamo.reset()
    for kind in (nn.Embedding, Scaled):
        model = build(kind)
        model.embed = torch.compile(model.embed, backend="eager")
        apply_neftune(model, 5.0, embedding_multiplier=1.0)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*NEFTune")
            assert not torch.equal(arrived(model), arrived(model, seed=8))


# ---- beside foreign forward hooks


@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("fused", [None, False])
def test_order_beside_enable_input_require_grads(fused, order, prepend):
    """transformers' hook makes a frozen embedding's output require grad, for reentrant
    checkpoints.
    """
    model = build()
    model.embed.weight.requires_grad_(False)
    seen = []

    def require_grads(module, args, output):
        seen.append(output.detach().clone())
        output.requires_grad_(True)

    if order == "after":
        apply_neftune(model, 5.0, fused=fused)
    hook = model.embed.register_forward_hook(require_grads, prepend=prepend)
    if order == "before":
        apply_neftune(model, 5.0, fused=fused)
    clean = F.embedding(IDS, model.embed.weight)
    noisy = exact(model, clean)
    assert torch.equal(arrived(model), noisy) and model.arrived.requires_grad
    # ours comes first; only a hook that is prepended after it stands before a noise behind
    earlier = fused is False and order == "after" and prepend
    assert torch.equal(seen[-1], clean if earlier else noisy)
    hook.remove()
    assert not model(IDS, MASK).isnan().any()


# ---- where there is no get_input_embeddings()


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"places": nn.Embedding(8, 4), "words": nn.Embedding(64, 4)})
        self.projected = nn.Linear(4, 4)


@pytest.mark.parametrize("returned", [None, nn.Parameter(torch.zeros(8, 4))])
def test_the_error_lists_the_tables_with_paths_and_sizes(returned):
    model = Tables()
    listed = r'embedding="inner.words" \(64, 4\), embedding="inner.places" \(8, 4\)$'
    with pytest.raises(ValueError, match="Tables has no get_input_embeddings.*" + listed):
        apply_neftune(model)
    model.get_input_embeddings = lambda: returned
    with pytest.raises(ValueError, match=listed):
        apply_neftune(model)
    model.inner = nn.ModuleList(nn.Embedding(8, 4) for _ in range(9))
    with pytest.raises(ValueError, match=r'embedding="inner.7" \(8, 4\) and 1 more'):
        apply_neftune(model)
    with pytest.raises(ValueError, match="holds no nn.Embedding"):
        apply_neftune(nn.Linear(2, 2))


class Pipeline(nn.Sequential):
    """SentenceTransformer's way: a list of modules that hand a dictionary on."""


Pipeline.__module__ = "sentence_transformers.SentenceTransformer"


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(64, 4)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None):
        return self.words(input_ids)


class Part(nn.Module):
    """Calls its model's forward by name, as sentence-transformers 6 does: no hook runs."""

    def __init__(self, models=1):
        super().__init__()
        self.models = nn.ModuleList(Encoder() for _ in range(models))

    def forward(self, features):
        features["embedded"] = self.models[0].forward(features["input_ids"])
        return features


def test_a_list_of_modules_around_a_model():
    pipeline = Pipeline(Part(), nn.Identity()).train()
    handle = apply_neftune(pipeline, 5.0, embedding_multiplier=1.0)
    ids = torch.randint(1, 64, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 2 + [0] * 4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = pipeline({"input_ids": ids, "attention_mask": mask})["embedded"]
    words = pipeline[0].models[0].words
    seed = words._neftune.last.noise.seed
    assert torch.equal(out, noisy_embedding(ids, words.weight, 5.0, attention_mask=mask, seed=seed))
    assert handle.stats()["length_min"] == 2
    with pytest.raises(ValueError, match='embedding="0.models.0.words"'):
        apply_neftune(Pipeline(Part(2)))
