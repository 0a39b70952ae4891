"""Moments and correlations of the noise itself, by the package's kernel, beside torch's
`uniform_(-1, 1)` in the same dtypes; bench/noise_quality.py puts them into its table.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neftune_kernels import add_noise, neftune_noise

LENGTH, DIM, SAMPLES = 128, 2048, 16
ROOT_OF_SIZE = float(LENGTH * DIM) ** 0.5  # as alpha: magnitude 1, exactly
CHUNKS = 32  # of 4 194 304 values: 16 MiB, which the allocator hands out again
TOGETHER = 8  # chunks that are counted at once
SEED = 1_000_003
VARIANCE = 1 / 3
VARIANCE_OF_SQUARES = 4 / 45  # E u^4 - (E u^2)^2 = 1/5 - 1/9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ONE = 1 << 24  # in steps of the finest float32 that torch's uniform_ can give
SHOWN = ("bfloat16", "torch bfloat16")  # in the figure
SPANS = ((-1.0, 1.0), (-0.03, 0.03))  # of its panels


def noise(seed: int, replica: int = 0) -> Tensor:
    """(samples, positions, columns) float32 of magnitude 1."""
    shape = (SAMPLES, LENGTH)
    return neftune_noise(shape, DIM, ROOT_OF_SIZE, seed=seed, replica=replica)


# ---- values


def ours(dtype: torch.dtype) -> Iterator[Tensor]:
    """Noise added to zeros of the dtype, as a lookup adds it, an element at a time."""
    for chunk in range(CHUNKS // TOGETHER):
        zeros = torch.zeros(TOGETHER * SAMPLES, LENGTH, DIM, dtype=dtype)
        yield add_noise(zeros, ROOT_OF_SIZE, seed=SEED + chunk)


def theirs(dtype: torch.dtype) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(CHUNKS // TOGETHER):
        values = torch.empty(TOGETHER * SAMPLES, LENGTH, DIM, dtype=dtype)
        yield values.uniform_(-1, 1, generator=generator)


def counted(chunks: Iterator[Tensor], dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Each value that occurs, as float64 and ascending, and how often."""
    if dtype == torch.float32:
        counts = np.zeros(2 * ONE + 1, dtype=np.int64)
        for values in chunks:
            scaled = values.double() * ONE
            if not torch.equal(scaled, scaled.round()):
                raise ValueError("a float32 value is no multiple of 2**-24: count it otherwise")
            counts += np.bincount((scaled.long() + ONE).flatten(), minlength=counts.size)
        found = counts.nonzero()[0]
        return (found - ONE) / ONE, counts[found]
    counts = np.zeros(1 << 16, dtype=np.int64)
    for values in chunks:
        counts += np.bincount(
            values.view(torch.int16).numpy().view(np.uint16).ravel(), minlength=1 << 16
        )
    found = counts.nonzero()[0]
    bits = torch.from_numpy(found.astype(np.uint16).view(np.int16))
    once, which = np.unique(bits.view(dtype).double().numpy(), return_inverse=True)  # -0.0 is 0.0
    return once, np.bincount(which, weights=counts[found]).astype(np.int64)


def moments(values: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Exact sums over a histogram. Deviations are in standard errors of n independent uniforms:
    sqrt(1 / 3n) of the mean, sqrt(4 / 45n) of the mean square, 1 / sqrt(n) of the sign.
    """
    n = int(counts.sum())
    mean, square = (float((values**power * counts).sum() / n) for power in (1, 2))
    sign = float((np.sign(values) * counts).sum() / n)
    return {
        "n": n,
        "mean": mean,
        "mean in errors": mean * math.sqrt(n / VARIANCE),
        "square": square,
        "square in errors": (square - VARIANCE) * math.sqrt(n / VARIANCE_OF_SQUARES),
        "sign": sign,
        "sign in errors": sign * math.sqrt(n),
        "least": float(values.min()),
        "most": float(values.max()),
        "distinct": len(values),
        "unpaired": int((~np.isin(-values, values)).sum()),
        "zeros": int(counts[values == 0].sum()),
    }


def distance(values: np.ndarray, counts: np.ndarray, at: np.ndarray) -> list[float]:
    """The share of values <= x less that of a uniform on (-1, 1), for each x of `at`."""
    below = np.concatenate(([0], counts.cumsum()))[np.searchsorted(values, at, side="right")]
    return list(below / counts.sum() - (at + 1) / 2)


def measure_values() -> dict[str, Any]:
    """Moments by dtype, and for the figure (x, :func:`distance`) by its panels."""
    found: dict[str, Any] = {"values": {}, "curves": {}}
    for name, dtype in DTYPES.items():
        for who, chunks in ((name, ours(dtype)), (f"torch {name}", theirs(dtype))):
            histogram = counted(chunks, dtype)
            found["values"][who] = moments(*histogram)
            if who in SHOWN:
                spans = [np.linspace(low, high, 4001) for low, high in SPANS]
                found["curves"][who] = [(list(at), distance(*histogram, at)) for at in spans]
    return found


# ---- pairs

Pairs = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # of a chunk and its seed


def lagged(axis: int, lag: int) -> Pairs:
    def pairs(cube: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        size = cube.shape[axis] - lag
        return cube.narrow(axis, 0, size), cube.narrow(axis, lag, size)

    return pairs


def beside(seed_of: Callable[[int], int], replica: int = 0) -> Pairs:
    def pairs(cube: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        return cube, noise(seed_of(seed), replica)

    return pairs


NEIGHBOURS: dict[str, Pairs] = {
    **{f"columns, {lag} apart": lagged(2, lag) for lag in (1, 2, 3, 4, 7, 8, 16)},
    **{f"positions, {lag} apart": lagged(1, lag) for lag in (1, 2, 8)},
    **{f"samples, {lag} apart": lagged(0, lag) for lag in (1, 2)},
    **{f"replicas 0 and {one}": beside(lambda s: s, one) for one in (1, 2, 2**31)},
    "seeds s and s + 1": beside(lambda s: s + 1),
    "seeds s and s + 2**32": beside(lambda s: s + 2**32),
    "seeds s and s + 2**63": beside(lambda s: s + 2**63),
    "seeds s and -s": beside(lambda s: -s),
}


def centred(values: Tensor) -> Tensor:
    return values**2 - VARIANCE


def sum_of_products(left: Tensor, right: Tensor) -> float:
    """In float64, of float32 products: their rounding, 2**-24 each, is far below 1 / sqrt(n)."""
    return float((left * right).sum(dtype=torch.float64))


def measure_pairs() -> dict[str, Any]:
    """Of each kind of neighbours: the number n of pairs, and of u and of u**2 the correlation in
    standard errors. Mean and variance are known, so the standard error of the mean product of n
    independent pairs is the variance over sqrt(n), that of the correlation 1 / sqrt(n).
    """
    sums = {name: [0.0, 0.0, 0] for name in NEIGHBOURS}
    for chunk in range(CHUNKS):
        seed = 5 + chunk * 16  # no seed comes twice
        cube = noise(seed)
        for name, pairs in NEIGHBOURS.items():
            left, right = pairs(cube, seed)
            one = sums[name]
            one[0] += sum_of_products(left, right) / VARIANCE
            one[1] += sum_of_products(centred(left), centred(right)) / VARIANCE_OF_SQUARES
            one[2] += left.numel()
    return {
        "pairs": {
            name: {
                "n": n,
                "correlation": first / n,
                "in errors": first / math.sqrt(n),
                "of squares, in errors": second / math.sqrt(n),
            }
            for name, (first, second, n) in sums.items()
        }
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "moments": measure_values,
    "correlations": measure_pairs,
}
