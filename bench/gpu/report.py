"""What an hour on a GPU leaves behind: one Markdown report and one CSV, written line by line."""

import csv
import io
import os
import pathlib
from collections.abc import Iterable

REPORT, TABLE = "report.md", "results.csv"
COLUMNS = (
    "device",
    "step",
    "what",  # a provider, a test file, a tool; "begun" or "ended" for the step itself
    "shape",  # (B, T, d)
    "dtype",
    "layout",
    "backend",
    "outcome",  # passed, failed; of steps also partial, timed out, cut off, not here
    "seconds",
    "device_us",  # median of the rounds
    "p10_us",
    "p90_us",
    "host_us",
    "bytes",  # that must move, whatever a rival moves
    "tb_per_s",
    "ratio",  # median over the rounds
    "ratio_to",
    "note",
)
BEGUN, ENDED = "begun", "ended"  # what the rows of the step itself are called
DEVICE_VARIABLE = "NEFTUNE_BENCH_DEVICE"  # the driver tells its steps what every row is to name

Row = dict[str, str]


def append(path: pathlib.Path, text: str) -> None:
    """On the disk when it returns. A line that was cut off before is closed, to spoil no other."""
    data = text.encode()
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _line(values: Iterable[object]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def write_row(folder: pathlib.Path, step: str, what: str, outcome: str, **fields: object) -> None:
    """One line of the CSV; numbers with five digits."""
    if unknown := fields.keys() - set(COLUMNS):
        raise ValueError(f"no such column: {', '.join(sorted(unknown))}")
    path = folder / TABLE
    if not path.exists():
        append(path, _line(COLUMNS))
    row = {
        "device": os.environ.get(DEVICE_VARIABLE, ""),
        "step": step,
        "what": what,
        "outcome": outcome,
    } | fields
    values = (row.get(column, "") for column in COLUMNS)
    append(
        path,
        _line(f"{v:.5g}" if isinstance(v, float) else str(v).replace("\n", " ") for v in values),
    )


def read_rows(path: pathlib.Path) -> list[Row]:
    """Whole lines only: one that a power cut left behind counts as never written."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    return [
        dict(zip(COLUMNS, line, strict=True)) for line in lines[1:] if len(line) == len(COLUMNS)
    ]


def rows_of(folder: pathlib.Path, step: str) -> list[Row]:
    """The step's own lines on this device."""
    device = os.environ.get(DEVICE_VARIABLE, "")
    return [
        row for row in read_rows(folder / TABLE) if row["step"] == step and row["device"] == device
    ]


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = [
        names,
        ["---"] * len(names),
        *([str(cell).replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def fenced(text: str) -> str:
    return f"\n```\n{text}\n```\n"
