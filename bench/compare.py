"""Ours against the floors and the rivals, interleaved in one run: `python -m bench.compare`.

Every provider is first checked (ours bit for bit against the reference backend), then all of a case
are timed in rounds, each round in a new random order, on inputs and buffers that rotate through
more memory than the caches hold. Ratios are taken within a round, so a slow moment of the machine
hits both sides; figures are medians, with the 10th and 90th percentile beside them.
"""

import argparse
import csv
import pathlib
import sys
import time
from typing import NamedTuple

import torch

from .cases import (
    DTYPES,
    SHAPES,
    Case,
    Inputs,
    Provider,
    check,
    make_case,
    make_inputs,
    make_providers,
)
from .machine import Floors, Load, describe, describe_load, last_level_cache, measure_floors

SAMPLE_SECONDS = 0.003  # one sample of a fast provider is a loop of about this length
PROVIDER_SECONDS = 6.0  # a slow provider takes part in fewer rounds
FEWEST_ROUNDS = 3
LARGE = 1_000_000  # elements from which the speedups over rivals are promised


class Spread(NamedTuple):
    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile


def spread(values: list[float]) -> Spread:
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    )
    return Spread(*quantiles.tolist())


class Target(NamedTuple):
    ours: str
    rival: str
    limit: float
    at_most: bool  # ours / rival <= limit; else rival / ours >= limit


class Comparison(NamedTuple):
    target: Target
    ratio: Spread
    judged: bool  # False: for information, no target is set for it

    @property
    def verdict(self) -> str:
        if not self.judged:
            return "-"
        met = (
            self.ratio.median <= self.target.limit
            if self.target.at_most
            else self.ratio.median >= self.target.limit
        )
        return "met" if met else "MISSED"

    @property
    def text(self) -> str:
        if self.target.at_most:
            return f"{self.target.ours} / {self.target.rival}"
        return f"{self.target.rival} / {self.target.ours}"


class Result(NamedTuple):
    case: Case
    seconds: dict[str, list[float]]  # provider → one time per round
    comparisons: list[Comparison]
    arithmetic_seconds: float
    memory_seconds: float
    others: float | None  # share of the CPU time that other processes took while this was timed


def targets(case: Case) -> list[tuple[Target, bool]]:
    """Each with whether it is judged."""
    float32, large_rows = case.dtype == torch.float32, case.key == "llama2-7b"
    kernel = 1.15 if float32 else 1.5 if large_rows else 2.5
    fresh = (1.1 if large_rows else 1.35) if float32 else (1.3 if large_rows else 2.4)
    promised = case.elements >= LARGE
    return [
        (Target("ours, into a buffer", "gather floor", kernel, True), True),
        (Target("ours, into a buffer, in cache", "gather floor, in cache", 2.5, True), not float32),
        (Target("ours", "F.embedding", fresh, True), True),
        (Target("ours", "HF hook", 5.0, False), promised),
        (Target("ours, attention_mask", "official", 6.0, False), promised),
        (Target("ours", "HF hook, compiled", 4.0, False), promised),
        (Target("ours, attention_mask", "official, compiled", 4.0, False), promised),
    ]


def time_once(provider: Provider, inputs: list[Inputs], cursor: int, iterations: int) -> float:
    if provider.cached:
        inputs = inputs[:1]
    provider.run(
        inputs[(cursor - 1) % len(inputs)]
    )  # whose freed memory the allocator hands out next is not the neighbour's luck
    chosen = [inputs[(cursor + i) % len(inputs)] for i in range(iterations)]
    start = time.perf_counter()
    for one in chosen:
        provider.run(one)
    return (time.perf_counter() - start) / iterations


def time_all(
    providers: list[Provider], inputs: list[Inputs], repeats: int
) -> dict[str, list[float]]:
    plans = {}
    for provider in providers:
        seconds = min(time_once(provider, inputs, i, 1) for i in range(2))
        iterations = max(1, min(1000, round(SAMPLE_SECONDS / seconds)))
        rounds = min(repeats, max(FEWEST_ROUNDS, int(PROVIDER_SECONDS / (seconds * iterations))))
        plans[provider.name] = (iterations, rounds if seconds < 2 else 1)
    taken: dict[str, list[float]] = {provider.name: [] for provider in providers}
    order, cursor = torch.Generator().manual_seed(0), 0
    for round_index in range(repeats):
        for i in torch.randperm(len(providers), generator=order).tolist():
            iterations, rounds = plans[providers[i].name]
            if round_index < rounds:
                taken[providers[i].name].append(time_once(providers[i], inputs, cursor, iterations))
                # the next provider never meets rows that this one left in the caches
                cursor += iterations
    return taken


def compare(case: Case, seconds: dict[str, list[float]]) -> list[Comparison]:
    comparisons = []
    for target, judged in targets(case):
        if target.ours in seconds and target.rival in seconds:
            pairs = zip(
                seconds[target.ours], seconds[target.rival], strict=False
            )  # the rounds that both took part in
            ratios = [a / b if target.at_most else b / a for a, b in pairs]
            comparisons.append(Comparison(target, spread(ratios), judged))
    return comparisons


def relative(seconds: dict[str, list[float]], base: str = "F.embedding") -> dict[str, float]:
    """Provider → median ratio to `base` within a round; `base` itself → its median in seconds."""
    pairs = {name: zip(values, seconds[base], strict=False) for name, values in seconds.items()}
    return {name: spread([a / b for a, b in pair]).median for name, pair in pairs.items()} | {
        base: spread(seconds[base]).median
    }


def run_case(case: Case, repeats: int, compiled: bool, floors: Floors, threads: int) -> Result:
    """Check, then time. Raises AssertionError where a provider does not compute what it should."""
    cache = last_level_cache()
    inputs = make_inputs(case, cache)
    providers = []
    for provider in make_providers(compiled, cached=case.bytes_moved <= 0.75 * cache):
        try:
            wrong = check(case, provider, inputs[-1])
        except Exception as error:
            if "compiled" not in provider.name:
                raise
            print(
                f"  left out: {provider.name}: torch.compile failed: {str(error).splitlines()[0]}"
            )
            continue
        if wrong:
            raise AssertionError(
                f"{case.model} {case.shape} {case.dtype_name}: {provider.name} {wrong}"
            )
        providers.append(provider)
    load = Load()
    seconds = time_all(providers, inputs, repeats)
    others = load.others()
    memory, arithmetic = floors.seconds(case.bytes_moved, case.elements, threads)
    return Result(case, seconds, compare(case, seconds), arithmetic, memory, others)


def print_case(result: Result) -> None:
    case = result.case
    print(
        f"\n{case.model} {case.shape} V={case.num_embeddings} {case.dtype_name}: "
        f"{case.elements / 1e6:.3g}M elements"
    )
    print(
        f"  must move {case.bytes_moved / 1e6:.3g} MB = "
        f"2·{case.tokens}·{case.embedding_dim}·{case.dtype.itemsize} B of rows + "
        f"8·{case.tokens} B of ids; floors: memory {result.memory_seconds * 1e3:.3g} ms at copy "
        f"speed, "
        f"arithmetic {result.arithmetic_seconds * 1e3:.3g} ms"
    )
    print(f"  {'':30} {'median ms':>10} {'p10':>9} {'p90':>9} {'GB/s':>7} {'rounds':>7}")
    for name, values in result.seconds.items():
        median, low, high = (value * 1e3 for value in spread(values))
        rate = case.bytes_moved / median / 1e6
        print(f"  {name:30} {median:10.4g} {low:9.4g} {high:9.4g} {rate:7.1f} {len(values):7}")
    for comparison in result.comparisons:
        ratio, target = comparison.ratio, comparison.target
        limit = (
            f"target {'<=' if target.at_most else '>='} {target.limit}"
            if comparison.judged
            else "no target"
        )
        print(
            f"  {comparison.text:55} {ratio.median:6.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]  "
            f"{limit:15} {comparison.verdict}"
        )
    if describe_load(result.others):
        print(f"  {describe_load(result.others)}")


def write_csv(path: pathlib.Path, results: list[Result], machine: dict[str, str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        measured = ("rounds", "median_ms", "p10_ms", "p90_ms", "bytes_moved", "gb_per_s")
        ratios = (
            "compared_with",
            "ratio",
            "ratio_p10",
            "ratio_p90",
            "target",
            "verdict",
            "others_cpu_share",
        )
        writer.writerow(
            (
                "model",
                "batch",
                "columns",
                "embedding_dim",
                "num_embeddings",
                "dtype",
                "provider",
                *measured,
                *ratios,
                *machine,
            )
        )
        for case, seconds, comparisons, _, _, others in results:
            for name, values in seconds.items():
                median, low, high = (value * 1e3 for value in spread(values))
                row = [
                    case.model,
                    case.batch,
                    case.columns,
                    case.embedding_dim,
                    case.num_embeddings,
                    case.dtype_name,
                    name,
                    len(values),
                ]
                row += [f"{value:.5g}" for value in (median, low, high)]
                row += [case.bytes_moved, f"{case.bytes_moved / median / 1e6:.4g}"]
                # a row carries the one comparison it stands for: a rival's with ours, or ours with
                # its floor
                own = next(
                    (
                        c
                        for c in comparisons
                        if name == (c.target.ours if c.target.at_most else c.target.rival)
                    ),
                    None,
                )
                if own is None:
                    row += [""] * (len(ratios) - 1)
                else:
                    against = own.target.rival if own.target.at_most else own.target.ours
                    bound = (
                        f"{'<=' if own.target.at_most else '>='} {own.target.limit}"
                        if own.judged
                        else ""
                    )
                    row += [
                        against,
                        *(f"{value:.4g}" for value in own.ratio),
                        bound,
                        own.verdict if own.judged else "",
                    ]
                writer.writerow(
                    (*row, "" if others is None else f"{others:.3f}", *machine.values())
                )


def machine_line(machine: dict[str, str]) -> str:
    return (
        f"{machine['cpu']}, {machine['caches']}; SIMD {machine['simd']}, {machine['threads']} "
        f"threads, torch {machine['torch']}, "
        f"neftune_kernels {machine['neftune_kernels']}, backend {machine['backend']}"
    )


def floor_line(floors: dict[str, Floors]) -> str:
    rates = "; ".join(
        f"{dtype}: "
        + ", ".join(
            f"{rate / 1e9:.3g}e9 with {count} thread{'s'[: count > 1]}"
            for count, rate in floor.arithmetic.items()
        )
        for dtype, floor in floors.items()
    )
    copy = next(iter(floors.values())).copy_bytes / 1e9
    return (
        "Arithmetic floor (noise alone in cache, no row traffic), elements per second and core: "
        f"{rates}. Copy: {copy:.1f} GB/s."
    )


def markdown(results: list[Result], machine: dict[str, str], floors: dict[str, Floors]) -> str:
    """For docs/performance.md: times in ms, in parentheses the ratio of the column's promise."""
    rivals = ("HF hook", "official", "HF hook, compiled", "official, compiled")
    head = ("shape", "dtype", "gather floor", "kernel alone", "`F.embedding`", "**ours**", *rivals)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 2 + "---:|" * (len(head) - 2)]
    for case, seconds, comparisons, *_ in results:
        ratio = {
            c.target.ours if c.target.at_most else c.target.rival: c.ratio.median
            for c in comparisons
        }

        def cell(
            name: str, seconds: dict[str, list[float]] = seconds, ratio: dict[str, float] = ratio
        ) -> str:
            if name not in seconds:
                return "-"
            milliseconds = f"{spread(seconds[name]).median * 1e3:.3g}"
            return f"{milliseconds} ({ratio[name]:.2f}x)" if name in ratio else milliseconds

        names = ("gather floor", "ours, into a buffer", "F.embedding", "ours", *rivals)
        cells = (f"{case.model} {case.shape}", case.dtype_name, *map(cell, names))
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Milliseconds, medians of interleaved rounds on rotating inputs. Kernel alone: over the "
        "gather floor (`index_select(out=)`). Ours: "
        "over `F.embedding`, both with a fresh output. Rivals: how many times ours (for the "
        "official code: ours given the same "
        "attention_mask) is faster.",
        "",
        f"{machine_line(machine)}. {floor_line(floors)}",
    ]
    busiest = describe_load(max((result.others or 0.0 for result in results), default=None))
    if busiest:
        lines += ["", f"**{busiest}**"]
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="5 rounds, no compiled rivals")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("bench/results"),
        help="folder for compare.csv, .png and .md",
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--repeats", type=int, default=None, metavar="N", help="rounds; default 41, 5 with --quick"
    )
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


@torch.no_grad()
def main() -> int:
    options = parse()
    start = time.perf_counter()
    torch.set_num_threads(options.threads)
    repeats = options.repeats or (5 if options.quick else 41)
    machine = describe(options.threads)
    print(machine_line(machine))
    floors = {dtype: measure_floors(options.threads, DTYPES[dtype]) for dtype in options.dtypes}
    print(floor_line(floors))
    results = []
    for key in options.shapes:
        for dtype in options.dtypes:
            try:
                results.append(
                    run_case(
                        make_case(key, DTYPES[dtype]),
                        repeats,
                        not options.quick,
                        floors[dtype],
                        options.threads,
                    )
                )
            except AssertionError as error:
                print(f"\nNOT EQUAL, nothing is timed: {error}", file=sys.stderr)
                return 1
            print_case(results[-1])
    judged = [
        comparison for result in results for comparison in result.comparisons if comparison.judged
    ]
    missed = sum(comparison.verdict == "MISSED" for comparison in judged)
    busy = sum(bool(describe_load(result.others)) for result in results)
    if busy:
        print(
            f"\nVOID: {busy} of {len(results)} tables were taken on a busy machine; take them "
            f"again, their verdicts mean nothing"
        )
    else:
        print(f"\n{len(judged) - missed} of {len(judged)} targets met, {missed} missed")
    if machine["simd"] == "none":
        print(
            f"The C++ kernel is missing, these are times of the {machine['backend']}: no target "
            f"is meant for it."
        )
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "compare.csv", results, machine)
    (options.out / "compare.md").write_text(markdown(results, machine, floors))
    from . import figures  # alone in needing matplotlib, and tests import this module

    figures.draw(
        options.out / "compare.png",
        {result.case: relative(result.seconds) for result in results},
        machine_line(machine),
    )
    print(
        f"wrote {options.out}/compare.csv, compare.md, compare.png; "
        f"{time.perf_counter() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
