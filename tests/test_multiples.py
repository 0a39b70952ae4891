"""Shapes in which a factor is found by values: what stands between a lookup and the first block."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neftune_kernels import apply_neftune
from neftune_kernels.integrations import probe
from neftune_kernels.integrations.multiples import multiple, thinned

WIDTH, ROOT = 48, math.sqrt(48)
IDS = torch.randint(1, 50, (3, 8), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6])
COLUMNS = torch.arange(8)
SAMPLES = torch.tensor([1.0, 2.0, 4.0])[:, None, None]


@pytest.fixture(autouse=True)
def nothing_kept():
    probe.KEPT.clear()


class Model(nn.Module):
    def __init__(self, way, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.embed = nn.Embedding(50, WIDTH)
        self.positions = nn.Embedding(8, WIDTH)
        self.speakers = nn.Embedding(3, WIDTH)
        self.same = nn.Identity()
        self.drop = nn.Dropout(0.3)
        self.norm = nn.RMSNorm(WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Linear(WIDTH + 16, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.to(dtype)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        return self.way(self, self.embed(input_ids))


def measured(way, ids=IDS, dtype=torch.float32, forwards=1):
    """By what the noise is divided, and what was said."""
    model = Model(way, dtype).train()
    apply_neftune(model, 5.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(forwards):
            model(ids, attention_mask=MASK[: len(ids)])
    return model.embed._neftune.factors.get(dtype), [str(one.message) for one in said]


def packed(model, x):
    lengths = MASK.sum(1)
    return model.lstm(nn.utils.rnn.pack_padded_sequence(x * 8, lengths, batch_first=True))[0].data


def positions_apart(model, x):
    """Positions that go through a module of their own, of the lookup's shape."""
    x = model.same(x)
    positions = model.drop(model.positions(COLUMNS.expand(3, 8)))
    return model.first(x * 8 + positions)


def others_before(model, x):
    return model.wide(torch.cat((torch.ones(3, 8, 16), x * 8), -1))


def written_into(model, x):
    whole = torch.zeros(3, 8, WIDTH)
    whole[:, :] = model.same(x) * 8
    model.first(whole)
    whole[:, 1:] = F.rms_norm(x, (WIDTH,))[:, 1:]  # no multiple any more, and the lookup's
    return model.first(model.same(whole) + 1) * model.first(x * 2)


WAYS = {
    "a dropout, then the factor": lambda net, x: net.first(net.drop(x) * 8),
    "functional dropout": lambda net, x: net.first(F.dropout(x * 8, 0.3)),
    "functional dropout in place": lambda net, x: net.first(F.dropout(x * 8, 0.3, inplace=True)),
    "torch's dropout": lambda net, x: net.first(torch.dropout(x * 8, 0.3, True)),
    "a chunk": lambda net, x: net.first((x * 8).chunk(2, 1)[0]),
    "columns of others behind": lambda net, x: net.wide(
        torch.cat((x * 8, torch.ones(3, 8, 16)), -1)
    ),
    "columns of others before": others_before,
    "without padding": lambda net, x: net.first((x * 8)[MASK.bool()]),
    "packed": packed,
    "sorted": lambda net, x: net.first((x * 8)[[2, 0, 1]]),
    "a column less": lambda net, x: net.first((x * 8)[:, 1:]),
    "a part of (B, d, T)": lambda net, x: net.same((x * 8)[:, 1:].transpose(1, 2)),
    "returned behind a module": lambda net, x: net.same(x) * 8,
    "positions apart": positions_apart,
    "a speaker in each row": lambda net, x: net.first(
        x * 8 + net.speakers(torch.arange(3))[:, None]
    ),
    "speakers and positions": lambda net, x: net.first(
        x * 8 + net.speakers(torch.arange(3))[:, None] + net.positions(COLUMNS)
    ),
    "a negative one": lambda net, x: net.first(x * -8),
    "written into another": written_into,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_factor_is_8(way):
    factor, said = measured(WAYS[way])
    assert factor == 8.0 and len(said) == 1 and "embedding_multiplier=8.0)" in said[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("factor", [11.7, 0.98, 1.01, 22.4, ROOT, 23.5])
def test_a_number_near_a_usual_one_is_no_usual_one(factor, dtype):
    """bfloat16 rounds a product by 0.4 %, thousands of them tell more."""
    assert measured(lambda net, x: net.first(x * factor), dtype=dtype)[0] == factor
    with_positions = measured(
        lambda net, x: net.first(x * factor + net.positions(COLUMNS)), dtype=dtype
    )[0]
    assert with_positions == pytest.approx(factor, rel=1e-3)
    cast = multiple(torch.randn(3, 8, WIDTH), torch.zeros(3, 8, WIDTH, dtype=dtype))
    assert [one.factor for one in cast] == [None]


def test_an_arrival_of_lower_precision_than_the_lookup():
    embedded = torch.randn(3, 8, WIDTH, generator=torch.Generator().manual_seed(1))
    (found,) = multiple(embedded, embedded.bfloat16() * 11.7)
    assert found.factor == 11.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_of_samples_that_are_near_each_other_are_several(dtype):
    near = 1 + (SAMPLES - 1) * (0.01 if dtype is torch.bfloat16 else 1e-5)
    _, said = measured(lambda net, x: net.first(x * near.to(dtype)), dtype=dtype)
    assert len(said) == 1 and "each token or sample by its own number" in said[0]


def test_factors_of_samples_behind_a_module_are_said():
    _, said = measured(lambda net, x: net.first(net.same(x) * SAMPLES))
    assert len(said) == 1 and "by 1 to 4, each token or sample" in said[0]


def test_a_block_that_normalises_tokens_has_no_factor_of_its_own():
    factor, said = measured(lambda net, x: net.first(net.norm(x * 8)))
    assert factor == 8.0 and len(said) == 1
    assert measured(lambda net, x: net.first(net.norm(x)))[1] == []


def test_a_dropout_of_its_own_is_unknown():
    def thin(net, x):
        kept = torch.rand(x.shape) > 0.3
        return net.first(net.same(x) * kept * 8)

    _, said = measured(thin)
    assert len(said) == 1 and "a dropout of its own" in said[0]
    e = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    assert thinned(e, (3 * e).relu(), 1.0) and not thinned(e, e.relu(), 1.0)
    assert not thinned(e, e.sigmoid().where(e > 0, 0), 1.0) and not thinned(e, 3 * e, 1.0)


# ---- what one batch cannot tell the next may


@pytest.mark.parametrize("first", [IDS[:1], IDS[:1].expand(3, 8)], ids=["one row", "equal rows"])
def test_a_batch_that_tells_too_little_is_followed_by_another_look(first):
    model = Model(lambda net, x: net.first(x * 8 + net.positions(COLUMNS))).train()
    apply_neftune(model, 5.0)
    with pytest.warns(UserWarning, match="not known whether Model.*no multiple"):
        model(first)
    with pytest.warns(UserWarning, match="multiplies its embeddings by 8 "):
        model(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS)
    assert model.embed._neftune.factors[torch.float32] == 8.0


def test_a_model_that_stays_unknown_says_so_once_and_is_left_alone():
    looks = []
    model = Model(lambda net, x: looks.append(1) or F.linear(x * 8, net.first.weight)).train()
    apply_neftune(model, 5.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(6):
            model(IDS, attention_mask=MASK)
    told = [one for one in said if "not known" in str(one.message)]
    assert len(told) == 1 and len(looks) >= 6


def test_a_first_forward_that_fails_is_not_the_last_look():
    model = Model(lambda net, x: net.first(x * 8)).train()
    apply_neftune(model, 5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(IndexError):
            model(IDS + 50)
    with pytest.warns(UserWarning, match="multiplies its embeddings by 8 "):
        model(IDS, attention_mask=MASK)
    assert model.embed._neftune.factors[torch.float32] == 8.0


# ---- a table that is looked up more than once


class Twice(Model):
    """An encoder and a decoder that share their table."""

    scales = 8.0, 2.0
    blocks = True

    def forward(self, input_ids, decoder_input_ids, attention_mask=None):
        encoded = self.first(self.embed(input_ids) * self.scales[0])
        encoded = self.same(encoded) if self.blocks else encoded
        return self.first(self.embed(decoder_input_ids) * self.scales[1]) + encoded.mean()


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("scales", [(8.0, 2.0), (8.0, 8.0)])
def test_each_lookup_of_a_table_is_looked_at(scales, blocks):
    model = Twice(None).train()
    model.scales, model.blocks = scales, blocks
    del model.lstm  # nothing is kept of what holds weak references
    handle = apply_neftune(model, 5.0)
    said, ran = [], []
    model.embed.register_forward_hook(lambda module, args, out: ran.append(1))
    for _ in range(4):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            model(IDS, IDS.flip(0), attention_mask=MASK)
        said.append([str(one.message) for one in heard if "multipl" in str(one.message)])
    alike = scales[0] == scales[1]
    everything = [one for messages in said for one in messages]
    assert len(said[2]) == len(said[3]) == 0 and len(everything) == (
        1 if alike or not blocks else 2
    )
    assert ("by 2 to 8, each token or sample" in everything[-1]) is not alike
    first, second = (1, 2) if blocks else (2, 2 if alike else 0)
    assert len(ran) == 8 + first + second, "a second look where the first saw one lookup"
    checked = handle.check(input_ids=IDS, decoder_input_ids=IDS.flip(0), attention_mask=MASK)
    assert checked["ok"] is alike
