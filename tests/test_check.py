"""handle.check(): is my noise on, and right? And what stats() tells beside it."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neftune_kernels import apply_neftune, neftune_noise

VOCAB, HIDDEN, FACTOR = 64, 32, 8.0
IDS = torch.randint(1, VOCAB, (3, 8), generator=torch.Generator().manual_seed(2))
KEEP = torch.tensor([[1] * 5 + [0] * 3, [1] * 2 + [0] * 6, [1] * 8])
BATCH = {"input_ids": IDS, "attention_mask": KEEP}


class Scaled(nn.Embedding):
    """A forward of its own: its noise is added behind it."""

    def forward(self, input):
        return super().forward(input) * 3.0


class Net(nn.Module):
    def __init__(self, kind=nn.Embedding, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.words = kind(VOCAB, HIDDEN)
        self.factor = factor
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(HIDDEN, 2))

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None, others=None):
        embedded = self.words(input_ids) * self.factor
        if not torch.compiler.is_compiling():
            random.random()  # as layer drop does
        return self.head(self.norm(embedded.transpose(1, 2)).transpose(1, 2))


def of(model, **options):
    handle = apply_neftune(model, 5.0, **options)
    return handle.check(**BATCH)


@pytest.mark.parametrize("factor", [1.0, FACTOR])
@pytest.mark.parametrize(("kind", "way"), [(nn.Embedding, "fused"), (Scaled, "behind")])
def test_a_right_model(kind, way, factor):
    model = Net(kind, factor).train()
    checked = of(model, replica=3)
    (site,) = checked["sites"]
    assert checked["ok"] and checked["noise_alpha"] == 5.0
    assert (site["site"], site["way"], site["replica"]) == ("words", way, 3)
    assert (site["multiplier"], site["measured"]) == (factor, factor)
    assert (site["heard"], site["lengths"]) == ("attention_mask", [5, 2, 8])
    assert site["padding"] is True and site["arrives"] == pytest.approx(1, abs=1e-6)
    assert "words" in str(checked) and "noise_alpha 5: exact" in str(checked)


def test_what_is_wrong_is_said_with_the_line_to_paste():
    checked = of(Net(factor=FACTOR).train(), embedding_multiplier=1.0)
    assert not checked["ok"] and checked["sites"][0]["arrives"] == pytest.approx(FACTOR, rel=1e-5)
    assert any("embedding_multiplier=8.0)" in line for line in checked["said"])
    assert "NOT as the paper's" in str(checked)
    model = Net().train()
    handle = apply_neftune(model, 5.0)
    checked = handle.check(input_ids=IDS, attention_mask=object())
    assert checked["ok"] and checked["sites"][0]["heard"] == "nothing"
    assert any("attention_mask that is not (batch, tokens)" in line for line in checked["said"])
    handle.noise_alpha = 0
    checked = handle.check(**BATCH)
    assert not checked["ok"] and "noise_alpha is 0" in checked["said"][0]


def test_noise_of_somebody_else_in_the_padding_is_seen():
    model = Net().train()
    model.words.register_forward_hook(lambda module, args, output: output + 0.1)
    checked = of(model, embedding_multiplier=1.0)
    assert not checked["ok"] and checked["sites"][0]["padding"] is False
    assert "words: padding is noised" in checked["said"] and "NOISED" in str(checked)


def test_everything_is_as_it_was():
    model = Net().eval()
    model.head[0].train()
    handle = apply_neftune(model, 5.0, embedding_multiplier=1.0)
    torch.manual_seed(3), random.seed(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states, stats = (torch.get_rng_state(), random.getstate()), handle.stats()
    assert handle.check(**BATCH)["ok"]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert handle.stats() == stats and all(one.grad is None for one in model.parameters())
    assert not model.training and not model.words.training and model.head[0].training
    assert not model.words._forward_hooks
    handle.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        handle.check(**BATCH)


def test_noise_to_embedding():
    model = Net().train()
    handle = apply_neftune(model, 5.0, embedding_multiplier=1.0)
    assert handle.stats()["noise_to_embedding"] is None
    model(**BATCH)
    seed = model.words._neftune.last.noise.seed
    noise = neftune_noise(IDS.shape, HIDDEN, 5.0, attention_mask=KEEP, seed=seed)[KEEP == 1]
    embedded = F.embedding(IDS, model.words.weight)[KEEP == 1]
    expected = (noise.double().square().mean() / embedded.double().square().mean()).sqrt()
    stats = handle.stats()
    assert stats["noise_to_embedding"] == float(expected)
    assert stats["skipped"] == {} and stats["compiled_forwards"] == 0


def test_compiled_forwards_are_counted_by_compilation():
    torch._dynamo.reset()
    model = Net().train()
    handle = apply_neftune(model, 5.0, embedding_multiplier=1.0)
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        compiled(**BATCH)
    stats = handle.stats()
    assert (stats["calls"], stats["compiled_forwards"]) == (0, 1)
