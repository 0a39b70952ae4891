"""Real quantised embeddings, torchao's and bitsandbytes': their own lookup, plus the noise, rounded
once; eval, removal and PEFT.
"""

import copy

import pytest
import torch
from torch import nn

from neftune_kernels import NEFTuneEmbedding, apply_neftune, neftune_noise

transformers = pytest.importorskip("transformers")

VOCAB, HIDDEN, ALPHA = 64, 64, 5.0
PLAIN = ("StableEmbedding", "Embedding")  # of bitsandbytes: for its optimizers, in full precision


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Tiny models: threads would only wait for each other."""
    threads(1)


def make_model(dtype=torch.float32, tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).train()


def torchao_embedding(config, everything=False):
    quantization = pytest.importorskip("torchao.quantization")
    configs = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "intx8": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int8),
        "intx4": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.granularity.PerGroup(32)
        ),
    }

    def quantise(model):
        kinds = (nn.Embedding, nn.Linear) if everything else nn.Embedding
        quantization.quantize_(
            model, configs[config](), filter_fn=lambda module, name: isinstance(module, kinds)
        )

    return quantise


def bitsandbytes_embedding(name):
    bnb = pytest.importorskip("bitsandbytes")

    def quantise(model):
        plain = model.get_input_embeddings()
        quantised = name not in PLAIN  # the two others mistake dtype= for a device
        made = getattr(bnb.nn, name)(
            VOCAB, HIDDEN, **({"dtype": plain.weight.dtype} if quantised else {})
        )
        made.load_state_dict({"weight": plain.weight.detach().clone()}, strict=False)
        made.weight.data = made.weight.data.to(
            plain.weight.dtype
        )  # StableEmbedding's norm stays in float32
        model.set_input_embeddings(made.to("cpu").train())  # which quantises

    return quantise


TORCHAO = {
    f"torchao-{config}": lambda config=config: torchao_embedding(config)
    for config in ("int8", "intx8", "intx4")
}
BITSANDBYTES = {
    f"bitsandbytes-{name}": lambda name=name: bitsandbytes_embedding(name)
    for name in ("Embedding8bit", "Embedding4bit", "EmbeddingFP4", "EmbeddingNF4", *PLAIN)
}
LIBRARIES = {**TORCHAO, **BITSANDBYTES}


def ragged():
    ids = torch.randint(1, VOCAB, (3, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[0, 5:] = 0
    mask[1, :6] = 0
    return ids, mask


def drawn_after(seed):
    torch.manual_seed(seed)
    return torch.empty((), dtype=torch.int64).random_(-(2**63), None)


def embedding_output(model, **inputs):
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    output = model(**inputs)
    hook.remove()
    assert len(seen) == 1
    return seen[0].detach().clone(), output


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("library", LIBRARIES)
def test_noise_is_added_to_the_modules_own_output(library, dtype):
    model = make_model(dtype)
    exact = model.get_input_embeddings().weight.detach().clone()
    LIBRARIES[library]()(model)
    embedding = model.get_input_embeddings()
    kind, weight = type(embedding), embedding.weight
    ids, mask = ragged()
    inputs = {"input_ids": ids, "attention_mask": mask}
    own = embedding(ids).detach().clone()
    if library.split("-")[1] not in PLAIN:
        assert not torch.equal(own, exact[ids])  # it is quantised
    before = model.eval()(**inputs).logits
    handle = apply_neftune(model.train(), ALPHA)
    seed = drawn_after(3)
    torch.manual_seed(3)
    noisy, output = embedding_output(model, **inputs)
    noise = neftune_noise(ids.shape, HIDDEN, ALPHA, attention_mask=mask, seed=seed)
    assert own.dtype == noisy.dtype == dtype
    assert torch.equal(noisy, (own.float() + noise).to(dtype))
    assert torch.equal(noisy[mask == 0], own[mask == 0]) and not torch.equal(noisy, own)
    assert not torch.equal(output.logits, before)
    stats = handle.stats()
    assert (stats["calls"], stats["samples"], stats["length_min"], stats["length_max"]) == (
        1,
        3,
        2,
        8,
    )
    assert torch.equal(model.eval()(**inputs).logits, before)
    assert torch.equal(embedding_output(model.train(), **inputs)[0][mask == 0], own[mask == 0])
    handle.remove()
    assert (
        type(embedding) is kind
        and embedding.weight is weight
        and "_neftune" not in embedding.__dict__
    )
    assert torch.equal(model.train()(**inputs).logits, before)


@pytest.mark.parametrize("library", LIBRARIES)
def test_copies_keep_the_noise(library):
    model = make_model()
    LIBRARIES[library]()(model)
    ids, mask = ragged()
    inputs = {"input_ids": ids, "attention_mask": mask}
    apply_neftune(model, ALPHA)
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    noisy = embedding_output(model, **inputs)[0]
    torch.manual_seed(3)
    assert torch.equal(embedding_output(twin, **inputs)[0], noisy)
    assert torch.equal(twin.eval()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("library", TORCHAO)
def test_quantised_after_apply_neftune(library):
    """torchao replaces the weight in place; the noise finds the new one."""
    model = make_model()
    handle = apply_neftune(model, ALPHA)
    LIBRARIES[library]()(model)
    embedding = model.get_input_embeddings()
    ids, mask = ragged()
    noise = neftune_noise(ids.shape, HIDDEN, ALPHA, attention_mask=mask, seed=drawn_after(3))
    torch.manual_seed(3)
    noisy = embedding_output(model, input_ids=ids, attention_mask=mask)[0]
    handle.remove()
    assert type(embedding) is nn.Embedding
    assert torch.equal(noisy, embedding(ids) + noise)


@pytest.mark.parametrize("library", TORCHAO)
def test_the_module_with_a_quantised_weight(library):
    model = make_model()
    LIBRARIES[library]()(model)
    ids, mask = ragged()
    module = NEFTuneEmbedding(VOCAB, HIDDEN, noise_alpha=ALPHA)
    module.weight = model.get_input_embeddings().weight
    noise = neftune_noise(ids.shape, HIDDEN, ALPHA, attention_mask=mask, seed=3)
    assert torch.equal(module(ids, mask, seed=3), model.get_input_embeddings()(ids) + noise)


@pytest.mark.parametrize(
    "use_reentrant", (None, True, False), ids=("kept", "reentrant", "non-reentrant")
)
@pytest.mark.parametrize("order", ("before", "after"))
@pytest.mark.parametrize(
    "quantised", ("torchao-int8", "torchao-intx8", "bitsandbytes-Embedding4bit")
)
def test_lora_on_a_quantised_model(quantised, order, use_reentrant):
    """torchao quantises every layer, bitsandbytes' linear layers are PEFT's own business: there the
    embedding alone.
    """
    peft = pytest.importorskip("peft")
    library, config = quantised.split("-")
    model = make_model()
    (
        torchao_embedding(config, everything=True)
        if library == "torchao"
        else bitsandbytes_embedding(config)
    )(model)
    for value in model.parameters():
        value.requires_grad_(False)
    handle = apply_neftune(model, ALPHA) if order == "before" else None
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    ).train()
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if handle is None:
        handle = apply_neftune(model, ALPHA)
    lora = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert lora and all("lora_" in name for name in lora)
    optimizer = torch.optim.AdamW(lora.values(), lr=2e-2)
    ids, mask = ragged()
    inputs = {"input_ids": ids, "attention_mask": mask}
    started = {name: value.detach().clone() for name, value in lora.items()}
    own = embedding_output(model.eval(), **inputs)[0]
    model.train()
    torch.manual_seed(3)
    noisy = embedding_output(model, **inputs)[0]
    noise = neftune_noise(ids.shape, HIDDEN, ALPHA, attention_mask=mask, seed=drawn_after(3))
    assert torch.equal(noisy, own + noise)
    for _ in range(2):
        loss = model(**inputs, labels=torch.where(mask == 1, ids, -100)).loss
        assert loss.requires_grad and loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        assert all(value.grad.isfinite().all() for value in lora.values())
        optimizer.step()
    assert all(value.grad.any() for value in lora.values())
    assert not any(torch.equal(value, started[name]) for name, value in lora.items())
    assert handle.stats()["calls"] == 3
    handle.remove()
    assert torch.equal(embedding_output(model, **inputs)[0], own)


def test_lora_on_the_quantised_embedding_itself():
    """PEFT wraps the embedding; the noise goes to the base layer's output, once.

    PEFT 0.21 takes torchao's for a linear layer.
    """
    peft = pytest.importorskip("peft")
    model = make_model()
    bitsandbytes_embedding("Embedding4bit")(model)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["embed_tokens"])
    ).train()
    ids, mask = ragged()
    inputs = {"input_ids": ids, "attention_mask": mask}
    own = embedding_output(model, **inputs)[0]
    handle = apply_neftune(model, ALPHA)
    noise = neftune_noise(ids.shape, HIDDEN, ALPHA, attention_mask=mask, seed=drawn_after(3))
    torch.manual_seed(3)
    assert torch.equal(embedding_output(model, **inputs)[0], own + noise)  # lora_A is zero yet
    model(**inputs, labels=ids).loss.backward()
    gradients = {
        name: value.grad for name, value in model.named_parameters() if value.requires_grad
    }
    assert any(gradient.any() for name, gradient in gradients.items() if "lora_embedding_A" in name)
    handle.remove()
    assert torch.equal(embedding_output(model, **inputs)[0], own)


def test_quantisation_aware_training():
    """torchao's fake-quantised embedding is an nn.Embedding, and keeps its forward."""
    qat = pytest.importorskip("torchao.quantization.qat")
    model = make_model()
    config = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32)
    made = qat.FakeQuantizedEmbedding.from_embedding(model.get_input_embeddings(), config)
    model.set_input_embeddings(made.train())
    ids, mask = ragged()
    own = made(ids).detach().clone()
    handle = apply_neftune(model, ALPHA)
    noise = neftune_noise(ids.shape, HIDDEN, ALPHA, attention_mask=mask, seed=drawn_after(3))
    torch.manual_seed(3)
    noisy, output = embedding_output(model, input_ids=ids, attention_mask=mask)
    assert torch.equal(noisy, own + noise)
    output.logits.sum().backward()
    assert made.weight.grad.isfinite().all() and made.weight.grad.any()
    handle.remove()
    assert type(made) is qat.FakeQuantizedEmbedding


def test_what_is_no_embedding_is_refused_by_name():
    """torch.ao's converted Embedding is called so too, without being one."""
    model = make_model()
    model.set_input_embeddings(torch.ao.nn.quantized.Embedding(VOCAB, HIDDEN))
    name = "torch.ao.nn.quantized.modules.embedding_ops.Embedding"
    message = rf"must be an nn.Embedding, got {name}: .*neftune_kernels.add_noise"
    with pytest.raises(ValueError, match=message):
        apply_neftune(model, ALPHA)
    with pytest.raises(
        ValueError, match=r"got torch.nn.modules.linear.Linear: name the embedding with embedding="
    ):
        apply_neftune(make_model(), ALPHA, embedding="lm_head")
