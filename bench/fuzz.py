"""Hundreds of thousands of drawn calls against the oracle: `make fuzz`.

    python -m bench.fuzz --cases 200000     goes on where it stopped; writes bench/results/fuzz.md

The properties are those of tests/test_properties.py, in chunks, each with a seed of its own; which
chunks passed on these sources is kept in build/fuzz.json. A chunk that fails stops the run with
hypothesis's own report and is tried first the next time.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import platform
import sys
import time
from typing import Any

import hypothesis
import numpy
import torch

from neftune_kernels import backends

from .machine import cpu_model
from .resumed import ROOT, digest_of

sys.path.insert(0, str(ROOT / "tests"))

import test_properties as properties
from hypothesis import given, seed, settings
from hypothesis.stateful import run_state_machine_as_test

RESULT = pathlib.Path(__file__).parent / "results" / "fuzz.md"
DONE = ROOT / "build" / "fuzz.json"
CHUNK = 1000  # calls
SHARED = 8  # calls large enough for 1, 2 and 3 threads, beside each chunk
HISTORIES = 40  # of the state machine, beside each chunk
STEPS = 10  # rules of a history, each followed by all invariants


def fingerprint() -> str:
    """Of what is tested and of what tests it: not the hooks in other people's models, not kernels
    for a GPU."""
    trees = [
        file for name in ("neftune_kernels", "csrc") for file in sorted((ROOT / name).rglob("*"))
    ]
    ran = [
        file
        for file in trees
        if file.suffix in (".py", ".h", ".cpp")
        and not {"integrations", "cuda"} & set(file.parts)
        and not file.name.startswith("triton")
    ]
    tests = ("oracle.py", "drawn_calls.py", "test_properties.py")
    return digest_of((*ran, *(ROOT / "tests" / name for name in tests)))


def run_chunk(number: int) -> None:
    """Raises where a property does not hold."""
    options = settings(properties.QUICK, max_examples=CHUNK, print_blob=True)
    seed(number)(options(given(properties.cases())(properties.check_call)))()
    options = settings(properties.QUICK, max_examples=SHARED)
    seed(number)(options(given(*properties.SHARED_OUT)(properties.check_threads)))()
    machine: Any = type("Algebra", (properties.Algebra,), {})  # its seed is its own
    options = settings(properties.QUICK, max_examples=HISTORIES, stateful_step_count=STEPS)
    run_state_machine_as_test(seed(number)(machine), settings=options)


def write_result(sources: str, chunks: int, seconds: float, jobs: int) -> None:
    levels = ", ".join(properties.KERNELS)
    processes = "one process" if jobs == 1 else f"{jobs} processes"
    text = [
        "# Drawn calls against the oracle",
        "",
        f"{chunks * CHUNK} calls, each by neftune_noise, add_noise, noisy_embedding and the",
        "module, half of them with the weight's gradient;",
        f"{chunks * SHARED} large ones, each by 1, 2 and 3 threads; and",
        f"{chunks * HISTORIES} histories of {STEPS} steps in which samples are padded, packed,",
        "split, merged, sharded, muted, negated and doubled. No bit differed.",
        "",
        f"Backends: reference, {levels}. Chunks 0 to {chunks - 1}, sources {sources}.",
        "",
        f"{time.strftime('%Y-%m-%d')}, {seconds / 60:.0f} minutes of {processes}, torch "
        f"{torch.__version__}, numpy {numpy.__version__},",
        f"hypothesis {hypothesis.__version__}, Python {platform.python_version()}, {cpu_model()},",
        f"native library at {backends.simd_level()}; written by `python -m bench.fuzz`.",
    ]
    RESULT.write_text("\n".join(text) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no chunk after")
    arguments = parser.parse_args()
    sources = fingerprint()
    done = json.loads(DONE.read_text()) if DONE.exists() else {}
    chunks, spent = done.get(sources, (0, 0.0))
    start = time.monotonic()
    wanted = range(chunks, -(-arguments.cases // CHUNK))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, context) as pool:
        for first in wanted[:: arguments.jobs]:
            begun = time.monotonic()
            if begun - start > 60 * arguments.minutes:
                break
            some = wanted[first - wanted.start :][: arguments.jobs]
            list(pool.map(run_chunk, some))  # raises where one failed
            chunks, spent = chunks + len(some), spent + time.monotonic() - begun
            DONE.parent.mkdir(exist_ok=True)
            DONE.write_text(json.dumps({sources: (chunks, spent)}))
            print(f"{chunks * CHUNK} calls", flush=True)
            write_result(sources, chunks, spent, arguments.jobs)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("NEFTUNE_SELF_CHECK", "0")
    sys.exit(main())
