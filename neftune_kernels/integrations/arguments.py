"""What a model's forward is told of its samples, read from its arguments.

transformers, TRL and the trainers built on them say it in six ways: cu_seq_lens_q, seq_idx,
position_ids (of one, three or four axes), attention_mask, all of these padded, or nothing.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import check_cu_seqlens_values
from ..samples import UNSAID, Samples

OUR_NAMES = (
    "attention_mask",
    "lengths",
    "cu_seqlens",
    "position_ids",
    "noise_mask",
)  # what a model of one's own may call them
KNOWN_NAMES = (*OUR_NAMES, "cu_seq_lens_q", "seq_idx")
Warn = Callable[[str], None]


def parameter_names(model: nn.Module) -> list[str]:
    return list(inspect.signature(type(model).forward).parameters)[1:]


def tells_samples(model: nn.Module) -> bool:
    return any(name in KNOWN_NAMES for name in parameter_names(model))


def from_arguments(given: dict[str, Any], pad_token_id: int | None, warn: Warn) -> Samples:
    """What the arguments say, and the model's own noise_mask if it has one."""
    noise_mask = given.get("noise_mask")
    samples = _told(given, pad_token_id, warn)
    return samples._replace(noise_mask=noise_mask) if isinstance(noise_mask, Tensor) else samples


def _told(given: dict[str, Any], pad_token_id: int | None, warn: Warn) -> Samples:
    """The first of cu_seq_lens_q, seq_idx, position_ids with attention_mask, attention_mask; what
    cannot be read warns.

    A mask longer than the ids (a cache before them) counts by its last columns.
    """
    own = [name for name in ("lengths", "cu_seqlens") if isinstance(given.get(name), Tensor)]
    mask, position_ids, input_ids = (
        given.get("attention_mask"),
        given.get("position_ids"),
        given.get("input_ids"),
    )
    if own:
        return Samples(**{name: given[name] for name in own})
    if not isinstance(input_ids, Tensor):  # under another name: the embedding compares the shapes
        return Samples(attention_mask=mask) if isinstance(mask, Tensor) else UNSAID
    columns = input_ids.shape[-1]
    mask = _two_axes(mask, columns, warn)
    bounds, number = given.get("cu_seq_lens_q"), given.get("seq_idx")
    if isinstance(bounds, Tensor):
        return _from_bounds(bounds, input_ids, pad_token_id)
    if isinstance(number, Tensor):
        if number.shape == input_ids.shape:
            return Samples(
                attention_mask=_without_tail(number, _opens(number), mask, input_ids, pad_token_id)
            )
        warn(
            f"seq_idx of shape {tuple(number.shape)} does not fit input_ids "
            f"{tuple(input_ids.shape)}: NEFTune does not use it"
        )
    if isinstance(position_ids, Tensor):
        return _from_position_ids(position_ids, mask, input_ids, pad_token_id, warn)
    return Samples(attention_mask=mask)


def _two_axes(mask: Any, columns: int, warn: Warn) -> Tensor | None:
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[-1] >= columns:
        return mask[:, mask.shape[-1] - columns :]
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    warn(
        f"an attention_mask that is not (batch, tokens) ({shape}) does not tell NEFTune the "
        f"samples' lengths: every token "
        "but padding_idx counts as real. Pass the model a 2-D attention_mask or position_ids"
    )
    return None


def _opens(number: Tensor) -> Tensor:
    """Where a number differs from the one before it; a row's first token opens too."""
    first = torch.ones_like(number[..., :1], dtype=torch.bool)
    return torch.cat((first, number[..., 1:] != number[..., :-1]), dim=-1)


def _without_tail(
    number: Tensor, opens: Tensor, mask: Tensor | None, input_ids: Tensor, pad_token_id: int | None
) -> Tensor:
    """Documents' numbers as a mask, 0 for padding; see _tail."""
    number = number - number.amin(-1, keepdim=True) + 1
    if mask is None:
        return number * ~_tail(opens, input_ids, pad_token_id)
    if mask.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        return number * (mask != 0)
    mask = mask.long()  # it may number documents itself: a change of either number opens one
    return (number * (mask.amax() + 1) + mask) * (mask != 0)


def _tail(opens: Tensor, input_ids: Tensor, pad_token_id: int | None) -> Tensor:
    """Tokens that pad_to_multiple_of appended to a batch without a mask: they look like documents
    of one token each, at the row's end.

    So these are the trailing documents of one token that is the padding token or 0, or the row's
    last token where the model names none.
    """
    alone = opens & torch.cat((opens[..., 1:], torch.ones_like(opens[..., :1])), dim=-1)
    padding = (
        input_ids == input_ids[..., -1:]
        if pad_token_id is None
        else (input_ids == pad_token_id) | (input_ids == 0)
    )
    kept = ~(alone & padding)
    kept[..., :1] = True  # a row that is one token long is a sample
    return kept.flip(-1).cumsum(-1).flip(-1) == 0


def _from_bounds(bounds: Tensor, input_ids: Tensor, pad_token_id: int | None) -> Samples:
    """cu_seq_lens_q over the flattened tokens; the last documents may be padding."""
    flat = input_ids.reshape(-1)
    if not torch.compiler.is_compiling():
        check_cu_seqlens_values(bounds, flat.numel())
    token = torch.arange(flat.numel(), device=flat.device)
    number = torch.searchsorted(bounds.to(flat.device).long(), token, right=True)
    if (
        flat.numel() == 0 or flat.numel() != input_ids.shape[-1]
    ):  # several rows: no padding-free batch, and documents may go on in the next row
        return Samples(cu_seqlens=bounds)
    outside = _tail(_opens(number), flat, pad_token_id) | (number == bounds.numel())
    number = torch.where(outside, 0, number)
    return Samples(attention_mask=number.view(input_ids.shape))


def _from_position_ids(
    position_ids: Tensor,
    mask: Tensor | None,
    input_ids: Tensor,
    pad_token_id: int | None,
    warn: Warn,
) -> Samples:
    if (
        position_ids.dim() == input_ids.dim() + 1
        and position_ids.shape[1:] == input_ids.shape
        and position_ids.shape[0] in (3, 4)
    ):
        if position_ids.shape[0] == 4:  # Qwen-VL: the text's own positions come first
            position_ids = position_ids[0]
        else:  # temporal, height, width: all three are 0 at a document's first token alone
            number = (position_ids == 0).all(0).cumsum(-1)
            return Samples(
                attention_mask=_without_tail(number, _opens(number), mask, input_ids, pad_token_id)
            )
    if position_ids.shape not in (input_ids.shape, (1, input_ids.shape[-1])):
        warn(
            f"position_ids of shape {tuple(position_ids.shape)} do not tell NEFTune where samples "
            f"begin and are not used"
        )
        return Samples(attention_mask=mask)
    if mask is None and input_ids.numel():
        expanded = position_ids.expand(input_ids.shape)
        previous = torch.cat((expanded[..., :1] - 1, expanded[..., :-1]), dim=-1)
        mask = ~_tail(expanded != previous + 1, input_ids, pad_token_id)
    return Samples(attention_mask=mask, position_ids=position_ids)


def trailing_padding(input_ids: Tensor, pad_token_id: int | None) -> Samples:
    """A decoder's shifted labels without a mask: real up to the last token that is not padding, the
    start token always.
    """
    if pad_token_id is None or input_ids.dim() == 0:
        return UNSAID
    kept = input_ids != pad_token_id
    real = kept.flip(-1).cumsum(-1).flip(-1) > 0
    first = torch.arange(input_ids.shape[-1], device=input_ids.device) == 0
    return Samples(attention_mask=real | first)
