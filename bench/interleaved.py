"""Providers of the same thing, timed in rounds: each round in a new random order, on inputs that
rotate, ratios taken within a round. A slow moment of the machine hits both sides of a ratio.
"""

import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

SAMPLE_SECONDS = 0.003  # one sample of a fast call is a loop of about this length
FEWEST_ROUNDS = 3

Runs = dict[str, Callable[[Any], object]]  # by provider; each takes one of the inputs


class Spread(NamedTuple):
    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile


def spread(values: Sequence[float]) -> Spread:
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    )
    return Spread(*quantiles.tolist())


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Of the rounds that both took part in."""
    return spread([a / b for a, b in zip(values, base, strict=False)])


class Sample(NamedTuple):
    seconds: float  # of one call
    faults: float  # pages that one call made the system map


class Plan(NamedTuple):
    iterations: int  # calls of a sample
    rounds: int


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def time_once(
    run: Callable[[Any], object], inputs: Sequence[Any], cursor: int, iterations: int
) -> Sample:
    # what is freed here the allocator hands out next: not the neighbour's luck
    run(inputs[(cursor - 1) % len(inputs)])
    chosen = [inputs[(cursor + i) % len(inputs)] for i in range(iterations)]
    faults, start = page_faults(), time.perf_counter()
    for one in chosen:
        run(one)
    seconds = time.perf_counter() - start
    return Sample(seconds / iterations, (page_faults() - faults) / iterations)


def plan_of(run: Callable[[Any], object], inputs: Sequence[Any], rounds: int, most: float) -> Plan:
    """Fewer rounds for a slow one: `most` seconds in all."""
    seconds = min(time_once(run, inputs, i, 1).seconds for i in range(2))
    iterations = max(1, min(1000, round(SAMPLE_SECONDS / seconds)))
    fit = int(most / (seconds * (iterations + 1)))
    return Plan(iterations, min(rounds, max(FEWEST_ROUNDS, fit)))


def time_rounds(
    runs: Runs, inputs: Sequence[Any], rounds: int, most: float
) -> dict[str, list[Sample]]:
    """By provider, one sample a round; `most` seconds for each provider."""
    plans = {name: plan_of(run, inputs, rounds, most) for name, run in runs.items()}
    taken: dict[str, list[Sample]] = {name: [] for name in runs}
    names, order, cursor = list(runs), torch.Generator().manual_seed(0), 0
    for number in range(rounds):
        for i in torch.randperm(len(names), generator=order).tolist():
            name = names[i]
            if number < plans[name].rounds:
                iterations = plans[name].iterations
                taken[name].append(time_once(runs[name], inputs, cursor, iterations))
                # the next provider never meets rows that this one left in the caches
                cursor += iterations
    return taken
