"""samples= in all its forms and handle.told(): what a user says of the samples."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

from neftune_kernels import apply_neftune, noisy_embedding

VOCAB, HIDDEN = 64, 32
IDS = torch.randint(1, VOCAB, (3, 8), generator=torch.Generator().manual_seed(2))
OTHER = torch.randint(1, VOCAB, (3, 8), generator=torch.Generator().manual_seed(3))
KEEP = torch.tensor([[1] * 5 + [0] * 3, [1] * 2 + [0] * 6, [1] * 8])
NUMBERS = torch.tensor([[1, 1, 2, 2, 2, 0, 0, 0], [1] * 8, [1, 2, 2, 2, 2, 2, 2, 3]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], list(range(8)), [0, 0, 1, 2, 3, 4, 5, 0]])


class Words(nn.Module):
    """A module around the table, as nearly every package has one."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB, HIDDEN)

    def forward(self, x):
        return self.table(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = Words()

    def forward(self, tokens, keep=None, features=None, **others):
        self.arrived = self.words(tokens if features is None else features["ids"])
        return self.arrived


class Pair(Net):
    """Looks up a source and a target."""

    def forward(self, source, keep, target):
        self.source, self.target = self.words(source), self.words(target)
        return self.target


def built(kind=Net, **options):
    torch.manual_seed(0)
    model = kind().train()
    return model, apply_neftune(model, 5.0, embedding="words.table", **options)


def drawn(seed=7):
    torch.manual_seed(seed)
    return int(torch.empty((), dtype=torch.int64).random_(-(2**63), None))


def expected(model, ids=IDS, seed=None, **told):
    seed = drawn() if seed is None else seed
    return noisy_embedding(ids, model.words.table.weight, 5.0, seed=seed, **told)


def called(model, *args, **given):
    torch.manual_seed(7)
    return model(*args, **given)


SAID = {
    "attention_mask": (KEEP, {"attention_mask": KEEP}),
    "key_padding_mask": (KEEP == 0, {"attention_mask": KEEP}),
    "lengths": (KEEP.sum(1), {"lengths": KEEP.sum(1)}),
    "document_lengths": (
        torch.tensor([[2, 3, 0], [8, 0, 0], [1, 6, 1]]),
        {"attention_mask": NUMBERS},
    ),
    "cu_seqlens": (torch.tensor([0, 5, 8, 24]), {"cu_seqlens": torch.tensor([0, 5, 8, 24])}),
    "position_ids": (POSITIONS, {"position_ids": POSITIONS}),
    "noise_mask": (KEEP, {"noise_mask": KEEP}),
}


@pytest.mark.parametrize("how", ["mapping", "dotted", "callable", "list", "told"])
@pytest.mark.parametrize("word", SAID)
def test_every_word_in_every_way(word, how):
    value, meaning = SAID[word]
    given = {"keep": value}
    if how == "mapping":
        model, _ = built(samples={word: "keep"})
    elif how == "dotted":
        model, _ = built(samples={word: "features.inner.keep"})
        given = {"features": {"ids": IDS, "inner": {"keep": value}}}
    elif how == "callable":
        model, _ = built(samples=lambda arguments: {word: arguments["keep"]})
    elif how == "list":
        model, _ = built(samples=[{"input_ids": "tokens", word: "keep"}])
    else:
        model, handle = built()
        with handle.told(**{word: value}):
            out = called(model, IDS)
    if how != "told":
        out = called(model, IDS, **given)
    assert torch.equal(out, expected(model, **meaning))


@pytest.mark.parametrize("lengths", [[[2, 3], [8], [1, 6, 1]], [[2, 3, 0], [8, 0, 0], [1, 6, 1]]])
def test_document_lengths_as_lists(lengths):
    model, handle = built()
    with handle.told(document_lengths=lengths):
        assert torch.equal(called(model, IDS), expected(model, attention_mask=NUMBERS))
    with handle.told(document_lengths=[2, 3]):
        out = called(model, IDS[0])
    assert torch.equal(out, expected(model, IDS[0], attention_mask=NUMBERS[0]))


def test_left_out_or_none_says_nothing():
    model, _ = built(samples={"attention_mask": "keep"})
    for given in ({}, {"keep": None}):
        assert torch.equal(called(model, IDS, **given), expected(model))
    model, _ = built(samples={"attention_mask": "features.keep"})
    assert torch.equal(called(model, IDS), expected(model))


@pytest.mark.parametrize(
    ("name", "offer"),
    [
        ("mask", "Net is not given: on offer are tokens, keep, features.*extra"),
        ("features.mask", "on offer are .*features.ids"),
        ("keep.mask", "'keep.mask', which Net is not given"),
    ],
)
def test_an_unknown_name_lists_those_on_offer(name, offer):
    model, _ = built(samples={"attention_mask": name})
    given = {"features": {"ids": IDS}, "extra": 1}
    with pytest.raises(TypeError, match=offer):
        model(IDS, KEEP, **given)
    with torch.no_grad():
        model(IDS, KEEP, **given)  # a forward without noise never raises
    model.eval()(IDS, KEEP, **given)


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        (5, TypeError, "samples must be callable.*a mapping.*got 5"),
        ([], TypeError, "samples must be callable"),
        ({"mask": "keep"}, TypeError, "samples= maps attention_mask, .*got 'mask'"),
        ({"attention_mask": KEEP}, TypeError, "to the name of an argument"),
        ([{"attention_mask": "keep"}], TypeError, "names its sequence"),
        (
            {"attention_mask": "a", "lengths": "b"},
            ValueError,
            "at most one of .* got attention_mask and lengths",
        ),
    ],
)
def test_bad_samples_are_refused(samples, error, message):
    with pytest.raises(error, match=message):
        built(samples=samples)
    _, handle = built()
    with pytest.raises(error, match=message):
        handle.samples = samples


def test_bad_words_are_refused():
    model, handle = built()
    with (
        pytest.raises(TypeError, match=r"told\(\) takes attention_mask.*got mask"),
        handle.told(mask=KEEP),
    ):
        pass
    with (
        pytest.raises(ValueError, match="at most one of"),
        handle.told(attention_mask=KEEP, lengths=KEEP.sum(1)),
    ):
        pass
    with handle.told(attention_mask=[1, 2]), pytest.raises(TypeError, match="is list: no tensor"):
        model(IDS)
    for wrong, message in (
        ([[9], [1], [1]], "add up to 9 in a row of 8 tokens"),
        ([[1], [1]], "a row for each of the 3 rows"),
        (torch.ones(3, 1), "document_lengths must be int32 or int64"),
    ):
        with (
            handle.told(document_lengths=wrong),
            pytest.raises((ValueError, TypeError), match=message),
        ):
            model(IDS)
    called(model, IDS)
    handle.samples = {"lengths": "keep"}
    assert handle.samples == {"lengths": "keep"}
    assert torch.equal(called(model, IDS, KEEP.sum(1)), expected(model, lengths=KEEP.sum(1)))


def test_the_model_is_asked_and_not_what_is_inside_it():
    """An inner one only where it is called alone."""
    asked = []

    def read(arguments):
        asked.append(sorted(arguments))
        return arguments.get("keep")

    model, _ = built(samples=read)
    assert torch.equal(called(model, IDS, keep=KEEP), expected(model, attention_mask=KEEP))
    assert asked == [["keep", "tokens"]]
    called(model.words, IDS)
    assert asked[1:] == [["x"]]


def test_a_model_that_calls_itself_is_asked_of_the_inner_call():
    class Twice(Net):
        def forward(self, tokens, keep=None, again=None):
            inner = None if again is None else self(*again)
            self.arrived = self.words(tokens), inner
            return self.arrived[0]

    model, _ = built(Twice, samples={"attention_mask": "keep"})
    inner = (OTHER, KEEP.flip(0))
    model(IDS, KEEP, inner)
    torch.manual_seed(7)
    out = model(IDS, KEEP, inner)
    torch.manual_seed(7)
    seeds = [int(torch.empty((), dtype=torch.int64).random_(-(2**63), None)) for _ in range(2)]
    assert torch.equal(model.arrived[1], expected(model, OTHER, seeds[0], attention_mask=inner[1]))
    assert torch.equal(out, expected(model, IDS, seeds[1], attention_mask=KEEP))


def test_transformers_own_models_are_asked_as_one():
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=VOCAB, hidden_size=HIDDEN, **sizes)
    bert = transformers.BertModel(config).train()
    for read in (
        lambda arguments: arguments["attention_mask"],
        {"attention_mask": "attention_mask"},
    ):
        handle = apply_neftune(bert, 5.0, samples=read)
        bert(IDS, attention_mask=KEEP)
        stats = handle.stats()
        assert (stats["length_min"], stats["length_max"]) == (2, 8)


def seeds(count):
    torch.manual_seed(7)
    return [int(torch.empty((), dtype=torch.int64).random_(-(2**63), None)) for _ in range(count)]


def test_a_mapping_reaches_the_ids_that_it_names():
    one, other = seeds(2)
    model, _ = built(Pair, samples=[{"input_ids": "target", "attention_mask": "keep"}])
    called(model, IDS, KEEP, OTHER)
    assert torch.equal(model.source, expected(model, IDS, one))
    assert torch.equal(model.target, expected(model, OTHER, other, attention_mask=KEEP))
    model, _ = built(
        Pair,
        samples=[
            {"input_ids": "source", "attention_mask": "keep"},
            {"input_ids": "target", "lengths": "keep"},
        ],
    )
    called(model, IDS, KEEP, IDS.clone())
    assert torch.equal(model.source, expected(model, IDS, one, attention_mask=KEEP))
    model, _ = built(Pair, samples={"attention_mask": "keep"})
    called(model, IDS, KEEP, OTHER)
    assert torch.equal(model.source, expected(model, IDS, one, attention_mask=KEEP))
    assert torch.equal(model.target, expected(model, OTHER, other)), "not by its shape"


def rows_joined(mask):
    """Rows are samples of their own there, too."""
    return (mask * torch.arange(1, len(mask) + 1)[:, None]).view(-1)


PLACES = {
    "the ids": lambda ids: (ids, lambda mask: mask),
    "a copy": lambda ids: (ids.clone(), lambda mask: mask),
    "flattened": lambda ids: (ids.view(-1), rows_joined),
    "flattened copy": lambda ids: (ids.clone().view(-1), rows_joined),
    "a prefix": lambda ids: (ids[:, :-1], lambda mask: mask[:, :-1]),
    "a prefix, copied": lambda ids: (ids[:, :-1].clone(), lambda mask: mask[:, :-1]),
    "shifted, copied": lambda ids: (ids[:, 1:].clone(), lambda mask: mask[:, 1:]),
    "a chunk": lambda ids: (ids[:, 2:5], lambda mask: mask[:, 2:5]),
    "a chunk, copied": lambda ids: (ids[:, 2:5].clone(), lambda mask: mask[:, 2:5]),
    "rows": lambda ids: (ids[1:], lambda mask: mask[1:]),
    "reordered": lambda ids: (ids[[2, 0, 1]], lambda mask: mask[[2, 0, 1]]),
    "a window": lambda ids: (F.pad(ids, (0, 4)), lambda mask: F.pad(mask, (0, 4))),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("word", ["attention_mask", "lengths", "noise_mask"])
def test_where_the_ids_lie_decides(name, word):
    ids, of = PLACES[name](IDS)
    model, handle = built()
    given = KEEP.sum(1) if word == "lengths" else KEEP
    with handle.told(input_ids=IDS, **{word: given}):
        out = called(model, ids)
    said = {"noise_mask" if word == "noise_mask" else "attention_mask": of(KEEP)}
    assert torch.equal(out, expected(model, ids, **said))


@pytest.mark.parametrize("of", [torch.Tensor.t, lambda ids: ids.t().contiguous()])
@pytest.mark.parametrize("word", ["attention_mask", "lengths", "noise_mask"])
def test_transposed_ids_keep_their_samples(of, word):
    model, handle = built()
    said = {word: KEEP.sum(1) if word == "lengths" else KEEP}
    with handle.told(input_ids=IDS, **said):
        out = called(model, of(IDS))
    assert torch.equal(out, expected(model, **said).transpose(0, 1))


def test_told_is_heard_where_no_forward_is():
    """An inner model called by its forward, which runs no hooks."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = Words()

        def forward(self, input_ids, attention_mask=None):
            return self.words.table(input_ids)

    torch.manual_seed(0)
    model = Inner().train()
    handle = apply_neftune(model, 5.0, embedding="words.table", embedding_multiplier=1.0)
    with handle.told(attention_mask=KEEP), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(7)
        assert torch.equal(model.forward(IDS), expected(model, attention_mask=KEEP))
        with handle.told(lengths=torch.tensor([8, 8, 1])):
            out = called(model, IDS, KEEP)
        assert torch.equal(out, expected(model, lengths=torch.tensor([8, 8, 1]))), "the innermost"
        assert torch.equal(called(model, IDS), expected(model, attention_mask=KEEP))
    with pytest.warns(UserWarning, match=r"outside its model's forward.*handle.told\("):
        model.forward(IDS)
    assert torch.equal(called(model, IDS), expected(model))


def test_told_ends_with_an_exception_and_speaks_to_one_model():
    model, handle = built()
    other, _ = built()
    with pytest.raises(KeyboardInterrupt), handle.told(attention_mask=KEEP):
        assert torch.equal(called(other, IDS), expected(other))
        raise KeyboardInterrupt
    assert torch.equal(called(model, IDS), expected(model))


def test_a_checkpoint_that_recomputes_outside_takes_what_its_first_pass_was_told():
    model, handle = built()
    weight = model.words.table.weight
    gradients = []
    for recomputed in (False, True):
        weight.grad = None
        torch.manual_seed(7)
        with handle.told(attention_mask=KEEP):
            out = (
                checkpoint(lambda ids: model(ids).square(), IDS, use_reentrant=False)
                if recomputed
                else model(IDS).square()
            )
        with handle.told(attention_mask=torch.ones_like(KEEP)):
            out.sum().backward()
        gradients.append(weight.grad)
    assert same_bits(*gradients)


def test_compiled():
    torch._dynamo.reset()
    model, handle = built(samples={"attention_mask": "keep"})
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(called(compiled, IDS, KEEP), expected(model, attention_mask=KEEP))
    handle.samples = None
    with handle.told(key_padding_mask=KEEP == 0):
        assert torch.equal(called(compiled, IDS), expected(model, attention_mask=KEEP))
    assert torch.equal(called(compiled, IDS), expected(model))


# ---- lines to paste


class Many(Net):
    def forward(self, tokens, attention_mask=None, **others):
        return self.words(tokens)


def said_of(model, *args, **given):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        called(model, *args, **given)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("lengths", [[[2, 3], [8], [1, 6, 1]], [(8,), (8,), (8,)]])
def test_lists_of_lengths_are_offered_and_do_what_is_promised(lengths):
    model, handle = built()
    (message,) = said_of(model, IDS, doc_lens=lengths, sizes=[3, 4], names=["a"] * 3)
    line = 'doc_lens (a list of 3) by samples={"document_lengths": "doc_lens"}'
    assert line in message and "sizes" not in message and "names" not in message
    handle.samples = {"document_lengths": "doc_lens"}
    rows = [[1] * a + [2] * b + [3] * c for a, b, c in padded(lengths)]
    mask = torch.tensor([(row + [0] * 8)[:8] for row in rows])
    out = called(model, IDS, doc_lens=lengths)
    assert torch.equal(out, expected(model, attention_mask=mask))


def padded(lengths):
    return [(*one, 0, 0, 0)[:3] for one in lengths]


def test_a_flat_list_is_offered_for_a_single_row():
    model, _ = built()
    (message,) = said_of(model, IDS.view(-1), seqlens=[3, 5, 16], others=[3, 5])
    assert 'seqlens (a list of 3) by samples={"document_lengths": "seqlens"}' in message
    assert "others" not in message


@pytest.mark.parametrize("mask", [object(), torch.zeros(3, 1, 8, 8)], ids=["none", "4 axes"])
def test_a_mask_that_says_nothing_names_what_could_once(mask):
    model, handle = built(Many)
    (message,) = said_of(model, IDS, mask, keep=KEEP)
    assert "attention_mask that is not" in message
    line = 'keep (3, 8) int64 by samples={"attention_mask": "keep"}'
    assert message.count(line) == 1
    assert message.count("samples=...") <= 1 and message.count("handle.told(") <= 1
    handle.samples = {"attention_mask": "keep"}
    assert not said_of(model, IDS, mask, keep=KEEP)
    assert torch.equal(called(model, IDS, mask, keep=KEEP), expected(model, attention_mask=KEEP))


def test_a_mask_of_other_ids_names_what_could():
    model, handle = built(samples={"attention_mask": "keep"})
    (message,) = said_of(model, IDS, KEEP[:, :5], real=KEEP)
    assert message.startswith("an attention_mask of shape (3, 5) does not fit")
    assert message.count('real (3, 8) int64 by samples={"attention_mask": "real"}') == 1
    assert message.count("handle.told(") == 1
    model, handle = built()
    with handle.told(attention_mask=KEEP[:, :5]):
        (message,) = said_of(model, IDS)
    assert "whose input_ids it is" in message
