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


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_negated_noise_is_the_papers(distribution, capturable):
    model = Net().train()
    handle = apply_neftune(model, 5.0, distribution=distribution, capturable=capturable)
    model(**BATCH)
    ratio = handle.stats()["max_noise_ratio"]
    handle.sign = -1
    checked = handle.check(**BATCH)
    assert checked["ok"] and checked["sites"][0]["arrives"] == pytest.approx(1, abs=1e-6)
    torch.manual_seed(7)
    model(**BATCH)
    negated = handle.stats()["max_noise_ratio"]
    handle.sign = 1
    torch.manual_seed(7)
    model(**BATCH)
    assert negated == handle.stats()["max_noise_ratio"] > 0 < ratio


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


# ---- what is no fault, and what is no proof


def test_a_table_that_only_names_others_is_no_fault():
    """T5 looks nothing up in `shared`, whose weight is that of its encoder's and decoder's."""
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": 8, "num_layers": 1}
    tokens = {"num_heads": 4, "pad_token_id": 0, "decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**small, **tokens))
    checked = apply_neftune(model.train(), 5.0).check(**BATCH, labels=IDS)
    assert checked["ok"] and checked["said"] == []
    ran = {site["site"]: site["arrives"] is not None for site in checked["sites"]}
    assert ran == {"shared": False, "encoder.embed_tokens": True, "decoder.embed_tokens": True}
    other = Net().train()
    other.another = nn.Embedding(VOCAB, HIDDEN)
    other.get_input_embeddings = lambda: other.another
    checked = apply_neftune(other, 5.0).check(**BATCH)
    assert not checked["ok"] and "another: no noise in this forward" in str(checked)


def test_what_was_skipped_before_is_no_reason_now():
    model = Net().eval()
    handle = apply_neftune(model, 5.0)
    model(**BATCH)
    handle.noise_alpha, before = 5.0, handle.stats()["skipped"]
    model.forward, forward = lambda **batch: torch.zeros(()), model.forward
    (site,) = handle.check(**BATCH)["sites"]
    assert site["arrives"] is None and site["why"] is None
    model.forward = forward
    assert handle.stats()["skipped"] == before


def test_nothing_but_padding_is_said():
    model = Net().train()
    checked = apply_neftune(model, 5.0).check(input_ids=IDS, attention_mask=KEEP * 0)
    assert not checked["ok"] and checked["said"] == [
        "words: no noise in this forward (every token is padding)"
    ]


def test_what_could_not_be_measured_is_not_called_exact():
    class Functional(Net):
        def forward(self, input_ids, attention_mask=None):
            return torch.tanh(self.words(input_ids) * self.factor)

    model = Functional().train()
    handle = apply_neftune(model, 5.0)
    checked = handle.check(**BATCH)
    assert not checked["ok"] and "could not be measured (what enters" in str(checked)
    handle.embedding_multiplier = 1.0
    assert handle.check(**BATCH)["ok"]

    model = Net(factor=torch.tensor([1.0, 2.0, 4.0])[:, None, None]).train()
    handle = apply_neftune(model, 5.0)
    for said in (None, 2.5):
        handle.embedding_multiplier = said
        checked = handle.check(**BATCH)
        assert not checked["ok"] and "multiplied by 1 to 4, each token" in checked["said"][-1]
    handle.embedding_multiplier = lambda given: torch.tensor([1.0, 2.0, 4.0])
    assert handle.check(**BATCH)["ok"]


def test_what_was_not_heard_stands_beside_the_verdict():
    model = Net().train()
    checked = apply_neftune(model, 5.0).check(input_ids=IDS, attention_mask=KEEP[:, :5])
    assert "exact: see below" in str(checked) and "(3, 5)" in str(checked)


def test_a_batch_stays_the_callers():
    class Popping(Net):
        def forward(self, batch):
            batch["more"] = 1
            return super().forward(batch.pop("input_ids"), batch.pop("attention_mask"))

    batch, model = dict(BATCH), Popping().train()
    checked = apply_neftune(model, 5.0).check(batch=batch)
    assert checked["ok"] and batch == BATCH and batch["input_ids"] is IDS


def test_a_batch_without_values_is_refused():
    model = Net().train()
    handle = apply_neftune(model, 5.0)
    with pytest.raises(ValueError, match="input_ids on the meta device has none"):
        handle.check(input_ids=IDS.to("meta"), attention_mask=KEEP)


def test_a_forward_that_raises_leaves_the_model_as_it_was():
    class Raising(Net):
        def forward(self, input_ids):
            self.calls = 1
            self.words(input_ids)
            raise ValueError("of the model's own")

    model = Raising().eval()
    handle = apply_neftune(model, 5.0)
    state, hooks = torch.get_rng_state(), len(model.words._forward_hooks)
    with pytest.raises(ValueError, match="of the model's own"):
        handle.check(input_ids=IDS)
    assert not model.training and not hasattr(model, "calls") and handle.stats()["calls"] == 0
    assert torch.equal(torch.get_rng_state(), state) and len(model.words._forward_hooks) == hooks


@pytest.mark.parametrize("off", ["no_grad", "frozen", "eval"])
def test_a_check_needs_neither_grad_nor_mode(off):
    model = Net(factor=FACTOR).train(off != "eval")
    handle = apply_neftune(model, 5.0)
    model.words.weight.requires_grad_(off != "frozen")
    with torch.set_grad_enabled(off != "no_grad"):
        assert handle.check(**BATCH)["ok"]
    assert model.training is (off != "eval")


def test_gradients_and_hooks_stay():
    model = Net().train()
    handle = apply_neftune(model, 5.0)
    model(**BATCH).sum().backward()
    gradients = [(one.grad, one.grad.clone()) for one in model.parameters()]
    hooks = [(*one._forward_hooks, *one._forward_pre_hooks) for one in model.modules()]
    handle.check(**BATCH)
    after = [one.grad for one in model.parameters()]
    assert all(a is b and torch.equal(a, c) for a, (b, c) in zip(after, gradients, strict=True))
    assert hooks == [(*one._forward_hooks, *one._forward_pre_hooks) for one in model.modules()]


PACKED = {
    "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]]),
    "attention_mask": torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3]]),
}


@pytest.mark.parametrize("told", PACKED)
@pytest.mark.parametrize("fused", [None, False])
def test_a_pack(fused, told):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "intermediate_size": 16}
    config = transformers.LlamaConfig(vocab_size=VOCAB, num_attention_heads=4, **small)
    model = transformers.LlamaModel(config).train()
    handle = apply_neftune(model, 5.0, fused=fused)
    checked = handle.check(input_ids=IDS[:1], **{told: PACKED[told]})
    (site,) = checked["sites"]
    assert checked["ok"] and site["lengths"] == [3, 2, 3] and told in site["heard"]
