"""`pytest -m gpu`, its files in parallel processes: `python -m bench.gpu.tests`.

Needs pytest alone, no plugin. A file with many tests is dealt out in several parts: a process
that a device assert has spoilt fails every later test in it.
"""

import collections
import concurrent.futures
import os
import pathlib
import sys
import xml.etree.ElementTree
from typing import NamedTuple

from . import process
from .report import fenced, table
from .step import FAILED, PARTIAL, PASSED, Setting, parser_of, setting_of

PYTEST = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
MOST_PROCESSES = 8


class Part(NamedTuple):
    name: str
    tests: list[str]

    def path(self, setting: Setting, suffix: str) -> pathlib.Path:
        return setting.folder / "logs" / (self.name.replace("/", "-").replace(" ", "-") + suffix)


def collect(setting: Setting) -> tuple[list[str], process.Ended]:
    """Node ids; those of sound files even where another file cannot be imported."""
    lines: list[str] = []
    command = [*PYTEST, "--collect-only", "-q", "--continue-on-collection-errors"]
    ended = process.run(command, setting.left, setting.log, lines.append)
    with setting.log.open("a") as log:
        log.write("\n".join(lines) + "\n")
    others = ("ERROR", "FAILED", "SKIPPED")
    return [line for line in lines if "::" in line and not line.startswith(others)], ended


def parts_of(tests: list[str], processes: int) -> list[Part]:
    by_file = collections.defaultdict(list)
    for test in tests:
        by_file[test.split("::")[0]].append(test)
    size = -(-len(tests) // max(1, processes))
    parts = []
    for name, found in by_file.items():
        count = -(-len(found) // size)
        for i in range(count):
            numbered = f"{name} {i + 1} of {count}" if count > 1 else name
            parts.append(Part(numbered, found[i * size : (i + 1) * size]))
    return parts


class Result(NamedTuple):
    passed: int
    failures: list[str]  # "name: message"
    skips: dict[str, int]  # reason → tests


def read_junit(path: pathlib.Path) -> Result | None:
    """None where pytest did not live to write it whole."""
    try:
        root = xml.etree.ElementTree.parse(path).getroot()
    except (FileNotFoundError, xml.etree.ElementTree.ParseError):
        return None
    passed, failures, skips = 0, [], collections.Counter[str]()
    for case in root.iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        if bad is not None:
            message = (bad.get("message") or "error").splitlines()[0]
            failures.append(f"{name}: {message}"[:300])
        elif skipped is not None:
            skips[(skipped.get("message") or "")[:120]] += 1
        else:
            passed += 1
    return Result(passed, failures, dict(skips))


def run_part(setting: Setting, part: Part) -> tuple[Part, process.Ended, Result | None]:
    junit = part.path(setting, ".xml")
    junit.unlink(missing_ok=True)
    command = [*PYTEST, "-v", f"--junitxml={junit}", *part.tests]
    ended = process.run(command, max(1.0, setting.left), part.path(setting, ".log"))
    return part, ended, read_junit(junit)


def record(setting: Setting, part: Part, ended: process.Ended, result: Result | None) -> str:
    """The part's outcome, in the CSV and, where there is something to say, in the report."""
    if result is None:
        outcome = "cut off" if ended.code is None else "failed"
        log = part.path(setting, ".log")
        note = f"{ended}, no result of {len(part.tests)} tests; last line: {process.tail(log, 1)}"
        print(f"- {part.name}: {note}\n{fenced(process.tail(log))}")
    else:
        sound = ended.code == 0 and not result.failures
        outcome = ("passed" if result.passed else "skipped") if sound else "failed"
        note = f"{result.passed} passed, {len(result.failures)} failed"
        note += f", {sum(result.skips.values())} skipped"
        print(f"- {part.name}: {note}, {ended.seconds:.0f} s")
        for failure in result.failures:
            print(f"  - **{failure}**")
        for reason, count in result.skips.items():
            print(f"  - {count} skipped: {reason}")
    setting.write(part.name, outcome, seconds=ended.seconds, note=note)
    return outcome


def tests(setting: Setting) -> int:
    found, ended = collect(setting)
    failed = not found or ended.code != 0
    note = f"{len(found)} tests collected by `pytest -m gpu`"
    print(f"{note} in {ended.seconds:.0f} s\n")
    outcome = "failed" if failed else "passed"
    setting.write("collection", outcome, seconds=ended.seconds, note=note)
    if failed:
        print(f"{ended}:\n{fenced(process.tail(setting.log))}")
    processes = min(MOST_PROCESSES, max(1, (os.cpu_count() or 2) // 2))
    parts = parts_of(found, processes)
    names = {part.name for part in parts}
    over = [row for row in setting.earlier_rows() if row["outcome"] != "cut off"]
    outcomes = {row["what"]: row["outcome"] for row in over if row["what"] in names}
    left = [part for part in parts if part.name not in outcomes]
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        running = [pool.submit(run_part, setting, part) for part in left]
        for future in concurrent.futures.as_completed(running):
            part, ended, result = future.result()
            outcomes[part.name] = record(setting, part, ended, result)
    print("\n" + table(("tests", "outcome"), sorted(outcomes.items())))
    if failed or "failed" in outcomes.values() or "passed" not in outcomes.values():
        return FAILED
    return PARTIAL if "cut off" in outcomes.values() else PASSED


def main(arguments: list[str] | None = None) -> int:
    return tests(setting_of(parser_of(__doc__, "tests"), arguments))


if __name__ == "__main__":
    sys.exit(main())
