"""batch_first=False: ids (T, B), whose columns are samples."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from neftune_kernels import NEFTuneEmbedding, apply_neftune, noisy_embedding

VOCAB, HIDDEN = 64, 32
ROWS = torch.randint(1, VOCAB, (3, 8), generator=torch.Generator().manual_seed(2))
IDS = ROWS.t().contiguous()  # (T, B)
KEEP = torch.tensor([[1] * 5 + [0] * 3, [1] * 2 + [0] * 6, [1] * 8])
NUMBERS = torch.tensor([[1, 1, 2, 2, 2, 0, 0, 0], [1] * 8, [1, 2, 2, 2, 2, 2, 2, 3]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], list(range(8)), [0, 0, 1, 2, 3, 4, 5, 0]])
TOLD = {
    "nothing": {},
    "attention_mask": {"attention_mask": KEEP},
    "documents": {"attention_mask": NUMBERS},
    "lengths": {"lengths": KEEP.sum(1)},
    "position_ids": {"position_ids": POSITIONS},
    "position_ids of all": {"position_ids": torch.arange(8)[None]},
    "mask and position_ids": {"attention_mask": KEEP, "position_ids": POSITIONS},
    "noise_mask": {"noise_mask": KEEP, "attention_mask": NUMBERS},
    "noise_mask alone": {"noise_mask": KEEP},
}
OFFSETS = {"replica": 2, "sample_offset": 3, "position_offset": 5}


def turned(told):
    return {name: value.t() if value.dim() == 2 else value for name, value in told.items()}


@pytest.mark.parametrize("offsets", [{}, OFFSETS], ids=["no offsets", "offsets"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 5}, {"embed_scale": 1.5}])
@pytest.mark.parametrize("name", TOLD)
def test_the_noise_is_the_transposed_calls(name, options, offsets):
    torch.manual_seed(0)
    module = NEFTuneEmbedding(VOCAB, HIDDEN, batch_first=False, **options)
    rows = NEFTuneEmbedding(VOCAB, HIDDEN, _weight=module.weight.detach(), **options)
    ids = torch.where(KEEP == 1, ROWS, 5)
    out = module(ids.t(), seed=3, **turned(TOLD[name]), **offsets)
    expected = rows(ids, seed=3, **TOLD[name], **offsets)
    assert torch.equal(out, expected.transpose(0, 1)) and out.is_contiguous()
    with torch.no_grad():
        out = module(ids.t().contiguous(), seed=3, **turned(TOLD[name]), **offsets)
    assert torch.equal(out, expected.transpose(0, 1))
    for distribution in ("normal", "rademacher"):
        module.distribution = rows.distribution = distribution
        out = module(ids.t(), seed=3, **turned(TOLD[name]), **offsets)
        assert torch.equal(out, rows(ids, seed=3, **TOLD[name], **offsets).transpose(0, 1))


def test_gradients_and_compilation():
    torch._dynamo.reset()
    module = NEFTuneEmbedding(VOCAB, HIDDEN, batch_first=False)
    weights = torch.randint(-8, 9, (8, 3, HIDDEN)).float()  # whose sums are exact in any order
    (module(IDS, seed=3) * weights).sum().backward()
    plain = torch.zeros(VOCAB, HIDDEN).index_add_(0, IDS.flatten(), weights.flatten(0, 1))
    assert torch.equal(module.weight.grad, plain)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    expected = module(IDS, seed=3, attention_mask=KEEP.t())
    assert torch.equal(compiled(IDS, seed=3, attention_mask=KEEP.t()), expected)


def test_what_it_refuses():
    module = NEFTuneEmbedding(VOCAB, HIDDEN, batch_first=False)
    for ids in (IDS[0], IDS[None]):
        with pytest.raises(ValueError, match=r"takes ids of shape \(T, B\), got \("):
            module(ids)
    with pytest.raises(ValueError, match="cu_seqlens bounds documents of flattened rows"):
        module(IDS, cu_seqlens=torch.tensor([0, 24]))
    with pytest.raises(ValueError, match=r"attention_mask must have the shape \(8, 3\)"):
        module(IDS, KEEP)
    with pytest.raises(ValueError, match=r"attention_mask must have the shape \(8, 3\)"):
        module.eval()(IDS, KEEP)
    module(IDS[0]), module(IDS, KEEP.t())
    with pytest.raises(ValueError, match="lengths must have the leading axes"):
        module.train()(IDS, lengths=torch.ones(8, dtype=torch.int64))
    for build in (
        lambda: NEFTuneEmbedding(VOCAB, HIDDEN, batch_first=None),
        lambda: apply_neftune(Net(), embedding="embed", batch_first=1),
    ):
        with pytest.raises(TypeError, match="batch_first must be True or False, got"):
            build()


def test_the_module_keeps_it():
    module = NEFTuneEmbedding(VOCAB, HIDDEN, batch_first=False)
    assert "batch_first=False" in repr(module)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        NEFTuneEmbedding.from_embedding(module.to_embedding(), batch_first=False),
        NEFTuneEmbedding.from_pretrained(module.weight.detach(), batch_first=False),
    ):
        assert torch.equal(other.train()(IDS, seed=3), module(IDS, seed=3))
    del module.__dict__["batch_first"]  # pickled before there was the word
    assert torch.equal(module(ROWS, seed=3), noisy_embedding(ROWS, module.weight, 5.0, seed=3))


class Net(nn.Module):
    """Time first, as nn.LSTM is by default."""

    def __init__(self, batch_first=False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.drop = nn.Dropout(0.5)
        self.rnn = nn.LSTM(HIDDEN, 8, batch_first=batch_first)

    def forward(self, tokens, keep=None, padding=None):
        self.arrived = self.embed(tokens)
        return self.rnn(self.drop(self.arrived) + 1)[0]


def seed_of(model):
    return model.embed._neftune.last.noise.seed


SAID = {
    "attention_mask": ({"attention_mask": "keep"}, {"keep": KEEP.t()}),
    "key_padding_mask": ({"key_padding_mask": "padding"}, {"padding": KEEP == 0}),
    "lengths": ({"lengths": "keep"}, {"keep": KEEP.sum(1)}),
    "document_lengths": ({"document_lengths": "keep"}, {"keep": KEEP.sum(1)[:, None]}),
    "named ids": ([{"input_ids": "tokens", "attention_mask": "keep"}], {"keep": KEEP.t()}),
    "callable": (lambda given: given["keep"], {"keep": KEEP.t()}),
}


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", SAID)
def test_a_model_that_is_told(name, fused):
    samples, given = SAID[name]
    model = Net().train()
    handle = apply_neftune(
        model, 5.0, embedding="embed", samples=samples, batch_first=False, fused=fused
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS, **given)
    weight = model.embed.weight
    expected = noisy_embedding(ROWS, weight, 5.0, attention_mask=KEEP, seed=seed_of(model))
    assert torch.equal(model.arrived, expected.transpose(0, 1))
    assert handle.stats()["length_min"] == 2 and handle.stats()["samples"] == 3
    handle.samples = None
    with handle.told(key_padding_mask=KEEP == 0):
        model(IDS)
    expected = noisy_embedding(ROWS, weight, 5.0, attention_mask=KEEP, seed=seed_of(model))
    assert torch.equal(model.arrived, expected.transpose(0, 1))


def test_a_model_that_hears():
    class Hears(Net):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids)

    model = Hears().train()
    apply_neftune(model, 5.0, embedding="embed", batch_first=False)
    model(IDS, KEEP.t())
    expected = noisy_embedding(
        ROWS, model.embed.weight, 5.0, attention_mask=KEEP, seed=seed_of(model)
    )
    assert torch.equal(model.arrived, expected.transpose(0, 1))
    with pytest.warns(UserWarning, match=r"attention_mask .*\(8, 3\)"):
        model(IDS, KEEP)
    model.eval()(IDS, KEEP), model(IDS[:, :1].expand(8, 3))
    with pytest.raises(ValueError, match=r"takes ids of shape \(T, B\)"):
        model.train()(IDS[0])


@pytest.mark.filterwarnings("ignore:no forward around the embedding")
def test_a_module_that_reads_time_first_warns_once():
    model = Net().train()
    handle = apply_neftune(model, 5.0, embedding="embed")
    with pytest.warns(UserWarning, match=r"LSTM has batch_first=False.*batch_first=False\); if"):
        model(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS)
        handle.batch_first = False
        model(IDS)
        assert not model.rnn._forward_pre_hooks
        handle.batch_first = True
        handle.remove()
        warnings.filterwarnings("ignore", "no forward around")
        assert not model.rnn._forward_pre_hooks and not model._forward_pre_hooks
        for told in (Net(batch_first=True), Net()):
            with apply_neftune(told.train(), 5.0, embedding="embed"):
                told(IDS[:3])  # as many rows as columns: nothing can be told


def test_a_module_that_reads_something_else_time_first_does_not_warn():
    """Of as many rows, but not what was looked up."""

    class Other(Net):
        def forward(self, input_ids, attention_mask=None):
            return self.rnn(self.embed(input_ids)[:, :2])[0]

    model = Other().train()
    apply_neftune(model, 5.0, embedding="embed", embedding_multiplier=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ROWS)


@pytest.mark.filterwarnings("ignore:no forward around the embedding")
def test_an_attention_that_got_its_input_transposed_does_not_warn():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, HIDDEN)
            self.layer = nn.TransformerEncoderLayer(HIDDEN, 2, 16)

        def forward(self, tokens):
            return self.layer(self.embed(tokens).transpose(0, 1))

    model = Attends().train()
    apply_neftune(model, 5.0, embedding="embed")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "no forward around")
        model(ROWS)
    with pytest.warns(UserWarning, match="MultiheadAttention has batch_first=False"):
        model.layer(model.embed(ROWS))
    clone = copy.deepcopy(model)
    apply_neftune(clone, 5.0, embedding="embed").remove()
    assert not any(module._forward_pre_hooks for module in clone.modules())
    torch._dynamo.reset()
    torch.compile(Net().train(), backend="eager", fullgraph=False)(IDS)
