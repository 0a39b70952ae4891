"""apply_neftune on transformers and PEFT models: the mask arrives by itself, nothing is left
behind.
"""

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neftune_kernels import NEFTuneEmbedding, apply_neftune, neftune_noise, noisy_embedding

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCAB, HIDDEN = 64, 32
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=2),
    "mistral": lambda: transformers.MistralConfig(**SMALL, num_key_value_heads=2),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=HIDDEN,
    ),
    "phi": lambda: transformers.PhiConfig(**SMALL),
}


def make_model(name="llama"):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).train()


def ragged():
    ids = torch.randint(1, VOCAB, (3, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[0, 5:] = 0
    mask[1, :6] = 0
    return ids, mask


def embedding_output(model, **inputs):
    """What the input embedding really returned during a forward of the model, and the seed of its
    noise.
    """
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.detach().clone())
    )
    model(**inputs)
    hook.remove()
    assert len(seen) == 1
    return seen[0]


def drawn_after(seed):
    torch.manual_seed(seed)
    return torch.empty((), dtype=torch.int64).random_(-(2**63), None)


@pytest.mark.parametrize("name", CONFIGS)
def test_mask_reaches_the_embedding(name):
    model = make_model(name)
    ids, mask = ragged()
    clean = embedding_output(model.eval(), input_ids=ids, attention_mask=mask)
    model.train()
    handle = apply_neftune(model, 5.0)
    torch.manual_seed(7)
    noisy = embedding_output(model, input_ids=ids, attention_mask=mask)
    noise = neftune_noise(ids.shape, HIDDEN, 5.0, attention_mask=mask, seed=drawn_after(7))
    assert torch.equal(noisy, clean + noise)
    assert torch.equal(noisy[mask == 0], clean[mask == 0])
    stats = handle.stats()
    assert (stats["calls"], stats["samples"]) == (1, 3)
    assert (stats["length_min"], stats["length_max"]) == (2, 8)
    assert stats["length_mean"] == 5.0
    assert 0.9 < stats["max_noise_ratio"] < 1
    eval_before = model.eval()(input_ids=ids, attention_mask=mask).logits
    handle.remove()
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, eval_before)


def test_every_way_lengths_arrive():
    model = make_model()
    ids, mask = ragged()
    weight = model.get_input_embeddings().weight
    apply_neftune(model, 5.0)

    def check(expected_layout, call, tokens=ids):
        seen = []
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: seen.append(output.detach().clone())
        )
        torch.manual_seed(3)
        call()
        hook.remove()
        assert torch.equal(
            seen[0],
            noisy_embedding(tokens, weight.detach(), 5.0, seed=drawn_after(3), **expected_layout),
        )

    check({"attention_mask": mask}, lambda: model(ids, mask))  # positional
    check({"attention_mask": mask}, lambda: model(ids, attention_mask=mask.bool()))
    check(
        {"attention_mask": mask}, lambda: model.model(ids, mask)
    )  # fused-head losses call the backbone directly
    check({}, lambda: model(ids))
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    packed = ids[:1]
    check({"position_ids": positions}, lambda: model(packed, position_ids=positions), packed)
    bounds = torch.tensor([0, 3, 5, 8], dtype=torch.int32)
    lengths = {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": 3,
        "max_length_k": 3,
    }
    check({"cu_seqlens": bounds}, lambda: model(packed, position_ids=positions, **lengths), packed)
    check({"position_ids": positions}, lambda: model(packed, position_ids=positions), packed)
    numbered = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3]])
    check(
        {"attention_mask": numbered},
        lambda: model.model.embed_tokens and model(packed, attention_mask=numbered),
        packed,
    )


def test_unknown_lengths_warn_once_and_name_the_remedy():
    model = make_model()
    ids, mask = ragged()
    apply_neftune(model, 5.0)
    four = torch.zeros(3, 1, 8, 8)
    with pytest.warns(UserWarning, match=r"Pass the model a 2-D attention_mask or position_ids"):
        model(ids, attention_mask=four)
    with pytest.warns(UserWarning, match="inputs_embeds.*add_noise"):
        model(inputs_embeds=model.get_input_embeddings().weight[ids].detach(), attention_mask=mask)
    with pytest.warns(UserWarning, match=r"outside its model's forward.*told\(attention_mask"):
        model.get_input_embeddings()(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, attention_mask=four)
        model.get_input_embeddings()(ids)


def test_embeddings_made_for_one_model_excuse_no_other():
    """Noisy embeddings of the encoder's table do not make the decoder's clean ones noisy."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    model = transformers.EncoderDecoderModel(
        encoder=transformers.BertModel(transformers.BertConfig(**sizes)),
        decoder=transformers.BertLMHeadModel(decoder),
    ).train()
    ids, mask = ragged()
    handle = apply_neftune(model, 5.0)
    with handle.told(attention_mask=mask):
        noisy = model.encoder.get_input_embeddings()(ids)
    clean = model.decoder.get_input_embeddings().weight[ids].detach()
    with pytest.warns(UserWarning, match="inputs_embeds.*add_noise"):
        model.decoder(inputs_embeds=clean, attention_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encoder(inputs_embeds=noisy, attention_mask=mask)


def test_only_in_training_with_grad():
    model = make_model()
    ids, mask = ragged()
    handle = apply_neftune(model, 5.0)
    clean = F.embedding(ids, model.get_input_embeddings().weight)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(embedding_output(model, input_ids=ids, attention_mask=mask), clean)
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.eval()
    assert torch.equal(embedding_output(model, input_ids=ids, attention_mask=mask), clean)
    handle.noise_alpha = 0
    assert torch.equal(embedding_output(model.train(), input_ids=ids, attention_mask=mask), clean)
    assert torch.equal(torch.get_rng_state(), state)
    stats = handle.stats()
    assert stats["calls"] == 0 and stats["samples"] is None
    assert (
        stats["skipped"]["no grad"] >= 2
        and stats["skipped"]["eval mode"] == 1
        and stats["skipped"]["noise_alpha is 0"] == 1
    )
    apply_neftune(model, 5.0, noise_without_grad=True)
    with torch.no_grad():
        assert not torch.equal(embedding_output(model, input_ids=ids, attention_mask=mask), clean)


def everything(model):
    """Class, hooks and attributes of every module."""
    keys = [key for key in vars(model) if "hooks" in key]
    return {
        name: (type(module), {key: len(vars(module)[key]) for key in keys}, sorted(vars(module)))
        for name, module in model.named_modules()
    }


def test_idempotent_and_reversible():
    model = make_model()
    before = everything(model)
    embedding, parameter = model.get_input_embeddings(), model.get_input_embeddings().weight
    keys = list(model.state_dict())
    handle = apply_neftune(model, 5.0)
    assert apply_neftune(model, 10.0) is handle and handle.noise_alpha == 10.0
    assert (
        model.get_input_embeddings() is embedding
        and embedding.weight is parameter
        and isinstance(embedding, nn.Embedding)
    )
    assert list(model.state_dict()) == keys and model.lm_head.weight is not None
    with pytest.raises(ValueError, match="finite and >= 0, got -1.0"):
        handle.noise_alpha = -1.0
    assert handle.noise_alpha == 10.0
    handle.remove()
    handle.remove()
    assert everything(model) == before
    with pytest.raises(RuntimeError, match="was removed: call apply_neftune again"):
        handle.stats()
    with pytest.raises(KeyError, match="crash"), apply_neftune(model, 5.0):
        assert everything(model) != before
        raise KeyError("crash")
    assert everything(model) == before
    ids, mask = ragged()
    with apply_neftune(model, 5.0), pytest.raises(IndexError, match="out of range|must lie in"):
        model(ids + VOCAB, attention_mask=mask)
    assert everything(model) == before


def test_copies_and_saves(tmp_path):
    model = make_model()
    ids, mask = ragged()
    handle = apply_neftune(model, 5.0)
    model(ids, mask)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        torch.manual_seed(1)
        out = embedding_output(twin, input_ids=ids, attention_mask=mask)
        assert torch.equal(
            out,
            noisy_embedding(
                ids,
                twin.get_input_embeddings().weight,
                5.0,
                attention_mask=mask,
                seed=drawn_after(1),
            ),
        )
        again = apply_neftune(twin, 2.0)
        assert again is not handle and handle.noise_alpha == 5.0
        torch.manual_seed(1)
        out = embedding_output(twin, input_ids=ids, attention_mask=mask)
        assert torch.equal(
            out,
            noisy_embedding(
                ids,
                twin.get_input_embeddings().weight,
                2.0,
                attention_mask=mask,
                seed=drawn_after(1),
            ),
        )
        again.remove()
        assert everything(twin) == everything(make_model())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.get_input_embeddings()) is nn.Embedding
    assert all(
        torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items()
    )


def test_resize_and_tie():
    model = make_model()
    handle = apply_neftune(model, 5.0)
    ids, mask = ragged()
    model.resize_token_embeddings(VOCAB + 8)
    assert model.get_input_embeddings().num_embeddings == VOCAB + 8
    torch.manual_seed(1)
    out = embedding_output(model, input_ids=ids + 8, attention_mask=mask)
    assert torch.equal(
        out,
        noisy_embedding(
            ids + 8,
            model.get_input_embeddings().weight,
            5.0,
            attention_mask=mask,
            seed=drawn_after(1),
        ),
    )
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    handle.remove()
    module = NEFTuneEmbedding.from_embedding(model.get_input_embeddings())
    model.set_input_embeddings(module)
    model.resize_token_embeddings(VOCAB)
    assert model.get_input_embeddings().num_embeddings == VOCAB


def test_what_cannot_be_noised_is_refused():
    class NoGetter(nn.Module):
        def __init__(self, embed):
            super().__init__()
            self.embed = embed

        def forward(self, ids):
            return self.embed(ids)

    with pytest.raises(
        ValueError, match=r'NoGetter has no get_input_embeddings\(\).*embedding="path.to.embed"'
    ):
        apply_neftune(NoGetter(nn.Embedding(5, 4)))

    class NoneGetter(NoGetter):
        def get_input_embeddings(self):
            return None

    with pytest.raises(
        ValueError,
        match=r"NoneGetter has no get_input_embeddings\(\), or it returns "
        r'None.*embedding="path.to.embed"',
    ):
        apply_neftune(NoneGetter(nn.Embedding(5, 4)))
    with pytest.raises(ValueError, match="embedding='nowhere' names no module of NoGetter"):
        apply_neftune(NoGetter(nn.Embedding(5, 4)), embedding="nowhere")
    with pytest.raises(
        ValueError, match="must be an nn.Embedding, got torch.nn.modules.linear.Linear"
    ):
        apply_neftune(NoGetter(nn.Linear(5, 4)), embedding="embed")
    with pytest.raises(ValueError, match="is a NEFTuneEmbedding and adds noise itself"):
        apply_neftune(NoGetter(NEFTuneEmbedding(5, 4)), embedding="embed")
    with pytest.raises(ValueError, match="not a part of the model"):
        apply_neftune(NoGetter(nn.Embedding(5, 4)), embedding=nn.Embedding(5, 4))
    patched = NoGetter(nn.Embedding(5, 4))
    patched.embed.forward = lambda ids: ids
    with pytest.raises(ValueError, match="fused=True.*a forward of its own is on the instance"):
        apply_neftune(patched, embedding="embed", fused=True)
    for bad, message in (
        ({"noise_alpha": -1.0}, "got -1.0"),
        ({"replica": 2**32}, "got 4294967296"),
        ({"backend": "tpu"}, "got 'tpu'"),
    ):
        model = NoGetter(nn.Embedding(5, 4))
        with pytest.raises(ValueError, match=message):
            apply_neftune(model, embedding="embed", **bad)
        assert type(model.embed) is nn.Embedding


def test_stream_is_refused_with_its_new_name():
    model = make_model()
    with pytest.raises(TypeError, match=r"apply_neftune\(\) takes no stream=: .* is replica="):
        apply_neftune(model, 5.0, stream=0)
    assert type(model.get_input_embeddings()) is nn.Embedding, "noised all the same"
    with pytest.raises(TypeError, match=r"apply_neftune.*unexpected keyword argument 'replicas'"):
        apply_neftune(model, 5.0, replicas=0)


def test_own_module_by_path_and_object():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"embed": nn.Embedding(20, 16, padding_idx=0)})

        def forward(self, tokens, attention_mask=None):
            return self.inner["embed"](tokens)

    tokens = torch.tensor([[3, 4, 0, 0], [5, 6, 7, 8]])
    for name in ("inner.embed", None):
        model = Own()
        embed = model.inner["embed"]
        handle = apply_neftune(model, 5.0, embedding=name or embed, replica=3)
        torch.manual_seed(1)
        out = model(tokens)
        expected = noisy_embedding(
            tokens, embed.weight, 5.0, padding_idx=0, seed=drawn_after(1), replica=3
        )
        assert torch.equal(out, expected)
        handle.remove()
        assert type(embed) is nn.Embedding


def test_transformers_own_hook_beside_ours_is_refused():
    model = make_model()
    handle = apply_neftune(model, 5.0)
    hook = transformers.trainer.activate_neftune(model, 5.0)
    with pytest.raises(RuntimeError, match="two noises.*neftune_noise_alpha=None"):
        model(ragged()[0])
    hook.remove()  # leaves its attribute, as Unsloth sets it without any hook: no second noise
    assert model.get_input_embeddings().neftune_noise_alpha == 5.0
    model(ragged()[0])
    assert handle.stats()["calls"] == 1


def test_handle_keeps_no_model_alive():
    model = make_model()
    handle = apply_neftune(model, 5.0)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    handle.remove()


def test_replica_follows_the_process_group(tmp_path, monkeypatch):
    model = make_model()
    ids, mask = ragged()
    apply_neftune(model, 5.0)
    weight = model.get_input_embeddings().weight
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        for rank in (0, 3):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            torch.manual_seed(1)
            out = embedding_output(model, input_ids=ids, attention_mask=mask)
            assert torch.equal(
                out,
                noisy_embedding(
                    ids, weight, 5.0, attention_mask=mask, seed=drawn_after(1), replica=rank
                ),
            )
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_model_draws_the_eager_noise_in_one_graph():
    model = make_model()
    ids, mask = ragged()
    handle = apply_neftune(model, 5.0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed, alpha in ((0, 5.0), (1, 5.0), (2, 9.0)):
        handle.noise_alpha = alpha
        torch.manual_seed(seed)
        expected = model(input_ids=ids, attention_mask=mask).logits
        torch.manual_seed(seed)
        assert torch.equal(compiled(input_ids=ids, attention_mask=mask).logits, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def lengths_seen(handle):
    stats = handle.stats()
    return stats["length_min"], stats["length_max"]


def test_masks_reach_the_embedding_whatever_the_ids_are_called():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, HIDDEN)

        def forward(
            this, tokens, attention_mask=None
        ):  # positional arguments must not shift with the name of self
            return this.embed(tokens)

    ids, mask = ragged()
    model = Tokens()
    handle = apply_neftune(model, 5.0, embedding="embed")
    for call in (
        lambda: model(ids, attention_mask=mask),
        lambda: model(ids, mask),
        lambda: model(tokens=ids, attention_mask=mask),
    ):
        call()
        assert lengths_seen(handle) == (2, 8)


def test_applied_to_the_embedding_first_and_to_two_models_around_it():
    model, other = make_model(), make_model()
    other.model.embed_tokens = model.model.embed_tokens
    ids, mask = ragged()
    handle = apply_neftune(model.model.embed_tokens, 5.0, embedding=model.model.embed_tokens)
    for one in (model, other):
        assert apply_neftune(one, 5.0) is handle
        one(ids, mask)
        assert lengths_seen(handle) == (2, 8)
    handle.remove()
    assert not model.model._forward_pre_hooks and not other.model._forward_pre_hooks


def test_a_model_that_calls_itself_keeps_the_outer_mask():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, HIDDEN)

        def forward(self, input_ids, attention_mask=None, again=True):
            if again:
                self(input_ids[:, :3], attention_mask[:, :3], again=False)
            return self.embed(input_ids)

    ids, mask = ragged()
    model = Twice()
    handle = apply_neftune(model, 5.0, embedding="embed")
    model(ids, mask)
    assert handle.stats()["calls"] == 2 and lengths_seen(handle) == (2, 8)


def test_forwards_without_the_noise_they_should_have_are_loud():
    class Bypassed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, HIDDEN)

        def forward(self, input_ids, attention_mask=None):
            return F.embedding(input_ids, self.embed.weight)

    ids, mask = ragged()
    model = Bypassed()
    apply_neftune(model, 5.0, embedding="embed")
    with pytest.warns(UserWarning, match="ended without NEFTune noise.*Call apply_neftune again"):
        model(ids, mask)
    model = make_model()
    apply_neftune(model, 5.0)
    model.model.embed_tokens._is_replica = True  # what nn.DataParallel marks its replicas with
    with pytest.raises(RuntimeError, match="DataParallel.*replica="):
        model(ids, mask)


def test_two_noises_are_refused_behind_wrappers_and_on_the_module():
    ids, mask = ragged()
    model = peft.get_peft_model(
        make_model(), peft.LoraConfig(target_modules=["q_proj", "embed_tokens"])
    )
    apply_neftune(model, 5.0)
    transformers.trainer.activate_neftune(model, 5.0)
    with pytest.raises(RuntimeError, match="two noises"):
        model.train()(input_ids=ids, attention_mask=mask)
    module = NEFTuneEmbedding(VOCAB, HIDDEN)
    module.neftune_noise_alpha = 5.0
    module(ids)
    hook = transformers.integrations.neftune.neftune_post_forward_hook
    module.register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="two noises"):
        module(ids)
    with pytest.raises(TypeError, match="is a NEFTuneEmbedding already"):
        NEFTuneEmbedding.from_embedding(module)


def test_reentrant_checkpoint_of_the_whole_model():
    ids, mask = ragged()

    def step(model, **options):
        def segment(scale):
            return model(ids, mask).logits.sum() * scale

        torch.manual_seed(5)
        torch.utils.checkpoint.checkpoint(
            segment, torch.ones((), requires_grad=True), **options
        ).backward()

    model = make_model()
    handle = apply_neftune(model, 5.0)
    with pytest.raises(RuntimeError, match="noise_without_grad=True"):
        step(model, use_reentrant=True)
    model.zero_grad()
    step(model, use_reentrant=False)
    expected = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    assert apply_neftune(model, 5.0, noise_without_grad=True) is handle
    step(model, use_reentrant=True)
    assert torch.equal(model.model.embed_tokens.weight.grad, expected)


def test_checkpoint_inside_the_forward_recomputes_what_its_first_pass_had():
    """The recomputation runs outside the model's forward, where nobody tells it of the mask."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, HIDDEN)

        def forward(self, input_ids, attention_mask=None, **options):
            def segment():
                return self.embed(input_ids).square()

            if not options:
                return segment()
            return torch.utils.checkpoint.checkpoint(segment, use_reentrant=False, **options)

    ids, mask = ragged()
    model = Inner()
    apply_neftune(model, 5.0, embedding="embed")
    gradients = []
    for options in ({}, {"preserve_rng_state": True}):
        torch.manual_seed(3)
        model.zero_grad()
        model(ids, mask, **options).sum().backward()
        gradients.append(model.embed.weight.grad)
    assert torch.equal(*gradients)
    with pytest.raises(RuntimeError, match="preserve_rng_state=False.*keep the embedding out"):
        model(ids, mask, preserve_rng_state=False).sum().backward()


class Int8Weight(torch.Tensor):
    """A quantised weight as bitsandbytes and torchao make them: an integer dtype outside, floats
    out of its lookup.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.embedding:
            rows = F.embedding(args[0], args[1].as_subclass(torch.Tensor))
            return rows.to(torch.bfloat16) / 16
        return super().__torch_function__(func, types, args, kwargs or {})


def quantised_model():
    model = make_model()
    weight = torch.randint(
        -127, 128, (VOCAB, HIDDEN), dtype=torch.int8, generator=torch.Generator().manual_seed(0)
    )
    model.get_input_embeddings().weight = nn.Parameter(
        weight.as_subclass(Int8Weight), requires_grad=False
    )
    return model.bfloat16()


def test_quantised_weight_goes_through_its_own_lookup():
    model = quantised_model()
    ids, mask = ragged()
    plain = embedding_output(model.eval(), input_ids=ids, attention_mask=mask)
    handle = apply_neftune(model.train(), 5.0)
    seed = drawn_after(3)
    torch.manual_seed(3)
    noisy = embedding_output(model, input_ids=ids, attention_mask=mask)
    noise = neftune_noise(ids.shape, HIDDEN, 5.0, attention_mask=mask, seed=seed)
    assert torch.equal(noisy, (plain.float() + noise).bfloat16())
    assert handle.stats()["length_max"] == 8
    module = NEFTuneEmbedding(VOCAB, HIDDEN)
    module.weight = model.get_input_embeddings().weight
    assert torch.equal(module(ids, mask, seed=seed), noisy)


def test_remove_refuses_under_a_parametrisation():
    model = make_model()
    embedding = model.get_input_embeddings()
    handle = apply_neftune(model)
    nn.utils.parametrizations.weight_norm(embedding)
    ids, mask = ragged()
    with pytest.raises(RuntimeError, match="parametrised"):
        handle.remove()
    model(input_ids=ids, attention_mask=mask)
    assert handle.stats()["calls"] == 1  # nothing was undone by half
    nn.utils.parametrize.remove_parametrizations(embedding, "weight")
    handle.remove()
    assert type(embedding) is nn.Embedding


def test_remove_refuses_under_a_forward_put_on_the_embedding():
    model = make_model()
    embedding = model.get_input_embeddings()
    handle = apply_neftune(model)
    inner = embedding.forward
    embedding.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(RuntimeError, match="forward of its own"):
        handle.remove()
    del embedding.forward
    handle.remove()
    assert type(embedding) is nn.Embedding


def test_variants_reach_the_model():
    """distribution and equal_variance of apply_neftune, sign of the handle, a noise_mask from the
    model's arguments or from samples=.
    """
    ids, mask = ragged()
    model = make_model()
    weight = model.get_input_embeddings().weight
    handle = apply_neftune(model, 5.0, distribution="normal", equal_variance=False)
    torch.manual_seed(7)
    noisy = embedding_output(model, input_ids=ids, attention_mask=mask)
    given = {"attention_mask": mask, "seed": drawn_after(7)}
    assert torch.equal(
        noisy,
        noisy_embedding(ids, weight, 5.0, **given, distribution="normal", equal_variance=False),
    )
    assert handle.stats()["max_noise_ratio"] > 1
    assert apply_neftune(model, 5.0) is handle
    handle.sign = -1
    torch.manual_seed(7)
    assert torch.equal(
        embedding_output(model, input_ids=ids, attention_mask=mask),
        noisy_embedding(ids, weight, 5.0, **given, sign=-1),
    )
    with pytest.raises(ValueError, match="sign must be.* 1 or -1, got 0"):
        handle.sign = 0
    handle.remove()
    prompt = torch.zeros_like(mask)
    prompt[:, 2:7] = 1
    apply_neftune(
        model,
        5.0,
        samples=lambda arguments: {
            "attention_mask": arguments["attention_mask"],
            "noise_mask": prompt,
        },
    )
    torch.manual_seed(7)
    assert torch.equal(
        embedding_output(model, input_ids=ids, attention_mask=mask),
        noisy_embedding(ids, weight, 5.0, **given, noise_mask=prompt),
    )

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, HIDDEN)

        def forward(self, input_ids, attention_mask=None, noise_mask=None):
            return self.embed(input_ids)

    own = Own()
    handle = apply_neftune(own, 5.0, embedding="embed")
    with pytest.warns(
        UserWarning, match=r'noise_mask.*samples=\{"attention_mask": "attention_mask"'
    ):
        own(ids, mask, prompt)
    torch.manual_seed(7)
    assert torch.equal(
        own(ids, None, prompt),
        noisy_embedding(ids, own.embed.weight, 5.0, seed=given["seed"], noise_mask=prompt),
    )
    handle.samples = {"attention_mask": "attention_mask", "noise_mask": "noise_mask"}
    torch.manual_seed(7)
    assert torch.equal(
        own(ids, mask, prompt),
        noisy_embedding(ids, own.embed.weight, 5.0, **given, noise_mask=prompt),
    )
