"""The tables of bench.compare, of all machines whose CSV is there: one line a machine and case."""

import csv
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from .cases import (
    ALONE,
    BASE,
    COMPILED_HOOK,
    COMPILED_OFFICIAL,
    GATHER,
    HOOK,
    OFFICIAL,
    OURS,
)
from .machine import BUSY, is_busy

STEP, SHAPE, BATCH, WAY, KERNEL = (
    "training step",
    "model shapes",
    "batches",
    "ways of calling",
    "kernel alone",
)
SWEPT = {"tokens": "tokens", "embedding_dim": "d", "num_embeddings": "V", "threads": "threads"}
Row = dict[str, Any]  # of the CSV
Machines = dict[str, list[Row]]  # by their names
RIVALS = (HOOK, OFFICIAL, COMPILED_HOOK, COMPILED_OFFICIAL)

ABOUT = """\
Medians of interleaved rounds on rotating inputs. Each ratio is over the column in milliseconds, the
same call without noise, in the same round; p10 and p90 stand in the CSV. Faults: pages that the
system mapped in one call. HF hook: transformers' own, with the padded length. Official: the paper's
training code. Compiled: the same with rand_like, through torch.compile."""


def read_one(path: pathlib.Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read(folder: pathlib.Path) -> Machines:
    return {path.stem: read_one(path) for path in sorted(folder.glob("*.csv"))}


def case_key(row: Row) -> tuple[str, ...]:
    names = ("case", "way", "batch", "columns", "embedding_dim", "num_embeddings", "dtype")
    return tuple(str(row[name]) for name in (*names, "layout", "threads"))


def grouped(rows: Iterable[Row], section: str) -> dict[tuple[str, ...], dict[str, Row]]:
    """Of each case, a row by provider."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["section"] == section:
            found.setdefault(case_key(row), {})[row["provider"]] = row
    return found


def is_void(row: Row) -> bool:
    return is_busy(float(row["others_cpu_share"] or 0))


def swept_value(section: str, row: Row) -> int:
    return int(row["batch"]) * int(row["columns"]) if section == "tokens" else int(row[section])


def cpu_of(rows: Sequence[Row]) -> str:
    return (
        f"{rows[0]['cpu']}, {rows[0]['simd']}".replace(" (family ", " ")
        .replace(", model ", "/")
        .replace(")", "")
    )


def lines_of(machines: Machines, section: str) -> Iterator[tuple[str, dict[str, Row]]]:
    """CPU and providers, the machines of one case beside each other."""
    by_machine = {name: grouped(rows, section) for name, rows in machines.items()}
    cases = dict.fromkeys(key for found in by_machine.values() for key in found)
    for key in cases:
        for name, found in by_machine.items():
            if key in found:
                yield cpu_of(machines[name]), found[key]


def shape(row: Row) -> str:
    return f"({row['batch']}, {row['columns']}, {row['embedding_dim']})"


def milliseconds(row: Row) -> str:
    return "VOID" if is_void(row) else f"{float(row['median_ms']):.3g}"


def ratio(row: Row | None) -> str:
    if row is None:
        return "-"
    return "VOID" if is_void(row) else f"{float(row['ratio']):.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def calls_table(
    machines: Machines, section: str, head: str, cell: Callable[[Row], str]
) -> list[str]:
    """Ours, then the rivals that took part, over the lookup without noise."""
    lines = list(lines_of(machines, section))
    rivals = [name for name in RIVALS if any(name in found for _, found in lines)]
    columns = [head, "dtype", "CPU", f"{BASE}, ms", f"ours / {BASE}", "at most"]
    columns += [f"{name} / {BASE}" for name in rivals]
    columns += [f"faults, {BASE}", "faults, ours", f"noise alone in cache / {BASE}"]
    rows = []
    for cpu, found in lines:
        base, ours = found[BASE], found[OURS]
        floor = float(base["arithmetic_floor_ms"]) / float(base["median_ms"])
        rows.append(
            [
                cell(base),
                base["dtype"],
                cpu,
                milliseconds(base),
                ratio(ours),
                str(ours["limit"]) or "-",
                *(ratio(found.get(name)) for name in rivals),
                base["page_faults"],
                ours["page_faults"],
                "VOID" if is_void(base) else f"{floor:.2f}",
            ]
        )
    return table(columns, rows)


def peaks_table(
    machines: Machines, section: str, head: str, cell: Callable[[Row], str]
) -> list[str]:
    columns = [head, "dtype", "CPU", f"{BASE}, ms", f"ours / {BASE}", f"{HOOK} / {BASE}"]
    columns += [f"peak MiB, {name}" for name in (BASE, OURS, HOOK)]
    rows = []
    for cpu, found in lines_of(machines, section):
        base = found[BASE]
        peaks = [f"{int(found[name]['peak_bytes']) / 2**20:.1f}" for name in (BASE, OURS, HOOK)]
        ratios = [ratio(found[name]) for name in (OURS, HOOK)]
        rows.append([cell(base), base["dtype"], cpu, milliseconds(base), *ratios, *peaks])
    return table(columns, rows)


def added_milliseconds(row: Row, base: Row) -> float:
    """What a provider adds to the lookup."""
    return (float(row["ratio"]) - 1) * float(base["median_ms"])


def share_of_step(row: Row, base: Row, step: Row) -> float:
    """The same in % of the whole step without noise."""
    return 100 * added_milliseconds(row, base) / float(step["median_ms"])


def added(row: Row, base: Row, step: Row) -> str:
    if is_void(row) or is_void(step):
        return "VOID"
    return f"{added_milliseconds(row, base):.2f} ms, {share_of_step(row, base, step):.2f} %"


def steps_of(lines: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """The lookup and the whole step of each training, which follow each other."""
    every = list(lines)
    return zip(every[::2], every[1::2], strict=True)


def steps_table(machines: Machines) -> list[str]:
    columns = ["model", "CPU", "step without noise, ms", "ours adds", "HF hook adds"]
    columns += ["whole step with ours / without", "with HF hook / without"]
    rows = []
    for (cpu, lookup), (_, step) in steps_of(lines_of(machines, STEP)):
        base = step[BASE]
        ratios = [
            f"{float(step[name]['ratio']):.3f} ({float(step[name]['ratio_p10']):.3f} to "
            f"{float(step[name]['ratio_p90']):.3f})"
            for name in (OURS, HOOK)
        ]
        more = [added(lookup[name], lookup[BASE], base) for name in (OURS, HOOK)]
        whole = ["VOID"] * 2 if is_void(base) else ratios
        rows.append([base["case"], cpu, milliseconds(base), *more, *whole])
    return table(columns, rows)


def kernel_table(machines: Machines) -> list[str]:
    rows = [
        [
            shape(found[GATHER]),
            found[GATHER]["dtype"],
            cpu,
            milliseconds(found[GATHER]),
            ratio(found[ALONE]),
        ]
        for cpu, found in lines_of(machines, KERNEL)
    ]
    return table(("shape", "dtype", "CPU", f"{GATHER}, ms", f"kernel alone / {GATHER}"), rows)


def commits(rows: Sequence[Row]) -> str:
    """With the parts of each, where they were not all measured at one."""
    parts: dict[str, dict[str, None]] = {}
    for row in rows:
        of = parts.setdefault(f"commit {row['commit']}, {row['date']}", {})
        of[row["section"]] = None
    if len(parts) == 1:
        return next(iter(parts))
    return "; ".join(f"{', '.join(of)}: {commit}" for commit, of in parts.items())


def machine_lines(machines: Machines) -> list[str]:
    return [
        f"- {rows[0]['machine']}, {commits(rows)}. Noise alone in "
        f"cache: {rows[0]['noise_alone_float32']} float32 and {rows[0]['noise_alone_bfloat16']} "
        f"bfloat16 elements per second and core. Copy: {float(rows[0]['copy_bytes']) / 1e9:.1f} "
        f"GB/s. `bench/results/compare/{name}.csv`"
        for name, rows in machines.items()
    ]


def void_lines(machines: Machines) -> list[str]:
    if not any(is_void(row) for rows in machines.values() for row in rows):
        return []
    return [
        f"VOID: other processes took more than {BUSY:.0%} of the CPU time meanwhile; no figure.",
        "",
    ]


Part = tuple[str, str, Callable[[], list[str]]]  # title, what it says, its table
THROUGH = "Through one base point, (4, 512, 2048) from V = 32000"


def sweep_part(machines: Machines, section: str, what: str) -> Part:
    def cell(row: Row) -> str:
        return str(swept_value(section, row))

    about = f"{THROUGH}; ragged, an attention_mask."
    return f"Sweep of {what}", about, partial(peaks_table, machines, section, what, cell)


def markdown(machines: Machines) -> str:
    sections = {row["section"] for rows in machines.values() for row in rows}
    parts: dict[str, Part] = {
        STEP: (
            "What noise adds to a training step",
            "4 rows of at most 128 tokens, 70 % real, an attention_mask; float32, AdamW. What is "
            "added is measured at the lookup, forward and backward, in a model without layers, and "
            "divided by the whole step. The two last columns are whole steps within a round.",
            lambda: steps_table(machines),
        ),
        SHAPE: (
            "Ragged batches, by the shapes of models",
            "70 % of the tokens real, an attention_mask, a fresh output.",
            lambda: calls_table(machines, SHAPE, "shape", shape),
        ),
        BATCH: (
            "The same base point, other batches",
            f"{THROUGH}.",
            lambda: calls_table(machines, BATCH, "batch", lambda row: row["layout"]),
        ),
        WAY: (
            "The same ragged batch, other ways to call",
            "Peak: the most that torch's allocator had handed out at once during one call, its "
            "output included; with backward also the weight's gradient.",
            lambda: peaks_table(machines, WAY, "way", lambda row: row["way"]),
        ),
        **{section: sweep_part(machines, section, what) for section, what in SWEPT.items()},
        KERNEL: (
            "The kernel alone",
            "Into a buffer that is there already, no mask; gather floor: `torch.index_select` into "
            "the same buffer.",
            lambda: kernel_table(machines),
        ),
    }
    lines = ["# What noise costs on CPUs", "", ABOUT, ""]
    lines += [*machine_lines(machines), "", *void_lines(machines)]
    for section, (title, about, make) in parts.items():
        if section in sections:
            lines += [f"## {title}", "", about, "", *make()]
    lines += ["Written by `make bench` (`python -m bench.compare`).", ""]
    return "\n".join(lines)
