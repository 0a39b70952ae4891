"""Packages that tell samples under names of their own, by their published signatures."""

import functools
import pathlib
import pickle
import re
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neftune_kernels import apply_neftune, neftune_noise, noisy_embedding
from neftune_kernels.integrations import places, running
from neftune_kernels.integrations.listening import Listener
from neftune_kernels.integrations.quirks import QUIRKS
from neftune_kernels.integrations.running import State

VOCAB, HIDDEN = 64, 32
IDS = torch.randint(1, VOCAB, (2, 8), generator=torch.Generator().manual_seed(2))
KEEP = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
NUMBERS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2], [1] * 5 + [2] * 3])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2]])


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)


def torchtune(self, tokens, *, mask=None, encoder_input=None, encoder_mask=None, input_pos=None):
    return self.embed(tokens)


def torchtitan(self, tokens, attention_masks=None, positions=None):
    return self.embed(tokens)


def olmo(self, input_ids, input_embeddings=None, attention_mask=None, doc_lens=None):
    return self.embed(input_ids)


def mpt(self, input_ids=None, past_key_values=None, attention_mask=None, sequence_id=None):
    return self.embed(input_ids)


def esmc(self, sequence_tokens=None, sequence_id=None):
    return self.embed(sequence_tokens)


def x_transformers(self, x, return_embeddings=False, mask=None, **kwargs):
    return self.embed(x)


def transformers(self, input_ids=None, attention_mask=None, global_attention_mask=None):
    return self.embed(input_ids)


LEFT = KEEP.flip(1)
CASES = [
    ("torchtune.modules.transformer", "TransformerDecoder", torchtune, {"input_pos": POSITIONS}, 0),
    ("torchtitan.models.llama3", "Transformer", torchtitan, {"positions": POSITIONS}, 0),
    ("torchtitan.models.common", "Decoder", torchtitan, {"positions": POSITIONS}, 0),
    ("olmo.model", "OLMo", olmo, {"doc_lens": torch.tensor([[3, 5], [5, 3]])}, 0),
    ("olmo_core.nn", "Transformer", olmo, {"doc_lens": torch.tensor([[3, 5], [5, 3]])}, 0),
    ("llmfoundry.models", "MPTModel", mpt, {"sequence_id": NUMBERS - 1}, 0),
    ("llmfoundry.models", "MPTModel", mpt, {"sequence_id": KEEP - 1}, KEEP),
    (
        "transformers_modules.mpt",
        "MPTModel",
        mpt,
        {"sequence_id": NUMBERS - 1, "attention_mask": KEEP},
        NUMBERS * KEEP,
    ),
    ("esm.models.esmc", "ESMC", esmc, {"sequence_id": KEEP.bool()}, KEEP),
    ("x_transformers.x_transformers", "TransformerWrapper", x_transformers, {"mask": KEEP}, KEEP),
    *(
        ("transformers.models", name, transformers, {"attention_mask": KEEP + LEFT}, KEEP | LEFT)
        for name in ("LongformerModel", "LEDEncoder", "LEDModel")
    ),
]


def built(module, name, forward):
    """A class whose forward says that it comes from that package."""

    own = type(forward)(
        forward.__code__, globals(), "forward", forward.__defaults__, forward.__closure__
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    own.__module__, own.__qualname__ = module, f"{name}.forward"
    torch.manual_seed(0)
    return type(name, (Base,), {"forward": own, "__module__": module})().train()


def called(model, ids, embedding="embed", **given):
    apply_neftune(model, 5.0, embedding=embedding)
    torch.manual_seed(7)
    out = model(ids, **given)
    torch.manual_seed(7)
    return out, int(torch.empty((), dtype=torch.int64).random_(-(2**63), None))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]} {list(case[3])}")
def test_a_row(case):
    module, name, forward, given, mask = case
    mask = NUMBERS if isinstance(mask, int) else mask
    model = built(module, name, forward)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, seed = called(model, IDS, **given)
    expected = noisy_embedding(IDS, model.embed.weight, 5.0, attention_mask=mask, seed=seed)
    assert torch.equal(out, expected)
    nothing = dict.fromkeys(given)
    out, seed = called(model, IDS, **nothing)
    assert torch.equal(out, noisy_embedding(IDS, model.embed.weight, 5.0, seed=seed))


@pytest.mark.filterwarnings("ignore:no forward around the embedding")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]} {list(case[3])}")
def test_a_namesake_has_no_row(case):
    _, name, forward, given, _ = case
    model = built("mine.models", name, forward)
    mask = given.get("attention_mask")
    out, seed = called(model, IDS, **given)
    plain = noisy_embedding(IDS, model.embed.weight, 5.0, attention_mask=mask, seed=seed)
    assert torch.equal(out, plain)
    assert not torch.equal(out, F.embedding(IDS, model.embed.weight))


# ---- a package whose name is anybody's, and one whose embeddings tell


def mistral(self, input_ids, seqlens):
    return self.embed(input_ids)


def other(self, input_ids, seqlens, cache=None):
    return self.embed(input_ids)


FLAT = IDS.view(-1)


def test_lengths_in_a_list():
    """mistral-finetune's: all documents in one row of (N,) ids."""
    model = built("model.transformer", "Transformer", mistral)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, seed = called(model, FLAT, seqlens=[3, 5, 8])
    bounds = torch.tensor([0, 3, 8, 16])
    weight = model.embed.weight
    assert torch.equal(out, noisy_embedding(FLAT, weight, 5.0, cu_seqlens=bounds, seed=seed))


@pytest.mark.parametrize(
    ("forward", "ids", "seqlens"),
    [
        (other, FLAT, [3, 5, 8]),
        (mistral, FLAT, [3, 5]),
        (mistral, FLAT, torch.tensor([3, 5, 8])),
        (mistral, IDS, [8, 8]),
        (mistral, FLAT, ["a"]),
    ],
)
@pytest.mark.filterwarnings("ignore:no forward around the embedding")
def test_a_model_of_the_same_path_matches_in_all_or_has_no_row(forward, ids, seqlens):
    model = built("model.transformer", "Transformer", forward)
    out, seed = called(model, ids, seqlens=seqlens)
    assert torch.equal(out, noisy_embedding(ids, model.embed.weight, 5.0, seed=seed))


def fairseq(self, src_tokens, src_lengths, prev_output_tokens, features_only=False, **kwargs):
    return self.encoder(src_tokens, src_lengths), self.decoder(prev_output_tokens)


def fairseq_encoder(self, src_tokens, src_lengths=None, return_all_hiddens=False):
    return self.embed(src_tokens)


def fairseq_decoder(self, prev_output_tokens, encoder_out=None, src_lengths=None):
    return self.embed(prev_output_tokens)


def lstm_decoder(self, prev_output_tokens, encoder_out=None, incremental_state=None):
    return self.embed(prev_output_tokens)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["Transformer", "LSTM"])
def test_source_lengths_are_counted_by_the_padding_of_either_side(family, side):
    """fairseq pads sources on the left by default, and counts src_lengths by its dictionary's.
    LSTM's encoder and decoder have no rows: their model tells.
    """
    package, has_rows = "fairseq.models", family == "Transformer"
    name = "TransformerModelBase" if has_rows else "FairseqEncoderDecoderModel"
    base, decoder = ("Base", fairseq_decoder) if has_rows else ("", lstm_decoder)
    model = built(package, name, fairseq)
    model.encoder = built(package, f"{family}Encoder{base}", fairseq_encoder)
    model.decoder = built(package, f"{family}Decoder{base}", decoder)
    table = nn.Embedding(VOCAB, HIDDEN, padding_idx=1)
    model.embed = model.encoder.embed = model.decoder.embed = table
    keep = LEFT if side == "left" else KEEP
    source = IDS.clamp(min=2).where(keep == 1, 1)
    target = IDS.flip(0).clamp(min=2).where(KEEP == 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_neftune(model, 5.0, embedding="embed", embedding_multiplier=1.0)
        torch.manual_seed(7)
        outs = model(source, keep.sum(1), target)
        alone = [model.encoder(source, keep.sum(1))] if has_rows else []
    torch.manual_seed(7)
    lookups = [(outs[0], source, keep), (outs[1], target, KEEP)]
    lookups += [(out, source, keep) for out in alone]
    for out, ids, mask in lookups:
        seed = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None))
        expected = noisy_embedding(
            ids, table.weight, 5.0, padding_idx=1, attention_mask=mask, seed=seed
        )
        assert torch.equal(out, expected)


def esm2(self, tokens, repr_layers=(), need_head_weights=False, return_contacts=False):
    """fair-esm's: zeroed where they are to be guessed, scaled by what is left, padding zeroed."""
    padding = tokens.eq(1)
    x = self.embed_scale * self.embed(tokens)
    if self.token_dropout:
        x = x.masked_fill((tokens == self.mask_idx)[..., None], 0.0)
        observed = (tokens == self.mask_idx).sum(-1).to(x.dtype) / (~padding).sum(-1)
        x = x * (1 - 0.15 * 0.8) / (1 - observed)[:, None, None]
    return x * (1 - padding[..., None].type_as(x))


@pytest.mark.parametrize("dropout", [True, False])
def test_token_dropout_of_fair_esm(dropout):
    model = built("esm.model.esm2", "ESM2", esm2)
    model.embed = nn.Embedding(VOCAB, HIDDEN, padding_idx=1)
    model.embed_scale, model.token_dropout, model.mask_idx, model.padding_idx = 2.0, dropout, 3, 1
    ids = IDS.clamp(min=4).where(KEEP == 1, 1)
    ids[0, 2] = 3
    clean = esm2(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, seed = called(model, ids)
    noise = neftune_noise(ids.shape, HIDDEN, 5.0, attention_mask=KEEP, seed=seed)
    noise[0, 2] = 0 if dropout else noise[0, 2]
    # three roundings of the model, two of ours
    torch.testing.assert_close(out - clean, noise, rtol=1e-5, atol=1e-6)


def esm_embeddings(self, input_ids=None, attention_mask=None, position_ids=None):
    """transformers': zeroed where they are to be guessed, scaled by what is left."""
    x = self.embed(input_ids).masked_fill((input_ids == self.mask_token_id)[..., None], 0.0)
    observed = (input_ids == self.mask_token_id).sum(-1).float() / attention_mask.sum(-1)
    return x * (1 - 0.15 * 0.8) / (1 - observed)[:, None, None]


def test_token_dropout_of_esm():
    model = built("transformers.models.esm", "EsmEmbeddings", esm_embeddings)
    model.token_dropout, model.mask_token_id = True, 3
    ids = IDS.clamp(min=4)
    ids[0, 2] = 3
    clean = esm_embeddings(model, ids, KEEP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, seed = called(model, ids, attention_mask=KEEP)
    noise = neftune_noise(ids.shape, HIDDEN, 5.0, attention_mask=KEEP, seed=seed)
    noise[0, 2] = 0
    # two roundings of the model, two of ours
    torch.testing.assert_close(out - clean, noise, rtol=1e-5, atol=1e-6)


def windowed(self, input_ids=None, attention_mask=None, token_type_ids=None):
    """BigBird pads to a multiple of its attention's blocks."""
    return self.embed(F.pad(input_ids, (0, 4)))


def time_first(self, input_ids=None, attention_mask=None, mems=None):
    return self.embed(input_ids.transpose(0, 1).contiguous()).transpose(0, 1)


@pytest.mark.parametrize("name", ["BigBirdModel", "XLNetModel"])
def test_ids_that_the_model_moves_where_values_are_not_asked(name):
    """As on an accelerator, where a look at a value would wait for it."""
    model = built("transformers.models", name, windowed if name == "BigBirdModel" else time_first)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(places, "_by_value", lambda input, ids: None)
        patch.setattr(running, "values_cost_nothing", lambda input: False)
        warnings.simplefilter("error")
        out, seed = called(model, IDS, attention_mask=KEEP)
    expected = noisy_embedding(IDS, model.embed.weight, 5.0, attention_mask=KEEP, seed=seed)
    assert torch.equal(out[:, :8], expected)


def test_a_listener_of_a_model_with_a_row_pickles():
    module, name, forward, *_ = CASES[0]
    listener = Listener(State(), built(module, name, forward))
    assert listener.quirks.samples is not None
    assert pickle.loads(pickle.dumps(listener)).quirks is listener.quirks


def cpmant(self, input_ids=None, output_attentions=None, past_key_values=None, use_cache=None):
    """CPM-Ant's published lookup: prompts of its own before its tokens, 0 is its padding."""
    prompts = torch.arange(VOCAB - 3, VOCAB, dtype=torch.int32).repeat(input_ids.size(0), 1)
    return self.embed(torch.cat((prompts, input_ids.to(torch.int32)), dim=1))


def cpmant_head(self, input_ids=None, attention_mask=None, **kwargs):
    return cpmant(self, input_ids)


@pytest.mark.parametrize("told", [False, True])
def test_prompts_of_the_models_own_are_no_tokens(told):
    """They have no noise and do not count in L."""
    forward = cpmant_head if told else cpmant
    name = "CpmAntForCausalLM" if told else "CpmAntModel"
    model = built("transformers.models.cpmant", name, forward)
    ids = IDS if told else IDS * KEEP
    given = {"attention_mask": KEEP} if told else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, seed = called(model, ids, **given)
    expected = noisy_embedding(ids, model.embed.weight, 5.0, attention_mask=KEEP, seed=seed)
    assert torch.equal(out[:, 3:], expected)
    assert torch.equal(
        out[:, :3],
        F.embedding(torch.arange(VOCAB - 3, VOCAB), model.embed.weight).expand(2, 3, HIDDEN),
    )


class Scaling(nn.Module):
    """FastSpeech2's positional encoding, as far as the embeddings are concerned."""

    input_scale = 4.0

    def forward(self, x):
        return x * self.input_scale


def fastspeech2(self, feature_representation, attention_mask=None):
    return self.pos_enc(self.embed(feature_representation))


def test_a_factor_in_a_module_beside_the_embedding():
    package = "transformers.models.fastspeech2_conformer"
    model = built(package, "FastSpeech2ConformerEncoder", fastspeech2)
    model.pos_enc = Scaling()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, seed = called(model, IDS, attention_mask=KEEP)
    expected = noisy_embedding(IDS, model.embed.weight, 5.0 / 4, attention_mask=KEEP, seed=seed)
    assert torch.equal(out, expected * 4.0)


def talker(self, input_ids=None, attention_mask=None, thinker_reply_part=None):
    return self.model(attention_mask, self.model.embed(input_ids))


def talker_model(self, attention_mask=None, inputs_embeds=None, input_ids=None):
    return inputs_embeds


def test_a_mask_that_stays_with_the_outer_model():
    """Qwen2.5-Omni's talker looks its tokens up itself, in its inner model's table."""
    package = "transformers.models.qwen2_5_omni"
    model = built(package, "Qwen2_5OmniTalkerForConditionalGeneration", talker)
    model.model = built(package, "Qwen2_5OmniTalkerModel", talker_model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, seed = called(model, IDS, "model.embed", attention_mask=KEEP)
    weight = model.model.embed.weight
    assert torch.equal(out, noisy_embedding(IDS, weight, 5.0, attention_mask=KEEP, seed=seed))


def several_parts(self, input_ids=None, pixel_values=None, **kwargs):
    return self.model(inputs_embeds=self.model.embed(input_ids), **kwargs)


@pytest.mark.parametrize("given", [{}, {"attention_mask": KEEP}], ids=["untold", "told"])
def test_a_model_of_several_parts_that_names_no_samples(given):
    """VibeVoice looks its tokens up itself and hands on what its inner model is told."""
    package = "transformers.models.vibevoice"
    model = built(package, "VibeVoiceModel", several_parts)
    model.config_class = types.SimpleNamespace(sub_configs={"text_config": object})
    model.model = built(package, "Qwen2Model", talker_model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, seed = called(model, IDS, "model.embed", **given)
    weight = model.model.embed.weight
    assert torch.equal(out, noisy_embedding(IDS, weight, 5.0, **given, seed=seed))


def dropping(self, input_ids=None, position_ids=None, **kwargs):
    return self.fnet(input_ids, position_ids=position_ids)


def placed(self, input_ids=None, position_ids=None):
    return self.embed(input_ids)


@pytest.mark.parametrize("given", [{}, {"attention_mask": KEEP}], ids=["untold", "told"])
def test_a_mask_that_the_model_drops(given):
    """FNet attends to all, and takes a mask among its other arguments as any trainer gives it."""
    package = "transformers.models.fnet"
    model = built(package, "FNetForMaskedLM", dropping)
    model.fnet = built(package, "FNetModel", placed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, seed = called(model, IDS, "fnet.embed", **given)
    weight = model.fnet.embed.weight
    assert torch.equal(out, noisy_embedding(IDS, weight, 5.0, **given, seed=seed))


def grounding(self, input_ids=None, pixel_values=None, attention_mask=None):
    phrases = torch.arange(input_ids.shape[1]).expand_as(input_ids) % 3
    attends = torch.eye(input_ids.shape[1], dtype=torch.bool)[None, None]
    return self.text_backbone(input_ids, attends, phrases)


def text_backbone(self, input_ids=None, attention_mask=None, position_ids=None):
    return self.embed(input_ids)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("name", ["GroundingDinoModel", "MMGroundingDinoModel"])
def test_phrases_that_the_model_makes_of_a_sample_are_no_samples(name, told):
    """Their texts' positions begin anew in each phrase: L is still the text's."""
    model = built("transformers.models.grounding_dino", name, grounding)
    model.text_backbone = built("transformers.models.bert", "BertModel", text_backbone)
    given = {"attention_mask": KEEP} if told else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, seed = called(model, IDS, "text_backbone.embed", **given)
    weight = model.text_backbone.embed.weight
    assert torch.equal(out, noisy_embedding(IDS, weight, 5.0, **given, seed=seed))


def vits(self, input_ids, padding_mask=None, attention_mask=None):
    return self.embed(input_ids) * self.config.hidden_size**0.5


def test_a_factor_of_the_config():
    model = built("transformers.models.vits", "VitsTextEncoder", vits)
    model.config = types.SimpleNamespace(hidden_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, seed = called(model, IDS, attention_mask=KEEP)
    expected = noisy_embedding(IDS, model.embed.weight, 5.0 / 4, attention_mask=KEEP, seed=seed)
    assert torch.equal(out, expected * 4.0)


# ---- every row is needed

ZOO = pathlib.Path(__file__).parent.parent / "bench/results/zoo.md"
NEEDED = set(re.findall(r"^- `(\w+\.forward)`: .* without it", ZOO.read_text(), re.MULTILINE))
fairseq_of = test_source_lengths_are_counted_by_the_padding_of_either_side
moved = test_ids_that_the_model_moves_where_values_are_not_asked
phrases = test_phrases_that_the_model_makes_of_a_sample_are_no_samples
talked = test_a_mask_that_stays_with_the_outer_model
HELD = {
    **{(case[0].split(".")[0], case[1]): functools.partial(test_a_row, case) for case in CASES},
    ("transformers", "MPTModel"): functools.partial(test_a_row, CASES[7]),
    ("esm", "ESM2"): functools.partial(test_token_dropout_of_fair_esm, True),
    ("fairseq", "FairseqEncoderDecoderModel"): functools.partial(fairseq_of, "LSTM", "left"),
    ("fairseq", "TransformerEncoderBase"): functools.partial(fairseq_of, "Transformer", "left"),
    ("fairseq", "TransformerDecoderBase"): functools.partial(fairseq_of, "Transformer", "right"),
    ("model", "Transformer"): test_lengths_in_a_list,
    ("transformers", "BigBirdModel"): functools.partial(moved, "BigBirdModel"),
    ("transformers", "XLNetModel"): functools.partial(moved, "XLNetModel"),
    ("transformers", "GroundingDinoModel"): functools.partial(phrases, "GroundingDinoModel", True),
    ("transformers", "MMGroundingDinoModel"): functools.partial(
        phrases, "MMGroundingDinoModel", True
    ),
    ("transformers", "EsmEmbeddings"): test_token_dropout_of_esm,
    ("transformers", "Qwen2_5OmniTalkerForConditionalGeneration"): talked,
    ("transformers", "VitsTextEncoder"): test_a_factor_of_the_config,
}


@pytest.mark.parametrize("key", QUIRKS, ids=".".join)
def test_a_row_is_needed(key, monkeypatch):
    """By an entry of the sweep, whose table says so, or by a test of its published forward that
    fails without it. A row with neither goes.
    """
    package, name = key
    held = HELD.get((package, name.removesuffix(".forward")))
    assert (package == "transformers" and name in NEEDED) or held
    if held:
        monkeypatch.delitem(QUIRKS, key)
        with pytest.raises((AssertionError, UserWarning)):
            held()


def test_the_sweeps_table_is_of_these_rows():
    assert len(NEEDED) > 30
    assert {("transformers", name) for name in NEEDED} <= QUIRKS.keys()
