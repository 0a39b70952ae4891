"""What noise costs, ours beside transformers' hook and the paper's code: `python -m bench.compare`.

    python -m bench.compare            `make bench`, some 12 minutes; writes bench/results/compare.*
    python -m bench.compare --quick    a minute, nothing written without --out
    python -m bench.compare --only "model shapes" "training step"
    python -m bench.compare --only tokens --out bench/results   this part anew, the others kept

Ragged batches with an attention_mask are the common case, and lead. Every provider is first checked
(ours bit for bit against the reference backend), then all of a case are timed in rounds, each round
in a new random order, on inputs and buffers that rotate through more memory than the caches hold.
Every ratio is over the same call without noise in the same round: a slow moment of the machine hits
both sides. Figures are medians, with the 10th and 90th percentile in the CSV. A machine's results
are a CSV of its own; the tables and the picture are drawn from all that are there.
"""

import argparse
import csv
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from . import calls, compare_tables, training_step
from .cases import (
    BASE,
    DTYPES,
    GATHER,
    LAYOUTS,
    OURS,
    RAGGED,
    SHAPES,
    UNTOLD,
    Case,
    Inputs,
    check,
    floor_providers,
    make_case,
    make_inputs,
    make_providers,
)
from .compare_tables import BATCH, KERNEL, SHAPE, STEP, WAY, is_void
from .interleaved import Runs, Sample, ratios, spread, time_rounds
from .machine import (
    Floors,
    Load,
    describe,
    is_busy,
    last_level_cache,
    machine_line,
    measure_floors,
)
from .memory import allocator_peak
from .resumed import ROOT, Bar

RESULTS = ROOT / "bench/results"
SWEEPS = {
    "tokens": (1024, 4096, 16384, 65536, 262144),
    "embedding_dim": (64, 256, 576, 1024, 2048, 4096, 8192),
    "num_embeddings": (8192, 32000, 131072, 262144),
    "threads": (1, 2),
}
SECTIONS = (STEP, SHAPE, BATCH, WAY, *SWEEPS, KERNEL)
# of ours with a mask and a fresh output over F.embedding
LIMITS = {"llama2-7b": 1.1, "smollm2": 1.25, "base": 1.25}
LOOKUP, WHOLE = "lookup, forward + backward", "whole step"


class Job(NamedTuple):
    section: str
    way: str
    case: Case
    threads: int


class Effort(NamedTuple):
    rounds: int
    seconds: float  # that a provider may take in all
    steps: int
    compiled: bool


TRIES = 3  # of a job that other processes disturb
FULL_EFFORT, QUICK = Effort(41, 1.0, 7, True), Effort(5, 0.15, 2, False)


def sweep(section: str, dtype: torch.dtype, threads: int, quick: bool) -> Iterator[Job]:
    base = make_case("base", dtype, RAGGED)
    values = SWEEPS[section]
    for value in values[1:3] if quick and section != "threads" else values:
        case, count = base, threads
        if section == "tokens":
            case = base._replace(columns=value // base.batch)
        elif section == "threads":
            count = value
        else:
            case = base._replace(**{section: value})  # type: ignore[arg-type]
        yield Job(section, calls.FORWARD, case, count)


def jobs_of(section: str, dtype: torch.dtype, threads: int, quick: bool) -> Iterator[Job]:
    if section == STEP:
        if dtype == torch.float32:
            trainings = [training_step.SMALL_LLAMA] if quick else training_step.TRAININGS
            for one in trainings:
                yield Job(section, one.name, training_step.case_of(one), threads)
    elif section == SHAPE:
        for key in ("base",) if quick else SHAPES:
            yield Job(section, calls.FORWARD, make_case(key, dtype, RAGGED), threads)
    elif section == BATCH:
        for layout in LAYOUTS:
            yield Job(section, calls.FORWARD, make_case("base", dtype, layout), threads)
    elif section == WAY:
        for way in calls.WAYS:
            yield Job(section, way, make_case("base", dtype, RAGGED), threads)
    elif section == KERNEL:
        for key in ("base",) if quick else SHAPES:
            yield Job(section, calls.FORWARD, make_case(key, dtype, UNTOLD), threads)
    else:
        yield from sweep(section, dtype, threads, quick)


# ---- one job


class Measured(NamedTuple):
    job: Job
    way: str
    taken: dict[str, list[Sample]]
    peaks: dict[str, int]  # bytes, by provider; where it was asked
    others: float | None  # share of the CPU time that other processes took meanwhile


def refuse(wrong: str, job: Job, name: str) -> None:
    if wrong:
        case = job.case
        raise AssertionError(
            f"{case.model} {case.shape} {case.dtype_name}, {case.layout}, {job.way}: {name} {wrong}"
        )


def checked_runs(job: Job, inputs: Inputs, compiled: bool) -> Runs:
    """Only those that compute what they should."""
    if job.section in (SHAPE, BATCH, KERNEL):
        providers = (
            floor_providers()
            if job.section == KERNEL
            else make_providers(job.case, compiled and job.section == SHAPE)
        )
        for one in providers:
            refuse(check(job.case, one, inputs), job, one.name)
        return {one.name: one.run for one in providers}
    refuse(calls.check_way(job.way, job.case, inputs), job, OURS)
    return calls.runs_of(job.way, job.case, inputs.weight)


def measure_calls(job: Job, effort: Effort) -> Iterator[Measured]:
    torch.set_num_threads(job.threads)
    with calls.grad_mode_of(job.way):
        inputs = make_inputs(job.case, last_level_cache())
        runs = checked_runs(job, inputs[-1], effort.compiled)
        for one in inputs:
            one.out.fill_(1)
        load = Load()
        taken = time_rounds(runs, inputs, effort.rounds, effort.seconds)
        others = load.others()
        peaks = {}
        if job.section not in (SHAPE, BATCH, KERNEL):
            anew = calls.runs_of(job.way, job.case, inputs[0].weight)  # holding no gradient
            peaks = {name: allocator_peak(partial(run, inputs[0])) for name, run in anew.items()}
        yield Measured(job, job.way, taken, peaks, others)


def measure_step(job: Job, effort: Effort) -> Iterator[Measured]:
    """What noise adds at the lookup, then the whole step."""
    torch.set_num_threads(job.threads)
    (training,) = (one for one in training_step.TRAININGS if one.name == job.way)
    inputs = make_inputs(job.case, last_level_cache())
    for one in inputs:
        one.out.fill_(1)
    with torch.enable_grad():
        load = Load()
        runs = training_step.lookup_runs(inputs[0].weight, training.lora)
        taken = time_rounds(runs, inputs, effort.rounds, effort.seconds)
        yield Measured(job, LOOKUP, taken, {}, load.others())
        load = Load()
        steps = training_step.time_steps(training, inputs, effort.steps)
        yield Measured(job, WHOLE, steps, {}, load.others())


# ---- rows


class Machine(NamedTuple):
    described: dict[str, str]
    floors: dict[str, Floors]  # by dtype


def commit() -> str:
    """Of the sources; with a + where they differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return ended.stdout.strip()


def rows_of(measured: Measured, machine: Machine) -> Iterator[dict[str, Any]]:
    job, case = measured.job, measured.job.case
    over = GATHER if GATHER in measured.taken else BASE
    memory, arithmetic = machine.floors[case.dtype_name].seconds(
        case.bytes_moved, case.elements, job.threads
    )
    for name, samples in measured.taken.items():
        seconds = [one.seconds for one in samples]
        base = [one.seconds for one in measured.taken[over]]
        ratio = ratios(seconds, base)
        judged = job.section == SHAPE and name == OURS
        yield {
            "section": job.section,
            "case": case.model,
            "way": measured.way if job.section != STEP else f"{job.way}: {measured.way}",
            "batch": case.batch,
            "columns": case.columns,
            "embedding_dim": case.embedding_dim,
            "num_embeddings": case.num_embeddings,
            "dtype": case.dtype_name,
            "layout": case.layout,
            "threads": job.threads,
            "provider": name,
            "rounds": len(samples),
            **{
                f"{what}_ms": f"{1e3 * value:.5g}"
                for what, value in zip(("median", "p10", "p90"), spread(seconds), strict=True)
            },
            "over": over,
            "ratio": f"{ratio.median:.4g}",
            "ratio_p10": f"{ratio.low:.4g}",
            "ratio_p90": f"{ratio.high:.4g}",
            "limit": LIMITS.get(case.key, "") if judged else "",
            "page_faults": f"{spread([one.faults for one in samples]).median:.0f}",
            "memory_floor_ms": f"{1e3 * memory:.4g}",
            "arithmetic_floor_ms": f"{1e3 * arithmetic:.4g}",
            "peak_bytes": measured.peaks.get(name, ""),
            "others_cpu_share": "" if measured.others is None else f"{measured.others:.3f}",
            **machine.described,
        }


def describe_machine(threads: int) -> Machine:
    described = describe(threads)
    described |= {"machine": machine_line(described), "commit": commit()}
    described["date"] = time.strftime("%Y-%m-%d")
    del described["threads"]  # each row has its own
    floors = {name: measure_floors(threads, dtype) for name, dtype in DTYPES.items()}
    for name, floor in floors.items():
        described[f"noise_alone_{name}"] = f"{max(floor.arithmetic.values()):.3g}"
    described["copy_bytes"] = f"{floors['float32'].copy_bytes:.3g}"
    return Machine(described, floors)


def write(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def with_parts_before(
    path: pathlib.Path, rows: list[dict[str, Any]], anew: Sequence[str]
) -> list[dict[str, Any]]:
    """Beside the parts that were measured anew the machine's others, as its CSV has them."""
    before = compare_tables.read_one(path) if path.exists() else []
    kept = [row for row in before if row["section"] not in anew]
    return sorted([*kept, *rows], key=lambda row: SECTIONS.index(row["section"]))


def name_of(described: dict[str, str]) -> str:
    """Of the machine's file: amd-epyc-family-25-model-1-avx2."""
    words = "".join(one if one.isalnum() else " " for one in described["cpu"].lower()).split()
    return "-".join([*words, described["simd"]])


def verdicts(rows: Sequence[dict[str, Any]]) -> str:
    busy = {one["section"] for one in rows if is_void(one)}
    if busy:
        return f"VOID where other processes took CPU time: {', '.join(sorted(busy))}"
    judged = [one for one in rows if one["limit"]]
    met = sum(float(one["ratio"]) <= float(one["limit"]) for one in judged)
    return f"{met} of {len(judged)} limits met"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, no compiled rivals")
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder for the CSV, the tables and the picture"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def memory_of(case: Case) -> int:
    """Bytes: HF's hook has three outputs at once, beside a buffer, what it returned before, and the
    weight with its gradient.
    """
    weight = 2 * case.num_embeddings * case.embedding_dim * case.dtype.itemsize
    return 5 * case.elements * case.dtype.itemsize + weight


def memory() -> int:
    """Three quarters of the machine's: others need some."""
    return 3 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def undisturbed(job: Job, effort: Effort) -> list[Measured]:
    """Measured again where other processes took part; what is still VOID at last says so."""
    measure = measure_step if job.section == STEP else measure_calls
    for _ in range(TRIES):
        made = list(measure(job, effort))
        if not any(is_busy(one.others) for one in made):
            break
    return made


def measure_all(options: argparse.Namespace, machine: Machine) -> list[dict[str, Any]]:
    jobs = [
        job
        for section in options.only
        for dtype in options.dtypes
        for job in jobs_of(section, DTYPES[dtype], options.threads, options.quick)
    ]
    for job in [one for one in jobs if memory_of(one.case) > memory()]:
        print(f"left out, too large for this memory: {job.section} {job.case.shape}")
        jobs.remove(job)
    effort, bar = QUICK if options.quick else FULL_EFFORT, Bar(len(jobs), 0)
    rows: list[dict[str, Any]] = []
    for done, job in enumerate(jobs):
        bar.show(done, f"{job.section}: {job.case.shape} {job.case.dtype_name}")
        for measured in undisturbed(job, effort):
            rows += rows_of(measured, machine)
    bar.show(len(jobs), "")
    return rows


def main() -> int:
    options = parse()
    out = options.out or (RESULTS if not options.quick and options.only == list(SECTIONS) else None)
    start = time.perf_counter()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        machine = describe_machine(options.threads)
    print(machine.described["machine"])
    try:
        rows = measure_all(options, machine)
    except AssertionError as error:
        print(f"\nNOT EQUAL, nothing is written: {error}", file=sys.stderr)
        return 1
    from . import figures  # alone in needing matplotlib

    print(compare_tables.markdown({name_of(machine.described): rows}))
    print(f"{verdicts(rows)}; {time.perf_counter() - start:.0f} s")
    if out is not None:
        path = out / "compare" / f"{name_of(machine.described)}.csv"
        write(path, with_parts_before(path, rows, options.only))
        machines = compare_tables.read(out / "compare")
        (out / "compare.md").write_text(compare_tables.markdown(machines))
        figures.draw(out / "compare.png", machines)
        print(f"wrote {out}/compare.md, compare.png and the CSV in {out}/compare")
    return 0


if __name__ == "__main__":
    sys.exit(main())
