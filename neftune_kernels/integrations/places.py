"""Where the ids of a lookup lie in a sequence that a forward was given: samples belong to a lookup
by its ids, not by its shape.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..torch_internals import transformed

Place = Callable[[Tensor], Tensor]  # per-token values of the sequence → those of the lookup
COMPARISONS = 1 << 24  # the most that reordered rows may cost


def same(values: Tensor) -> Tensor:
    """The place of ids that are the sequence."""
    return values


def place(input: Tensor, ids: Tensor) -> Place | None:
    """By storage where the lookup's ids are the sequence or a view of it, else by value on the CPU:
    the same, flattened, rows in another order, a chunk, or padded to a window.

    None: they are none of these, or it cannot be known without a synchronisation.
    """
    if input is ids:
        return same
    if torch.compiler.is_compiling() or transformed():
        return None
    if type(input) is not Tensor or type(ids) is not Tensor:  # no storage that says anything
        return None
    if input.device != ids.device or not input.numel() or not ids.numel():
        return None
    if input.device.type == "meta":
        return None
    return _by_storage(input, ids) or (_by_value(input, ids) if input.is_cpu else None)


def _by_storage(input: Tensor, ids: Tensor) -> Place | None:
    if (
        input.dtype != ids.dtype
        or input.untyped_storage().data_ptr() != ids.untyped_storage().data_ptr()
    ):
        return None
    offset = input.storage_offset() - ids.storage_offset()
    if not offset and input.shape == ids.shape and input.stride() == ids.stride():
        return same
    last = offset + sum(
        (size - 1) * step for size, step in zip(input.shape, input.stride(), strict=True)
    )
    if not ids.is_contiguous() or offset < 0 or last >= ids.numel():
        return None
    number = torch.arange(ids.numel(), device=ids.device)
    return _taken(number.as_strided(input.shape, input.stride(), offset))


def _taken(number: Tensor) -> Place:
    """number: of each token of the lookup, its place in the flattened sequence."""
    return lambda values: values.reshape(-1)[number]


def _by_value(input: Tensor, ids: Tensor) -> Place | None:
    if input.numel() == ids.numel():
        # flattened or not, never transposed
        if torch.equal(input.reshape(-1), ids.reshape(-1)) and (
            input.shape[-1] == ids.shape[-1] or 1 in (input.dim(), ids.dim())
        ):
            return lambda values: values.reshape(input.shape)
        if input.shape == ids.shape:
            return _reordered(input, ids)
        return None
    if input.dim() != ids.dim() or input.shape[:-1] != ids.shape[:-1]:
        return None
    columns, own = ids.shape[-1], input.shape[-1]
    if own > columns:
        if not torch.equal(input[..., :columns], ids):
            return None
        return lambda values: torch.nn.functional.pad(values, (0, own - columns))
    for start in (0, columns - own, *range(1, columns - own)):
        if torch.equal(input, ids[..., start : start + own]):
            return lambda values: values[..., start : start + own]
    return None


def _reordered(input: Tensor, ids: Tensor) -> Place | None:
    if input.dim() != 2 or input.shape[0] * input.numel() > COMPARISONS:
        return None
    alike = (input[:, None] == ids[None]).all(-1)
    if not bool(alike.any(1).all()):
        return None
    row = alike.int().argmax(1)
    return lambda values: values[row]
