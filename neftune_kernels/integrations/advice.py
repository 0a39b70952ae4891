"""Lines to paste where NEFTune does not understand of which samples tokens are."""

from typing import Any

import torch
from torch import Tensor

from .arguments import KNOWN_NAMES
from .sequences import NO_IDS, is_ids, tensors_in, tokens_in

TELL = "tell NEFTune the samples with apply_neftune(..., samples=...) or handle.told(...)"
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def paste(given: dict[str, Any], ids: Tensor, many: bool = False) -> str:
    """What of a forward's arguments could tell the samples of these ids, by its shape, and the
    samples= that would say so.

    many: the forward looks up more than one sequence, so that the line names this one.
    """
    if torch.compiler.is_compiling():  # values would be asked for
        return TELL
    name = next((name for name, value in tokens_in(given) if value is ids), None) if many else None
    own = "" if name is None else f'"input_ids": "{name}", '
    lines = [
        _line(own, word, name, value)
        for name, value in tensors_in(given)
        if value is not ids and (word := _could_be(name, value, ids)) is not None
    ]
    if not lines:
        return TELL
    return f"of this call's arguments, {'; '.join(lines)} could tell. Or {TELL}"


def _line(own: str, word: str, name: str, value: Tensor) -> str:
    kind = str(value.dtype).removeprefix("torch.")
    what = f"{name} {tuple(value.shape)} {kind}"
    if word != "mask":
        return f"{what} by {_samples(own, word, name)}"
    padding = _samples(own, "key_padding_mask", name)
    return f"{what} by {_samples(own, 'attention_mask', name)} ({padding} if True means padding)"


def _samples(own: str, word: str, name: str) -> str:
    if own:
        return f'samples=[{{{own}"{word}": "{name}"}}]'
    return f'samples={{"{word}": "{name}"}}'


def _could_be(name: str, value: Tensor, ids: Tensor) -> str | None:
    """Our word for an argument of that shape."""
    if value.dtype not in WHOLE and "mask" not in name:
        return None
    if name in ("labels", "token_type_ids", "cache_position"):
        return None
    if value.shape == ids.shape and value.dim():
        if "pos" in name:
            return "position_ids"
        tokens = is_ids(value) and name not in NO_IDS and "mask" not in name
        return None if tokens and not _is_mask(value) else "mask"
    if value.dtype in (torch.int32, torch.int64) and value.dim() == 1:
        if ids.dim() > 1 and value.numel() == ids.shape[0]:
            return "lengths"
        return "cu_seqlens" if "cu" in name and name not in KNOWN_NAMES else None
    if value.dtype in (torch.int32, torch.int64) and value.dim() == 2 and "len" in name:
        return "document_lengths" if value.shape[0] == ids.shape[0] else None
    return None


def _is_mask(value: Tensor) -> bool:
    return value.is_cpu and bool(((value == 0) | (value == 1)).all())
