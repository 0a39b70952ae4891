"""Whole models under torch.compile, torch.export and activation checkpointing: one graph, the noise
of eager mode.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from neftune_kernels import NEFTuneEmbedding, apply_neftune, noisy_embedding

transformers = pytest.importorskip("transformers")

VOCAB, HIDDEN = 64, 32


def llama(layers=1, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        use_cache=False,
        **options,
    )
    return transformers.LlamaForCausalLM(config).train()


def batch(rows=2, columns=8, seed=0):
    ids = torch.randint(3, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, columns // 2 :] = 0
    return ids, mask


def first_hidden(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[0]


def compilations(calls):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    calls()
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_noise_is_that_of_eager_mode(backend):
    """Forward noise and the embedding's gradient; Inductor sums the layers in another order, so
    logits may differ in the last bit.
    """
    model = llama()
    apply_neftune(model, 5.0)
    ids, mask = batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for seed in (0, 1, -7):
        torch.manual_seed(seed)
        expected = first_hidden(model, ids, mask)
        torch.manual_seed(seed)
        assert torch.equal(first_hidden(compiled, ids, mask), expected)
    torch.manual_seed(3)
    unlike = first_hidden(compiled, ids, mask)
    assert not torch.equal(unlike, expected)


def test_one_compilation_for_many_seeds_alphas_and_lengths():
    """As many compilations as the model has without us, over lengths that the compiler makes
    dynamic, and none for seeds and alphas.
    """

    def run(model, handle):
        def calls():
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            for i, columns in enumerate((8, 10, 14, 20, 31)):
                if handle is not None:
                    handle.noise_alpha = 1.0 + i
                torch.manual_seed(i)
                ids, mask = batch(columns=columns)
                compiled(input_ids=ids, attention_mask=mask)

        return compilations(calls)

    plain = run(llama(), None)
    model = llama()
    assert run(model, apply_neftune(model, 5.0)) == plain <= 2


def test_signs_and_distributions_that_change_after_compiling():
    model = llama()
    handle = apply_neftune(model, 5.0)
    ids, mask = batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for sign, distribution in (
        (1, "uniform"),
        (-1, "uniform"),
        (1, "normal"),
        (-1, "normal"),
        (1, "rademacher"),
        (1, "uniform"),
    ):
        assert apply_neftune(model, 5.0, distribution=distribution) is handle
        handle.sign = sign
        torch.manual_seed(3)
        expected = first_hidden(model, ids, mask)
        torch.manual_seed(3)
        assert torch.equal(first_hidden(compiled, ids, mask), expected), (sign, distribution)


def test_an_embedding_replaced_before_compiling_is_refused():
    """Found again at the next forward, but not from inside a graph."""
    peft = pytest.importorskip("peft")
    ids, mask = batch()
    model = llama()
    apply_neftune(model, 5.0)
    model.model.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="call apply_neftune again before compiling"):
        torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids, attention_mask=mask)
    model = llama()
    handle = apply_neftune(model, 5.0)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    ).train()
    torch._dynamo.reset()
    compiled = torch.compile(
        wrapped, backend="eager"
    )  # in parts, it finds the wrapper as eager mode does
    compiled(input_ids=ids, attention_mask=mask)
    assert handle._noisy and not handle.has_moved()
    torch.manual_seed(3)
    expected = first_hidden(wrapped, ids, mask)
    torch.manual_seed(3)
    assert torch.equal(first_hidden(compiled, ids, mask), expected)


def test_noise_is_launched_outside_cuda_graphs():
    """alpha is read by the host at the launch: Inductor must not record it, or a replay would add
    the first alpha for ever.
    """
    for name in (
        "noisy_embedding",
        "add_noise",
        "add_variant_noise",
        "cuda_noisy_embedding",
        "cuda_add_noise",
    ):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.neftune_kernels, name).default.tags


@pytest.mark.parametrize("kind", ["T5", "Marian", "packed"])
def test_other_ways_in_compile_whole(kind):
    """Encoder-decoders, models that scale embeddings afterwards, packed batches."""
    torch.manual_seed(0)
    ids, mask = batch()
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    if kind == "T5":
        config = transformers.T5Config(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            dropout_rate=0.0,
            use_cache=False,
        )
        model = transformers.T5ForConditionalGeneration(config).train()
    elif kind == "Marian":
        sides = {
            f"{s}_{p}": n
            for s in ("encoder", "decoder")
            for p, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
        }
        config = transformers.MarianConfig(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            pad_token_id=1,
            decoder_start_token_id=1,
            scale_embedding=True,
            dropout=0.0,
            use_cache=False,
            max_position_embeddings=32,
            **sides,
        )
        model = transformers.MarianMTModel(config).train()
    else:
        model = llama()
        given = {
            "input_ids": ids[:1],
            "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]]),
            "labels": ids[:1],
        }
    handle = apply_neftune(model, 5.0)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected = model(**given).loss
        torch.manual_seed(seed)
        assert torch.equal(compiled(**given).loss, expected)
    handle.noise_alpha = 0
    assert not torch.equal(model(**given).loss, expected)
    if kind == "Marian":
        assert model.get_encoder().embed_scale == model.get_decoder().embed_scale == HIDDEN**0.5


class Packing(nn.Module):
    """Its embedding alone is compiled; what enters the first block is what it returns."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.embed(input_ids)


def test_position_ids_that_come_with_another_shape_to_a_compiled_embedding():
    """The second shape makes the ids' vary; that of position ids, seen for the first time, not."""
    torch.manual_seed(0)
    models = [Packing().train() for _ in range(2)]
    models[0].load_state_dict(models[1].state_dict())
    torch._dynamo.reset()
    models[0].embed = torch.compile(models[0].embed, backend="eager")
    for model in models:
        apply_neftune(model, 5.0, embedding="embed", embedding_multiplier=1.0)
    (ids, mask), (packed, _) = batch(2, 6), batch(3, 8)
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]).expand(3, 8)
    for given in (
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": packed, "position_ids": positions},
    ):
        torch.manual_seed(1)
        expected = models[1](**given)
        torch.manual_seed(1)
        assert torch.equal(models[0](**given), expected)


@pytest.mark.parametrize("training", [True, False])
def test_export_of_a_model(training):
    model = llama().train(training)
    apply_neftune(model, 5.0)
    ids, mask = batch()
    exported = torch.export.export(
        model, (), {"input_ids": ids, "attention_mask": mask}, strict=False
    )
    names = [str(node.target) for node in exported.graph.nodes]
    noisy = [name for name in names if "noisy_embedding" in name or "add_noise" in name]
    assert (
        len(noisy) == len([name for name in names if "draw_seed" in name]) == (1 if training else 0)
    )
    module = exported.module()
    torch.manual_seed(4)
    expected = model(input_ids=ids, attention_mask=mask).logits
    torch.manual_seed(4)
    assert torch.equal(module(input_ids=ids, attention_mask=mask).logits, expected)


def test_the_seed_stays_on_the_device():
    """What CUDA graphs (mode="reduce-overhead") need: an operator draws the seed on the weight's
    device, and the host never reads it.
    """
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    module = NEFTuneEmbedding(VOCAB, HIDDEN)
    ids, _ = batch()
    torch._dynamo.reset()
    torch.compile(module, backend=keep, fullgraph=True)(ids)
    (graph,) = graphs
    (draw,) = [node for node in graph.graph.nodes if "draw_seed" in str(node.target)]
    assert [node for node in graph.graph.nodes if node.op == "call_function" and draw in node.args]
    assert not [
        node
        for node in graph.graph.nodes
        if str(node.target) in ("item", "tolist") or "_local_scalar" in str(node.target)
    ]
    assert draw.args[0].kwargs["device"] == module.weight.device


class Segments(nn.Module):
    """A model whose embedding lies inside or outside the checkpointed segment."""

    def __init__(self, embedding, inside, **options):
        super().__init__()
        self.embedding, self.inside, self.options = embedding, inside, options
        self.layer = nn.Linear(HIDDEN, HIDDEN)
        self.seen = []

    def segment(self, ids, mask, embeds):
        embeds = self.embedding(ids, mask) if self.inside else embeds
        self.seen.append(embeds.detach().clone())
        return self.layer(embeds).tanh()

    def forward(self, ids, mask):
        embeds = None if self.inside else self.embedding(ids, mask)
        start = torch.zeros(
            (), requires_grad=True
        )  # a reentrant checkpoint wants an input that requires grad
        return checkpoint(
            lambda zero: self.segment(ids, mask, embeds) + zero, start, **self.options
        )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_see_the_same_bits_twice(use_reentrant, inside, compiled):
    torch.manual_seed(0)
    model = Segments(NEFTuneEmbedding(VOCAB, HIDDEN), inside, use_reentrant=use_reentrant)
    plain = copy.deepcopy(model)
    plain.inside = False
    plain.forward = lambda ids, mask: plain.segment(ids, mask, plain.embedding(ids, mask))
    ids, mask = batch()
    run = model
    if compiled:
        if use_reentrant:
            pytest.skip("torch.compile refuses reentrant checkpoints (use_reentrant=True) itself")
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager")
    grads = []
    for one, call in ((model, run), (plain, plain.forward)):
        one.seen.clear()
        torch.manual_seed(5)
        call(ids, mask).sum().backward()
        grads.append(one.embedding.weight.grad)
    assert torch.equal(*grads)
    if not compiled:
        assert len(model.seen) == 2 and torch.equal(*model.seen)


def test_without_preserve_rng_state_a_fixed_seed_works():
    """preserve_rng_state=False recomputes with the generator's next draw, ours as dropout's; seed=
    does not depend on it.
    """

    class Fixed(NEFTuneEmbedding):
        seed = None

        def forward(self, ids, mask):
            return super().forward(ids, mask, seed=self.seed)

    torch.manual_seed(0)
    ids, mask = batch()
    model = Segments(Fixed(VOCAB, HIDDEN), True, use_reentrant=False, preserve_rng_state=False)
    model(ids, mask).sum().backward()
    assert not torch.equal(*model.seen)
    model.seen.clear()
    model.embedding.seed = 11
    model(ids, mask).sum().backward()
    assert torch.equal(*model.seen)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_a_model(use_reentrant):
    """transformers checkpoints its layers: the embedding lies outside, and nothing changes."""
    ids, mask = batch()
    grads = []
    for checkpointing in (False, True):
        model = llama(layers=2)
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
            )
        apply_neftune(model, 5.0)
        torch.manual_seed(2)
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        grads.append(model.get_input_embeddings().weight.grad)
    assert torch.equal(*grads)


def test_a_checkpoint_around_an_applied_model_is_not_compiled_whole():
    """Dynamo lets a checkpointed segment change nothing outside it, such as who is running.

    Compiled in parts it is right.
    """
    model = llama()
    apply_neftune(model, 5.0)
    ids, mask = batch()

    def step(ids, mask):
        return checkpoint(
            lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits,
            ids,
            mask,
            use_reentrant=False,
        ).sum()

    torch._dynamo.reset()
    with pytest.raises(Exception, match="(?i)side effect|mutating a variable"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(ids, mask)
    grads = []
    torch._dynamo.reset()
    for call in (step, torch.compile(step, backend="aot_eager")):
        model.zero_grad()
        torch.manual_seed(3)
        call(ids, mask).backward()
        grads.append(model.get_input_embeddings().weight.grad)
    assert torch.equal(*grads)


def test_autocast_anomaly_mode_and_determinism():
    """bf16 autocast leaves the float32 table's noise alone; anomaly mode and deterministic
    algorithms change no bit and raise nothing.
    """
    torch.manual_seed(0)
    module = NEFTuneEmbedding(VOCAB, HIDDEN)
    layer = nn.Linear(HIDDEN, HIDDEN)
    ids, mask = batch()
    expected = module(ids, mask, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(ids, mask, seed=1)
        layer(out).float().sum().backward()
    assert torch.equal(out, expected) and module.weight.grad.isfinite().all()
    with torch.autograd.detect_anomaly(check_nan=True):
        again = module(ids, mask, seed=1)
        again.sum().backward()
    torch.use_deterministic_algorithms(True)
    strict = module(ids, mask, seed=1)
    strict.sum().backward()
    assert torch.equal(again, expected) and torch.equal(strict, expected)


def test_double_backward():
    """The gradient of the gradient is that of F.embedding."""
    ids, _ = batch()
    found = []
    for noisy in (True, False):
        torch.manual_seed(0)
        module = (
            NEFTuneEmbedding(VOCAB, HIDDEN).double()
            if noisy
            else nn.Embedding(VOCAB, HIDDEN).double()
        )
        module.weight.data = torch.linspace(-1, 1, VOCAB * HIDDEN, dtype=torch.float64).view(
            VOCAB, HIDDEN
        )
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(
            (module(ids) * factor).pow(1).sum() * factor, module.weight, create_graph=True
        )
        (second,) = torch.autograd.grad(grad.sum(), factor)
        found.append(second)
    assert torch.equal(*found) and bool(found[0] != 0)


def test_vmap_of_grad_over_a_functional_model():
    module = NEFTuneEmbedding(VOCAB, HIDDEN).requires_grad_(True)
    ids, _ = batch(rows=4)
    weight = module.weight.detach()

    def loss(weight, row):
        return (
            torch.func.functional_call(module, {"weight": weight}, (row,), {"seed": 3})
            .square()
            .sum()
        )

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, ids)
    for row, grad in zip(ids, rows, strict=True):
        assert torch.equal(torch.func.grad(loss)(weight, row), grad)
    out = torch.func.functional_call(module, {"weight": weight}, (ids,), {"seed": 3})
    assert not torch.equal(out, F.embedding(ids, weight))


LAYOUTS_ON_DEVICE = {
    "nothing": {},
    "mask": {"attention_mask": (2, 8)},
    "position_ids": {"position_ids": (2, 8)},
    "mask and position_ids": {"attention_mask": (2, 8), "position_ids": (2, 8)},
    "cu_seq_lens_q": {"cu_seq_lens_q": (4,)},
    "seq_idx": {"seq_idx": (2, 8)},
    "3 axes": {"position_ids": (3, 2, 8)},
}


@pytest.mark.filterwarnings("ignore:neftune_kernels has no fused kernel for meta")
@pytest.mark.parametrize("layout", LAYOUTS_ON_DEVICE)
def test_no_value_is_read_off_an_accelerator(layout):
    """A meta tensor has no values, so whatever would synchronise with a device (item, nonzero,
    bool, copies to the host) raises on it.
    """
    with torch.device("meta"):
        model = llama()
    handle = apply_neftune(model, 5.0)
    ids = torch.empty(2, 8, dtype=torch.int64, device="meta")
    given = {
        name: torch.empty(shape, dtype=torch.int64, device="meta")
        for name, shape in LAYOUTS_ON_DEVICE[layout].items()
    }
    base = model.model
    # the model's own attention may look at values, so only what is ours runs
    type(base).forward, original = (
        (lambda self, input_ids, **kwargs: self.embed_tokens(input_ids)),
        type(base).forward,
    )
    try:
        out = base(input_ids=ids, **given)
    finally:
        type(base).forward = original
    out.sum().backward()
    assert out.device.type == base.embed_tokens.weight.grad.device.type == "meta"
    assert handle._live_state().calls == 1
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(out.sum() > 0)  # the detector detects


@pytest.mark.filterwarnings("ignore:neftune_kernels has no fused kernel for meta")
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"lengths": (2,)},
        {"cu_seqlens": (3,)},
        {"padding_idx": 3},
        {"embed_scale": 2.0},
        {"replica": 3, "seed": 5},
    ],
)
def test_functions_read_no_value_either(given):
    weight = torch.empty(VOCAB, HIDDEN, device="meta", requires_grad=True)
    ids = torch.empty(2, 8, dtype=torch.int64, device="meta")
    given = {
        name: torch.empty(value, dtype=torch.int64, device="meta")
        if isinstance(value, tuple)
        else value
        for name, value in given.items()
    }
    noisy_embedding(ids, weight, 5.0, **given).sum().backward()
    assert weight.grad.shape == weight.shape
