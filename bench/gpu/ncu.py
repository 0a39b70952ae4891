"""Nsight Compute's speed of light, ours and a lookup, three shapes: `python -m bench.gpu.ncu`.

Clocks are left alone.
"""

import csv
import os
import pathlib
import sys

from . import process
from .report import fenced, table
from .step import FAILED, NOT_HERE, PASSED, Setting, find_tool, parser_of, setting_of

SECTIONS = ("SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis", "LaunchStats", "WarpStateStats")
OPTIONS = ("--clock-control", "none", "--csv", "--page", "details")
KERNELS = "regex:noisy|number_|summarise_pieces|gather|index"
WANTED = {  # in the report, if this ncu has them; the log holds everything
    "Duration": "took",
    "DRAM Throughput": "DRAM",
    "Memory Throughput": "memory",
    "Compute (SM) Throughput": "SM",
    "L2 Hit Rate": "L2 hits",
    "Registers Per Thread": "registers",
    "Achieved Occupancy": "occupancy",
}


def read_metrics(log: pathlib.Path) -> dict[str, dict[str, str]]:
    """Launch → metric → value with its unit, from ncu's table of details in its log."""
    lines = log.read_text(errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        if not row.get("Metric Name") or not row.get("Metric Value"):
            continue  # a rule's advice
        launch = f"{row['ID']} {row['Kernel Name']} {row.get('Grid Size', '')}"
        metrics = found.setdefault(launch, {})
        value = f"{row['Metric Value']} {row.get('Metric Unit', '')}".strip()
        metrics.setdefault(row["Metric Name"], value)
    return found


def ncu(setting: Setting) -> int:
    tool = find_tool("ncu")
    if tool is None:
        print("No ncu on the PATH or in /usr/local/cuda/bin.")
        return NOT_HERE
    log = setting.log.with_name("ncu-details.log")
    log.unlink(missing_ok=True)
    command = [tool, *OPTIONS, "--kernel-name", KERNELS]
    command += [part for section in SECTIONS for part in ("--section", section)]
    command += [sys.executable, "-m", "bench.gpu.program", "profiled", "--device", setting.device]
    ended = process.run(command, setting.left, log, env=os.environ)
    launches = read_metrics(log)
    lines = []
    for launch, metrics in launches.items():
        named = [(short, metrics[name]) for name, short in WANTED.items() if name in metrics]
        note = ", ".join(f"{short} {value}" for short, value in named)
        setting.write(launch[:200], "passed", note=note)
        lines.append((launch[:80], *(metrics.get(name, "") for name in WANTED)))
    print(table(("launch", *WANTED.values()), lines))
    if ended.code != 0 or not launches:
        print(f"{ended}, {len(launches)} launches; the log's end:\n{fenced(process.tail(log, 15))}")
        return FAILED
    return PASSED


def main(arguments: list[str] | None = None) -> int:
    return ncu(setting_of(parser_of(__doc__, "ncu"), arguments))


if __name__ == "__main__":
    sys.exit(main())
