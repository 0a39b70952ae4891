"""The first hour on a GPU as one command: `python -m bench.first_gpu`.

Steps in order of worth, each a process of its own with a limit, so that a crash, a hang or a spoilt
CUDA context costs that step alone. What a step finds goes at once to one Markdown report and one
CSV. Called again, it goes on: first with what was never begun, then with what was cut off; what
ended on this device is left out unless --again says otherwise. Needs the Python that has torch
(2.10 or newer, with its triton), numpy, scipy, pytest and transformers; no network. It changes
nothing about the device.

Exit status: 0 all asked for passed, 1 something failed, 2 no GPU (it then says what it would run),
3 nothing failed, but something is left to run.

    python -m bench.first_gpu --list                    what it would run, and what is done
    python -m bench.first_gpu --budget 560              where a command may take ten minutes
    python -m bench.first_gpu --plot DIR/results.csv    plots, anywhere; needs matplotlib
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from .gpu import process
from .gpu.report import (
    BEGUN,
    DEVICE_VARIABLE,
    ENDED,
    REPORT,
    TABLE,
    append,
    fenced,
    rows_of,
    table,
    write_row,
)
from .gpu.step import (
    ABOUT_DEVICE,
    CRASHED,
    DEVICES,
    FAILED,
    NO_DEVICE,
    OUT,
    OUTCOMES,
    PARTIAL,
    PASSED,
    log_of,
)

BUDGET = 2400
MARGIN = 10.0  # seconds by which a step is told to be over before it is ended
MACHINE_LIMIT = 120.0
MOST_RESTARTS = 5
OVER = ("passed", "failed", "timed out", "not here")  # partial and cut off go on at the next call
EVERYWHERE = {"PYTHONUNBUFFERED": "1"}
NO_SELF_CHECK = {"NEFTUNE_SELF_CHECK": "0"}  # it would hide wrong bits behind a fallback


class Step(NamedTuple):
    name: str
    limit: int  # seconds
    least: int  # with fewer left it does not begin
    about: str
    command: tuple[str, ...]  # of the interpreter
    ours: bool = True  # prints Markdown and takes --out, --device, --seconds and --again
    restarts: bool = False  # after a crash a new process goes on behind the row that crashed
    environment: dict[str, str] = NO_SELF_CHECK


def module(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"bench.gpu.{name}", *arguments)


def times(dtype: str, limit: int) -> Step:
    about = f"device and host time in {dtype} against floors and rivals"
    command = module("times", "--dtype", dtype)
    return Step(f"times-{dtype}", limit, 60, about, command, restarts=True)


OWN_CHECK = ("-m", "neftune_kernels", "--check")
STEPS = (
    Step("build", 300, 60, "both native parts, CUDA for this GPU alone", module("build")),
    Step("smoke", 240, 30, "every dtype, layout, backend against the reference", module("smoke")),
    Step("check", 60, 20, "the package's own check", OWN_CHECK, ours=False, environment={}),
    Step("tests", 480, 90, "pytest -m gpu, files in parallel", module("tests"), environment={}),
    times("bfloat16", 480),
    Step("training", 150, 40, "a training step: no noise, ours, HF's hook", module("training")),
    Step("debug", 60, 30, "NEFTUNE_DEBUG=1: good calls and a bad one", module("debug")),
    Step("ncu", 180, 60, "Nsight Compute's speed of light on three shapes", module("ncu")),
    Step("sanitizers", 240, 60, "compute-sanitizer's four tools", module("sanitizers")),
    times("float32", 210),
)


class Stopped(BaseException):
    """SIGTERM or SIGINT: what runs is ended and written down before we go."""


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    def stop(number: int, frame: object) -> NoReturn:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Hour:
    """One call: where it writes, what it may take."""

    def __init__(self, folder: pathlib.Path, device: str, budget: float, again: bool) -> None:
        self.folder, self.device, self.again = folder, device, again
        self.end = time.monotonic() + budget

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        """A line of the report, on the disk before anything else happens."""
        append(self.folder / REPORT, text + "\n")
        print(text, flush=True)

    def outcome_of(self, step: Step) -> str:
        """Of its last run on this device; "" if none, "cut off" if only its begin is known."""
        found = [row for row in rows_of(self.folder, step.name) if row["what"] in (BEGUN, ENDED)]
        if not found:
            return ""
        return found[-1]["outcome"] if found[-1]["what"] == ENDED else "cut off"

    def plan(self, steps: list[Step]) -> list[Step]:
        """What never began goes before what was cut off: a step that hangs starves no other."""
        if self.again:
            return steps
        outcomes = {step.name: self.outcome_of(step) for step in steps}
        left = [step for step in steps if outcomes[step.name] not in OVER]
        return sorted(left, key=lambda step: outcomes[step.name] != "")

    def command(self, step: Step, seconds: float) -> list[str]:
        command = [sys.executable, *step.command]
        if step.ours:
            command += ["--out", str(self.folder), "--device", self.device]
            command += ["--seconds", f"{max(1.0, seconds - MARGIN):.0f}"]
            command += ["--again"] * self.again
        return command

    def run(self, step: Step) -> None:
        """To its end, whatever that is; the outcome is in the CSV."""
        limit, start = min(float(step.limit), self.left), time.monotonic()
        self.say(f"\n## {step.name}: {step.about}\n")
        write_row(self.folder, step.name, BEGUN, "", note=f"limit {limit:.0f} s")
        outcome, ended = "cut off", None
        try:
            ended = self.run_processes(step, start + limit)
            outcome = "timed out" if ended.code is None else OUTCOMES.get(ended.code, "failed")
            if outcome == "timed out" and limit < step.limit:
                outcome = "cut off"  # by the budget, not by its own limit: the next call runs it
        finally:
            seconds = time.monotonic() - start
            note = str(ended or "stopped from outside")
            write_row(self.folder, step.name, ENDED, outcome, seconds=seconds, note=note)
            if outcome not in OUTCOMES.values():
                log = log_of(self.folder, step.name)
                command = " ".join(self.command(step, limit))
                self.say(f"\n`{command}`: {note}. The last lines of its log:\n")
                self.say(fenced(process.tail(log)))
            self.say(f"\n**{step.name}: {outcome}**, {seconds:.0f} s")

    def run_processes(self, step: Step, end: float) -> process.Ended:
        """One; where a row crashes it, another for the rows behind."""
        log = log_of(self.folder, step.name)
        environment = os.environ | EVERYWHERE | step.environment
        for restart in range(MOST_RESTARTS + 1):
            left = end - time.monotonic()
            if not step.ours:
                self.say("```")
            ended = process.run(self.command(step, left), left, log, self.say, environment)
            if not step.ours:
                self.say("```")
            crashed = ended.code is not None and (ended.code < 0 or ended.code == CRASHED)
            again = step.restarts and crashed and restart < MOST_RESTARTS
            if not again or end - time.monotonic() < step.least:
                break
            self.say(f"\nThe process crashed ({ended}), a new one goes on:\n")
            self.say(fenced(process.tail(log, 5)))
        return ended


def sources() -> str:
    """Which state of the package this is, where there is no git to ask."""
    digest = hashlib.sha256()
    for pattern in ("neftune_kernels/**/*.py", "csrc/**/*.*"):
        for path in sorted(pathlib.Path().glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit() -> str:
    try:
        head, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return "no git here"
    return f"{head} with changes" if changed else head


def ask_machine(device: str, folder: pathlib.Path) -> dict[str, str] | str:
    """The device and all versions; or why there is none."""
    lines: list[str] = []
    log = log_of(folder, "machine")
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gpu.machine", "--device", device, "--out", str(folder)]
    ended = process.run(command, MACHINE_LIMIT, log, lines.append)
    if ended.code != PASSED:
        return f"{process.tail(log, 3)}\n({ended})"
    found: dict[str, str] = json.loads(lines[-1])
    return found


def write_header(hour: Hour, machine: dict[str, str], given: argparse.Namespace) -> None:
    if not (hour.folder / REPORT).exists():
        hour.say("# neftune_kernels on a GPU\n")
        hour.say(f"Written by `python -m bench.first_gpu`; the figures are in {TABLE}.")
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    rows = [
        *machine.items(),
        ("commit", given.commit or commit()),
        ("sources", sources()),
        ("budget", f"{given.budget:.0f} s"),
    ]
    hour.say(f"\n# Call of {now}\n\n{table(('', ''), rows)}")


def describe_steps(hour: Hour, steps: list[Step]) -> str:
    rows = []
    for step in steps:
        so_far, command = hour.outcome_of(step) or "not yet", " ".join(("python", *step.command))
        rows.append((step.name, f"{step.limit} s", so_far, step.about, command))
    return table(("step", "at most", "so far", "what", "command"), rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [step.name for step in STEPS]
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--out", type=pathlib.Path, default=OUT, help=f"folder of {REPORT} and {TABLE}")
    some = f"some of {', '.join(names)}"
    add("--steps", nargs="+", choices=names, default=names, metavar="STEP", help=some)
    over = f"after which this call is over (default {BUDGET})"
    add("--budget", type=float, default=BUDGET, metavar="SECONDS", help=over)
    add("--again", action="store_true", help="also what ended before")
    add("--list", "--dry-run", action="store_true", help="only say what would run")
    add("--commit", help="of this tree, where there is no git to ask")
    add("--plot", type=pathlib.Path, metavar="CSV", help=f"draw the plots of a {TABLE}")
    add("--device", choices=DEVICES, default="cuda", help=ABOUT_DEVICE)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    if given.plot:
        from .gpu.figures import draw

        drawn = draw(given.plot)
        print("\n".join(f"wrote {path}" for path in drawn) or f"no times in {given.plot}")
        return PASSED
    given.out.mkdir(parents=True, exist_ok=True)
    hour = Hour(given.out.resolve(), given.device, given.budget, given.again)
    steps = [step for step in STEPS if step.name in given.steps]
    machine = ask_machine(given.device, hour.folder)
    if isinstance(machine, str):
        print(f"No GPU: {machine}\n\nOn a machine with one this would run:\n")
        print(describe_steps(hour, steps))
        return NO_DEVICE
    os.environ[DEVICE_VARIABLE] = machine["device"]
    if given.list:
        print(describe_steps(hour, steps))
        return PASSED
    write_header(hour, machine, given)
    try:
        with stopped_by_signals():
            for step in hour.plan(steps):
                if hour.left < step.least:
                    left = f"{hour.left:.0f} s of the budget are left, it wants {step.least}"
                    hour.say(f"\n{step.name} does not begin: {left}")
                else:
                    hour.run(step)
    except Stopped as stopped:
        hour.say(f"\n**Stopped by {stopped}.**")
    outcomes = {step.name: hour.outcome_of(step) or "not yet" for step in steps}
    hour.say(f"\n## So far\n\n{table(('step', 'outcome'), outcomes.items())}")
    hour.say(f"{hour.folder / REPORT}, {hour.folder / TABLE}")
    if {"failed", "timed out"} & set(outcomes.values()):
        return FAILED
    return PARTIAL if {"not yet", "cut off", "partial"} & set(outcomes.values()) else PASSED


if __name__ == "__main__":
    sys.exit(main())
