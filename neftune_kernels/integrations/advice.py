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
    lines = could_tell(given, ids, many)
    return f"of this call's arguments, {lines} could tell. Or {TELL}" if lines else TELL


def could_tell(given: dict[str, Any], ids: Tensor, many: bool = False) -> str:
    """The same without our own words; empty where nothing could."""
    if torch.compiler.is_compiling():  # values would be asked for
        return ""
    name = next((name for name, value in tokens_in(given) if value is ids), None) if many else None
    own = "" if name is None else f'"input_ids": "{name}", '
    lines = [
        _line(own, word, name, value)
        for name, value in tensors_in(given)
        if value is not ids and (word := _could_be(name, value, ids)) is not None
    ]
    lines += [
        f"{name} (a list of {len(value)}) by {_samples(own, 'document_lengths', name)}"
        for name, value in given.items()
        if _are_lengths(value, ids)
    ]
    return "; ".join(lines)


def _are_lengths(value: Any, ids: Tensor) -> bool:
    """Whether a list may be the lengths of each row's documents, or of those of the only row."""
    if not isinstance(value, (list, tuple)) or not value or not ids.dim():
        return False
    nested = all(isinstance(one, (list, tuple)) for one in value)
    rows, columns = value if nested else [value], ids.shape[-1]
    return len(rows) == ids.shape[:-1].numel() and all(
        row
        and all(type(one) is int and one >= 0 for one in row)
        and (sum(row) == columns or (nested and 0 < sum(row) < columns))
        for row in rows
    )


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
    if value.dtype not in WHOLE and ("mask" not in name or not _is_round(value)):
        return None
    if name in ("labels", "token_type_ids", "cache_position"):
        return None
    if name == "noise_mask":
        return "noise_mask" if value.shape == ids.shape else None
    if value.shape == ids.shape and value.dim():
        if "pos" in name:
            return "position_ids"
        tokens = is_ids(value) and name not in NO_IDS and "mask" not in name
        return None if tokens and not _is_mask(value) else "mask"
    if value.dtype in (torch.int32, torch.int64) and value.dim() == 1:
        if ids.dim() > 1 and value.numel() == ids.shape[0]:
            small = not value.is_cpu or int(value.max()) <= ids.shape[-1]
            return "lengths" if small else None
        return "cu_seqlens" if "cu" in name and name not in KNOWN_NAMES else None
    if value.dtype in (torch.int32, torch.int64) and value.dim() == 2 and "len" in name:
        return "document_lengths" if value.shape[0] == ids.shape[0] else None
    return None


def _is_round(value: Tensor) -> bool:
    return not value.is_cpu or not bool((value != value.round()).any())


def _is_mask(value: Tensor) -> bool:
    return value.is_cpu and bool(((value == 0) | (value == 1)).all())
