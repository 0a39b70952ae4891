"""Packages that tell samples under names of their own, by their published signatures."""

import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neftune_kernels import apply_neftune, noisy_embedding
from neftune_kernels.integrations.listening import Listener
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
    ("transformers.models", "LongformerModel", transformers, {"attention_mask": KEEP * 2}, KEEP),
    (
        "transformers.models",
        "LEDEncoder",
        transformers,
        {"attention_mask": KEEP + LEFT},
        KEEP | LEFT,
    ),
    ("transformers.models", "LEDModel", transformers, {"attention_mask": KEEP + LEFT}, KEEP | LEFT),
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


def called(model, ids, **given):
    apply_neftune(model, 5.0, embedding="embed")
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


def test_a_listener_of_a_model_with_a_row_pickles():
    module, name, forward, *_ = CASES[0]
    listener = Listener(State(), built(module, name, forward))
    assert listener.quirks.samples is not None
    assert pickle.loads(pickle.dumps(listener)).quirks is listener.quirks
