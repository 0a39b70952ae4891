"""What neftune-run costs: once for itself, and at the start of every Python process that it
reaches: `python -m bench.neftune_run`.

Processes that do nothing, interleaved, each round in a new random order; what they take more, in
wall and in CPU time, which a busy machine lengthens less.
"""

import argparse
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from neftune_run import REPORTS, SITE


class Cost(NamedTuple):
    wall: float  # ms
    cpu: float


class Call(NamedTuple):
    command: list[str]
    pythonpath: str

    def cost(self, reports: str) -> Cost:
        environment = {**os.environ, "PYTHONPATH": self.pythonpath, REPORTS: reports}
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(self.command, env=environment, check=True, stderr=subprocess.DEVNULL)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        return Cost(wall * 1e3, cpu * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    rounds: int = parser.parse_args().rounds
    root, nothing = os.path.dirname(os.path.dirname(SITE)), [sys.executable, "-c", "pass"]
    calls = {
        "true": Call(["true"], ""),
        "neftune-run true": Call([sys.executable, "-m", "neftune_run", "true"], root),
        "python": Call(nothing, ""),
        "python, reached": Call(nothing, SITE),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in calls}
    with tempfile.TemporaryDirectory() as reports:
        for _ in range(rounds):
            for name in random.sample(list(calls), len(calls)):
                costs[name].append(calls[name].cost(reports))
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    )
    for what, name, base, limit in (
        ("the launcher, once", "neftune-run true", "true", 100),
        ("a Python process", "python, reached", "python", 35),
    ):
        wall, cpu = (
            [pick(with_it) - pick(without) for pick in (statistics.median, min)]
            for with_it, without in zip(
                zip(*costs[name], strict=True), zip(*costs[base], strict=True), strict=True
            )
        )
        print(
            f"{what}, at most {limit} ms: median {wall[0]:.1f} ({cpu[0]:.1f} of CPU), "
            f"least {wall[1]:.1f} ({cpu[1]:.1f} of CPU)"
        )


if __name__ == "__main__":
    main()
