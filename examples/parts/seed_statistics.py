"""Means over seeds with Student's 95 % intervals, and what two arms of one seed are compared by.

A seed is the unit: it draws the split, the order of the data and the noise. Held-out items of one
run share a model and are no repetitions of the experiment.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Point(NamedTuple):
    """One evaluation of a run, noise off: mean losses per answer token, in nats."""

    step: int
    training_loss: float
    held_out_loss: float


class Interval(NamedTuple):
    mean: float
    half: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half


def student_within(t: float, freedom: int) -> float:
    """P(|T| <= t) for that many degrees of freedom: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    if freedom % 2 == 0:
        term, total = 1.0, 1.0
        for i in range(2, freedom, 2):
            term *= (i - 1) / i * cosine**2
            total += term
        return sine * total
    term, total = cosine, cosine if freedom > 1 else 0.0
    for i in range(3, freedom, 2):
        term *= (i - 1) / i * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total)


def student_quantile(freedom: int) -> float:
    """The t with P(|T| <= t) = 0.95, by bisection."""
    low, high = 0.0, 16.0  # 12.71 at one degree of freedom, less at more
    while (middle := (low + high) / 2) not in (low, high):
        if student_within(middle, freedom) < CONFIDENCE:
            low = middle
        else:
            high = middle
    return high


def interval(values: Sequence[float]) -> Interval:
    """Mean and half width of its 95 % interval, over seeds."""
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval over seeds needs at least 2 of them, got {n}: run more")
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Interval(mean, student_quantile(n - 1) * math.sqrt(variance / n))


# ---- what is compared


def best_held_out(points: Sequence[Point]) -> Point:
    return min(points, key=lambda point: point.held_out_loss)


def held_out_at(points: Sequence[Point], training_loss: float) -> float | None:
    """Where a run's training loss first falls to that level; None where it never does, or was
    there before the first evaluation. Between two evaluations linear in log(training loss).
    """
    for before, after in itertools.pairwise(points):
        if before.training_loss >= training_loss >= after.training_loss:
            fallen = math.log(before.training_loss / after.training_loss)
            share = math.log(before.training_loss / training_loss) / fallen if fallen else 1.0
            return before.held_out_loss + share * (after.held_out_loss - before.held_out_loss)
    return None


def differences_at_equal_training_loss(
    one: Sequence[Point], other: Sequence[Point]
) -> float | None:
    """Held-out loss of one minus the other's, at the lowest training loss that both evaluated."""
    level = max(min(point.training_loss for point in points) for points in (one, other))
    here, there = held_out_at(one, level), held_out_at(other, level)
    return None if here is None or there is None else here - there
