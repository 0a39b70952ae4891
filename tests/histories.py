"""What a history of apply_neftune needs: models of several kinds, batches, and what must be true of
them, by the oracle that shares no code with the package.
"""

import types
from typing import Any, NamedTuple

import numpy as np
import oracle
import torch
from hypothesis import strategies as st
from torch import nn

VOCAB, HIDDEN, FACTOR = 24, 16, 4.0
ARRIVED: list[tuple[torch.Tensor, bool]] = []  # what entered a first block, and with grad or not


# ---- models


def arrive(module, args):
    """Forward pre-hook of a first block."""
    ARRIVED.append((args[0].detach().clone(), torch.is_grad_enabled()))


class Scaled(nn.Embedding):
    """A forward of its own: its noise is added behind it."""

    def forward(self, input):
        return super().forward(input) * 1.0


class Inner(nn.Module):
    def __init__(self, kind, factor, block):
        super().__init__()
        self.embed = kind(VOCAB, HIDDEN)
        self.factor = factor
        self.block = block(HIDDEN, HIDDEN)
        self.block.register_forward_pre_hook(arrive)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))  # a look puts it back

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        self.calls.add_(1)
        embeds = self.embed(input_ids)
        if self.factor != 1:
            embeds = embeds * self.factor
        return self.block(embeds)


class Outer(nn.Module):
    def __init__(self, *how):
        super().__init__()
        self.model = Inner(*how)

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.model(input_ids, attention_mask, position_ids)


class Recurrent(nn.LSTM):
    """Reads its input time first."""


def llama():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.model.layers[0].register_forward_pre_hook(arrive)
    return model


def gpt2():
    """Its head is tied to its embeddings; positions are added to them."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=1,
        n_head=2,
        n_positions=16,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.transformer.h[0].register_forward_pre_hook(arrive)
    return model


class Kind(NamedTuple):
    make: Any
    own: bool  # not transformers'
    factor: float = 1.0
    time_first: bool = False
    fusable: bool = True


KINDS = {
    "own": Kind(lambda: Outer(nn.Embedding, 1.0, nn.Linear), True),
    "behind": Kind(lambda: Outer(Scaled, 1.0, nn.Linear), True, fusable=False),
    "factor": Kind(lambda: Outer(nn.Embedding, FACTOR, nn.Linear), True, FACTOR),
    "time first": Kind(lambda: Outer(nn.Embedding, 1.0, Recurrent), True, time_first=True),
    "Llama": Kind(llama, False),
    "GPT-2": Kind(gpt2, False),
}


def build(kind):
    torch.manual_seed(0)
    return KINDS[kind].make().train()


def inner_of(model):
    """The model inside that has the same input embeddings, if there is one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "model", None) or base.transformer


# ---- batches

LENGTHS = {(3, 8): (5, 2, 8), (2, 5): (5, 1)}
HOW = ("right", "left", "none", "packed by positions", "packed by numbers", "holes")


class Batch(NamedTuple):
    """(B, T) each, or (T, B)."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None

    def given(self):
        said = {"attention_mask": self.mask, "position_ids": self.positions}
        return {"input_ids": self.ids} | {k: v for k, v in said.items() if v is not None}

    def turned(self):
        return Batch(*(None if one is None else one.t().contiguous() for one in self))


def batch_of(shape, how):
    """Rows are samples."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCAB, shape, generator=generator)
    lengths, column = torch.tensor(LENGTHS[shape])[:, None], torch.arange(shape[1])
    mask = positions = None
    if how == "right":
        mask = (column < lengths).long()
    elif how == "left":
        mask = (column >= shape[1] - lengths).long()
    elif how == "holes":
        mask = (torch.rand(shape, generator=generator) < 0.6).long()
    elif how == "packed by numbers":
        mask = torch.where(column < lengths, 1, 2)
        mask[:, -1] = 0
    elif how == "packed by positions":
        positions = torch.where(column < lengths, column, column - lengths)
    return Batch(ids, mask, positions)


SHAPES = st.sampled_from(sorted(LENGTHS))
BATCHES = st.builds(batch_of, SHAPES, st.sampled_from(HOW))
FOREIGN_BATCHES = st.builds(batch_of, SHAPES, st.sampled_from(HOW[:4]))


# ---- settings


def every_token(given):
    """samples= of who says that every token is real."""
    return None


SETTINGS = {
    "noise_alpha": st.sampled_from([5.0, 2.5, 0.0]),
    "replica": st.sampled_from([None, 3]),
    "noise_without_grad": st.sampled_from([False, False, True]),
    "distribution": st.sampled_from(["uniform", "uniform", "normal", "rademacher"]),
    "equal_variance": st.booleans(),
    "backend": st.sampled_from([None, None, "reference"]),
    "samples": st.sampled_from([None, None, every_token]),
    "fused": st.sampled_from([None, None, False]),
    "capturable": st.sampled_from([False, False, True]),
}
DEFAULTS = {
    "noise_alpha": 5.0,
    "replica": None,
    "noise_without_grad": False,
    "distribution": "uniform",
    "equal_variance": True,
    "backend": None,
    "samples": None,
    "fused": None,
    "capturable": False,
}


@st.composite
def settings_of(draw, kind):
    """Arguments of apply_neftune: few that are not the default's, as people call it."""
    names = draw(st.lists(st.sampled_from(sorted(SETTINGS)), max_size=3, unique=True))
    said = {name: draw(SETTINGS[name]) for name in names}
    if KINDS[kind].time_first:
        said["batch_first"] = False
    if KINDS[kind].factor != 1:
        said["embedding_multiplier"] = draw(st.sampled_from([None, KINDS[kind].factor]))
    return said


# ---- what must be true


def first_draw(seed):
    """What NEFTune draws after torch.manual_seed(seed), and the generator's state behind it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return int(drawn), generator.get_state()


def flat(value):
    return None if value is None else value.flatten().tolist()


class Told(NamedTuple):
    """What handle.told() is given: one word, and what it says as a mask."""

    word: str
    value: torch.Tensor
    mask: torch.Tensor | None
    lengths: tuple[int, ...] | None = None


def told_of(batch, word, time_first):
    """handle.told() of other samples than the batch's own arguments say; the mask is the ids'."""
    rows = batch.turned() if time_first else batch
    shape = tuple(rows.ids.shape)
    lengths = tuple(reversed(LENGTHS[shape]))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    as_ids = mask.t().contiguous() if time_first else mask
    if word == "lengths":
        return Told(word, torch.tensor(lengths), None, lengths)
    if word == "key_padding_mask":  # (B, T) always
        return Told(word, mask == 0, mask)
    return Told(word, as_ids, mask)


def noise_of(settings, batch, told, seed, factor):
    """(N, HIDDEN) of the ids as they lie, and the samples' lengths."""
    time_first = not settings.get("batch_first", True)
    rows = batch.turned() if time_first else batch
    shape = tuple(rows.ids.shape)
    if told is not None:
        said = {"lengths": told.lengths} if told.lengths else {"attention_mask": flat(told.mask)}
    elif settings["samples"] is not None:
        said = {}
    else:
        said = {"attention_mask": flat(rows.mask), "position_ids": flat(rows.positions)}
    places = oracle.places(shape, **said)
    noise = oracle.noise_of_tokens(
        places,
        HIDDEN,
        settings["noise_alpha"] / factor,
        seed,
        settings["replica"] or 0,
        settings["sign"],
        settings["distribution"],
        settings["equal_variance"],
    )
    if time_first:
        noise = noise.reshape(*shape, HIDDEN).transpose(1, 0, 2).reshape(-1, HIDDEN)
    lengths = sorted({one[0]: one[2] for one in places if one is not None}.values())
    return noise, lengths


def arrival(kind, model, weight, batch, noise=None):
    """What enters the first block of a model whose table is `weight`."""
    rows = weight[batch.ids.flatten()]
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32)).numpy()
    name = str(rows.dtype).removeprefix("torch.")
    embeds = wide if noise is None else oracle.embedded_with_noise(wide, noise, name)
    out = torch.from_numpy(np.ascontiguousarray(embeds)).to(rows.dtype)
    out = out.view(*batch.ids.shape, HIDDEN)
    if KINDS[kind].factor != 1:
        out = out * KINDS[kind].factor
    if kind == "GPT-2":
        columns = torch.arange(batch.ids.shape[1]) if batch.positions is None else batch.positions
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        table = base.transformer.wpe.weight
        table = table.full_tensor() if hasattr(table, "full_tensor") else table
        out = out + table.detach()[columns]
    return out


# ---- a model without noise and its twin


MARKS = ("_is_torch_compile", "_torchdynamo_wrapper_id")  # that torch leaves on what was compiled


def everything(model):
    """Class, hooks and attributes of every module, so that models can be compared."""
    return {
        name: (
            _kind(module),
            {
                key: _value(one, module)
                for key, one in vars(module).items()
                if key not in MARKS and not key.startswith("__composable")
            },
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def _kind(module):
    mro = type(module).__mro__
    assert not any("_neftune_base" in vars(one) for one in mro), f"{type(module)} is noisy"
    return [(one.__module__, one.__qualname__) for one in mro]


def _value(value, module):
    if isinstance(value, dict):
        # hooks go by numbers of torch's own
        return [
            (None if isinstance(key, int) else str(key), _value(one, module))
            for key, one in value.items()
        ]
    if isinstance(value, types.MethodType):
        return "method", value.__qualname__, value.__self__ is module
    if callable(value) and not isinstance(value, (nn.Module, torch.Tensor)):
        inside = getattr(value, "__wrapped__", None)
        return getattr(value, "__qualname__", type(value).__name__), _value(inside, module)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return type(value).__name__


def same_state(one, other):
    """Whether two state_dicts have the same keys and bits."""
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(
        torch.equal(_whole(left[name]), _whole(right[name])) for name in left
    )


def _whole(value):
    if not isinstance(value, torch.Tensor):
        return torch.zeros(())
    return value.full_tensor() if hasattr(value, "full_tensor") else value
