"""Schedules of noise_alpha: functions of the optimizer step, for NEFTuneCallback or a loop of one's
own, picklable. No recompilation per value.
"""

import math
from collections.abc import Callable
from functools import partial

from .noise import check_alpha, check_integer

Schedule = Callable[[int], float]


# What the schedules do at a step; named functions, so that a schedule can be pickled.


def _linear(start: float, end: float, num_steps: int, step: int) -> float:
    return end if step >= num_steps else start + (end - start) * (step / num_steps)


def _cosine(start: float, end: float, num_steps: int, step: int) -> float:
    if step >= num_steps:
        return end
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _warmup(num_warmup_steps: int, rest: Schedule, step: int) -> float:
    if step < num_warmup_steps:
        return rest(0) * (step / num_warmup_steps)
    return rest(step - num_warmup_steps)


def _constant(noise_alpha: float, step: int) -> float:
    return noise_alpha


def _check_steps(name: str, value: int, least: int) -> int:
    value = check_integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return value


def linear_schedule(start: float, end: float, num_steps: int) -> Schedule:
    """Alpha from `start` at step 0 to `end` at step `num_steps` on a straight line, `end` from
    there on.

    Args:
        start, end: alphas, finite and >= 0.
        num_steps: optimizer steps, >= 1.

    Returns:
        A function from the optimizer step (int, >= 0) to alpha.

    Raises:
        ValueError: an alpha below 0 or not finite, num_steps below 1.
        TypeError: an alpha that is no number, num_steps that is no integer.

    Example:
        >>> schedule = linear_schedule(10.0, 0.0, num_steps=4)
        >>> [schedule(step) for step in (0, 1, 4, 9)]
        [10.0, 7.5, 0.0, 0.0]
    """
    start, end, num_steps = (
        check_alpha(start),
        check_alpha(end),
        _check_steps("num_steps", num_steps, 1),
    )
    return partial(_linear, start, end, num_steps)


def cosine_schedule(start: float, end: float, num_steps: int) -> Schedule:
    """Alpha from `start` to `end` along half a cosine, as the learning rate of Loshchilov and
    Hutter 2017 (arXiv 1608.03983).

    Arguments and result as :func:`linear_schedule`.

    Raises:
        ValueError, TypeError: as :func:`linear_schedule`.

    Example:
        >>> schedule = cosine_schedule(10.0, 0.0, num_steps=4)
        >>> [round(schedule(step), 3) for step in (0, 1, 2, 4)]
        [10.0, 8.536, 5.0, 0.0]
    """
    start, end, num_steps = (
        check_alpha(start),
        check_alpha(end),
        _check_steps("num_steps", num_steps, 1),
    )
    return partial(_cosine, start, end, num_steps)


def warmup_schedule(num_warmup_steps: int, after: float | Schedule) -> Schedule:
    """Alpha from 0 up to `after` on a straight line, then `after`: an alpha or another schedule,
    whose step 0 is the end of the warm-up.

    Args:
        num_warmup_steps: optimizer steps, >= 0.
        after: alpha, finite and >= 0, or a schedule.

    Returns as :func:`linear_schedule`.

    Raises:
        ValueError, TypeError: as :func:`linear_schedule`.

    Example:
        >>> schedule = warmup_schedule(2, linear_schedule(5.0, 0.0, num_steps=4))
        >>> [schedule(step) for step in (0, 1, 2, 4, 6)]
        [0.0, 2.5, 5.0, 2.5, 0.0]
    """
    num_warmup_steps = _check_steps("num_warmup_steps", num_warmup_steps, 0)
    rest = after if callable(after) else constant_schedule(after)
    return partial(_warmup, num_warmup_steps, rest)


def constant_schedule(noise_alpha: float | None) -> Schedule:
    """The same alpha at every step.

    Raises:
        ValueError, TypeError: as :func:`linear_schedule`.

    Example:
        >>> constant_schedule(5.0)(100)
        5.0
    """
    return partial(_constant, check_alpha(noise_alpha))
