"""The sequences of ids that a forward was given, and what its arguments say of each."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..samples import PER_TOKEN
from .arguments import KNOWN_NAMES
from .places import Place, place
from .telling import turned_values

Given = dict[str, Any]
NO_IDS = (*KNOWN_NAMES, "labels", "token_type_ids", "cache_position")
# The arguments of an encoder-decoder that speak of its decoder's tokens.
OF_THE_DECODER = {
    "decoder_input_ids": "input_ids",
    "decoder_attention_mask": "attention_mask",
    "decoder_position_ids": "position_ids",
}


class Sequence(NamedTuple):
    ids: Tensor | None  # None: among the arguments under a name that is not known
    given: Given  # what speaks of them
    decoder: bool = False


def is_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)


def other_sequences(given: Given, decoder: bool, time_first: bool) -> list[Sequence]:
    """Beside the forward's own ids: dictionaries that hold input_ids, and its decoder's."""
    found = [dict(one) for one in _mappings(given.values()) if is_ids(one.get("input_ids"))]
    sequences = [sequence(one, decoder, time_first) for one in found]
    if is_ids(given.get("decoder_input_ids")):
        own = {name: given.get(theirs) for theirs, name in OF_THE_DECODER.items()}
        sequences.append(sequence(own, True, time_first))
    return sequences


def sequence(given: Given, decoder: bool, time_first: bool) -> Sequence:
    """The ids called input_ids, and what the arguments beside them say."""
    if time_first:
        own = [name for name, _ in tokens_in(given)]
        given = turned_values(given, (*PER_TOKEN, "seq_idx", *own))
    ids = given.get("input_ids")
    return Sequence(ids if isinstance(ids, Tensor) else None, given, decoder)


def _mappings(values: Any) -> Iterator[Mapping[str, Any]]:
    """sentence-transformers' features, FlagEmbedding's queries and passages, losses' lists."""
    for value in values:
        if isinstance(value, Mapping):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (one for one in value if isinstance(one, Mapping))


def tensors_in(given: Given) -> Iterator[tuple[str, Tensor]]:
    """By their names; those in dictionaries as "a.b"."""
    for name, value in given.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from (
                (f"{name}.{inner}", one) for inner, one in value.items() if isinstance(one, Tensor)
            )


def tokens_in(given: Given) -> Iterator[tuple[str, Tensor]]:
    """Those that may be token ids."""
    for name, value in tensors_in(given):
        if is_ids(value) and name.rpartition(".")[2] not in NO_IDS:
            yield name, value


def among_arguments(input: Tensor, given: Given) -> tuple[Tensor, Place] | None:
    """The argument that a lookup reads where ids have another name than ours."""
    for _, value in tokens_in(given):
        if (where := place(input, value)) is not None:
            return value, where
    return None
