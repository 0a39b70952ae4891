"""apply_neftune on every model family people fine-tune: the paper's noise, once, at the right
magnitude; eval untouched.
"""

import itertools
import warnings

import pytest
import torch
from tiny_models import make_llava
from torch import nn

from neftune_kernels import NEFTuneEmbedding, apply_neftune, neftune_noise, noisy_embedding
from neftune_kernels.integrations import places, running
from neftune_kernels.integrations.running import RUNNING

transformers = pytest.importorskip("transformers")

VOCAB, HIDDEN = 64, 32
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DECODERS = {
    "Llama": ("Llama", GROUPED),
    "Qwen2": ("Qwen2", GROUPED),
    "Qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "Mistral": ("Mistral", GROUPED),
    "GPT2": ("GPT2", {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4}),
    "GPT-NeoX": ("GPTNeoX", SMALL),
    "OPT": (
        "OPT",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "word_embed_proj_dim": HIDDEN,
        },
    ),
    "Phi": ("Phi", SMALL),
    "Gemma": ("Gemma", {**GROUPED, "head_dim": 8}),
    "Gemma2": ("Gemma2", {**GROUPED, "head_dim": 8}),
    "Gemma3": ("Gemma3Text", {**GROUPED, "head_dim": 8}),
    "Mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4}),
    "Qwen2-MoE": (
        "Qwen2Moe",
        {**GROUPED, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "Qwen3-MoE": ("Qwen3Moe", {**GROUPED, **EXPERTS, "num_experts": 4, "head_dim": 8}),
    "Granite": ("Granite", {**GROUPED, "embedding_multiplier": 12.0}),
}
ENCODERS = {
    "BERT": ("Bert", SMALL),
    "RoBERTa": ("Roberta", {**SMALL, "pad_token_id": 1, "max_position_embeddings": 40}),
}
T5_LIKE = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART_LIKE = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "scale_embedding": True,
    "max_position_embeddings": 64,
}
ENCODER_DECODERS = {
    "T5": ("T5", T5_LIKE),
    "MT5": ("MT5", T5_LIKE),
    "UMT5": ("UMT5", T5_LIKE),
    "LongT5": ("LongT5", T5_LIKE),
    "SwitchTransformers": ("SwitchTransformers", {**T5_LIKE, "num_experts": 2}),
    "BART": ("Bart", BART_LIKE),
    "MBart": ("MBart", BART_LIKE),
    "Pegasus": ("Pegasus", BART_LIKE),
    "M2M100": ("M2M100", BART_LIKE),
    "Blenderbot": ("Blenderbot", BART_LIKE),
    "PLBart": ("PLBart", BART_LIKE),
    "LED": (
        "LED",
        {
            **{k: v for k, v in BART_LIKE.items() if k != "scale_embedding"},
            "attention_window": 6,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
    ),
    "Marian": ("Marian", BART_LIKE),
}


def build(family, table, suffix):
    name, options = table[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    return (
        getattr(transformers, name.removesuffix("Text") + suffix)._from_config(config)
        if not name.endswith("Text")
        else transformers.AutoModelForCausalLM.from_config(config)
    )


def decoder_only(family):
    return build(family, DECODERS, "LMHeadModel" if family == "GPT2" else "ForCausalLM")


def batch(padding):
    ids = torch.randint(3, VOCAB, (3, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 8, dtype=torch.int64)
    if padding == "right":
        mask[0, 5:], mask[1, 2:] = 0, 0
    elif padding == "left":
        mask[0, :3], mask[1, :6] = 0, 0
    elif padding == "holes":
        mask[0, 2], mask[1, ::3] = 0, 0
    return ids, mask


class Recorded:
    """Outputs of the given modules during a forward, in order."""

    def __init__(self, *modules):
        self.outputs = [[] for _ in modules]
        self.hooks = [
            module.register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(output.detach().clone())
            )
            for module, seen in zip(modules, self.outputs, strict=True)
        ]

    def __enter__(self):
        return self.outputs

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def first_hidden(model, **inputs):
    """What the first layer is given; `output_hidden_states` hands out the same tensor."""
    return model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[0].detach()


def last_seed(module):
    return module._neftune.last.noise.seed


@pytest.mark.parametrize("padding", ["right", "left", "holes", "none"])
@pytest.mark.parametrize("family", DECODERS)
def test_decoders(family, padding, proves):
    """The first layer of a decoder gets embedding (scaled as the model scales it) + alpha/sqrt(L d)
    u, with its own L in every row.
    """
    model = decoder_only(family).train()
    for module in model.modules():  # dropout between embedding and first layer would hide the bits
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids, mask = batch(padding)
    given = {} if padding == "none" else {"attention_mask": mask}
    clean = first_hidden(model.eval(), input_ids=ids, **given)
    handle = apply_neftune(model, 5.0)
    assert torch.equal(first_hidden(model, input_ids=ids, **given), clean), (
        "eval stays what it was, bit for bit"
    )
    embedding = model.get_input_embeddings()
    noisy = first_hidden(model.train(), input_ids=ids, **given)
    noise = neftune_noise(ids.shape, HIDDEN, 5.0, attention_mask=mask, seed=last_seed(embedding))
    if family in ("GPT2", "OPT"):  # they add learned positions after the embedding
        with Recorded(embedding) as (seen,):
            model.eval()(input_ids=ids, **given)
            model.train()(input_ids=ids, **given)
        clean, noisy = seen
        noise = neftune_noise(
            ids.shape, HIDDEN, 5.0, attention_mask=mask, seed=last_seed(embedding)
        )
    if family == "Granite":  # multiplies by 12 afterwards: spec 3's one rounding
        noise = neftune_noise(
            ids.shape, HIDDEN, 5.0 / 12, attention_mask=mask, seed=last_seed(embedding)
        )
        assert torch.equal(noisy, (nn.functional.embedding(ids, embedding.weight) + noise) * 12.0)
    else:
        assert torch.equal(noisy, clean + noise)
    assert handle.stats()["calls"] == (2 if family in ("GPT2", "OPT") else 1)
    handle.remove()
    assert torch.equal(
        first_hidden(model.eval(), input_ids=ids, **given),
        first_hidden(decoder_only(family).eval(), input_ids=ids, **given),
    )
    proves(family, "forward", f"padding: {padding}")


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family, proves):
    model = build(family, ENCODERS, "ForMaskedLM").train()
    ids, mask = batch("right")
    embedding = model.get_input_embeddings()
    clean = embedding(ids)
    handle = apply_neftune(model, 5.0)
    for given, real in (({"attention_mask": mask}, mask), ({}, torch.ones_like(mask))):
        with Recorded(embedding) as (seen,):
            model(input_ids=ids, **given)
        assert torch.equal(
            seen[0],
            clean
            + neftune_noise(ids.shape, HIDDEN, 5.0, attention_mask=real, seed=last_seed(embedding)),
        )
    padded = ids.masked_fill(mask == 0, embedding.padding_idx)
    with Recorded(embedding) as (seen,):
        model(input_ids=padded)
    expected = neftune_noise(ids.shape, HIDDEN, 5.0, attention_mask=mask, seed=last_seed(embedding))
    assert torch.equal(
        seen[0], torch.nn.functional.embedding(padded, embedding.weight) + expected
    ), "padding_idx tells padding where nothing else does"
    assert handle.stats()["calls"] == 3
    proves(family, "forward", "padding: right")


def encoder_decoder(family):
    return build(
        family, ENCODER_DECODERS, "MTModel" if family == "Marian" else "ForConditionalGeneration"
    ).train()


def labels_and_ids(model):
    """Labels padded with -100 and the decoder's own shifted ids with the real tokens of each row:
    labels and the start token.
    """
    labels = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(3))
    labels[0, 4:], labels[1, 1:] = -100, -100
    real = torch.ones(3, 6, dtype=torch.int64)
    real[0, 5:], real[1, 2:] = 0, 0
    return labels, real


def shifted_with_noise(labels, real, embedding):
    """What a decoder that makes its ids of labels looks up: start token 2, padding 1."""
    ids = labels.clamp(min=1).where(labels >= 0, 1).roll(1, 1)
    ids[:, 0] = 2
    seed = last_seed(embedding)
    noise = neftune_noise(real.shape, HIDDEN, 5.0, attention_mask=real, seed=seed)
    return nn.functional.embedding(ids, embedding.weight) + noise


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoders(family, proves):
    """Encoder and decoder tokens get noise, each once and each with its own lengths; `shared`,
    which transformers hooks, never runs.
    """
    model = encoder_decoder(family)
    ids, mask = batch("right")
    labels, real = labels_and_ids(model)
    encoder, decoder = (
        model.get_encoder().get_input_embeddings(),
        model.get_decoder().get_input_embeddings(),
    )
    scale = {
        stack: getattr(stack, "embed_scale", 1.0) if family in ("Pegasus", "Marian") else 1.0
        for stack in (model.get_encoder(), model.get_decoder())
    }
    eval_logits = model.eval()(input_ids=ids, attention_mask=mask, labels=labels).logits
    handle = apply_neftune(model, 5.0)
    assert torch.equal(model(input_ids=ids, attention_mask=mask, labels=labels).logits, eval_logits)
    model.train()
    assert handle.stats()["calls"] == 0
    with Recorded(encoder, decoder) as (encoded, decoded):
        model(input_ids=ids, attention_mask=mask, labels=labels)
    stats = handle.stats()
    assert (stats["length_min"], stats["length_max"], stats["samples"]) == (2, 8, 6)
    assert stats["calls"] == 2, "LED looks up its window's padding apart, without noise"
    seeds = [last_seed(encoder), last_seed(decoder)]
    handle.noise_alpha = 0
    with Recorded(encoder, decoder) as (encoded_clean, decoded_clean):
        model(input_ids=ids, attention_mask=mask, labels=labels)
    assert len(decoded) == 1
    alpha = 5.0 / scale[model.get_encoder()]
    noise = neftune_noise(mask.shape, HIDDEN, alpha, attention_mask=mask, seed=seeds[0])
    assert all(torch.equal(*pair) for pair in zip(encoded[1:], encoded_clean[1:], strict=True)), (
        "the padding of LED's window"
    )
    assert len(encoded) == (2 if family == "LED" else 1)
    assert torch.equal(encoded[0], encoded_clean[0] + noise)
    alpha = 5.0 / scale[model.get_decoder()]
    noise = neftune_noise(real.shape, HIDDEN, alpha, attention_mask=real, seed=seeds[1])
    assert torch.equal(decoded[0], decoded_clean[0] + noise)
    assert not seeds[0].equal(seeds[1])
    handle.noise_alpha = 5.0
    own = torch.ones_like(real)
    own[2, :2] = 0
    model(
        input_ids=ids,
        attention_mask=mask,
        decoder_input_ids=labels.clamp(min=3),
        decoder_attention_mask=own,
    )
    assert decoder._neftune.last.samples.attention_mask.equal(own)
    handle.remove()
    assert torch.equal(
        model.eval()(input_ids=ids, attention_mask=mask, labels=labels).logits, eval_logits
    )
    proves(family, "forward", "encoder and decoder")


def test_fsmt(proves):
    """Its decoder is a plain module whose mask has a name and sense of its own: its ids up to the
    last that is not padding are real.
    """
    torch.manual_seed(0)
    options = {k: v for k, v in BART_LIKE.items() if k != "vocab_size"}
    config = transformers.FSMTConfig(
        langs=["en", "de"], src_vocab_size=VOCAB, tgt_vocab_size=VOCAB, **options
    )
    model = transformers.FSMTForConditionalGeneration(config).train()
    ids, mask = batch("right")
    decoder_ids = ids.masked_fill(mask == 0, 1).flip(0)
    encoder, decoder = model.model.encoder.embed_tokens, model.model.decoder.embed_tokens
    handle = apply_neftune(model, 5.0)
    with Recorded(encoder, decoder) as outputs:
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids)
    for output, module, tokens, real in zip(
        outputs, (encoder, decoder), (ids, decoder_ids), (mask, mask.flip(0)), strict=True
    ):
        alpha = 5.0 / HIDDEN**0.5
        noise = neftune_noise(ids.shape, HIDDEN, alpha, attention_mask=real, seed=last_seed(module))
        assert torch.equal(output[0], nn.functional.embedding(tokens, module.weight) + noise)
    assert handle.stats()["calls"] == 2
    with Recorded(decoder) as (output,):
        model(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=ids.flip(1),
            decoder_attention_mask=mask.flip(0),
        )
    own = {"attention_mask": mask.flip(0), "seed": last_seed(decoder)}
    noise = neftune_noise(ids.shape, HIDDEN, 5.0 / HIDDEN**0.5, **own)
    clean = nn.functional.embedding(ids.flip(1), decoder.weight)
    assert torch.equal(output[0], clean + noise), "its mask, though it takes any argument"
    proves("FSMT", "forward", "encoder and decoder")


def test_encoder_decoder_after_resizing():
    """resize_token_embeddings puts one module in both places: still each its own mask."""
    model = encoder_decoder("BART")
    handle = apply_neftune(model, 5.0)
    model.resize_token_embeddings(VOCAB + 8)
    ids, mask = batch("right")
    labels, _ = labels_and_ids(model)
    model(input_ids=ids, attention_mask=mask, labels=labels)
    assert handle.stats()["calls"] == 2
    assert "_neftune" in vars(model.get_decoder().get_input_embeddings())


def test_whisper(proves):
    """Speech has no token embedding: noise on the decoder's tokens alone."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    model = transformers.WhisperForConditionalGeneration(config).train()
    features = torch.randn(3, 8, 32)
    labels, real = labels_and_ids(model)
    decoder = model.get_decoder().embed_tokens
    handle = apply_neftune(model, 5.0)
    with Recorded(decoder) as (seen,):
        model(input_features=features, labels=labels)
    assert torch.equal(seen[0], shifted_with_noise(labels, real, decoder))
    assert handle.stats()["calls"] == 1
    proves("Whisper", "forward", "encoder and decoder")


def test_llava(proves):
    """Image placeholders are tokens of the sequence and count in L; their embeddings, noise and
    all, are replaced by the image's.
    """
    model = make_llava(transformers, transformers.LlamaConfig(**GROUPED))
    ids = torch.randint(4, VOCAB, (2, 10), generator=torch.Generator().manual_seed(0))
    ids[:, 2:6] = 3  # four patches
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    embedding = model.get_input_embeddings()
    handle = apply_neftune(model, 5.0)
    with Recorded(embedding) as (seen,):
        model(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(2, 3, 8, 8))
    noise = neftune_noise(ids.shape, HIDDEN, 5.0, attention_mask=mask, seed=last_seed(embedding))
    assert torch.equal(seen[0], nn.functional.embedding(ids, embedding.weight) + noise)
    stats = handle.stats()
    assert (stats["calls"], stats["length_min"], stats["length_max"]) == (1, 8, 10)
    handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())
    proves("Llava", "forward", "padding: right")


WINDOWED = {
    "Longformer": ("Longformer", {**SMALL, "attention_window": [6, 6], "pad_token_id": 1}),
    "BigBird": ("BigBird", {**SMALL, "block_size": 6, "num_random_blocks": 1}),
}


@pytest.fixture
def values_are_not_asked(monkeypatch):
    """As on an accelerator, where a look at a value would wait for it."""

    monkeypatch.setattr(places, "_by_value", lambda input, ids: None)
    monkeypatch.setattr(running, "values_cost_nothing", lambda input: False)


@pytest.mark.parametrize("family", ["Longformer", "BigBird", "LED"])
def test_padding_to_a_window_where_values_are_not_asked(family, values_are_not_asked):
    """The mask is the forward's, padded: not what the ids say of padding."""
    if family == "LED":
        model = encoder_decoder(family)
        model.config.attention_window = [6, 6]
        call = {"labels": labels_and_ids(model)[0]}
        embedding = model.get_encoder().get_input_embeddings()
    else:
        torch.manual_seed(0)
        name, sizes = WINDOWED[family]
        config = getattr(transformers, f"{name}Config")(**sizes)
        config.attention_type = "block_sparse"
        model = getattr(transformers, f"{name}Model")(config).train()
        call, embedding = {}, model.get_input_embeddings()
    ids, mask = batch("right")
    ids, mask = torch.cat((ids,) * 6, 1)[:, :44], torch.cat((mask,) * 6, 1)[:, :44]
    handle = apply_neftune(model, 5.0)
    with Recorded(embedding) as (seen,), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids, attention_mask=mask, **call)
        handle.noise_alpha = 0
        model(input_ids=ids, attention_mask=mask, **call)
    assert len(seen) == (4 if family == "LED" else 2)
    if family == "LED":  # it looks the window's padding up apart
        assert torch.equal(seen.pop(1), seen.pop(-1))
    noisy, clean = seen
    behind = noisy.shape[1] - 44
    assert behind == (0 if family == "LED" else 4)
    own = nn.functional.pad(mask, (0, behind))
    noise = neftune_noise(own.shape, HIDDEN, 5.0, attention_mask=own, seed=last_seed(embedding))
    assert torch.equal(noisy, clean + noise)


def test_florence2(proves):
    """A whole BART is its decoder. The outer model embeds the encoder's tokens in a table of its
    own, the decoder those that its labels are shifted to.
    """
    sizes = {"d_model": HIDDEN, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    tokens = {"vocab_size": VOCAB, "pad_token_id": 1, "decoder_start_token_id": 2}
    text = transformers.BartConfig(**sizes, **heads, **tokens, scale_embedding=True)
    vision = {
        "embed_dim": [8, 16],
        "num_heads": [1, 2],
        "num_groups": [1, 2],
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "projection_dim": HIDDEN,
    }
    torch.manual_seed(0)
    config = transformers.Florence2Config(text_config=text, vision_config=vision, image_token_id=3)
    model = transformers.Florence2ForConditionalGeneration(config).train()
    inner = model.model.language_model
    ids, mask = batch("right")
    labels, real = labels_and_ids(model)
    handle = apply_neftune(model, 5.0)
    with (
        Recorded(inner.shared, inner.decoder.embed_tokens) as (encoded, decoded),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        model(input_ids=ids, attention_mask=mask, labels=labels)
        handle.noise_alpha = 0
        model(input_ids=ids, attention_mask=mask, labels=labels)
    for module, (noisy, clean), own in (
        (inner.shared, encoded, mask),
        (inner.decoder.embed_tokens, decoded, real),
    ):
        noise = neftune_noise(own.shape, HIDDEN, 5.0, attention_mask=own, seed=last_seed(module))
        assert torch.equal(noisy, clean + noise)
    assert handle.stats()["calls"] == 2
    proves("Florence-2", "forward", "encoder and decoder")


@pytest.mark.parametrize("inner_pad", [None, 3])
def test_vision_encoder_decoder(inner_pad, proves):
    """It shifts labels with the pad_token_id of its own config, not with its decoder's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 4}
    image = {"intermediate_size": 48, "image_size": 8, "patch_size": 4}
    decoder = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=1, n_head=4, pad_token_id=inner_pad
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**sizes, **image), decoder
    )
    config.pad_token_id, config.decoder_start_token_id = 1, 2
    model = transformers.VisionEncoderDecoderModel(config=config).train()
    labels, real = labels_and_ids(model)
    labels[1, 0] = 3  # a token to its config, padding to its decoder's
    embedding = model.decoder.get_input_embeddings()
    handle = apply_neftune(model, 5.0)
    with Recorded(embedding) as (seen,), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(pixel_values=torch.randn(len(labels), 3, 8, 8), labels=labels)
    assert torch.equal(seen[0], shifted_with_noise(labels, real, embedding))
    assert handle.stats()["calls"] == 1
    proves("VisionEncoderDecoder", "forward", "encoder and decoder")


class Own(nn.Module):
    """Somebody's own code: other names, the embedding deep inside."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"embed": nn.Embedding(VOCAB, HIDDEN)})

    def forward(self, tokens, keep):
        return self.parts["embed"](tokens)


def test_own_module_with_a_callable():
    ids, mask = batch("right")
    for told in (
        lambda given: given["keep"],
        lambda given: {"attention_mask": given["keep"]},
        lambda given: {"lengths": given["keep"].sum(1)},
    ):
        model = Own()
        handle = apply_neftune(model, 5.0, embedding="parts.embed", samples=told)
        out = model(ids, keep=mask)
        noise = neftune_noise(
            ids.shape, HIDDEN, 5.0, attention_mask=mask, seed=last_seed(model.parts["embed"])
        )
        assert torch.equal(out, nn.functional.embedding(ids, model.parts["embed"].weight) + noise)
        handle.remove()
        assert type(model.parts["embed"]) is nn.Embedding and not model._forward_pre_hooks


def test_shards_of_a_sequence_through_apply_neftune():
    """A context-parallel split that samples= explains: global lengths, each token's place, one
    replica; shards together are the whole.
    """
    model = decoder_only("Llama").train()
    ids, mask = batch("right")
    lengths = mask.sum(1)
    whole = apply_neftune(model, 5.0)
    torch.manual_seed(3)
    with Recorded(model.get_input_embeddings()) as (seen,):
        model(input_ids=ids, attention_mask=mask)
    whole.remove()
    apply_neftune(
        model,
        5.0,
        replica=0,
        samples=lambda given: {"lengths": lengths, "position_ids": given["position_ids"]},
    )
    shards = []
    for columns in (torch.tensor([0, 1, 6, 7]), torch.tensor([2, 3, 4, 5])):  # zig-zag
        torch.manual_seed(3)
        with Recorded(model.get_input_embeddings()) as (part,):
            model(input_ids=ids[:, columns], position_ids=columns.expand(3, 4))
        shards.append(part[0])
    assert torch.equal(torch.cat(shards, 1)[:, torch.tensor([0, 1, 4, 5, 6, 7, 2, 3])], seen[0])


def test_own_module_that_tells_nothing_warns_and_names_the_remedy():
    ids, mask = batch("right")
    model = Own()
    apply_neftune(model, embedding="parts.embed")
    paste = (
        r'keep \(3, 8\).*samples=\{"attention_mask": "keep"\}.*"key_padding_mask".*if True means'
    )
    with pytest.warns(UserWarning, match="takes an attention_mask.*" + paste):
        model(ids, mask)
    model = Own()
    apply_neftune(model, embedding="parts.embed", samples=lambda given: 5)
    with pytest.raises(
        TypeError, match="must return an attention_mask tensor, a dictionary or None, got int"
    ):
        model(ids, mask)
    model = Own()
    apply_neftune(model, embedding="parts.embed", samples=lambda given: {"mask": mask})
    with pytest.raises(ValueError, match="may return attention_mask, lengths.*got mask"):
        model(ids, mask)
    with pytest.raises(TypeError, match="samples must be callable"):
        apply_neftune(Own(), embedding="parts.embed", samples=mask)


def test_own_module_by_hand():
    """Without apply_neftune: the module itself, as docs/how-to/own-loop.md shows it."""
    embedding = NEFTuneEmbedding(VOCAB, HIDDEN, noise_alpha=5.0)
    ids, mask = batch("left")
    noise = neftune_noise(ids.shape, HIDDEN, 5.0, attention_mask=mask, seed=3)
    assert torch.equal(
        embedding(ids, mask, seed=3), nn.functional.embedding(ids, embedding.weight) + noise
    )


@pytest.mark.parametrize("version", ["2", "2_5"])
def test_qwen_vl(version, proves):
    """Multimodal rotary positions: without them, and with the model's own three axes given."""
    torch.manual_seed(0)
    name = f"Qwen{version}VL"
    sizes = {
        "hidden_size": 32,
        "num_heads": 2,
        "depth": 1,
        "patch_size": 4,
        "spatial_merge_size": 1,
        "temporal_patch_size": 1,
        "in_channels": 3,
    }
    vision = (
        {**sizes, "embed_dim": 32}
        if version == "2"
        else {
            **sizes,
            "out_hidden_size": HIDDEN,
            "intermediate_size": 32,
            "fullatt_block_indexes": [0],
        }
    )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "type": "default"}
    text = {**GROUPED, "rope_scaling": rope, "rope_parameters": {**rope, "rope_theta": 10000.0}}
    config = getattr(transformers, f"Qwen{version}VLConfig".replace("2_5", "2_5_"))(
        text_config=text, vision_config=vision, image_token_id=3
    )
    model = getattr(transformers, f"{name.replace('2_5', '2_5_')}ForConditionalGeneration")(
        config
    ).train()
    ids, mask = batch("right")
    ids = ids.clamp(min=8)
    handle = apply_neftune(model, 5.0)
    embedding = model.get_input_embeddings()
    positions = torch.arange(8).expand(3, 3, 8).clone()
    for given in ({}, {"position_ids": positions}):
        with Recorded(embedding) as (seen,):
            model(input_ids=ids, attention_mask=mask, **given)
        noise = neftune_noise(
            ids.shape, HIDDEN, 5.0, attention_mask=mask, seed=last_seed(embedding)
        )
        assert torch.equal(seen[0], nn.functional.embedding(ids, embedding.weight) + noise)
    assert handle.stats()["calls"] == 2
    proves(f"Qwen{version.replace('_', '.')}-VL", "forward", "padding: right")


@pytest.mark.parametrize("kind", ["EncoderModel", "ForTokenClassification"])
def test_encoder_of_t5_alone(kind, proves):
    """`shared` never runs here either, but the encoder's embedding is tied to it."""
    torch.manual_seed(0)
    model = getattr(transformers, f"T5{kind}")(transformers.T5Config(**T5_LIKE)).train()
    ids, mask = batch("right")
    handle = apply_neftune(model, 5.0)
    model(input_ids=ids, attention_mask=mask)
    stats = handle.stats()
    assert (stats["calls"], stats["length_min"], stats["length_max"]) == (1, 2, 8)
    handle.remove()
    assert not any("_neftune" in vars(module) for module in model.modules())
    proves("T5 encoder", "forward", "padding: right")


def test_a_mask_that_the_outer_model_keeps_to_itself():
    """RwkvForCausalLM takes an attention_mask and does not hand it on."""
    torch.manual_seed(0)
    config = transformers.RwkvConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        attention_hidden_size=HIDDEN,
        intermediate_size=32,
    )
    model = transformers.RwkvForCausalLM(config).train()
    ids, mask = batch("right")
    handle = apply_neftune(model, 5.0)
    model(input_ids=ids, attention_mask=mask)
    assert (handle.stats()["length_min"], handle.stats()["length_max"]) == (2, 8)


def test_models_that_look_up_time_first():
    """XLNet, and one of one's own: samples are the columns there."""
    torch.manual_seed(0)
    config = transformers.XLNetConfig(
        vocab_size=VOCAB, d_model=HIDDEN, n_layer=1, n_head=2, d_inner=32, dropout=0.0
    )

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, HIDDEN)

        def get_input_embeddings(self):
            return self.embed

        def forward(self, input_ids, attention_mask=None):
            return self.embed(input_ids.permute(1, 0))

    ids, mask = batch("right")
    for model, given in itertools.product(
        (transformers.XLNetModel(config).train(), TimeFirst()), (mask, None)
    ):
        apply_neftune(model)
        embedding = model.get_input_embeddings()
        with Recorded(embedding) as (out,), warnings.catch_warnings():
            warnings.simplefilter("error")
            model(ids, attention_mask=given)
        expected = noisy_embedding(
            ids, embedding.weight, 5.0, attention_mask=given, seed=last_seed(embedding)
        )
        assert torch.equal(out[-1], expected.transpose(0, 1))  # others are a look at it


@pytest.mark.parametrize("then", ["remove", "forward", "wrap"])
def test_an_interrupted_forward_leaves_nothing_behind(then):
    """KeyboardInterrupt runs no forward hooks."""
    peft = pytest.importorskip("peft")
    model = decoder_only("Granite").train()
    ids, mask = batch("right")
    logits = model.eval()(input_ids=ids, attention_mask=mask).logits
    handle = apply_neftune(model.train(), 5.0)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=ids, attention_mask=mask)
    hook.remove()
    if then == "remove":
        handle.remove()
        assert not any("_neftune" in vars(module) for module in model.modules())
    elif then == "forward":
        noisy = first_hidden(model, input_ids=ids, attention_mask=mask)
        noise = neftune_noise(
            ids.shape,
            HIDDEN,
            5.0 / 12,
            attention_mask=mask,
            seed=last_seed(model.get_input_embeddings()),
        )
        embedded = nn.functional.embedding(ids, model.get_input_embeddings().weight)
        assert torch.equal(noisy, (embedded + noise) * 12.0)
        assert not RUNNING.forwards
    else:
        wrapped = peft.get_peft_model(
            model,
            peft.LoraConfig(
                target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}
            ),
        )
        calls = handle.stats()["calls"]
        wrapped.train()(input_ids=ids, attention_mask=mask)
        assert handle.stats()["calls"] == calls + 1
        return
    assert torch.equal(model.eval()(input_ids=ids, attention_mask=mask).logits, logits)
