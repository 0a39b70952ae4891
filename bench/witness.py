"""What arrives at a model's first block, seen by global module hooks; and the same model with the
paper's noise put in by hand. Shares nothing with the package but `neftune_kernels.reference`.

A lookup is the innermost module that is called with a sequence's token ids. Before and after it the
global generator is seeded anew, by the sequence's number, so the seed that NEFTune draws there is
known beforehand, and whatever is drawn later in the forward is the same with noise and without.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from neftune_kernels import reference

ALPHA = 5.0
FIRST_SEED = 1000  # of the first sequence; the next has the next
TRANSPARENT = (nn.Dropout, nn.Dropout1d, nn.Identity)


class Sequence(NamedTuple):
    """Token ids of one row or several, with each token's place: sample, position, length."""

    ids: Tensor  # [B, T]
    sample: Tensor  # [B * T] int64
    position: Tensor  # [B * T] int64
    length: Tensor  # [B * T] int64, 0 for padding


def padded(ids: Tensor, real: Tensor) -> Sequence:
    """Each row is a sample; real: (B, T), of one run of ones a row."""
    rows, columns = ids.shape
    first = real.long().argmax(-1, keepdim=True)
    sample = torch.arange(rows)[:, None].expand(rows, columns)
    position = torch.arange(columns) - first
    length = real.long().sum(-1, keepdim=True) * real
    return Sequence(ids, sample.reshape(-1), position.reshape(-1), length.reshape(-1))


def packed(ids: Tensor, lengths: list[int]) -> Sequence:
    """One row of documents, which fill it."""
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(one) for one in lengths])
    return Sequence(ids, sample, position, torch.tensor(lengths)[sample])


def seed_drawn(number: int) -> Tensor:
    """What NEFTune draws first after manual_seed(number)."""
    generator = torch.Generator().manual_seed(number)
    return torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator)


def paper_noise(sequence: Sequence, dim: int, seed: Tensor, alpha: float = ALPHA) -> Tensor:
    """(B * T, dim) float32: alpha / √(L·d) · u."""
    places = (sequence.sample, sequence.position, sequence.length)
    return reference.neftune_noise(places, dim, alpha, seed)


class Lookup(NamedTuple):
    """One call of an embedding with a sequence's ids."""

    module: nn.Module
    sequence: int
    place: Tensor  # [ids looked up] of each its place in the flattened sequence, or -1
    dim: int
    seed: Tensor
    begun: int  # events before it


class Event(NamedTuple):
    """A floating tensor that enters a module."""

    module: nn.Module
    leaf: bool
    tensor: Tensor


def place_of(looked_up: Tensor, ids: Tensor) -> Tensor | None:
    """Of each id of the lookup its place in the flattened sequence: the ids as they are, flattened,
    transposed, a run of columns of them, or with others (-1) before or behind them.
    """
    number = torch.arange(ids.numel()).view(ids.shape)
    for values, numbers in ((ids, number), (ids.t(), number.t())):
        if looked_up.numel() == ids.numel():
            same_rows = looked_up.shape[-1] == values.shape[-1] or looked_up.dim() == 1
            if same_rows and torch.equal(looked_up.reshape(-1), values.reshape(-1)):
                return numbers.reshape(-1)
        if looked_up.dim() != 2:
            continue
        if looked_up.shape[0] != values.shape[0]:
            continue
        excess = looked_up.shape[1] - values.shape[1]
        if excess > 0 and torch.equal(looked_up[:, : values.shape[1]], values):
            return nn.functional.pad(numbers, (0, excess), value=-1).reshape(-1)
        if excess > 0 and torch.equal(looked_up[:, excess:], values):
            return nn.functional.pad(numbers, (excess, 0), value=-1).reshape(-1)
        if excess < 0 and looked_up.shape[1] > 2:
            for start in range(-excess + 1):
                columns = slice(start, start + looked_up.shape[1])
                if torch.equal(looked_up, values[:, columns]):
                    return numbers[:, columns].reshape(-1)
    return None


def _by_id(rows: Tensor, place: Tensor, ids: Tensor) -> bool:
    """Whether rows of equal ids are equal: a table of positions gives others."""
    known = place >= 0
    looked_up = ids.reshape(-1)[place[known]]
    first: dict[int, int] = {}
    firsts = torch.tensor([first.setdefault(one, at) for at, one in enumerate(looked_up.tolist())])
    return torch.equal(rows[known], rows[known][firsts])


class Watched:
    """The forwards run inside `with watching(...)`: lookups and what entered modules after them."""

    def __init__(self) -> None:
        self.lookups: list[Lookup] = []
        self.events: list[Event] = []
        self.stack: list[tuple[nn.Module, int]] = []  # running, with the lookups before each


@contextlib.contextmanager
def watching(
    sequences: list[Sequence],
    only: set[nn.Module] | None = None,
    by_hand: Mapping[int, float] | None = None,
) -> Iterator[Watched]:
    """
    Args:
        only: the modules whose lookups count; None: all.
        by_hand: alpha for each sequence, whose noise is added to the lookup's output.
    """
    watched = Watched()
    leaves: dict[nn.Module, bool] = {}
    grad = torch.is_grad_enabled()  # a look at the model in between, without it, is none of ours
    reseed: int | None = None

    def found(module: nn.Module, args: Any) -> tuple[int, Tensor] | None:
        if only is not None and module not in only:
            return None
        for value in args if isinstance(args, tuple) else (args,):
            if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32):
                for number, sequence in enumerate(sequences):
                    if (place := place_of(value, sequence.ids)) is not None:
                        return number, place
        return None

    def before(module: nn.Module, args: Any) -> None:
        nonlocal reseed
        if torch.is_grad_enabled() is not grad:
            return
        if reseed is not None:
            torch.manual_seed(reseed)
            reseed = None
        watched.stack.append((module, len(watched.lookups)))
        what = found(module, args)
        if what is not None:
            torch.manual_seed(FIRST_SEED + what[0])
            return
        if not watched.lookups:
            return
        if module not in leaves:
            leaves[module] = not any(True for _ in module.children())
        for value in args if isinstance(args, tuple) else (args,):
            if isinstance(value, Tensor) and value.is_floating_point():
                watched.events.append(Event(module, leaves[module], value.detach().clone()))

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal reseed
        if torch.is_grad_enabled() is not grad:
            return None
        while watched.stack and watched.stack[-1][0] is not module:  # ended by an exception
            watched.stack.pop()
        if not watched.stack:
            return None
        _, lookups = watched.stack.pop()
        what = found(module, args)
        if what is None or lookups != len(watched.lookups):  # a module inside it looked them up
            return None
        number, place = what
        rest: tuple[Any, ...] | None = None
        if isinstance(output, tuple) and output:  # the embeddings and their scale, quantised
            output, rest = output[0], output[1:]
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2:
            return None
        dim = output.shape[-1]
        if output.numel() != place.numel() * dim:
            return None
        if only is None and not _by_id(output.reshape(-1, dim), place, sequences[number].ids):
            return None
        torch.manual_seed(FIRST_SEED + number)  # a hook of NEFTune's draws after this
        reseed = FIRST_SEED + number
        seed = seed_drawn(reseed)
        watched.lookups.append(Lookup(module, number, place, dim, seed, len(watched.events)))
        if by_hand is None:
            return None
        noise = noise_of(watched.lookups[-1], sequences, by_hand[number]).view(output.shape)
        noisy = torch.where(noise != 0, output + noise.to(output.dtype), output)
        return noisy if rest is None else (noisy, *rest)

    hooks = [
        register_module_forward_pre_hook(before),
        register_module_forward_hook(cast(Any, after)),
    ]
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


def noise_of(lookup: Lookup, sequences: list[Sequence], alpha: float = ALPHA) -> Tensor:
    """(ids looked up, dim): the paper's noise at each of them, none where it is not a token."""
    noise = paper_noise(sequences[lookup.sequence], lookup.dim, lookup.seed, alpha)
    return torch.where(lookup.place[:, None] >= 0, noise[lookup.place], 0.0)


class Arrival(NamedTuple):
    """By what the noise that was put in was multiplied where it arrived."""

    factor: float  # nan: not the same number everywhere
    at: str  # the module's class
    error: float  # largest |difference from factor · noise| over the rounding allowed


NOWHERE = Arrival(float("nan"), "nowhere", float("inf"))


def _arranged(tensor: Tensor, lookup: Lookup, rows: int) -> Iterator[Tensor]:
    """The tensor as (ids, dim), in the ways that models turn it."""
    ids, dim = lookup.place.numel(), lookup.dim
    if tensor.numel() == ids * dim:
        if tensor.shape[-1] == dim:
            yield tensor.reshape(ids, dim)
            if tensor.dim() == 3 and rows not in (1, ids):
                yield tensor.transpose(0, 1).reshape(ids, dim)
        if tensor.dim() == 3 and tensor.shape[1] == dim:
            yield tensor.transpose(1, 2).reshape(ids, dim)
    elif tensor.shape[-1] == dim and tensor.numel() % (ids * dim) == 0 and tensor.dim() == 4:
        yield tensor[..., 0, :].reshape(-1, dim)[:ids]  # copies side by side
    elif tensor.shape[-1] > dim and tensor.numel() == ids * tensor.shape[-1]:
        for start in range(0, tensor.shape[-1] - dim + 1, dim):  # beside something else
            yield tensor[..., start : start + dim].reshape(ids, dim)
    elif tensor.dim() == 3 and tensor.shape[-1] == dim and tensor.shape[1] * rows > ids:
        columns = ids // rows
        if tensor.shape[0] == rows:  # something stands before or behind the tokens
            yield tensor[:, -columns:].reshape(ids, dim)
            yield tensor[:, :columns].reshape(ids, dim)


ROUNDINGS = 16  # of float32, of the larger of both values: a sum and a product here and there


def _factor(delta: Tensor, noise: Tensor, scale: float, epsilon: float) -> tuple[float, float]:
    """The f of delta = f · noise by least squares, and the error in units of what is allowed."""
    delta, noise = delta.double(), noise.double()
    factor = float((delta * noise).sum() / (noise * noise).sum())
    error = float((delta - factor * noise).abs().max())
    return factor, error / (ROUNDINGS * epsilon * scale)


def arrival(
    clean: Watched, noisy: Watched, number: int, sequences: list[Sequence], alpha: float = ALPHA
) -> Arrival:
    """Where the noise of a lookup arrives: at the last module before the first block's own
    arithmetic whose input is the clean one and a multiple of the noise.
    """
    lookup = noisy.lookups[number]
    noise = noise_of(lookup, sequences, alpha)
    rows = sequences[lookup.sequence].ids.shape[0]
    found = NOWHERE
    pairs = zip(clean.events[lookup.begun :], noisy.events[lookup.begun :], strict=False)
    for before, after in pairs:
        if before.module is not after.module or before.tensor.shape != after.tensor.shape:
            break
        if torch.equal(before.tensor, after.tensor):
            continue
        scale = float(max(before.tensor.abs().max(), after.tensor.abs().max()))
        epsilon = torch.finfo(before.tensor.dtype).eps / 2
        name = type(before.module).__name__
        best = NOWHERE
        both = zip(
            _arranged(before.tensor, lookup, rows), _arranged(after.tensor, lookup, rows),
            strict=True,
        )  # fmt: skip
        for one, other in both:
            if torch.equal(one, other):  # beside it, untouched
                continue
            factor, error = _factor(other.double() - one.double(), noise, scale, epsilon)
            if error < best.error:
                best = Arrival(factor, name, error)
        if best.error <= 1 and abs(best.factor) < 1e-4:
            continue  # nothing of the noise: a sum that was rounded otherwise
        if best.error <= 1:
            found = best
        elif best is NOWHERE and before.tensor.numel() < noise.numel():
            continue  # a column of the embeddings, say, for their shape's sake
        elif before.leaf and not isinstance(before.module, TRANSPARENT):
            return found if found is not NOWHERE else best._replace(factor=float("nan"))
    return found
