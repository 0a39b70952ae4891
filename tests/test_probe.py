"""The look at a model of an unknown class: what it multiplies embeddings by, found by values."""

import functools
import gc
import math
import sys
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neftune_kernels import apply_neftune, noisy_embedding
from neftune_kernels.integrations import find, listening, probe
from neftune_kernels.integrations.multiples import Measured

WIDTH = 48
IDS = torch.randint(1, 50, (3, 8), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6])
ROOT = math.sqrt(WIDTH)


@pytest.fixture(autouse=True)
def nothing_kept():
    probe.KEPT.clear()


class Net(nn.Module):
    """Somebody's own code: `way` is what stands between the lookup and the first block."""

    def __init__(self, way, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.embed = nn.Embedding(50, WIDTH, dtype=dtype)
        self.positions = nn.Embedding(8, WIDTH, dtype=dtype)
        self.norm = nn.BatchNorm1d(WIDTH, dtype=dtype)
        self.drop = nn.Dropout(0.5)
        self.first = nn.Linear(WIDTH, WIDTH, dtype=dtype)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        return self.first(self.way(self, self.embed(input_ids)))


def in_place(net, x):
    x *= ROOT
    return x


def transposed(net, x):
    return net.norm((x * 3).transpose(1, 2)).transpose(1, 2)


WAYS = {
    "nothing": (lambda net, x: x, 1.0),
    "sqrt": (lambda net, x: x * ROOT, ROOT),
    "in place": (in_place, ROOT),
    "12": (lambda net, x: x * 12.0, 12.0),
    "an odd number": (lambda net, x: x * 0.8375, 0.8375),
    "a gradient shrink": (lambda net, x: x * 0.1 + x.detach() * 0.9, 1.0),
    "positions": (lambda net, x: x * ROOT + net.positions(torch.arange(8)), ROOT),
    "dropout, a module": (lambda net, x: net.drop(x * 5), 5.0),
    "transposed into a BatchNorm": (transposed, 3.0),
    "padding zeroed": (lambda net, x: x * ROOT * MASK[..., None], ROOT),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_the_factor_is_found(way, dtype, frozen):
    how, factor = WAYS[way]
    net = Net(how, dtype).train()
    net.embed.weight.requires_grad_(not frozen)
    apply_neftune(net, 5.0)
    seen = []
    net.embed.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if frozen and way == "in place":
            net.embed.register_forward_hook(lambda module, args, out: out.requires_grad_(False))
        net(IDS, attention_mask=MASK)
        net(IDS, attention_mask=MASK)
    found = net.embed._neftune.factors.get(dtype, 1.0)
    assert abs(found / factor - 1) <= (1e-6 if dtype is torch.float32 else 2**-9)
    alpha = torch.tensor(5.0, dtype=torch.float64) / found
    seed = net.embed._neftune.last.noise.seed
    expected = noisy_embedding(IDS, net.embed.weight, float(alpha), attention_mask=MASK, seed=seed)
    assert torch.equal(seen[-1], expected)
    told = [str(one.message) for one in said if "embedding_multiplier=" in str(one.message)]
    assert len(told) == (factor != 1), "said once, with the line to paste"


@pytest.mark.parametrize("factor", [ROOT, 12.0])
def test_the_usual_numbers_are_exact(factor):
    for dtype in (torch.float32, torch.bfloat16):
        net = Net(lambda net, x: x * factor, dtype).train()
        apply_neftune(net, 5.0)
        with pytest.warns(UserWarning, match="multiplies its embeddings by"):
            net(IDS, attention_mask=MASK)
        assert net.embed._neftune.factors[dtype] == factor


UNKNOWN = {
    "a function first": (lambda net, x: torch.tanh(x * 8), {}, "no multiple of the lookup"),
    "a cache": (lambda net, x: x * 8, {"past_key_values": [1]}, "given a cache"),
}


@pytest.mark.parametrize("way", UNKNOWN)
def test_what_cannot_be_told_is_1_and_says_so_once(way):
    how, given, why = UNKNOWN[way]
    net = Net(how).train()
    apply_neftune(net, 5.0)
    with pytest.warns(UserWarning, match=rf"not known whether Net .*{why}.*multiplier=1.0"):
        net(IDS, attention_mask=MASK, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(IDS, attention_mask=MASK, **given)
    assert net.embed._neftune.factors == {}


def test_a_factor_of_each_sample_warns_with_its_range():
    net = Net(lambda net, x: x * torch.tensor([1.0, 2.0, 4.0])[:, None, None]).train()
    apply_neftune(net, 5.0)
    with pytest.warns(UserWarning, match=r"by 1 to 4, each token or sample.*multiplier=2\.5"):
        net(IDS, attention_mask=MASK)


NORMED = lambda net, x: F.rms_norm(net.drop(x), (WIDTH,))  # noqa: E731  a module's input, then more


@pytest.mark.parametrize("ids", ["one token", "one prompt in every row"])
def test_equal_tokens_make_no_factor_of_a_norm(ids):
    """Of one token a norm's output is a multiple of the lookup; of a prompt that is in every row
    each column has its own.
    """
    ids = torch.full((3, 8), 7) if ids == "one token" else IDS[:1].expand(3, -1)
    net = Net(NORMED).train()
    handle = apply_neftune(net, 5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arrived = arriving(net, ids)
    paper = 5 / math.sqrt(8 * WIDTH)
    noise = (arrived - F.embedding(ids, net.embed.weight)).abs().amax((1, 2))
    assert bool((noise > 0.9 * paper).all()) and bool((noise <= paper * (1 + 1e-6)).all())
    checked = handle.check(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert checked["ok"], str(checked)


def arriving(net, ids):
    """What the dropout, the first module behind the lookup, is given."""
    given = []
    hook = net.drop.register_forward_pre_hook(lambda module, args: given.append(args[0].detach()))
    net(ids, torch.ones_like(ids))
    hook.remove()
    return given[-1]


@pytest.mark.parametrize("way", ["dropout, a module", "transposed into a BatchNorm", "positions"])
def test_a_look_leaves_nothing_behind(way):
    """RNG and buffers go on as they do where the number is said."""
    results = []
    for said in (None, WAYS[way][1]):
        net = Net(WAYS[way][0]).train()
        apply_neftune(net, 5.0, embedding_multiplier=said)
        hooks = [len(one._forward_pre_hooks) for one in net.modules()]
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = net(IDS, attention_mask=MASK)
        assert hooks == [len(one._forward_pre_hooks) for one in net.modules()]
        results.append(
            (out, torch.get_rng_state(), net.norm.running_mean, net.norm.num_batches_tracked)
        )
        out.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_compiled_first_forward_says_so():
    net = Net(lambda net, x: x * 8).train()
    apply_neftune(net, 5.0)
    with pytest.warns(UserWarning, match="first noisy forward is compiled.*embedding_multiplier="):
        torch.compile(net, backend="eager", fullgraph=True)(IDS, attention_mask=MASK)


def test_a_second_model_of_one_class_compiles_too():
    """What is asked outside the graph is asked of each model's own handle."""
    torch._dynamo.reset()
    for _ in range(3):
        net = Net(lambda net, x: x * 8).train()
        handle = apply_neftune(net, 5.0, embedding_multiplier=8.0)
        torch.compile(net, backend="eager", fullgraph=True)(IDS, attention_mask=MASK)
        assert handle.stats()["compiled_forwards"] == 1


def test_no_look_where_there_is_no_noise():
    net = Net(lambda net, x: x * 8).train()
    apply_neftune(net, 5.0)
    calls = []
    net.first.register_forward_pre_hook(lambda module, args: calls.append(1))
    net.embed.register_forward_hook(lambda module, args, out: calls.append(1))
    with torch.no_grad():
        net(IDS, attention_mask=MASK)
    net.eval()(IDS, attention_mask=MASK)
    assert len(calls) == 4


# ---- what is found is kept, and what changes is looked at again


class Configured(nn.Module):
    """Scales by what its config says, in a module beside the table."""

    def __init__(self, scale=8.0, width=WIDTH):
        super().__init__()
        torch.manual_seed(0)
        self.config = Config(scale)
        self.embed = nn.Embedding(50, width)
        self.scaled = Times(scale)
        self.first = nn.Linear(width, width)
        self.seen, self.log, self.calls, self.last = [], {}, 0, None

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        self.seen.append(1)
        self.log["calls"] = self.calls = self.calls + 1
        self.fresh = self.last = object()
        return self.first(self.scaled(self.embed(input_ids)))


class Config:
    def __init__(self, scale):
        self.scale = scale


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def looks(net, **given):
    """How often a forward looked at the model, and what the noise was divided by."""
    ran = []
    hook = net.embed.register_forward_hook(lambda module, args, out: ran.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net(IDS, attention_mask=MASK, **given)
    hook.remove()
    return len(ran) - 1, net.embed._neftune.factors.get(torch.float32, 1.0)


def test_what_is_found_is_kept_per_class_and_configuration():
    net = Configured().train()
    apply_neftune(net, 5.0)
    assert looks(net) == (1, 8.0)
    other = Configured().train()
    other.embed.weight.data.mul_(2)
    apply_neftune(other, 5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(IDS, attention_mask=MASK)
    for config, factor in ((Configured(4.0), 4.0), (Configured(8.0, 32), 8.0)):
        apply_neftune(config.train(), 5.0)
        assert looks(config) == (1, factor)
    again = Configured().train()
    again.eval()(IDS)
    apply_neftune(again.train(), 5.0)
    assert looks(again) == (1, 8.0), "it has counted its calls: that is another configuration"


class Told(nn.Module):
    """Its forward is told the factor."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.embed, self.block = nn.Embedding(64, 16), nn.Linear(16, 16)
        self.register_buffer("columns", torch.full((16,), scale))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids, scale=1.0):
        return self.block(self.embed(ids) * self.columns * scale)


def factor_of(net, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_neftune(net.train(), 5.0)
        net(*args)
    return net.embed._neftune.factors.get(torch.float32, 1.0)


def test_what_is_kept_is_that_of_the_same_arguments_and_buffers():
    assert factor_of(Told(), IDS, 1.0) == 1.0
    assert factor_of(Told(), IDS, 8.0) == 8.0
    assert factor_of(Told(2.0), IDS, 1.0) == 2.0
    assert factor_of(Told(4.0), IDS, 1.0) == 4.0
    net = Told()
    assert probe.configuration_of(net, IDS) == probe.configuration_of(Told(), IDS.flip(0))
    assert probe.configuration_of(net, IDS) != probe.configuration_of(net, IDS[:, 1:])
    net.columns[3] = 2.0
    assert probe.configuration_of(net) != probe.configuration_of(Told())


SCALE = 1.0


class Global(Told):
    """Its factor stands where nobody looks."""

    def forward(self, ids):
        return super().forward(ids, SCALE)


class OneTold(Told):
    """Of one row with positions nothing can be told."""

    def __init__(self):
        super().__init__(8.0)
        self.positions = nn.Embedding(8, 16)

    def forward(self, ids):
        positions = self.positions(torch.arange(ids.shape[1]))
        return self.block(self.embed(ids) * self.columns + positions)


def test_arguments_that_tell_nothing_take_what_others_told():
    """Of another model, or of this one by another apply_neftune; and nothing is said of it."""
    first = OneTold()
    assert factor_of(first, IDS) == 8.0
    for net in (OneTold(), first):
        apply_neftune(net.train(), 5.0).remove()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*embeddings")
            apply_neftune(net, 5.0)
            net(IDS[:1])
        assert net.embed._neftune.factors[torch.float32] == 8.0
        assert net.embed._neftune.multiplier_known


def test_arguments_that_tell_nothing_first_are_said():
    net = OneTold().train()
    apply_neftune(net, 5.0)
    with pytest.warns(UserWarning, match=r"not known whether OneTold .*NEFTune takes 1\."):
        net(IDS[:1])
    with pytest.warns(UserWarning, match="multiplies its embeddings by 8"):
        net(IDS)
    assert net.embed._neftune.factors[torch.float32] == 8.0


def test_what_stands_elsewhere_is_kept_until_it_is_said(monkeypatch):
    net = Global()
    assert factor_of(net, IDS) == 1.0
    monkeypatch.setitem(globals(), "SCALE", 8.0)
    apply_neftune(net, 5.0).remove()
    assert factor_of(net, IDS) == factor_of(Global(), IDS) == 1.0
    handle = apply_neftune(net, 5.0, embedding_multiplier=8.0)
    net(IDS)
    (row,) = handle.check(ids=IDS)["sites"]
    assert row["measured"] == pytest.approx(8.0) and row["arrives"] == pytest.approx(1.0)


def test_what_cannot_be_told_any_more_stays_what_it_was(monkeypatch):
    """A number changes, and the look cannot tell: the factor is the one before, and it is said."""
    net = Told()
    net.number = 1
    assert factor_of(net, IDS, 8.0) == 8.0
    net.number = 2
    with monkeypatch.context() as patch:
        patch.setattr(listening, "measure", lambda *args: {net.embed: Measured(why="it is a test")})
        with pytest.warns(UserWarning, match=r"NEFTune takes 8\. .*embedding_multiplier=8\.0"):
            for _ in range(listening.LOOKS):
                net(IDS, 8.0)
    assert net.embed._neftune.factors[torch.float32] == 8.0
    net.number = 3  # nobody has seen that it does not count
    with pytest.warns(UserWarning, match="has changed since"):
        net(IDS, 4.0)
    assert net.embed._neftune.factors[torch.float32] == 4.0


def test_parameters_that_are_shared_out_are_gathered_for_one_look(monkeypatch):
    """A rank that looked again, by what its own batch holds, would wait for the others."""
    monkeypatch.setattr(listening, "is_shared_out", lambda model: True)
    net, ran = Told(), []
    net.number = 1
    net.block.register_forward_pre_hook(lambda module, args: ran.append(1))
    assert factor_of(net, IDS, 8.0) == 8.0
    net.number, before = 2, len(ran)
    with pytest.warns(UserWarning, match="shared out among ranks"):
        net(IDS, 8.0)
    assert len(ran) == before + 1 and net.embed._neftune.factors[torch.float32] == 8.0
    other, ran = Told(), []
    other.number = 1
    other.block.register_forward_pre_hook(lambda module, args: ran.append(1))
    assert factor_of(other, IDS, 8.0) == 8.0 and len(ran) == 2, "what one rank kept others may not"
    same = Told()
    with pytest.warns(UserWarning, match="embeddings by 8"):
        apply_neftune(same.train(), 5.0)
        same(torch.ones(2, 4, dtype=torch.long), 8.0)
        ran = []
        same.block.register_forward_pre_hook(lambda module, args: ran.append(1))
        same(IDS, 8.0)
    assert len(ran) == 1


class Fallback(Told):
    """Whatever its blocks raise, it goes another way."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))

    def forward(self, ids, scale=1.0):
        embedded = self.embed(ids) * scale
        try:
            return self.block(embedded)
        except Exception:
            self.fell = True
            return embedded


def test_a_look_raises_nothing_that_a_forward_takes_for_its_own():
    net = Fallback()
    fell = []
    net.__class__ = type("Seen", (Fallback,), {"fell": property(None, lambda *_: fell.append(1))})
    assert factor_of(net, IDS, 8.0) == 8.0 and not fell


def test_noise_to_embedding_is_that_of_factors_given_for_each_row():
    found = []
    for said in (8.0, lambda given: torch.full((len(given["ids"]),), 8.0)):
        torch.manual_seed(0)
        net = Told().train()
        handle = apply_neftune(net, 5.0, embedding_multiplier=said)
        net(IDS, 8.0)
        found.append(handle.stats()["noise_to_embedding"])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and 0 < found[0] < 1


def test_what_is_kept_keeps_no_model_alive():
    net = Configured().train()
    apply_neftune(net, 5.0)
    looks(net)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None

    class Passing(Configured):
        pass

    net = Passing().train()
    apply_neftune(net, 5.0)
    looks(net)
    assert Passing in probe.KEPT
    del net, Passing
    find._kinds_of.cache_clear(), find._is_peft_class.cache_clear()  # bounded
    gc.collect()
    assert list(probe.KEPT) == [Configured]


@pytest.mark.parametrize(
    "attribute", [[nn.Linear(2, 2)], functools.partial(max, 1), nn.Linear(2, 2).forward]
)
def test_what_cannot_be_compared_is_looked_at_each_time(attribute):
    for _ in range(2):
        net = Configured().train()
        net.other = attribute
        apply_neftune(net, 5.0)
        assert looks(net) == (1, 8.0)


DIFFERENT = {
    "a number": lambda net: setattr(net, "scale", 3),
    "a class": lambda net: setattr(net, "scaled", type("Times", (Times,), {})(8.0)),
    "a function": lambda net: setattr(net, "how", lambda x: x),
    "a number of its config": lambda net: setattr(net.config, "scale", 3.0),
    "a list": lambda net: net.seen.append(-1),
    "a flag that equals a number": lambda net: setattr(net, "calls", False),
    "a tensor of one number": lambda net: net.register_buffer("f", torch.tensor(8.0)),
    "a dtype": lambda net: net.bfloat16(),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_configuration_is(what):
    net, other = Configured(), Configured()
    assert probe.configuration_of(net) == probe.configuration_of(other) is not None
    DIFFERENT[what](other)
    assert probe.configuration_of(net) != probe.configuration_of(other)


def swapped(net):
    net.scaled = Times(2.0)


CHANGES = {
    "a number of the model": lambda net: setattr(net, "outer", 2.0),
    "a module on the way": swapped,
    "the table": lambda net: setattr(net, "embed", nn.Embedding(60, WIDTH).train()),
}


class Outer(Configured):
    outer = None

    def __init__(self):
        super().__init__()
        self.outer = 8.0

    def forward(self, input_ids, attention_mask=None):
        self.calls += 1
        x = self.embed(input_ids) * self.outer
        return self.first(self.scaled(x))


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_after_apply_is_looked_at_again(what):
    net = Outer().train()
    net.scaled = Times(1.0)
    apply_neftune(net, 5.0)
    assert looks(net)[1] == 8.0
    assert looks(net)[0] == 1, "a number has changed"
    assert looks(net) == (0, 8.0), "and was only a count of calls"
    CHANGES[what](net)
    factor = {"a number of the model": 2.0, "a module on the way": 16.0}.get(what, 8.0)
    assert looks(net) == (what != "the table" or 1, factor)
    if what == "a number of the model":
        for factor in (4.0, 1.0, 2.0):
            net.outer = factor
            assert looks(net) == (1, factor), "it is a part of the factor, whenever it changes"


def test_attributes_that_a_look_changes_are_put_back():
    net = Configured().train()
    apply_neftune(net, 5.0)
    last = net.last
    inside = []
    net.first.register_forward_pre_hook(lambda module, args: inside.append(net.calls))
    assert looks(net) == (1, 8.0)
    assert (net.calls, net.seen, net.log) == (1, [1], {"calls": 1}) and net.last is not last
    net = Configured().train()
    with torch.no_grad(), probe.undisturbed(net):
        net(IDS)
    assert (net.calls, net.seen, net.log, net.last) == (0, [], {}, None)
    assert not hasattr(net, "fresh")


# ---- forwards that are not heard, or not as others


def test_a_site_that_is_only_told_says_that_it_does_not_know():
    net = Configured().train()
    handle = apply_neftune(net, 5.0)
    line = "not known whether the model multiplies.*no forward.*heard.*embedding_multiplier=1.0"
    with handle.told(attention_mask=MASK), pytest.warns(UserWarning, match=line):
        net.forward(IDS)
    handle.embedding_multiplier = 8.0
    with handle.told(attention_mask=MASK), warnings.catch_warnings():
        warnings.simplefilter("error")
        net.forward(IDS)
    handle.embedding_multiplier = None
    assert looks(net) == (1, 8.0)
    with handle.told(attention_mask=MASK), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(7)
        out = net.forward(IDS)
    seed = net.embed._neftune.last.noise.seed
    expected = noisy_embedding(IDS, net.embed.weight, 5.0 / 8, attention_mask=MASK, seed=seed)
    assert torch.equal(out, net.first(expected * 8.0))


def test_a_compiled_site_that_is_only_told_says_so():
    torch._dynamo.reset()
    net = Net(lambda net, x: x * 8).train()
    handle = apply_neftune(net, 5.0)
    forward = torch.compile(net.forward, backend="eager")
    with handle.told(attention_mask=MASK), pytest.warns(UserWarning, match="not known whether"):
        forward(IDS)


def test_noise_without_grad_is_divided_too():
    net = Net(lambda net, x: x * 8).train()
    apply_neftune(net, 5.0, noise_without_grad=True)
    with torch.no_grad():
        assert looks(net) == (1, 8.0)


def test_one_token_is_a_number_and_is_looked_at_again():
    net = Net(lambda net, x: x * 8).train()
    apply_neftune(net, 5.0)
    one = torch.full((2, 1), 7)
    with pytest.warns(UserWarning, match="multiplies its embeddings by 8"):
        net(one)
    assert net.embed._neftune.factors[torch.float32] == 8.0 and net.embed._neftune.state.unmeasured
    assert looks(net) == (1, 8.0) and looks(net) == (0, 8.0)


def test_an_embedding_that_trains_alone_says_that_it_does_not_know():
    net = Net(lambda net, x: x * 8).eval()
    net.embed.train()
    apply_neftune(net, 5.0)
    with pytest.warns(UserWarning, match="not known whether"):
        net(IDS, attention_mask=MASK)


class Methods(nn.Module):
    """A model without any forward."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)

    def encode(self, ids):
        return self.embed(ids) * 8.0


def test_a_model_of_methods_alone_says_that_it_does_not_know():
    net = Methods().train()
    handle = apply_neftune(net, 5.0, embedding="embed")
    line = "not known whether the model multiplies"
    with handle.told(attention_mask=MASK), pytest.warns(UserWarning, match=line):
        net.encode(IDS)


# ---- what may change a factor, wherever it is held


class Deep:
    def __init__(self):
        self.inner = {"scale": 2.0}


class Held(Net):
    of_class = 1.0

    def __init__(self):
        super().__init__(None)
        self.config = Deep()
        self.learned = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("kept", torch.tensor(1.0))
        self.scaled = Times(2.0)
        self.unused = nn.Parameter(torch.tensor(1.0))
        self.config.itself = self.config

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids) * self.config.inner["scale"] * self.of_class
        return self.first(self.scaled(x * self.learned * self.kept))


def in_place_of(net):
    net.config = Deep()
    net.config.inner["scale"] = 6.0


def steps(net):
    with torch.no_grad():
        net.learned.mul_(3.0)


HELD = {
    "a dictionary in a config": lambda net: net.config.inner.update(scale=6.0),
    "another config": in_place_of,
    "its class": lambda net: setattr(type(net), "of_class", 3.0),
    "a parameter": steps,
    "a parameter's data": lambda net: net.learned.data.fill_(3.0),
    "a buffer": lambda net: net.kept.fill_(3.0),
    "another buffer": lambda net: setattr(net, "kept", torch.tensor(3.0)),
    "a module beside the table": lambda net: setattr(net.scaled, "factor", 6.0),
}


@pytest.mark.parametrize("what", HELD)
def test_a_factor_that_changes_is_followed_wherever_it_is_held(what):
    net = type("Held", (Held,), {})().train()
    apply_neftune(net, 5.0)
    assert looks(net) == (1, 4.0) and looks(net) == (0, 4.0)
    HELD[what](net)
    assert looks(net) == (1, 12.0) and looks(net) == (0, 12.0)


def test_a_number_that_is_no_factor_is_looked_at_once():
    net = Held().train()
    apply_neftune(net, 5.0)
    assert looks(net) == (1, 4.0)
    for expected in (1, 0, 0):
        with torch.no_grad():
            net.unused.add_(1)
        assert looks(net) == (expected, 4.0)


def test_a_learned_factor_says_once_that_it_changes():
    net = Held().train()
    apply_neftune(net, 5.0)
    said = []
    for _ in range(4):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            net(IDS, attention_mask=MASK)
        said.append([str(one.message) for one in heard])
        steps(net)
    assert [len(one) for one in said] == [1, 1, 0, 0]
    assert "has changed since it was first looked at" in said[1][0]
    assert "embedding_multiplier=lambda given: ..." in said[1][0]
    assert net.embed._neftune.factors[torch.float32] == 4.0 * 27


OF_A_CLASS = {
    "a word": lambda kind: setattr(kind, "word", "other"),
    "a method": lambda kind: setattr(kind, "helper", lambda self: 2),
}


@pytest.mark.parametrize("what", OF_A_CLASS)
def test_what_a_class_holds_is_its_configuration_too(what):
    kind = type("Kind", (Net,), {"word": "one", "helper": lambda self: 1})
    before = probe.configuration_of(kind(None))
    assert before == probe.configuration_of(kind(None)) is not None
    OF_A_CLASS[what](kind)
    assert probe.configuration_of(kind(None)) != before


# ---- somebody's model around one of transformers


class Around(nn.Module):
    """factor: of what it looks up itself; None: it hands the ids on."""

    def __init__(self, factor=None):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
        torch.manual_seed(0)
        self.llm = transformers.GPT2Model(config)
        self.factor = factor

    def get_input_embeddings(self):
        return self.llm.wte

    def forward(self, input_ids, attention_mask=None):
        if self.factor is None:
            return self.llm(input_ids, attention_mask=attention_mask)
        embeds = self.llm.wte(input_ids) * self.factor
        return self.llm(inputs_embeds=embeds, attention_mask=attention_mask)


@pytest.mark.parametrize("factor", [None, 1.0, 8.0])
def test_a_factor_around_a_model_that_is_known(factor):
    net = Around(factor).train()
    handle = apply_neftune(net, 5.0)
    blocks = []
    net.llm.h[0].register_forward_pre_hook(lambda module, args: blocks.append(1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            net(IDS, attention_mask=MASK)
    assert net.llm.wte._neftune.factors.get(torch.float32, 1.0) == (factor or 1.0)
    assert [str(one.message)[:33] for one in said] == ["Around multiplies its embeddings "] * (
        factor == 8
    )
    assert len(blocks) == (3 if factor is None else 4), "a look ends where it is known"
    assert not net.llm.wte._neftune.state.unmeasured
    assert handle.check(input_ids=IDS, attention_mask=MASK)["ok"]
    inner = Around().llm
    assert apply_neftune(inner, 5.0) and not inner.wte._neftune.state.unmeasured


def test_a_look_around_a_known_model_that_tells_nothing_is_silent():
    """One row with positions, a cache, a forward that cannot be run: as without anybody around."""
    net = Around().train()
    apply_neftune(net, 5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(IDS[:1])
    net = Around().train()
    net.llm = torch.compile(net.llm, backend="eager")
    apply_neftune(net, 5.0, embedding="llm._orig_mod.wte")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        net(IDS, attention_mask=MASK)
    assert not [one for one in said if "multipl" in str(one.message)]


def test_a_look_around_a_known_model_that_fails_is_silent():
    class NeedsGrad(Around):
        def forward(self, input_ids, attention_mask=None):
            assert torch.is_grad_enabled()
            return super().forward(input_ids, attention_mask)

    net = NeedsGrad().train()
    apply_neftune(net, 5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(IDS, attention_mask=MASK)


# ---- threads


class Threaded(nn.Module):
    """Its first block keeps what arrived for each thread; `within` runs inside its forward."""

    def __init__(self, within=lambda: None):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.block = nn.Linear(32, 32)
        self.within = within
        self.arrived = threading.local()
        self.block.register_forward_pre_hook(self.keep)

    def keep(self, block, args):
        self.arrived.value = args[0].detach().clone()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        embedded = self.embed(input_ids) * 8.0
        self.within()
        return self.block(embedded)


def test_threads_that_begin_together_wait_for_one_look():
    """Each arrives with the noise of its own lengths; two looks at once would see each other."""
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    faults = []
    try:
        for _ in range(8):
            probe.KEPT.clear()
            torch.manual_seed(0)
            model = Threaded().train()
            weight, start = model.embed.weight.detach(), threading.Barrier(6)
            apply_neftune(model, 5.0)

            def run(length, model=model, weight=weight, start=start):
                ids = torch.arange(1, 17)[None]
                mask = (torch.arange(16) < length).long()[None]
                try:
                    start.wait()
                    model(ids, mask)
                    noise = (model.arrived.value - F.embedding(ids, weight) * 8.0)[0].abs()
                    paper = 5.0 / (length * 32) ** 0.5
                    # of 128 uniform draws and more none is beyond 0.8: 4e-13
                    if noise[length:].any() or not 0.8 * paper < noise.max() < 1.001 * paper:
                        faults.append((length, float(noise.max()) / paper))
                except Exception as error:
                    faults.append(error)

            threads = [threading.Thread(target=run, args=(length,)) for length in range(4, 16, 2)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for one in threads:
                    one.start()
                for one in threads:
                    one.join()
    finally:
        sys.setswitchinterval(switch)
    assert not faults


def test_a_thread_that_a_look_waits_for_says_so(monkeypatch):
    """A forward that waits for a thread of its own, which would look too."""
    monkeypatch.setattr(listening, "PATIENCE", 0.05)
    probe.KEPT.clear()
    other, said = Threaded().train(), []
    steers = apply_neftune(other, 5.0)

    def inside():
        def run():
            try:
                other(IDS)
            except RuntimeError as error:
                said.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    model = Threaded(inside).train()
    apply_neftune(model, 5.0)
    with pytest.warns(UserWarning, match="multiplies its embeddings by 8"):
        model(IDS)
    assert len(said) == 1 and "another thread has been looking" in said[0]
    assert steers.stats()["calls"] == 1, "in the forward itself nothing waits"
