"""A look at a model leaves no trace: in the model, in generators, and in what it was given."""

import collections
import random
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from neftune_kernels import apply_neftune
from neftune_kernels.integrations import probe
from neftune_kernels.integrations.undisturbed import undisturbed

IDS = torch.randint(1, 50, (3, 8), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def nothing_kept():
    probe.KEPT.clear()


class Model(nn.Module):
    """move: what its forward does before it looks anything up."""

    def __init__(self, move=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.first = nn.Linear(16, 16)
        self.move = move
        self.counter = collections.Counter(calls=0)
        self.recent = collections.deque([0], maxlen=3)
        self.ordered = collections.OrderedDict(a=0)
        self.grouped = collections.defaultdict(list)
        self.plain = torch.zeros(3)
        self.nested = {
            "inner": {"calls": 0},
            "tensor": torch.zeros(2),
            "pair": ([0], torch.ones(2)),
        }
        self.seen = {1}
        self.steps = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.register_buffer("state", torch.zeros(2))
        self.drawn = torch.Generator().manual_seed(3)
        self.python = random.Random(3)
        self.numpy = np.random.default_rng(3)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, given=None):
        if self.move is not None:
            self.move(self, given)
        return self.first(self.embed(input_ids) * 8)


def adds(name):
    def move(net, given):
        with torch.no_grad():
            getattr(net, name).add_(1)

    return move


def nests(net, given):
    net.nested["inner"]["calls"] += 1
    net.nested["tensor"] += 1
    net.nested["pair"][0].append(1)
    net.nested["pair"][1].mul_(3)


MOVES = {
    "a Counter": lambda net, given: net.counter.update(calls=1),
    "a deque": lambda net, given: net.recent.append(1),
    "an OrderedDict": lambda net, given: net.ordered.update(a=net.ordered["a"] + 1),
    "a defaultdict": lambda net, given: net.grouped["a"].append(1),
    "a set": lambda net, given: net.seen.add(len(net.seen) + 1),
    "containers in containers": nests,
    "a tensor that is an attribute": adds("plain"),
    "a parameter that counts": adds("steps"),
    "a buffer": adds("state"),
    "a new buffer": lambda net, given: setattr(net, "state", net.state + 1),
    "a buffer that it makes": lambda net, given: net.register_buffer(
        f"made{len(net._buffers)}", torch.ones(1), persistent=False
    ),
    "a module that it makes": lambda net, given: net.add_module(
        f"made{len(net._modules)}", nn.Linear(2, 2)
    ),
    "its torch generator": lambda net, given: torch.rand(1, generator=net.drawn),
    "its python generator": lambda net, given: net.python.random(),
    "its numpy generator": lambda net, given: net.numpy.random(),
    "python's generator": lambda net, given: random.random(),
    "numpy's generator": lambda net, given: np.random.rand(),
    "torch's generator": lambda net, given: torch.rand(1),
}


def traces(net):
    """All that the moves move, as values."""
    nested = net.nested["inner"], net.nested["tensor"].tolist(), str(net.nested["pair"])
    containers = dict(net.counter), list(net.recent), dict(net.ordered), dict(net.grouped), net.seen
    tensors = net.plain.tolist(), float(net.steps), net.state.tolist()
    own = net.drawn.get_state().tolist(), net.python.getstate(), str(net.numpy.bit_generator.state)
    everybodys = (
        random.getstate(),
        [*map(str, np.random.get_state())],
        torch.get_rng_state().tolist(),
    )
    made = list(net._buffers), list(net._modules), net._non_persistent_buffers_set
    return repr((nested, containers, tensors, own, everybodys, made))


@pytest.mark.parametrize("what", MOVES)
def test_a_look_is_followed_by_the_same_forward(what):
    results = []
    for said in (None, 8.0):
        net = Model(MOVES[what]).train()
        apply_neftune(net, 5.0, embedding_multiplier=said)
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        before = traces(net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net(IDS)
        assert traces(net) != before
        results.append(traces(net))
        assert net.embed._neftune.factors.get(torch.float32, said) == 8.0
    assert results[0] == results[1]


def test_a_container_that_did_not_change_is_not_written():
    class Watched(dict):
        pass

    net = Model()
    held = net.nested
    with undisturbed(net):
        iterator = iter(held)
        next(iterator)
    held["inner"]["calls"] += 0
    assert next(iterator) == "tensor", "cleared and filled again, it would raise"


def pops(net, given):
    given.pop("extra")


GIVEN = {
    "a dictionary": (dict, pops),
    "an OrderedDict": (collections.OrderedDict, pops),
    "a UserDict": (collections.UserDict, pops),
    "a namespace": (
        lambda pairs: types.SimpleNamespace(values=torch.zeros(2), calls=0),
        lambda net, given: (given.values.add_(1), vars(given).update(calls=given.calls + 1)),
    ),
    "an object": (
        lambda pairs: Given(),
        lambda net, given: (given.values.add_(1), given.rows.append(1)),
    ),
    "a list": (
        lambda pairs: [torch.zeros(2)],
        lambda net, given: (given[0].add_(1), given.append(1)),
    ),
    "a generator": (
        lambda pairs: torch.Generator().manual_seed(1),
        lambda net, given: torch.rand(1, generator=given),
    ),
}


class Given:
    def __init__(self):
        self.values, self.rows = torch.zeros(2), []


def written(given):
    if isinstance(given, torch.Generator):
        return given.get_state().tolist()
    return repr(given if isinstance(given, (list, dict, collections.UserDict)) else vars(given))


@pytest.mark.parametrize("what", GIVEN)
def test_what_a_forward_is_given_is_changed_by_it_alone(what):
    make, move = GIVEN[what]
    results = []
    for said in (None, 8.0):
        net = Model(move).train()
        apply_neftune(net, 5.0, embedding_multiplier=said)
        given = make({"extra": 1, "more": 2})
        before = written(given)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net(IDS, given)
        assert written(given) != before
        assert net.embed._neftune.factors.get(torch.float32, said) == 8.0
        results.append(written(given))
    assert results[0] == results[1]


def test_what_a_look_warns_of_is_left_to_the_forward():
    """A reentrant checkpoint without grad; a warning made an error would end the look."""

    class Checkpointed(Model):
        def forward(self, input_ids):
            x = self.embed(input_ids) * 8
            warnings.warn("of the model's own", stacklevel=1)
            return checkpoint(self.first, x, use_reentrant=True)

    net = Checkpointed().train()
    apply_neftune(net, 5.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        net(IDS).sum().backward()
    told = [str(one.message) for one in said]
    assert not any("None of the inputs" in one for one in told)
    assert told.count("of the model's own") == 1
    assert net.embed._neftune.factors[torch.float32] == 8.0


def test_a_scripted_part_gets_no_hook_and_none_is_left():
    net = Model().train()
    net.first = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    apply_neftune(net, 5.0)
    hooks = [dict(one._forward_pre_hooks) for one in net.modules()]
    with pytest.warns(UserWarning, match="not known whether Model.*no multiple"):
        net(IDS)
    assert hooks == [dict(one._forward_pre_hooks) for one in net.modules()]


def test_no_look_inside_a_dispatch_mode():
    """It would be counted, or there would be no values; the next forward is looked at."""
    net = Model().train()
    apply_neftune(net, 5.0)
    line = "not known whether Model.*a dispatch mode is on"
    with FlopCounterMode(display=False) as flops, pytest.warns(UserWarning, match=line):
        net(IDS)
    assert flops.get_total_flops() == 2 * IDS.numel() * 16 * 16
    with pytest.warns(UserWarning, match="multiplies its embeddings by 8 "):
        net(IDS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        net(torch.ones(2, 3, dtype=torch.long))
