"""Host time of one call on a handful of tokens, where nothing but overhead is left: `python -m
bench.overhead`.

All calls are interleaved in one run, each round in a new random order; ratios are taken within a
round against nn.Embedding.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from neftune_kernels import NEFTuneEmbedding, add_noise, noisy_embedding

from .interleaved import Spread, spread
from .machine import Load, describe, describe_load, machine_line

SHAPE, EMBEDDING_DIM, NUM_EMBEDDINGS = (1, 8), 64, 1000
BASE = "nn.Embedding"


class BareSubclass(nn.Embedding):
    """What any subclass pays, whatever it does."""


class Call(NamedTuple):
    name: str
    run: Callable[[Tensor], Tensor]
    limit: float | None  # of its time over nn.Embedding's
    stretch: float | None = None


def make_calls(frozen: bool) -> list[Call]:
    weight = nn.Parameter(torch.randn(NUM_EMBEDDINGS, EMBEDDING_DIM), requires_grad=not frozen)

    def share(module: nn.Embedding) -> nn.Embedding:
        module.weight = weight
        return module

    sizes, seed = (NUM_EMBEDDINGS, EMBEDDING_DIM), torch.tensor(0)
    embeds = torch.randn(*SHAPE, EMBEDDING_DIM)
    return [
        Call(BASE, share(nn.Embedding(*sizes)), None),
        Call("bare subclass of nn.Embedding", share(BareSubclass(*sizes)), None),
        Call(
            "NEFTuneEmbedding, training", share(NEFTuneEmbedding(*sizes, noise_alpha=5.0)), 3.0, 2.0
        ),
        Call(
            "NEFTuneEmbedding, noise_alpha=0",
            share(NEFTuneEmbedding(*sizes, noise_alpha=0.0)),
            1.15,
        ),
        Call(
            "NEFTuneEmbedding, eval", share(NEFTuneEmbedding(*sizes, noise_alpha=5.0)).eval(), 1.15
        ),
        Call("noisy_embedding", lambda ids: noisy_embedding(ids, weight, 5.0), None),
        Call(
            "noisy_embedding, seed=tensor",
            lambda ids: noisy_embedding(ids, weight, 5.0, seed=seed),
            None,
        ),
        Call("add_noise", lambda ids: add_noise(embeds, 5.0), None),
        Call(
            "torch.nn.functional.embedding", lambda ids: nn.functional.embedding(ids, weight), None
        ),
    ]


def time_calls(calls: list[Call], repeats: int, iterations: int) -> dict[str, list[float]]:
    """Seconds per call, one value per round."""
    ids = torch.arange(SHAPE[0] * SHAPE[1]).view(SHAPE)
    for call in calls:
        for _ in range(100):
            call.run(ids)
    taken: dict[str, list[float]] = {call.name: [] for call in calls}
    order, clock = torch.Generator().manual_seed(0), time.perf_counter
    for _ in range(repeats):
        for i in torch.randperm(len(calls), generator=order).tolist():
            run = calls[i].run
            start = clock()
            for _ in range(iterations):
                run(ids)
            taken[calls[i].name].append((clock() - start) / iterations)
    return taken


def report(calls: list[Call], taken: dict[str, list[float]]) -> int:
    """Prints the table; returns how many targets are missed."""
    missed = 0
    print(f"  {'':32} {'median us':>9} {'p10':>7} {'p90':>7}   over nn.Embedding")
    for call in calls:
        median, low, high = (value * 1e6 for value in spread(taken[call.name]))
        ratio: Spread = spread([a / b for a, b in zip(taken[call.name], taken[BASE], strict=True)])
        verdict = ""
        if call.limit is not None:
            met = ratio.median <= call.limit
            missed += not met
            verdict = f"target <= {call.limit} {'met' if met else 'MISSED'}"
            if call.stretch is not None:
                stretched = "met" if ratio.median <= call.stretch else "missed"
                verdict += f", stretch <= {call.stretch} {stretched}"
        over = f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
        print(f"  {call.name:32} {median:9.2f} {low:7.2f} {high:7.2f}   {over}  {verdict}".rstrip())
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=501, metavar="N", help="rounds")
    parser.add_argument(
        "--iterations",
        type=int,
        default=40,
        help="calls in one sample, short beside a time slice of the scheduler",
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine_line(describe(options.threads)))
    missed = 0
    for frozen in (False, True):
        calls = make_calls(frozen)
        print(
            f"\n{SHAPE} tokens, d={EMBEDDING_DIM}, float32, grad mode on, weight "
            f"{'frozen' if frozen else 'requires grad'}"
        )
        load = Load()
        taken = time_calls(calls, options.repeats, options.iterations)
        others = load.others()
        missed += report(calls, taken)
        if describe_load(others):
            print(f"  {describe_load(others)}")
    print(f"\n{missed} targets missed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
