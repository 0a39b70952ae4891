"""Where the ids of a lookup lie in a sequence that a forward was given: samples belong to a lookup
by its ids, not by its shape.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..torch_internals import transformed

Place = Callable[[Tensor], Tensor]  # per-token values of the sequence → those of the lookup
COMPARISONS = 1 << 24  # the most that reordered rows may cost
CHUNKS = 64  # the most places that are compared with a chunk


def same(values: Tensor) -> Tensor:
    """The place of ids that are the sequence."""
    return values


def transposed(values: Tensor) -> Tensor:
    """The place of ids (T, B) whose sequence is (B, T): samples are columns there."""
    return values.t()


def behind(others: int) -> Place:
    """The place of ids that have others before them, which are padding to the noise."""
    return lambda values: torch.nn.functional.pad(values, (others, 0))


@dataclass(frozen=True)
class Columns:
    """The place of some columns of the sequence, or of one that has lost its axis."""

    start: int
    width: int
    is_kept: bool = True  # the axis

    def __call__(self, values: Tensor) -> Tensor:
        if self.is_kept:
            return values[..., self.start : self.start + self.width]
        return values[..., self.start]

    def meets(self, other: "Columns") -> bool:
        return self.start < other.start + other.width and other.start < self.start + self.width


def values_cost_nothing(input: Tensor) -> bool:
    """Whether values can be asked: on an accelerator that would wait for it."""
    return input.is_cpu and not torch.compiler.is_compiling()


def place(input: Tensor, ids: Tensor) -> Place | None:
    """By storage where the lookup's ids are the sequence or a view of it, else by value on the CPU:
    the same, flattened, transposed, some rows in any order, a chunk, shifted by one, or padded to a
    window.

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


def padded(input: Tensor, ids: Tensor) -> Place | None:
    """The place of ids that are said to be the sequence with padding behind it, without a look at
    their values: where they are not, each token is real.
    """
    columns, own = ids.shape[-1], input.shape[-1]
    if input.shape[:-1] != ids.shape[:-1] or own <= columns:
        return None

    def values_of(values: Tensor) -> Tensor:
        behind = torch.nn.functional.pad(values, (0, own - columns))
        alike = (input[..., :columns] == ids).all()
        return torch.where(alike, behind, torch.ones_like(behind))

    return values_of


def _by_storage(input: Tensor, ids: Tensor) -> Place | None:
    if (
        input.dtype != ids.dtype
        or input.untyped_storage().data_ptr() != ids.untyped_storage().data_ptr()
    ):
        return None
    offset = input.storage_offset() - ids.storage_offset()
    if not offset and input.shape == ids.shape and input.stride() == ids.stride():
        return same
    if not offset and input.dim() == ids.dim() == 2 and 1 not in ids.shape:
        turned = ids.t()
        if input.shape == turned.shape and input.stride() == turned.stride():
            return transposed
    last = offset + sum(
        (size - 1) * step for size, step in zip(input.shape, input.stride(), strict=True)
    )
    if not ids.is_contiguous() or offset < 0 or last >= ids.numel():
        return None
    if ids.dim() > 1 and offset < ids.shape[-1]:
        leading, steps = ids.shape[:-1], ids.stride()[:-1]
        if input.shape == leading and input.stride() == steps:
            return Columns(int(offset), 1, is_kept=False)
        if input.shape[:-1] == leading and input.stride()[:-1] == steps and input.stride(-1) == 1:
            return Columns(int(offset), input.shape[-1])
    number = torch.arange(ids.numel(), device=ids.device)
    return _taken(number.as_strided(input.shape, input.stride(), offset))


def _taken(number: Tensor) -> Place:
    """number: of each token of the lookup, its place in the flattened sequence."""
    return lambda values: values.reshape(-1)[number]


def _by_value(input: Tensor, ids: Tensor) -> Place | None:
    if input.numel() == ids.numel():
        # flattened or not
        if torch.equal(input.reshape(-1), ids.reshape(-1)) and (
            input.shape[-1] == ids.shape[-1] or 1 in (input.dim(), ids.dim())
        ):
            return lambda values: values.reshape(input.shape)
        if input.dim() == ids.dim() == 2 and torch.equal(input, ids.t()):
            return transposed
        if input.shape != ids.shape:
            return None
        if (where := _rows(input, ids)) is not None or input.shape[-1] == 1:
            return where
        return _shifted(input, ids)
    if input.dim() != ids.dim():
        return None
    if input.shape[-1] == ids.shape[-1]:
        return _rows(input, ids)
    if input.shape[:-1] != ids.shape[:-1]:
        return None
    columns, own = ids.shape[-1], input.shape[-1]
    if own > columns:
        if not torch.equal(input[..., :columns], ids):
            return None
        return lambda values: torch.nn.functional.pad(values, (0, own - columns))
    return _chunk(input, ids)


def _chunk(input: Tensor, ids: Tensor) -> Place | None:
    """Some columns; of the places that hold the same ids, the first."""
    own = input.shape[-1]
    row, wanted = ids.reshape(-1, ids.shape[-1])[0], input.reshape(-1, own)[0]
    could = row[: row.numel() - own + 1] == wanted[0]
    could = could & (row[own - 1 :] == wanted[-1])
    for start in could.nonzero().flatten()[:CHUNKS].tolist():
        if torch.equal(input, ids[..., start : start + own]):
            return Columns(start, own)
    return None


def _shifted(input: Tensor, ids: Tensor) -> Place | None:
    """By one column to the right, as decoders' labels are, or to the left, as the targets of heads
    that look ahead; the column that is new is its neighbour's.
    """
    if torch.equal(input[..., 1:], ids[..., :-1]):
        return lambda values: torch.cat((values[..., :1], values[..., :-1]), -1)
    if torch.equal(input[..., :-1], ids[..., 1:]):
        return lambda values: torch.cat((values[..., 1:], values[..., -1:]), -1)
    return None


def rearranged(input: Tensor, ids: Tensor) -> Place | None:
    """Each row's own tokens in another order: reversed, as models that read backwards do, rotated
    by a number of each row's own, as padding that changes sides is, or any other. There equal
    tokens keep their order. Asked where no sequence has a `place` for the lookup: another sequence
    may hold the same tokens (sentences in another order).
    """
    if input.shape != ids.shape or input.dim() == 0 or input.shape[-1] < 2 or not input.numel():
        return None
    if not values_cost_nothing(input) or transformed():
        return None
    if type(input) is not Tensor or type(ids) is not Tensor or not ids.is_cpu:
        return None
    wanted, order = input.sort(dim=-1, stable=True)
    there, origin = ids.sort(dim=-1, stable=True)
    if not torch.equal(wanted, there):
        return None
    if torch.equal(input, ids.flip(-1)):
        return lambda values: values.flip(-1)
    columns = torch.arange(ids.shape[-1], device=ids.device)
    if input.numel() * ids.shape[-1] <= COMPARISONS:
        turned = (columns[:, None] + columns) % ids.shape[-1]
        alike = (ids[..., turned] == input.unsqueeze(-2)).all(-1)
        if bool(alike.any(-1).all()):
            taken = turned[alike.int().argmax(-1)]
            return lambda values: values.gather(-1, taken)
    taken = torch.empty_like(order).scatter_(-1, order, origin)
    return lambda values: values.gather(-1, taken)


def _rows(input: Tensor, ids: Tensor) -> Place | None:
    """Some of the rows, in any order."""
    if input.dim() != 2 or ids.shape[0] * input.numel() > COMPARISONS:
        return None
    alike = (input[:, None] == ids[None]).all(-1)
    if not bool(alike.any(1).all()):
        return None
    row = alike.int().argmax(1)
    return lambda values: values[row]
