"""The look at a model of an unknown class: what it multiplies embeddings by, found by values."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neftune_kernels import apply_neftune, noisy_embedding

WIDTH = 48
IDS = torch.randint(1, 50, (3, 8), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6])
ROOT = math.sqrt(WIDTH)


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
    "functional dropout": (lambda net, x: F.dropout(x * 8, 0.5), {}, "no multiple of the lookup"),
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
