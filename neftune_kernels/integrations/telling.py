"""What a user says of the samples in words of ours: samples= and handle.told()."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..samples import PER_TOKEN, UNSAID, Samples
from .places import values_cost_nothing

WORDS = (
    "attention_mask",
    "lengths",
    "cu_seqlens",
    "position_ids",
    "noise_mask",
    "key_padding_mask",
    "document_lengths",
)
ONE_OF = ("attention_mask", "key_padding_mask", "lengths", "document_lengths", "cu_seqlens")
IDS = "input_ids"  # whose samples these are, where a model looks up more than one sequence
Read = Callable[[dict[str, Any]], Any] | Mapping[str, str] | Sequence[Mapping[str, str]]
Words = dict[str, Any]


def check_samples(samples: Any) -> Any:
    """samples= as it is kept: None, a callable, a dictionary or a list of dictionaries."""
    if samples is None or (callable(samples) and not isinstance(samples, Mapping)):
        return samples
    if isinstance(samples, Mapping):
        return _checked(samples)
    if not isinstance(samples, (list, tuple)) or not samples:
        raise TypeError(
            "samples must be callable with the forward's arguments, a mapping of our words to the "
            f"model's argument names, or a list of such mappings, got {samples!r}"
        )
    for one in samples:
        if not isinstance(one, Mapping) or IDS not in one:
            raise TypeError(
                f'every mapping of a list in samples= names its sequence, {{"{IDS}": "src_tokens", '
                f"...}}, got {one!r}"
            )
    return [_checked(one) for one in samples]


def _checked(mapping: Mapping[str, Any]) -> dict[str, str]:
    for word, name in mapping.items():
        if word not in (*WORDS, IDS):
            raise TypeError(f"samples= maps {', '.join(WORDS)} or {IDS}, got {word!r}")
        if not isinstance(name, str):
            raise TypeError(
                f"samples= maps {word} to the name of an argument of the model, got {name!r}"
            )
    check_one_of(mapping, "samples=")
    return dict(mapping)


def check_words(words: Words) -> Words:
    """What handle.told() is given."""
    if unknown := sorted(set(words) - {*WORDS, IDS}):
        raise TypeError(f"told() takes {', '.join(WORDS)} and {IDS}, got {', '.join(unknown)}")
    check_one_of(words, "told()")
    return words


def check_one_of(words: Mapping[str, Any], who: str) -> None:
    if len(said := [word for word in ONE_OF if words.get(word) is not None]) > 1:
        raise ValueError(f"{who} says at most one of {', '.join(ONE_OF)}, got {' and '.join(said)}")


def words_said(read: Any, given: dict[str, Any], names: tuple[str, ...], who: str) -> list[Words]:
    """What samples= makes of the arguments of a forward, a dictionary for each sequence.

    names: of that forward's parameters.
    """
    if isinstance(read, (dict, list)):
        mappings = [read] if isinstance(read, dict) else read
        return [
            {word: _reach(given, name, names, who) for word, name in mapping.items()}
            for mapping in mappings
        ]
    told = read(given)
    if told is None:
        return []
    if isinstance(told, Tensor):
        return [{"attention_mask": told}]
    if not isinstance(told, dict):
        raise TypeError(
            f"samples= must return an attention_mask tensor, a dictionary or None, got "
            f"{type(told).__name__}"
        )
    if unknown := sorted(set(told) - {*WORDS, IDS}):
        raise ValueError(f"samples= may return {', '.join(WORDS)}, got {', '.join(unknown)}")
    check_one_of(told, "samples=")
    return [told]


def _reach(given: dict[str, Any], name: str, names: tuple[str, ...], who: str) -> Any:
    """The argument of that name; "a.b" reaches into a dictionary. One that was left out is None."""
    if name in given:
        return given[name]
    if name in names:
        return None
    value: Any = given
    for part in name.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            if value is given and part in names:
                return None
            raise TypeError(
                f"samples= names {name!r}, which {who} is not given: on offer are "
                f"{', '.join(_on_offer(given, names))}"
            )
        value = value[part]
    return value


def _on_offer(given: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    inner = [
        f"{name}.{key}"
        for name, value in given.items()
        if isinstance(value, Mapping)
        for key in value
    ]
    return [*dict.fromkeys([*names, *given]), *inner]


def samples_of(words: Words, ids: Tensor, batch_first: bool = True) -> Samples:
    """The layout arguments for ids (..., T); for the transpose (B, T) of ids (T, B) where not
    `batch_first`: masks and position ids are then (T, B), key_padding_mask is (B, T).
    """
    said = {word: value for word, value in words.items() if value is not None and word != IDS}
    if not said:
        return UNSAID
    for word, value in said.items():
        if not isinstance(value, Tensor) and word != "document_lengths":
            raise TypeError(f"NEFTune was told {word}, which is {type(value).__name__}: no tensor")
    if not batch_first:
        if "cu_seqlens" in said:
            raise ValueError(
                "cu_seqlens bounds documents of flattened rows: with batch_first=False, where "
                "columns are samples, say attention_mask, lengths or document_lengths"
            )
        said = turned_values(said)
    padded = said.pop("key_padding_mask", None)
    if padded is not None:
        said["attention_mask"] = padded == 0
    lengths = said.pop("document_lengths", None)
    if lengths is not None:
        said["attention_mask"] = documents_of(lengths, ids)
    return Samples(**said)


def turned_values(said: Words, names: Collection[str] = PER_TOKEN) -> Words:
    """What is shaped as ids (T, B), as it would be of ids (B, T); all else as it is."""
    return said | {
        word: value.t()
        for word, value in said.items()
        if word in names and isinstance(value, Tensor) and value.dim() == 2
    }


def documents_of(lengths: Any, ids: Tensor) -> Tensor:
    """Documents' lengths, a row of them for each row of ids, 0 where a row has fewer, as a mask
    that numbers them; what they leave of a row is padding.
    """
    if not isinstance(lengths, Tensor):
        nested = [list(one) if isinstance(one, (list, tuple)) else one for one in lengths]
        if any(isinstance(one, list) for one in nested):
            most = max(len(one) for one in nested)
            nested = [[*one, *[0] * (most - len(one))] for one in nested]
        lengths = torch.tensor(nested, dtype=torch.int64)
    if lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"document_lengths must be int32 or int64, got {lengths.dtype}")
    rows = ids.shape[:-1].numel()
    columns = ids.shape[-1]
    if lengths.dim() == 1:
        lengths = lengths[None]
    if lengths.dim() != 2 or lengths.shape[0] != rows or not lengths.shape[1]:
        raise ValueError(
            f"document_lengths must have a row for each of the {rows} rows of ids, got "
            f"{tuple(lengths.shape)}"
        )
    ends = lengths.to(ids.device).long().cumsum(-1)
    if values_cost_nothing(ids) and int(ends[:, -1].max()) > columns:
        raise ValueError(
            f"document_lengths add up to {int(ends[:, -1].max())} in a row of {columns} tokens"
        )
    token = torch.arange(columns, device=ids.device).expand(rows, columns).contiguous()
    number = torch.searchsorted(ends, token, right=True) + 1
    return torch.where(token < ends[:, -1:], number, 0).view(ids.shape)
