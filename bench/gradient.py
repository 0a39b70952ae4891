"""The weight's gradient on the CPU beside torch's: `python -m bench.gradient` writes
bench/results/gradient.md.

Alone, with all of it read afterwards, as an optimizer does, and in a whole training step. The ways
are interleaved, each round in a new random order; ratios are taken within a round over torch's
dense gradient. How many elements are the exact sum's rounding is counted on some columns of every
case. Needs transformers for the steps.
"""

import argparse
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from neftune_kernels import NEFTuneEmbedding, gradients
from neftune_kernels.reference import rounded_once

from .machine import Load, describe, describe_load
from .resumed import Bar
from .training_step import SMOLLM2

RESULT = pathlib.Path(__file__).parent / "results" / "gradient.md"
TORCH, OURS = "torch dense", "ours dense"
PROBED = 64  # columns whose exact sums are taken


class Case(NamedTuple):
    num_embeddings: int
    embedding_dim: int
    tokens: int
    dtype: torch.dtype
    ids: str

    @property
    def name(self) -> str:
        shape = f"({self.num_embeddings}, {self.embedding_dim}, {self.tokens})"
        return f"{shape} {str(self.dtype).removeprefix('torch.')} {self.ids}"


SHAPES = ((32000, 4096, 4096), (128256, 1024, 4096), (128256, 2048, 16384))
CASES = [
    Case(*shape, dtype, ids)
    for shape in SHAPES
    for dtype in (torch.float32, torch.bfloat16)
    for ids in ("uniform", "Zipf")
]


def make_ids(case: Case, generator: torch.Generator) -> Tensor:
    if case.ids == "uniform":
        return torch.randint(case.num_embeddings, (case.tokens,), generator=generator)
    weights = 1 / torch.arange(1, case.num_embeddings + 1, dtype=torch.float64)
    return torch.multinomial(weights, case.tokens, replacement=True, generator=generator)


def by_torch(case: Case, grad: Tensor, ids: Tensor) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(grad, ids, case.num_embeddings, -1, False)


def by_index_add(case: Case, grad: Tensor, ids: Tensor) -> Tensor:
    return grad.new_zeros(case.num_embeddings, case.embedding_dim).index_add_(0, ids, grad)


def by_coalescing(case: Case, grad: Tensor, ids: Tensor) -> Tensor:
    shape = (case.num_embeddings, case.embedding_dim)
    return torch.sparse_coo_tensor(ids[None], grad, shape, check_invariants=False).coalesce()


def ours(case: Case, grad: Tensor, ids: Tensor) -> Tensor:
    return gradients.dense(grad, ids, case.num_embeddings)


def ours_sparse(case: Case, grad: Tensor, ids: Tensor) -> Tensor:
    return gradients.sparse(grad, ids, case.num_embeddings)


WAYS: dict[str, Callable[[Case, Tensor, Tensor], Tensor]] = {
    TORCH: by_torch,
    OURS: ours,
    "index_add_": by_index_add,
    "torch sparse, coalesced": by_coalescing,
    "ours sparse": ours_sparse,
}
READ = (TORCH, OURS)  # and then all of it


class Taken(NamedTuple):
    wall: float
    cpu: float


def time_way(case: Case, way: str, grad: Tensor, ids: Tensor, read: bool) -> Taken:
    wall, cpu = time.perf_counter(), time.process_time()
    made = WAYS[way](case, grad, ids)
    if read:
        made.sum()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def exact_share(case: Case, grad: Tensor, ids: Tensor, made: Tensor) -> float:
    """Of the probed elements of ids that occur, those that are the unlimited sum's rounding."""
    columns = torch.linspace(0, case.embedding_dim - 1, PROBED).long()
    rows = grad[:, columns].double().numpy()
    order = ids.argsort(stable=True)
    occurring, counts = ids[order].unique_consecutive(return_counts=True)
    groups = np.split(order.numpy(), counts.cumsum(0)[:-1].numpy())
    sums = [[math.fsum(column) for column in rows[group].T] for group in groups]
    exact = rounded_once(torch.tensor(sums, dtype=torch.float64), case.dtype)
    return float((made[occurring][:, columns] == exact).double().mean())


def measure(case: Case, rounds: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(3):  # in turns, so that none stays in a cache
        grad = torch.randn(case.tokens, case.embedding_dim, generator=generator).to(case.dtype)
        batches.append((grad, make_ids(case, generator)))
    jobs = [(way, False) for way in WAYS] + [(way, True) for way in READ]
    taken: dict[tuple[str, bool], list[Taken]] = {job: [] for job in jobs}
    for number in range(rounds + 1):
        for index in torch.randperm(len(jobs), generator=generator).tolist():
            way, read = jobs[index]
            once = time_way(case, way, *batches[number % 3], read)
            if number:  # the first one warms up
                taken[way, read].append(once)

    def over(job: tuple[str, bool], base: tuple[str, bool]) -> str:
        pairs = zip(taken[job], taken[base], strict=True)
        ratios = sorted((b.wall / a.wall, b.cpu / a.cpu) for a, b in pairs)
        wall, cpu = (sorted(column) for column in zip(*ratios, strict=True))
        spread = f"({wall[0]:.2f} to {wall[-1]:.2f})"
        return f"{statistics.median(wall):.2f} {spread}, CPU {statistics.median(cpu):.2f}"

    base = 1e3 * statistics.median(one.wall for one in taken[TORCH, False])
    grad, ids = batches[0]
    shares = [exact_share(case, grad, ids, WAYS[way](case, grad, ids)) for way in READ]
    cells = [
        case.name,
        f"{base:.1f}",
        over((OURS, False), (TORCH, False)),
        over((OURS, True), (TORCH, True)),
        *(over((way, False), (TORCH, False)) for way in list(WAYS)[2:]),
        *(f"{100 * share:.3f} %" for share in reversed(shares)),
    ]
    return cells


HEAD = [
    "(V, d, tokens), dtype, ids",
    "torch dense, ms",
    "ours, times faster",
    "ours and all of it read, times faster than torch's and read",
    *(f"{way}, times faster than torch dense" for way in list(WAYS)[2:]),
    "ours exact",
    "torch's exact",
]


# ---- a whole step: forward, loss, backward and AdamW, every weight trained, in float32

LARGE_VOCABULARY: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "tie_word_embeddings": False,
}
STEPS = {"SmolLM2-135M, tied": SMOLLM2, "Llama of 4 layers, V = 128256, d = 1024": LARGE_VOCABULARY}
BATCH = 4, 128
FILLS = 1.0, 0.7, 0.5, 0.3  # of a row, which padding follows


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, mask: Tensor) -> Taken:
    wall, cpu = time.perf_counter(), time.process_time()
    optimizer.zero_grad(set_to_none=True)
    labels = ids.masked_fill(mask == 0, -100)
    model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    optimizer.step()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def measure_step(name: str, rounds: int) -> list[str]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**STEPS[name])
    model = transformers.LlamaForCausalLM(config).train()
    plain = model.get_input_embeddings()
    exact = NEFTuneEmbedding.from_embedding(plain, noise_alpha=0, deterministic_grad=True)
    assert exact.weight is plain.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    rows, columns = BATCH
    lengths = torch.tensor([int(fill * columns) for fill in FILLS])
    mask = (torch.arange(columns) < lengths[:, None]).long()
    taken: dict[str, list[Taken]] = {TORCH: [], OURS: []}
    for number in range(rounds + 1):
        ids = torch.randint(config.vocab_size, (rows, columns))
        for index in torch.randperm(2).tolist():
            way = (TORCH, OURS)[index]
            model.set_input_embeddings(exact if way == OURS else plain)
            once = step_of(model, optimizer, ids, mask)
            if number:
                taken[way].append(once)
    ratios = [a.wall / b.wall for a, b in zip(taken[TORCH], taken[OURS], strict=True)]
    spread = f"({min(ratios):.3f} to {max(ratios):.3f})"
    seconds = statistics.median(one.wall for one in taken[TORCH])
    return [name, f"{seconds:.2f}", f"{statistics.median(ratios):.3f} {spread}"]


STEP_HEAD = ["model", "step with torch's gradient, s", "step with ours, times faster"]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    rule = f"|---|{'---:|' * (len(head) - 1)}"
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("names", nargs="*", help="words that a case's name must hold; none: all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = [case for case in CASES if all(word in case.name for word in options.names)]
    steps = [name for name in STEPS if all(word in name for word in options.names)]
    load, bar, rows, of_steps = Load(), Bar(len(chosen) + len(steps), 0), [], []
    with torch.no_grad():
        for case in chosen:
            rows.append(measure(case, options.rounds))
            bar.show(len(rows), case.name)
    for name in steps:
        of_steps.append(measure_step(name, options.rounds))
        bar.show(len(rows) + len(of_steps), name)
    lines = [
        "# The weight's gradient on the CPU",
        "",
        "Medians of ratios within a round, least and most in brackets; more than 1 is faster than",
        "torch's. Exact: the share of elements that are the unlimited sum, rounded once.",
        "",
        *table(HEAD, rows),
        "",
        f"A whole step of {BATCH[0]} rows of up to {BATCH[1]} tokens, an attention_mask, every",
        "weight trained in float32: forward, loss, backward, AdamW.",
        "",
        *table(STEP_HEAD, of_steps),
        "",
        f"{time.strftime('%Y-%m-%d')}, {', '.join(describe(options.threads).values())};",
        "written by `python -m bench.gradient`.",
        describe_load(load.others()),
    ]
    print("\n".join(lines))
    if not options.names:
        RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
