"""How good the noise is: `make noise-quality` writes bench/results/noise_quality.md and .png.

dieharder's battery on the words under the noise, a stream for every word of counter and key and for
the variants (noise_streams.py); on known-bad generators, which it must fail; and on AES in counter
mode, which shows what it says of a good one. Then moments and correlations of the noise itself
(noise_moments.py). Goes on where it stopped. Needs dieharder, openssl and g++.
"""

import argparse
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import noise_figure, noise_moments
from .machine import cpu_model
from .noise_battery import BATTERY, CONTROL, Value, judge, judge_bad, verdicts
from .noise_streams import (
    BAD,
    BEYOND,
    HEADERS,
    SOURCE,
    STREAMS,
    Stream,
    check_kernel,
    check_words,
    compile_words,
)
from .resumed import ROOT, digest_of, judged_one_by_one

RESULT = ROOT / "bench" / "results" / "noise_quality.md"
FIGURE = RESULT.with_suffix(".png")
DONE = ROOT / "build" / "noise_quality.jsonl"
VALUES = noise_moments.CHUNKS * noise_moments.SAMPLES * noise_moments.LENGTH * noise_moments.DIM


def judged(one: dict[str, Any]) -> dict[Value, str]:
    return verdicts(*([Value(*value) for value in one[which]] for which in ("first", "again")))


def row_of(stream: Stream, made: list[dict[str, Any]]) -> tuple[str, int]:
    """Of the table, and how many FAILED."""
    values = [pair for one in made for pair in judged(one).items()]
    weak, failed = (sum(said == which for _, said in values) for which in ("WEAK", "FAILED"))
    smallest = min(value.tail for value, _ in values)
    size = sum(one["bytes"] for one in made) / 1e9
    shown = f"{size:.1f}" if size else "as much"
    return (
        f"| {stream.name} | {stream.what} | {shown} | {len(values)} | {weak} | {smallest:.2g} | "
        f"{failed or 'none'} |",
        failed,
    )


def table(done: dict[str, Any]) -> tuple[list[str], int]:
    lines = [
        "| stream | what it walks | GB | p-values | WEAK once | nearest to 0 or 1 | FAILED |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    made = {one: [done[f"{one.name}: {test}"] for test in BATTERY] for one in (*STREAMS, CONTROL)}
    lines.append(row_of(CONTROL, made[CONTROL])[0])
    counts = [
        number for number, one in enumerate(made[CONTROL]) if "FAILED" not in judged(one).values()
    ]
    failures = 0
    for stream in STREAMS:
        row, failed = row_of(stream, [made[stream][number] for number in counts])
        lines.append(row)
        failures += failed
    if void := [test for number, test in enumerate(BATTERY) if number not in counts]:
        lines += ["", f"Failed by AES, and therefore no test here: {', '.join(void)}."]
    lines += [
        "",
        "| known-bad generator | what is wrong | GB | passed before | FAILED by | p-value |",
        "|---|---|---:|---:|---|---:|",
    ]
    for stream in (*BAD, *BEYOND):
        one = done[stream.name]
        found = f"{one['test']} | {one['p']:.8f}" if one["test"] else "nothing | "
        lines.append(
            f"| {stream.name} | {stream.what} | {one['bytes'] / 1e9:.1f} | {one['passed']} of "
            f"{len(BATTERY)} tests | {found} |"
        )
    return lines, failures


def moment_tables(done: dict[str, Any]) -> list[str]:
    lines = [
        "## Measured: values",
        "",
        f"Noise of magnitude 1, L = {noise_moments.LENGTH}, d = {noise_moments.DIM}, "
        f"{VALUES} values each, beside",
        "`torch.empty(...).uniform_(-1, 1)`. In brackets: distance from a uniform's in its",
        "standard errors, sqrt(1/3n), sqrt(4/45n) and 1/sqrt(n).",
        "",
        "| | mean | mean square | P(> 0) - P(< 0) | least | most | values | without their "
        "negative | zeros |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for who, one in done["moments"]["values"].items():
        cells = [
            f"{one[name]:.{digits}} ({one[f'{name} in errors']:+.1f})"
            for name, digits in (("mean", "2e"), ("square", "7f"), ("sign", "2e"))
        ]
        cells += [f"{one[name]:.7g}" for name in ("least", "most")]
        cells += [str(one[name]) for name in ("distinct", "unpaired", "zeros")]
        lines.append(f"| {who if 'torch' in who else 'ours, ' + who} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Measured: neighbours",
        "",
        "Correlation over n pairs; its standard error is 1/sqrt(n).",
        "",
        "| pairs | n | correlation | in standard errors | of squares, in standard errors |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, one in done["correlations"]["pairs"].items():
        lines.append(
            f"| {name} | {one['n']} | {one['correlation']:+.2e} | {one['in errors']:+.2f} | "
            f"{one['of squares, in errors']:+.2f} |"
        )
    return lines


def version_of_dieharder() -> str:
    printed = subprocess.run(("dieharder", "-l"), capture_output=True, text=True).stdout
    words = printed.split()
    return words[words.index("version") + 1]


def write_result(done: dict[str, Any], checked: str, sources: str) -> int:
    """How many FAILED of ours."""
    lines, failures = table(done)
    tests = [one for name, one in done.items() if ": " in name]
    size = sum(one["bytes"] for one in done.values() if "bytes" in one) / 1e9
    count = sum(len(one["first"]) for one in tests)
    text = [
        "# How good the noise is",
        "",
        "## Measured: the battery",
        "",
        f"{size:.0f} GB of words by {len(BATTERY)} runs of dieharder a stream, {count} p-values of",
        f"{len(STREAMS)} streams and the control. {checked}.",
        "",
        *lines,
        "",
        *moment_tables(done),
        "",
        f"{time.strftime('%Y-%m-%d')}, dieharder {version_of_dieharder()}, torch "
        f"{torch.__version__}, Python {platform.python_version()},",
        f"{cpu_model()}; sources {sources}; written by `python -m bench.noise_quality`.",
    ]
    RESULT.write_text("\n".join(text) + "\n")
    return failures


def fingerprint(*judges: str) -> str:
    """Of the noise's definition, and of what judges it; not of the table that is made of that."""
    kernels = [HEADERS / f"{name}.h" for name in ("compiler", "noise", "philox")]
    package = [ROOT / "neftune_kernels" / f"{name}.py" for name in ("reference", "reference_ops")]
    return digest_of((*kernels, *package, SOURCE, *(ROOT / f"bench/{name}.py" for name in judges)))


def battery_jobs(program: pathlib.Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """The control and the known-bad generators first: where those are not what they should be,
    nothing else is worth the time.
    """
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        f"{CONTROL.name}: {test}": partial(judge, program, CONTROL, test) for test in BATTERY
    }
    jobs |= {stream.name: partial(judge_bad, program, stream) for stream in (*BAD, *BEYOND)}
    for test in BATTERY:
        for stream in STREAMS:
            jobs[f"{stream.name}: {test}"] = partial(judge, program, stream, test)
    return jobs


def sweep(jobs: dict[str, Callable[[], dict[str, Any]]], sources: str, anew: bool) -> Any:
    return judged_one_by_one(list(jobs), DONE, sources, lambda name: jobs[name](), anew)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--anew", action="store_true", help="forget what was judged")
    arguments = parser.parse_args()
    for tool in ("dieharder", "openssl", "g++"):
        if shutil.which(tool) is None:
            parser.error(f"no {tool} here: install it (apt-get install dieharder openssl g++)")
    program = compile_words()
    words, values = check_words(program), check_kernel(program)
    checked = (
        f"{words} words of the streams were the reference's, and {values} values of the\n"
        "package's noise and its variants made of them, bit for bit"
    )
    print(checked, flush=True)
    of_moments, of_battery = (
        fingerprint(*judges) for judges in (("noise_moments",), ("noise_battery", "noise_streams"))
    )
    done = sweep(battery_jobs(program), of_battery, arguments.anew)
    done |= sweep(noise_moments.PARTS, of_moments, arguments.anew)
    noise_figure.draw(FIGURE, done["moments"]["curves"], VALUES)
    failures = write_result(done, checked, f"{of_battery} and {of_moments}")
    print(f"{RESULT.relative_to(ROOT)}: {failures or 'nothing'} FAILED")
    missed = [stream.name for stream in BAD if done[stream.name]["test"] is None]
    if missed:
        print(f"the battery does not see that {', '.join(missed)} is bad: it proves nothing")
    return 1 if failures or missed else 0


if __name__ == "__main__":
    sys.exit(main())
