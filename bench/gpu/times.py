"""Device and host time of ours, the floors and the rivals: `python -m bench.gpu.times`.

Every provider is first checked, ours bit for bit against the reference on the same device. Device
time is the replay of a CUDA graph of calls on inputs that rotate through more memory than the
caches hold; the graphs of a shape are replayed in rounds, each in a new random order, and ratios
are taken within a round. Host time is what the caller waits for. A shape's rows are written when
it is done; what the CSV has is not measured again.
"""

import math
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from bench import cases
from bench.interleaved import spread
from neftune_kernels import available_backends

from .clock import Clock, clock_of, host_seconds
from .machine import STATE, nvidia_smi
from .providers import Measured, case_of, layouts, make_all, make_inputs, shapes
from .report import append, table
from .smoke import BACKENDS
from .step import CRASHED, FAILED, PARTIAL, PASSED, Setting, parser_of, setting_of

FIRST_GUESS = 30.0  # seconds that the first shape may take
SPARE = 5.0
HEAD = ("what", "layout", "backend", "device us", "p10", "p90", "host us", "TB/s")


class Timed(NamedTuple):
    measured: Measured
    replay: Callable[[], float]
    host: float


class Doing:
    """Names what is being measured in a file, for the process that comes after a crash."""

    def __init__(self, setting: Setting) -> None:
        self.path = setting.folder / f"{setting.name}.doing"

    def begin(self, *what: str) -> None:
        self.end()
        append(self.path, "|".join(what))

    def end(self) -> None:
        self.path.unlink(missing_ok=True)

    def left_behind(self) -> list[str] | None:
        return self.path.read_text().strip().split("|") if self.path.exists() else None


def write(
    setting: Setting, shape: str, key: tuple[str, str, str], outcome: str, **fields: object
) -> None:
    what, layout, backend = key
    fields |= {"shape": shape, "dtype": setting.rest.dtype, "layout": layout, "backend": backend}
    setting.write(what, outcome, **fields)


def record(
    setting: Setting,
    clock: Clock,
    case: cases.Case,
    inputs: list[cases.Inputs],
    wanted: list[Measured],
) -> tuple[list[Timed], int]:
    """Checked, captured and timed on the host; and how many could not be."""
    timed, failures, doing = [], 0, Doing(setting)
    for measured in wanted:
        doing.begin(case.shape, *measured.key)
        try:
            if wrong := measured.check(inputs[-1]):
                raise AssertionError(wrong)
            runs = [partial(measured.run, one) for one in inputs]
            timed.append(Timed(measured, clock.record(runs), host_seconds(runs[0], clock)))
        except Exception as error:
            failures += 1
            note = f"{type(error).__name__}: {error}"[:300]
            print(f"- {case.shape} {' '.join(measured.key)}: {note}")
            write(setting, case.shape, measured.key, "failed", note=note)
            doing.end()
            # Raises once more where the context is lost: a new process goes on behind this row.
            clock.synchronise()
    doing.end()
    return timed, failures


def time_rounds(clock: Clock, timed: list[Timed]) -> list[list[float]]:
    taken: list[list[float]] = [[] for _ in timed]
    order = torch.Generator().manual_seed(0)
    for round_ in range(clock.rounds + 1):
        for i in torch.randperm(len(timed), generator=order).tolist():
            seconds = timed[i].replay()
            if round_:  # the first warms up
                taken[i].append(seconds)
    return taken


def measure(setting: Setting, clock: Clock, case: cases.Case, done: set[tuple[str, ...]]) -> int:
    """One shape; how many of its rows failed."""
    available = available_backends(setting.device)
    backends = [name for name in BACKENDS[setting.device] if available[name] == "available"]
    base, *others = make_all(case, layouts(case, setting.device), backends)
    left = [one for one in (base, *others) if (case.shape, *one.key) not in done]
    if not left:
        return 0
    inputs = make_inputs(case, setting.device)
    wanted = left if left[0] is base else [base, *left]
    timed, failures = record(setting, clock, case, inputs, wanted)
    taken = time_rounds(clock, timed)
    bases = taken[0] if timed and timed[0].measured is base else [math.nan] * clock.rounds
    lines = []
    for (one, _, host), values in zip(timed, taken, strict=True):
        if one not in left:
            continue
        median, low, high = spread(values)
        ratio = spread([value / over for value, over in zip(values, bases, strict=True)])[0]
        fields = {
            "device_us": median * 1e6,
            "p10_us": low * 1e6,
            "p90_us": high * 1e6,
            "host_us": host * 1e6,
        }
        numbers = [f"{value:.4g}" for value in fields.values()]
        if one.moves_rows:
            fields |= {"bytes": case.bytes_moved, "tb_per_s": case.bytes_moved / median / 1e12}
        write(setting, case.shape, one.key, "passed", **fields, ratio=ratio, ratio_to=base.what)
        speed = f"{fields['tb_per_s']:.3g}" if one.moves_rows else ""
        lines.append((*one.key, *numbers, speed, f"{ratio:.2f}"))
    print(f"\n{case.shape} {case.dtype_name}, {len(inputs)} sets of inputs\n")
    print(table((*HEAD, f"over {base.what}"), lines))
    return failures


def state(device: str) -> str:
    if device == "cuda":
        return f"{STATE}: {nvidia_smi(STATE)}"
    return "a CPU: these figures check the program and are nobody's"


@torch.no_grad()
def times(setting: Setting) -> int:
    torch.manual_seed(0)
    clock, dtype, doing = clock_of(setting.device), cases.DTYPES[setting.rest.dtype], Doing(setting)
    if at := doing.left_behind():
        shape, what, layout, backend = at
        note = "the process ended while it measured this"
        print(f"- {shape} {what} {layout} {backend}: {note}")
        write(setting, shape, (what, layout, backend), "failed", note=note)
        doing.end()
    rows = [row for row in setting.earlier_rows() if row["shape"]]
    done: set[tuple[str, ...]] = {
        (row["shape"], row["what"], row["layout"], row["backend"]) for row in rows
    }
    failures = sum(row["outcome"] == "failed" for row in rows)
    print(f"Before: {state(setting.device)}\n")
    longest = FIRST_GUESS
    for shape_ in shapes(setting.tiny):
        if setting.left < longest + SPARE:
            left = f"{setting.left:.0f} s left, a shape may take {longest:.0f} s"
            print(f"Stopped before {shape_}: {left}")
            return PARTIAL
        start = time.monotonic()
        failures += measure(setting, clock, case_of(shape_, dtype, setting.tiny), done)
        longest = max(longest / 2, time.monotonic() - start)
        clock.release_memory()
    print(f"After: {state(setting.device)}")
    return FAILED if failures else PASSED


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__, "times")
    parser.add_argument("--dtype", choices=list(cases.DTYPES), default="bfloat16")
    setting = setting_of(parser, arguments)
    try:
        return times(setting._replace(name=f"times-{setting.rest.dtype}"))
    except Exception:
        traceback.print_exc()
        return CRASHED


if __name__ == "__main__":
    sys.exit(main())
