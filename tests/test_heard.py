"""What a forward is heard saying, without being told: samples belong to a lookup by its ids."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neftune_kernels import apply_neftune, noisy_embedding
from neftune_kernels.integrations import places
from neftune_kernels.integrations.arguments import Padding, from_arguments, tail

VOCAB, HIDDEN = 64, 32
GENERATOR = torch.Generator().manual_seed(2)
IDS = torch.randint(10, VOCAB, (3, 8), generator=GENERATOR)
OTHER = torch.randint(10, VOCAB, (3, 8), generator=GENERATOR)
KEEP = torch.tensor([[1] * 5 + [0] * 3, [1] * 2 + [0] * 6, [1] * 8])
ROWS = KEEP * torch.tensor([[1], [2], [3]])  # samples of their own where rows are joined


class Config:
    is_encoder_decoder = False

    def __init__(self, pad_token_id=None, eos_token_id=None):
        self.pad_token_id, self.eos_token_id = pad_token_id, eos_token_id


class Net(nn.Module):
    """Looks up whatever `look_up` makes of the arguments."""

    def __init__(self, look_up, config=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.look_up = look_up
        self.config = config

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, **given):
        many = self.look_up(input_ids, token_type_ids, **given)
        self.arrived = [self.embed(ids) for ids in many]
        return self.arrived


def heard(look_up, *, config=None, fused=None, warns=None, **given):
    """[what each lookup returned], [their seeds], the weight, stats()."""
    model = Net(look_up, config).train()
    handle = apply_neftune(model, 5.0, embedding="embed", fused=fused)
    given = {"input_ids": IDS, "attention_mask": KEEP, **given}
    torch.manual_seed(7)
    if warns is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**given)
    else:
        with pytest.warns(UserWarning, match=warns):
            model(**given)
    torch.manual_seed(7)
    seeds = [int(torch.empty((), dtype=torch.int64).random_(-(2**63), None)) for _ in model.arrived]
    return model.arrived, seeds, model.embed.weight, handle.stats()


def noisy(ids, weight, seed, mask=None, **told):
    return noisy_embedding(ids, weight, 5.0, attention_mask=mask, seed=seed, **told)


ORDER = torch.tensor([2, 0, 1])
MIXED = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
PLACES = {
    "the same": (lambda ids: ids, KEEP),
    "a copy": (lambda ids: ids.clone(), KEEP),
    "flattened": (lambda ids: ids.view(-1), ROWS.view(-1)),
    "a flattened copy": (lambda ids: ids.clone().view(-1), ROWS.view(-1)),
    "flattened, images' places changed": (
        lambda ids: torch.where(ids % 3 == 0, 1, ids).view(-1),
        ROWS.view(-1),
    ),
    "reordered": (lambda ids: ids[ORDER], KEEP[ORDER]),
    "rows": (lambda ids: ids[1:], KEEP[1:]),
    "copied rows": (lambda ids: ids[1:].clone(), KEEP[1:]),
    "a prefix": (lambda ids: ids[:, :-1], KEEP[:, :-1]),
    "a copied prefix": (lambda ids: ids[:, :-1].clone(), KEEP[:, :-1]),
    "a copied chunk": (lambda ids: ids[:, 2:6].clone(), KEEP[:, 2:6]),
    "a window": (lambda ids: F.pad(ids, (0, 4), value=1), F.pad(KEEP, (0, 4))),
    "shifted right": (
        lambda ids: torch.cat((torch.zeros_like(ids[:, :1]), ids[:, :-1]), 1),
        torch.cat((KEEP[:, :1], KEEP[:, :-1]), 1),
    ),
    "shifted left": (lambda ids: ids.roll(-1, 1), torch.cat((KEEP[:, 1:], KEEP[:, -1:]), 1)),
    "reversed": (lambda ids: ids.flip(1), KEEP.flip(1)),
    "padding on the other side": (
        lambda ids: torch.stack([row.roll(place + 2) for place, row in enumerate(ids)]),
        torch.stack([row.roll(place + 2) for place, row in enumerate(KEEP)]),
    ),
    "in another order": (lambda ids: ids[:, MIXED], KEEP[:, MIXED]),
    "images' places changed": (lambda ids: torch.where(ids % 3 == 0, 1, ids), KEEP),
}


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", PLACES)
def test_the_place_of_the_ids_is_their_masks(name, fused):
    of, mask = PLACES[name]
    (out,), (seed,), weight, _ = heard(lambda ids, _: [of(ids)], fused=fused)
    assert torch.equal(out, noisy(of(IDS), weight, seed, mask))


@pytest.mark.parametrize("token", [None, 0])
def test_flattened_ids_are_samples_of_their_own_without_a_mask(token):
    ids = IDS if token is None else IDS.masked_fill(KEEP == 0, token)
    for of in (torch.Tensor.flatten, lambda ids: ids.clone().view(-1)):
        (out,), (seed,), weight, _ = heard(
            lambda ids, _, of=of: [of(ids)],
            config=Config(token),
            input_ids=ids,
            attention_mask=None,
        )
        told = noisy(ids, weight, seed, None if token is None else KEEP)
        assert torch.equal(out, told.flatten(0, 1))


def test_another_sequence_of_the_same_tokens_has_its_own_mask():
    """Sentences in another order, as BART learns to sort them: exact ids come before rearranged."""

    class Both(nn.Module):
        config = type("Config", (), {"is_encoder_decoder": False, "pad_token_id": None})()

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, HIDDEN)

        def get_input_embeddings(self):
            return self.embed

        def forward(self, input_ids, attention_mask, target_ids, target_attention_mask):
            return self.embed(input_ids), self.embed(target_ids)

    model = Both().train()
    handle = apply_neftune(
        model,
        5.0,
        samples=[
            {"input_ids": "input_ids", "attention_mask": "attention_mask"},
            {"input_ids": "target_ids", "attention_mask": "target_attention_mask"},
        ],
        embedding_multiplier=1.0,
    )
    _, out = model(IDS, KEEP, IDS.flip(1), KEEP.flip(0))
    seed = model.embed._neftune.last.noise.seed
    assert torch.equal(out, noisy(IDS.flip(1), model.embed.weight, seed, KEEP.flip(0)))
    assert handle.stats()["calls"] == 2


def test_the_padding_of_a_window_is_compared_without_a_look():
    behind, other = F.pad(IDS, (0, 4)), F.pad(OTHER, (0, 4))
    where = places.padded(behind, IDS)
    assert torch.equal(where(KEEP), F.pad(KEEP, (0, 4)))
    assert bool(places.padded(other, IDS)(KEEP).all()), "other ids: every token is real"
    assert places.padded(IDS, IDS) is None and places.padded(behind[1:], IDS) is None
    places.padded(behind.to("meta"), IDS.to("meta"))(KEEP.to("meta"))  # which has no values


def test_a_second_batch_of_one_forward_does_not_take_the_firsts_mask():
    """Of the same shape, and named by nobody: it warns, and says how to name it."""
    out, seeds, weight, _ = heard(
        lambda ids, _, other: [ids, other],
        other=OTHER,
        warns=r'none of the tokens.*samples=\[\{"input_ids": "other", "attention_mask": '
        r'"attention_mask"\}\]',
    )
    assert torch.equal(out[0], noisy(IDS, weight, seeds[0], KEEP))
    assert torch.equal(out[1], noisy(OTHER, weight, seeds[1]))


PARTS = {
    "columns": lambda ids: [ids[:, column] for column in range(8)],
    "columns that keep their axis": lambda ids: ids.split(1, 1),
    "chunks": lambda ids: ids.split(4, 1),
    "copies of chunks": lambda ids: [part.clone() for part in ids.split(4, 1)],
}


@pytest.mark.parametrize("is_masked", (False, True))
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_sequence_are_not_taken_for_whole_in_silence(name, is_masked):
    said = {} if is_masked else {"attention_mask": None}
    heard(lambda ids, _: PARTS[name](ids), warns="some columns at a time", **said)


def test_columns_that_meet_are_no_parts():
    """Inputs and the targets behind them; the same half again, as a checkpoint looks it up."""
    heard(lambda ids, _: [ids[:, :-1], ids[:, 1:], ids[:, :4], ids[:, :4]])


def test_ids_that_the_forward_makes_twice():
    """The first count as its own by their shape, the second are other ones."""
    out, seeds, weight, _ = heard(
        lambda ids, _: [(ids * 3) % VOCAB, (ids * 5) % VOCAB], warns="none of the tokens"
    )
    assert torch.equal(out[0], noisy((IDS * 3) % VOCAB, weight, seeds[0], KEEP))
    assert torch.equal(out[1], noisy((IDS * 5) % VOCAB, weight, seeds[1]))


@pytest.mark.filterwarnings("ignore:it is not known whether")
def test_ids_that_an_inner_forward_makes_twice():
    """The second are no more the outer model's than the inner one's."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Net(lambda ids, _: [(ids * 3) % VOCAB, (ids * 5) % VOCAB])

        def forward(self, input_ids, attention_mask=None):
            return self.inner(input_ids, attention_mask)

    model = Outer().train()
    apply_neftune(model, 5.0, embedding="inner.embed")
    with pytest.warns(UserWarning, match="none of the tokens"):
        model(IDS, KEEP)
    seed, weight = model.inner.embed._neftune.last.noise.seed, model.inner.embed.weight
    assert torch.equal(model.inner.arrived[1], noisy((IDS * 5) % VOCAB, weight, seed))


@pytest.mark.parametrize("of", [lambda types: types, lambda types: types.clone()])
def test_token_types_get_no_noise(of):
    types = (torch.arange(8) > 3).long().expand(3, 8)
    out, seeds, weight, stats = heard(lambda ids, types: [ids, of(types)], token_type_ids=types)
    assert torch.equal(out[0], noisy(IDS, weight, seeds[0], KEEP))
    assert torch.equal(out[1], F.embedding(types, weight))
    assert stats["calls"] == 1 and stats["skipped"] == {"token_type_ids": 1}


def test_ids_that_equal_their_token_types_are_ids():
    types = (torch.arange(8) > 3).long().expand(3, 8).contiguous()
    (out,), (seed,), weight, _ = heard(
        lambda ids, types: [ids], input_ids=types.clone(), token_type_ids=types
    )
    assert torch.equal(out, noisy(types, weight, seed, KEEP))


def test_two_dictionaries_of_one_forward():
    """As queries and passages are given: each with its own mask."""

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, HIDDEN)

        def forward(self, queries, passages):
            return self.embed(queries["input_ids"]), self.embed(passages["input_ids"])

    model = Pairs().train()
    apply_neftune(model, 5.0, embedding="embed")
    short = OTHER[:, :6]
    masks = KEEP, KEEP.flip(0)[:, :6]
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = model(
            {"input_ids": IDS, "attention_mask": masks[0]},
            {"input_ids": short, "attention_mask": masks[1]},
        )
    torch.manual_seed(7)
    seeds = [int(torch.empty((), dtype=torch.int64).random_(-(2**63), None)) for _ in range(2)]
    assert torch.equal(one, noisy(IDS, model.embed.weight, seeds[0], masks[0]))
    assert torch.equal(other, noisy(short, model.embed.weight, seeds[1], masks[1]))


def test_a_decoder_that_is_told_its_mask_by_another_name():
    """FSMT's: its model's decoder_attention_mask arrives there under a name of its own."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)

        def forward(self, input_ids, mine):
            return self.embed_tokens(input_ids)

    class Both(nn.Module):
        config = type("Config", (), {"is_encoder_decoder": True, "pad_token_id": None})()

        def __init__(self):
            super().__init__()
            self.decoder = Decoder()

        def get_decoder(self):
            return self.decoder

        def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask):
            return self.decoder(decoder_input_ids, decoder_attention_mask == 0)

    model = Both().train()
    apply_neftune(model, 5.0, embedding_multiplier=1.0)
    out = model(IDS, torch.ones_like(KEEP), OTHER, KEEP)
    seed = model.decoder.embed_tokens._neftune.last.noise.seed
    assert torch.equal(out, noisy(OTHER, model.decoder.embed_tokens.weight, seed, KEEP))


def test_a_decoder_of_the_decoder():
    """Florence-2's get_decoder() is its language model, which it does not call: it embeds its
    tokens itself and calls that one's encoder and decoder.
    """
    both = type("Config", (), {"is_encoder_decoder": True, "pad_token_id": None})()

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)

        def get_input_embeddings(self):
            return self.embed_tokens

        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
            return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    class Language(nn.Module):
        config = both

        def __init__(self):
            super().__init__()
            self.shared = nn.Embedding(VOCAB, HIDDEN)
            self.encoder, self.decoder = Stack(), Stack()

        def get_input_embeddings(self):
            return self.shared

        def get_decoder(self):
            return self.decoder

        def forward(self, input_ids, attention_mask=None):
            raise NotImplementedError

    class Florence(nn.Module):
        config = both

        def __init__(self):
            super().__init__()
            self.language_model = Language()

        def get_input_embeddings(self):
            return self.language_model.shared

        def get_decoder(self):
            return self.language_model

        def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask):
            language = self.language_model
            states = language.encoder(
                attention_mask=attention_mask, inputs_embeds=language.shared(input_ids)
            )
            return states, language.decoder(decoder_input_ids, decoder_attention_mask)

    model = Florence().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_neftune(model, 5.0, embedding_multiplier=1.0)
        states, out = model(IDS, KEEP, OTHER, KEEP)
    language = model.language_model
    for found, ids, one in (
        (states, IDS, language.shared),
        (out, OTHER, language.decoder.embed_tokens),
    ):
        seed = one._neftune.last.noise.seed
        assert torch.equal(found, noisy(ids, one.weight, seed, KEEP))


def test_a_config_that_cannot_tell_its_text_model():
    """MusicGen's raises, as it has two of them: its own padding counts."""

    class Two(Config):
        def get_text_config(self):
            raise ValueError("multiple valid text configs")

    config = Two(pad_token_id=0)
    ids = IDS * KEEP
    (out,), (seed,), weight, _ = heard(
        lambda ids, _: [ids], config=config, input_ids=ids, attention_mask=None
    )
    assert torch.equal(out, noisy(ids, weight, seed, KEEP))


def test_masks_among_others():
    """**kwargs of a forward that names no mask."""

    class Others(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Embedding(VOCAB, HIDDEN))

        def forward(self, tokens, **others):
            return self.inner(tokens)

    model = Others().train()
    apply_neftune(model, 5.0, embedding="inner.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(IDS, attention_mask=KEEP)
    seed = model.inner[0]._neftune.last.noise.seed
    assert torch.equal(out, noisy(IDS, model.inner[0].weight, seed, KEEP))


def test_a_longer_mask_counts_a_cache_before_the_tokens():
    mask = F.pad(KEEP, (4, 0), value=1)
    (out,), (seed,), weight, stats = heard(
        lambda ids, _: [ids], attention_mask=mask, warns="4 columns before them for a cache"
    )
    whole = torch.cat((torch.zeros(3, 4, dtype=torch.int64), IDS), 1)
    assert torch.equal(out, noisy(whole, weight, seed, mask)[:, 4:])
    assert stats["length_max"] == 12
    with pytest.warns(UserWarning, match=r"not \(batch, tokens\) \(\(2, 12\)\)"):
        from_arguments({"input_ids": IDS, "attention_mask": mask[:2]}, Padding(), warnings.warn)


def test_words_that_may_be_somebody_elses_win_only_without_a_mask():
    lengths = torch.tensor([8, 8, 8])
    (out,), (seed,), weight, _ = heard(lambda ids, _, lengths: [ids], lengths=lengths)
    assert torch.equal(out, noisy(IDS, weight, seed, KEEP))
    (out,), (seed,), weight, _ = heard(
        lambda ids, _, lengths: [ids], lengths=KEEP.sum(1), attention_mask=None
    )
    assert torch.equal(out, noisy(IDS, weight, seed, KEEP))


MISFITS = {
    "lengths": (
        torch.rand(3),
        torch.tensor([16000, 8000, 4000]),
        torch.tensor([8, -1, 2]),
        torch.tensor([8, 8]),
        torch.tensor([True, True, False]),
        [8, 5, 3],
    ),
    "cu_seqlens": (torch.rand(4), torch.tensor([0, 5]), torch.tensor([[0, 24]]), "auto"),
    "noise_mask": (torch.rand(3, 8), torch.ones(3, 1, 8, 8), [1]),
    "position_ids": (torch.rand(3, 8), [0, 1]),
    "seq_idx": (torch.rand(3, 8), 3),
    "cu_seq_lens_q": ([0, 24],),
}
CASES = [(name, value) for name, values in MISFITS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_word_of_ours_that_means_something_else_is_not_read_and_warns(name, value):
    (out,), (seed,), weight, _ = heard(
        lambda ids, _, **given: [ids],
        **{"attention_mask": None, name: value, "keep": KEEP},
        warns=rf"{name} \(.*does not read it.*keep \(3, 8\) int64 by samples=(?!.*{name} \()",
    )
    assert torch.equal(out, noisy(IDS, weight, seed))


def test_a_noise_mask_counts_only_where_there_is_no_mask():
    (out,), (seed,), weight, _ = heard(
        lambda ids, _, noise_mask: [ids], noise_mask=KEEP, attention_mask=None
    )
    assert torch.equal(out, noisy(IDS, weight, seed, noise_mask=KEEP))
    whole = torch.ones_like(KEEP)
    line = {"attention_mask": "attention_mask", "noise_mask": "noise_mask"}
    model = Net(lambda ids, _, noise_mask: [ids]).train()
    handle = apply_neftune(model, 5.0, embedding="embed")
    with pytest.warns(UserWarning, match="noise_mask beside an attention_mask") as said:
        model(IDS, whole, noise_mask=KEEP)
    seed = model.embed._neftune.last.noise.seed
    assert torch.equal(model.arrived[0], noisy(IDS, model.embed.weight, seed, whole))
    assert len(said) == 1 and str(line).replace("'", '"') in str(said[0].message)
    handle.samples = line
    model(IDS, whole, noise_mask=KEEP)
    seed = model.embed._neftune.last.noise.seed
    expected = noisy(IDS, model.embed.weight, seed, whole, noise_mask=KEEP)
    assert torch.equal(model.arrived[0], expected)


# ---- padding at the rows' ends


TAIL = torch.tensor([[5, 6, 2, 2, 2], [5, 2, 6, 7, 2], [2, 2, 2, 2, 2], [5, 6, 7, 8, 9]])
ONES = torch.ones(1, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("padding", "kept"),
    [
        (Padding(2), [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1] * 5]),
        (Padding(2, True), [[1, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0], [1] * 5]),
        (Padding(), [[1] * 5] * 4),
        (Padding(3), [[1] * 5] * 4),
    ],
)
def test_without_a_mask_the_models_padding_token_tells(padding, kept):
    assert (~tail(TAIL, padding)).long().tolist() == kept
    assert not tail(TAIL, padding, masked=True).any(), "a mask calls them real"
    config = Config(padding.token, padding.token if padding.is_end else None)
    (out,), (seed,), weight, _ = heard(
        lambda ids, _: [ids], input_ids=TAIL, attention_mask=None, config=config
    )
    assert torch.equal(out, noisy(TAIL, weight, seed, torch.tensor(kept)))


@pytest.mark.parametrize("mask", [None, ONES])
@pytest.mark.parametrize("end", [[0, 0], [0, 1]], ids=["all 0", "restart"])
@pytest.mark.parametrize("padding", [Padding(), Padding(0), Padding(0, True)])
def test_position_ids_that_begin_anew_tell_padding(padding, end, mask):
    """LLaMA-Factory's packing: true pads ids and position ids under a mask of ones."""
    ids = torch.tensor([[5, 6, 0, 0, 0]])  # the first 0 ends the sample, or counts on as one
    positions = torch.tensor([[0, 1, 2, *end]])
    given = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    told = from_arguments(given, padding, pytest.fail)
    real = [1, 1, 1, 0, 0]
    if mask is None and padding == Padding(0):
        real = [1, 1, 0, 0, 0]  # nothing calls it real, and the model names it padding
    assert told.attention_mask.long().tolist() == [real]


def test_ids_that_count_on_under_a_mask_of_ones_are_real():
    given = {"input_ids": TAIL[:1], "position_ids": torch.arange(5)[None], "attention_mask": ONES}
    for padding in (Padding(2), Padding(2, True), Padding()):
        assert from_arguments(given, padding, pytest.fail).attention_mask.bool().all()


# ---- collators of tools, their batches written down


LLAMA_FACTORY_NEAT = {  # SFTDataCollatorWith4DAttentionMask before its 4-D mask: numbered documents
    "input_ids": torch.tensor([[11, 12, 13, 2, 21, 22, 2, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0]]),
}
LLAMA_FACTORY_PACKING = {  # packing: true: ones, position ids, the pad token behind
    "input_ids": torch.tensor([[11, 12, 13, 2, 21, 22, 2, 0]]),
    "attention_mask": torch.ones(1, 8, dtype=torch.int64),
    "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0]]),
}
AXOLOTL = {  # V2BatchSamplerDataCollatorForSeq2Seq: numbered masks and position ids
    "input_ids": torch.tensor([[11, 12, 13, 2, 21, 22, 2, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0]]),
    "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0]]),
}
AXOLOTL_FLASH = {  # the same with flash attention: no mask
    "input_ids": torch.tensor([[11, 12, 13, 2, 21, 22, 2, 0]]),
    "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0]]),
}


@pytest.mark.parametrize("ends", [False, True], ids=["a pad token", "pad is eos"])
@pytest.mark.parametrize(
    "batch", [LLAMA_FACTORY_NEAT, LLAMA_FACTORY_PACKING, AXOLOTL, AXOLOTL_FLASH]
)
def test_collators(batch, ends):
    if ends:
        batch = batch | {"input_ids": batch["input_ids"].where(batch["input_ids"] != 0, 2)}
    padding = Padding(2, True) if ends else Padding(0)
    told = from_arguments(batch, padding, pytest.fail)
    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
    said = {"attention_mask": told.attention_mask, "position_ids": told.position_ids}
    out = noisy_embedding(batch["input_ids"], weight, 5.0, seed=0, **said)
    numbers = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0]])
    assert torch.equal(out, noisy(batch["input_ids"], weight, 0, numbers))
