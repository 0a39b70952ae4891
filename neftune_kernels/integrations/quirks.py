"""How packages tell samples under names of their own, keyed by what their forward is called.

A row is found by (top package, forward.__qualname__): a namesake in a user's own package has none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .telling import documents_of

Given = dict[str, Any]
Row = Callable[[Given], Given]  # a forward's arguments → those that transformers would call them


def _renamed(ids: str, name: str, word: str) -> Row:
    def read(given: Given) -> Given:
        return {"input_ids": given.get(ids), word: given.get(name)}

    return read


def _by_lengths(ids: str, name: str) -> Row:
    """Documents' lengths, as a mask that numbers them."""

    def read(given: Given) -> Given:
        tokens, lengths = given.get(ids), given.get(name)
        if lengths is None or not isinstance(tokens, Tensor):
            return {"input_ids": tokens}
        return {"input_ids": tokens, "attention_mask": documents_of(lengths, tokens)}

    return read


def _by_sequence_id(ids: str) -> Row:
    """Documents' numbers from 0, negative or False for padding; a mask beside them counts too."""

    def read(given: Given) -> Given:
        number, mask = given.get("sequence_id"), given.get("attention_mask")
        if not isinstance(number, Tensor):
            return {"input_ids": given.get(ids)}
        if number.dtype != torch.bool:
            number = (number + 1).clamp(min=0)
        if isinstance(mask, Tensor) and mask.shape == number.shape:
            number = number * (mask != 0)
        return {"input_ids": given.get(ids), "attention_mask": number}

    return read


def _presence(given: Given) -> Given:
    """2 is attention to all tokens, no document of its own."""
    mask = given.get("attention_mask")
    return {"attention_mask": mask != 0} if isinstance(mask, Tensor) else {}


ROWS: dict[tuple[str, str], Row] = {
    ("torchtune", "TransformerDecoder.forward"): _renamed("tokens", "input_pos", "position_ids"),
    ("torchtitan", "Transformer.forward"): _renamed("tokens", "positions", "position_ids"),
    ("torchtitan", "Decoder.forward"): _renamed("tokens", "positions", "position_ids"),
    ("olmo", "OLMo.forward"): _by_lengths("input_ids", "doc_lens"),
    ("olmo_core", "Transformer.forward"): _by_lengths("input_ids", "doc_lens"),
    ("llmfoundry", "MPTModel.forward"): _by_sequence_id("input_ids"),
    ("transformers", "MPTModel.forward"): _by_sequence_id("input_ids"),
    ("esm", "ESMC.forward"): _by_sequence_id("sequence_tokens"),
    ("x_transformers", "TransformerWrapper.forward"): _renamed("x", "mask", "attention_mask"),
    ("transformers", "LongformerModel.forward"): _presence,
    ("transformers", "LEDEncoder.forward"): _presence,
    ("transformers", "LEDModel.forward"): _presence,
}


# These look tokens up time first, (T, B).
TRANSPOSED = frozenset({("transformers", "XLNetModel.forward")})
# These look up the padding that they append to a window, apart from their tokens.
PAD_WINDOWS = frozenset({("transformers", "LEDEncoder.forward")})


def key_of(model: nn.Module) -> tuple[str, str]:
    forward = type(model).forward
    package = getattr(forward, "__module__", "").split(".")[0]
    if package == "transformers_modules":  # code that came with a checkpoint
        package = "transformers"
    return package, getattr(forward, "__qualname__", "")


def row_of(model: nn.Module) -> Row | None:
    return ROWS.get(key_of(model))


def transposes(model: nn.Module) -> bool:
    return key_of(model) in TRANSPOSED


def pads_window(model: nn.Module) -> bool:
    return key_of(model) in PAD_WINDOWS
