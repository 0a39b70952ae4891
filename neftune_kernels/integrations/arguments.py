"""What a model's forward is told of its samples, read from its arguments.

transformers, TRL and the trainers built on them say it in six ways: cu_seq_lens_q, seq_idx,
position_ids (of one, three or four axes), attention_mask, all of these padded, or nothing.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import layout as layouts
from ..layout import check_cu_seqlens_values
from ..samples import UNSAID, Samples
from .places import values_cost_nothing

OPS = torch.ops.neftune_kernels
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


def takes_any(model: nn.Module) -> bool:
    """Whether its forward takes arguments under any name."""
    given = inspect.signature(type(model).forward).parameters.values()
    return any(one.kind is one.VAR_KEYWORD for one in given)


def tells_samples(model: nn.Module) -> bool:
    return any(name in KNOWN_NAMES for name in parameter_names(model))


class Padding(NamedTuple):
    """What a model's config calls padding."""

    token: int | None = None  # pad_token_id
    is_end: bool = False  # it is the token that ends a sample, too


def from_arguments(given: dict[str, Any], padding: Padding, warn: Warn) -> Samples:
    """What the arguments say, and the model's own noise_mask if it has one and no attention_mask:
    others may mean something else by the word.
    """
    samples = _told(given, padding, warn)
    noise_mask, ids = given.get("noise_mask"), given.get("input_ids")
    if noise_mask is None:
        return samples
    if given.get("attention_mask") is None:
        if _fits("noise_mask", noise_mask, ids):
            return samples._replace(noise_mask=noise_mask)
        warn(_misfit("noise_mask", noise_mask, ids))
    elif getattr(noise_mask, "shape", None) == getattr(given["attention_mask"], "shape", ()):
        warn(NOISE_MASK)
    return samples


def _fits(name: str, value: Any, ids: Any) -> bool:
    """Whether an argument of a name of ours may be what we call so: values are asked on the CPU."""
    if not isinstance(value, Tensor) or not isinstance(ids, Tensor):
        return isinstance(value, Tensor)
    asked = value.numel() and values_cost_nothing(value)
    if name == "noise_mask":
        return value.shape == ids.shape and not (
            asked and value.is_floating_point() and bool((value != value.round()).any())
        )
    if name == "lengths":
        small = not asked or (int(value.min()) >= 0 and int(value.max()) <= ids.shape[-1])
        return (
            _is_whole(value)
            and value.dtype != torch.bool
            and value.shape == ids.shape[:-1]
            and small
        )
    if value.dim() != 1 or value.dtype not in (torch.int32, torch.int64):  # cu_seqlens
        return False
    return not asked or (int(value[0]) == 0 and int(value[-1]) == ids.numel())


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def _misfit(name: str, value: Any, ids: Any) -> str:
    shape = tuple(ids.shape) if isinstance(ids, Tensor) else "it looks up"
    what = type(value).__name__
    if isinstance(value, Tensor):
        what = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return (
        f"{name} ({what}) is nothing that NEFTune knows by that name for the tokens {shape}, so it "
        "does not read it. If it tells the samples, say so with apply_neftune(..., samples=...) or "
        "handle.told(...)"
    )


NOISE_MASK = (
    "noise_mask beside an attention_mask may be anything, so NEFTune does not read it: if it says "
    'which tokens get noise, samples={"attention_mask": "attention_mask", "noise_mask": '
    '"noise_mask"}'
)


def _told(given: dict[str, Any], padding: Padding, warn: Warn) -> Samples:
    """The first of cu_seq_lens_q, seq_idx, position_ids with attention_mask, attention_mask; what
    cannot be read warns.
    """
    mask, position_ids, input_ids = (
        given.get("attention_mask"),
        given.get("position_ids"),
        given.get("input_ids"),
    )
    if mask is None:
        for name in ("lengths", "cu_seqlens"):
            if (value := given.get(name)) is not None:
                if _fits(name, value, input_ids):
                    return Samples(**{name: value})
                warn(_misfit(name, value, input_ids))
    if not isinstance(input_ids, Tensor):  # under another name: the embedding compares the shapes
        if mask is None or isinstance(mask, Tensor):
            return UNSAID if mask is None else Samples(attention_mask=mask)
        warn(NO_MASK.format(shape=type(mask).__name__))
        return UNSAID
    bounds, number = given.get("cu_seq_lens_q"), given.get("seq_idx")
    if number is not None and not _is_whole(number):
        warn(_misfit("seq_idx", number, input_ids))
        number = None
    if position_ids is not None and not _is_whole(position_ids):
        warn(_misfit("position_ids", position_ids, input_ids))
        position_ids = None
    if bounds is not None and not isinstance(bounds, Tensor):
        warn(_misfit("cu_seq_lens_q", bounds, input_ids))
    others = (
        isinstance(bounds, Tensor) or isinstance(number, Tensor) or isinstance(position_ids, Tensor)
    )
    if mask is None and not others:
        return UNSAID
    mask = _two_axes(mask, input_ids, _nothing if others and isinstance(mask, Tensor) else warn)
    before = 0 if mask is None else mask.shape[-1] - input_ids.shape[-1]
    if before and not others:
        return Samples(attention_mask=mask, before=before)
    if mask is not None and before:  # position ids tell of the documents that go on in a cache
        mask = mask[..., before:]
    if isinstance(bounds, Tensor):
        return _from_bounds(bounds, mask, input_ids, padding)
    if isinstance(number, Tensor):
        if number.shape == input_ids.shape:
            return Samples(
                attention_mask=_without_tail(number, _opens(number), mask, input_ids, padding)
            )
        warn(
            f"seq_idx of shape {tuple(number.shape)} does not fit input_ids "
            f"{tuple(input_ids.shape)}: NEFTune does not use it"
        )
    if isinstance(position_ids, Tensor):
        return _from_position_ids(position_ids, mask, input_ids, padding, warn)
    return Samples(attention_mask=mask)


def _two_axes(mask: Any, input_ids: Tensor, warn: Warn) -> Tensor | None:
    """The mask (batch, tokens), the columns of PEFT's virtual tokens taken off, those of a cache
    left in front.
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.shape == input_ids.shape and mask.dim() in (1, 2):
        return mask
    columns = input_ids.shape[-1]
    if (
        isinstance(mask, Tensor)
        and mask.dim() == 2
        and mask.shape[-1] >= columns
        and mask.shape[:-1] == input_ids.shape[:-1]
    ):
        excess = mask.shape[-1] - columns
        if torch.compiler.is_compiling():
            return mask[:, excess:]
        virtual = min(virtual_tokens(), excess)
        if excess > virtual:
            warn(CACHE.format(mask=mask.shape[-1], ids=columns, before=excess - virtual))
        return mask[:, virtual:]
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    warn(NO_MASK.format(shape=shape))
    return None


def virtual_tokens() -> int:
    """How many a running PEFT model of prompt learning puts in front of the tokens."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            config = getattr(frame.f_locals["self"], "active_peft_config", None)
            if getattr(config, "is_prompt_learning", False):
                return int(config.num_virtual_tokens)  # type: ignore[union-attr]
        frame = frame.f_back
    return 0


CACHE = (
    "an attention_mask of {mask} columns beside {ids} tokens: NEFTune takes the {before} columns "
    "before them for a cache and counts its tokens in the samples' lengths. If they are none of "
    "the samples' tokens, pass a mask of the tokens alone with "
    "apply_neftune(..., samples=...) or handle.told(...)"
)
NO_MASK = (
    "an attention_mask that is not (batch, tokens) ({shape}) does not tell NEFTune the samples' "
    "lengths: every token but padding_idx counts as real. Pass the model a 2-D attention_mask or "
    "position_ids, or tell NEFTune with apply_neftune(..., samples=...) or handle.told(...)"
)
BRANCH = (
    "position_ids return to a place inside their own row's sample, as the branches of a prefix "
    "tree do: NEFTune counts such a branch as a document of its own, without its prompt. Tell it "
    "the samples with apply_neftune(..., samples=...) if it is none"
)


def _nothing(message: str) -> None:
    """Position ids or bounds tell what the mask does not."""


def _has_branches(position_ids: Tensor, mask: Tensor | None) -> bool:
    """(rows, T), on the CPU: whether an id goes back to one that its row's sample has passed, other
    than 0 and the row's first.
    """
    if not position_ids.numel() or not values_cost_nothing(position_ids):
        return False
    back = position_ids[..., 1:] <= position_ids[..., :-1]
    first = position_ids[..., :1]
    back = back & (position_ids[..., 1:] > first) & (position_ids[..., 1:] != 0)
    return bool((back if mask is None else back & (mask[..., 1:] != 0)).any())


def _opens(number: Tensor) -> Tensor:
    """Where a number differs from the one before it; a row's first token opens too."""
    first = torch.ones_like(number[..., :1], dtype=torch.bool)
    return torch.cat((first, number[..., 1:] != number[..., :-1]), dim=-1)


def _without_tail(
    number: Tensor, opens: Tensor, mask: Tensor | None, input_ids: Tensor, padding: Padding
) -> Tensor:
    """Documents' numbers as a mask, 0 for padding; see tail."""
    number = number - number.amin(-1, keepdim=True) + 1
    cut = tail(input_ids, padding, opens, mask is not None)
    if mask is None:
        return number * ~cut
    if mask.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        return number * ((mask != 0) & ~cut)
    mask = mask.long()  # it may number documents itself: a change of either number opens one
    return (number * (mask.amax() + 1) + mask) * ((mask != 0) & ~cut)


def tail(
    input_ids: Tensor, padding: Padding, opens: Tensor | None = None, masked: bool = False
) -> Tensor:
    """layout.tail of the padding token; a mask calls real what it is not 0 at, up to the first
    document that opens in such a run.
    """
    return layouts.tail(input_ids, padding.token, padding.is_end, opens, masked)


def _from_bounds(
    bounds: Tensor, mask: Tensor | None, input_ids: Tensor, padding: Padding
) -> Samples:
    """cu_seq_lens_q over the flattened tokens; the last documents may be padding."""
    flat = input_ids.reshape(-1)
    if not torch.compiler.is_compiling():
        check_cu_seqlens_values(bounds, flat.numel())
    if (
        flat.numel() == 0 or flat.numel() != input_ids.shape[-1]
    ):  # several rows: no padding-free batch, and documents may go on in the next row
        return Samples(cu_seqlens=bounds)
    if mask is None:
        bounds = bounds.to(flat.device)
        return Samples(attention_mask=OPS.untailed(input_ids, None, bounds, *padding))
    token = torch.arange(flat.numel(), device=flat.device)
    number = torch.searchsorted(bounds.to(flat.device).long(), token, right=True)
    outside = tail(flat, padding, _opens(number), True) | (number == bounds.numel())
    outside = outside | (mask.reshape(-1) == 0)
    number = torch.where(outside, 0, number)
    return Samples(attention_mask=number.view(input_ids.shape))


def _from_position_ids(
    position_ids: Tensor,
    mask: Tensor | None,
    input_ids: Tensor,
    padding: Padding,
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
                attention_mask=_without_tail(number, _opens(number), mask, input_ids, padding)
            )
    # no `in`: Dynamo's takes a shape that varies for another than the one it is
    if position_ids.shape != input_ids.shape and position_ids.shape != (1, input_ids.shape[-1]):
        warn(
            f"position_ids of shape {tuple(position_ids.shape)} do not tell NEFTune where samples "
            f"begin and are not used"
        )
        return Samples(attention_mask=mask)
    if _has_branches(position_ids, mask):
        warn(BRANCH)
    expanded = position_ids.expand(input_ids.shape)
    if mask is None:
        mask = OPS.untailed(input_ids, expanded, None, *padding)
    elif input_ids.numel():
        previous = torch.cat((expanded[..., :1] - 1, expanded[..., :-1]), dim=-1)
        mask = mask * ~tail(input_ids, padding, expanded != previous + 1, True)
    return Samples(attention_mask=mask, position_ids=position_ids)
