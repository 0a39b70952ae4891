"""Whether a tensor is a multiple of embeddings, by its values, and by what number."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDINGS = 4  # of a product, in the coarser of the two dtypes
SURE = 16.0  # standard errors: of a factor that was measured from rounded values
SAME = 1e-12  # relative: what float64 leaves open
SCALARS = 2.0**-22  # relative: what is left open by float32, in which torch keeps scalars
ROWS = 64  # the most that are looked for among the lookup's
COMPARISONS = 1 << 34  # the most that they may cost


class Measured(NamedTuple):
    """Of one site. Neither a factor nor a range: it could not be told, and why."""

    factor: float | None = None
    low: float = 0.0
    high: float = 0.0  # of factors that differ by token or sample
    why: str = ""
    by_sample: bool = False  # they are the same in each: nothing that normalises tokens


def multiple(embedded: Tensor, arrived: Tensor) -> list[Measured]:
    """What each view of a tensor is to the embeddings, which are in its last axis; empty where its
    shape says that it is something else.
    """
    if embedded.device != arrived.device:
        return []
    found = [_aligned(embedded, view) for view in _views(arrived, embedded.shape)]
    if all(one.factor is None and not one.high for one in found):
        rows = _of_rows(embedded, arrived)
        found += [rows] if rows.factor is not None else []
    return found


def _views(tensor: Tensor, shape: torch.Size) -> Iterator[Tensor]:
    """A tensor as the lookup's shape, with axes exchanged, flattened, or with tokens or columns
    before or behind.
    """
    if tensor.shape == shape:
        yield tensor
    if tensor.dim() == len(shape) == 3:
        for axes in ((1, 0, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1)):
            moved = tensor.permute(axes)
            if moved.shape == shape:
                yield moved
        if tensor.shape[::2] == shape[::2] and tensor.shape[1] > shape[1]:
            yield tensor[:, : shape[1]]
            yield tensor[:, tensor.shape[1] - shape[1] :]
    elif tensor.numel() == shape.numel() and tensor.dim() and tensor.shape[-1] == shape[-1]:
        yield tensor.reshape(shape)
    if tensor.dim() and tensor.shape[:-1] == shape[:-1] and tensor.shape[-1] > shape[-1]:
        yield tensor[..., : shape[-1]]
        yield tensor[..., tensor.shape[-1] - shape[-1] :]


def _epsilon(embedded: Tensor, arrived: Tensor) -> float:
    return max(torch.finfo(embedded.dtype).eps, torch.finfo(arrived.dtype).eps) * ROUNDINGS


def _aligned(embedded: Tensor, arrived: Tensor) -> Measured:
    """factor where it is one number; a range where each token has its own; neither: none."""
    eps = _epsilon(embedded, arrived)
    e, t = embedded.double(), arrived.detach().double()
    rows = (e != 0).any(-1) & (t != 0).any(-1)  # padding may be zero on either side
    if not bool(rows.any()):
        return Measured()
    found = _by_tokens(e[rows], t[rows], eps)
    if found.factor is not None:
        return Measured(_exactly(embedded, arrived, found.factor))
    if found.high:
        factors = (e * t).sum(-1) / e.square().sum(-1).clamp(min=torch.finfo(e.dtype).tiny)
        sizes = e.square().sum(-1)
        return found._replace(by_sample=_is_by_sample(factors, sizes, rows, eps))
    factor = _by_differences(e, t, rows, eps)
    return Measured() if factor is None else Measured(factor)


def _by_tokens(e: Tensor, t: Tensor, eps: float) -> Measured:
    """Of rows that belong to each other."""
    size = e.square().sum(-1)
    by_token = (e * t).sum(-1) / size
    product = by_token[:, None] * e
    if bool(((t - product).abs() > eps * product.abs()).any()):
        return Measured()
    whole = float((e * t).sum() / size.sum())
    rest = float((t - product).square().sum()) / max(e.numel() - len(e), 1)
    low, high = float(by_token.min()), float(by_token.max())
    # by more than rounding moves them: the variance between tokens against that within
    between = float(((by_token - whole).square() * size).sum()) / max(len(e) - 1, 1)
    if between > SURE * 3 * rest and high - low > SAME * abs(whole):
        return Measured(low=min(abs(low), abs(high)), high=max(abs(low), abs(high)))
    return Measured(_simplest(whole, e.shape[-1], SURE * (rest / float(size.sum())) ** 0.5))


def _is_by_sample(factors: Tensor, sizes: Tensor, rows: Tensor, eps: float) -> bool:
    """Whether they are the same within every sample of tokens of several sizes: of equal ones a
    norm's are, too. Samples are along the first axis, or the second.
    """
    if factors.dim() != 2:
        return False
    for values, size, real in ((factors, sizes, rows), (factors.t(), sizes.t(), rows.t())):
        many = _varies(size, real, eps)
        if bool(many.any()) and not bool(_varies(values, real, eps)[many].any()):
            return True
    return False


def _varies(values: Tensor, real: Tensor, eps: float) -> Tensor:
    """Within each row, by more than rounding."""
    low = values.where(real, torch.inf).amin(-1)
    high = values.where(real, -torch.inf).amax(-1)
    return (high - low > eps * high.abs()) & (real.sum(-1) > 1)


def _by_differences(e: Tensor, t: Tensor, rows: Tensor, eps: float) -> float | None:
    """Of two rows at the same column, where learned positions cancel, of two columns of a row,
    where a speaker's vector does, or of both.
    """
    if e.dim() != 3:
        return None
    for axes in ((0,), (1,), (0, 1)):
        if all(e.shape[axis] > 1 for axis in axes):
            factor = _by_difference(e, t, rows, eps, axes)
            if factor is not None:
                return factor
    return None


def _by_difference(
    e: Tensor, t: Tensor, rows: Tensor, eps: float, axes: tuple[int, ...]
) -> float | None:
    size_e, size_t = e.abs(), t.abs()
    for axis in axes:
        e, t = (_behind(one, axis) - one.narrow(axis, 0, 1) for one in (e, t))
        size_e, size_t = (_behind(one, axis) + one.narrow(axis, 0, 1) for one in (size_e, size_t))
        rows = _behind(rows, axis) & rows.narrow(axis, 0, 1)
    e, t, size = e[rows], t[rows], eps * size_t[rows]
    square = float(e.square().sum())
    if not square:
        return None
    factor = float((e * t).sum()) / square
    rest = (t - factor * e).abs()
    if bool((rest > size + eps * abs(factor) * size_e[rows]).any()):
        return None
    left = float(rest.square().sum())
    # positions so large that rounding hides the embeddings say nothing
    if left >= 0.01 * float(t.square().sum()):
        return None
    return _simplest(factor, e.shape[-1], SURE * (left / e.numel() / square) ** 0.5)


def _behind(values: Tensor, axis: int) -> Tensor:
    """All but the first."""
    return values.narrow(axis, 1, values.shape[axis] - 1)


def _of_rows(embedded: Tensor, arrived: Tensor) -> Measured:
    """Rows that lie elsewhere: a chunk, sorted by length, without their padding, packed."""
    width = embedded.shape[-1]
    if arrived.dim() > 1 and arrived.shape[-1] != width:
        arrived = arrived.transpose(1, -1)
    if arrived.shape[-1:] != (width,) or width < 2:
        return Measured()
    e, t = embedded.reshape(-1, width).float(), arrived.detach().reshape(-1, width).float()
    e, t = e[(e != 0).any(-1)], t[(t != 0).any(-1)]
    t = t[:: max(1, -(-len(t) // ROWS))]
    if not len(e) or not len(t) or e.numel() * len(t) > COMPARISONS:
        return Measured()
    unit = torch.nn.functional.normalize
    cosine = unit(t, dim=-1) @ unit(e, dim=-1).t()
    nearest, row = cosine.abs().max(-1)
    if bool((nearest < 0.99).any()):
        return Measured()
    found = _by_tokens(e[row].double(), t.double(), _epsilon(embedded, arrived))
    return found if found.factor is not None else Measured()


def thinned(embedded: Tensor, arrived: Tensor, known: float) -> bool:
    """Whether some of a multiple's values are 0 and what is left has another factor: as a dropout
    of somebody's own makes of it.
    """
    if embedded.shape != arrived.shape or embedded.device != arrived.device:
        return False
    e, t = embedded.double(), arrived.detach().double()
    left = (t != 0) & (e != 0)
    if not bool(left.any()) or bool(left.all()):
        return False
    factor = float((e[left] * t[left]).sum() / e[left].square().sum())
    eps = _epsilon(embedded, arrived)
    rest = (t - factor * e)[left].abs()
    return abs(factor - known) > eps * known and not bool((rest > eps * t[left].abs()).any())


def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=dtype, device="cpu"))


def _candidates(factor: float, columns: int) -> list[float]:
    """Usual numbers, the nearest first, then those of few digits."""
    root = columns**0.5
    roots = [root, *(_rounded(root, dtype) for dtype in (torch.bfloat16, torch.float16))]
    sign = -1 if factor < 0 else 1
    usual = {sign * one for one in (1.0, *roots, 1 / root)} | {float(round(factor))}
    short = [float(f"{factor:.{digits}g}") for digits in range(2, 8)]
    return [*sorted(usual - {0.0}, key=lambda one: abs(one - factor)), *short]


def _exactly(embedded: Tensor, arrived: Tensor, factor: float) -> float:
    """The usual number that makes the arrival bit for bit, else what was measured."""
    near = _epsilon(embedded, arrived) * abs(factor)
    for one in _candidates(factor, embedded.shape[-1]):
        if abs(one - factor) <= near and torch.equal(embedded * one, arrived):
            return one
    return factor


def _simplest(factor: float, columns: int, error: float) -> float:
    """The usual number that cannot be told from what was measured."""
    near = max(error, SCALARS * abs(factor))
    return next((one for one in _candidates(factor, columns) if abs(one - factor) <= near), factor)
