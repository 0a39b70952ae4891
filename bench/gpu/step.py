"""What the steps have in common: arguments, exit statuses, how much time is left."""

import argparse
import os
import pathlib
import shutil
import time
from typing import NamedTuple

from .report import BEGUN, TABLE, Row, rows_of, write_row

PASSED, FAILED, NO_DEVICE, PARTIAL, NOT_HERE, CRASHED = range(6)  # exit statuses
OUTCOMES = {PASSED: "passed", PARTIAL: "partial", NOT_HERE: "not here"}  # all else: failed
OUT = pathlib.Path("build/first_gpu")
DEVICES = ("cuda", "cpu")
ABOUT_DEVICE = "cpu: tiny shapes, checks the program and no device"
TOOL_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


class Setting(NamedTuple):
    name: str  # of the step, in the CSV
    folder: pathlib.Path  # of the report and the CSV
    device: str  # "cuda", or "cpu": tiny shapes, which checks the program and no device
    end: float  # time.monotonic() when this step must be over
    again: bool  # measure anew what the CSV has
    rest: argparse.Namespace

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def earlier_rows(self) -> list[Row]:
        """This step's own on this device; with `again` those of this beginning alone, for it may
        be a process that goes on behind one that crashed."""
        rows = rows_of(self.folder, self.name)
        begun = max((i for i, row in enumerate(rows) if row["what"] == BEGUN), default=0)
        return rows[begun:] if self.again else rows

    def write(self, what: str, outcome: str, **fields: object) -> None:
        """A row of the CSV."""
        write_row(self.folder, self.name, what, outcome, **fields)

    @property
    def log(self) -> pathlib.Path:
        return log_of(self.folder, self.name)


def log_of(folder: pathlib.Path, step: str) -> pathlib.Path:
    return folder / "logs" / f"{step}.log"


def parser_of(description: str | None, name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help=f"folder of {TABLE}")
    parser.add_argument("--device", choices=DEVICES, default="cuda", help=ABOUT_DEVICE)
    parser.add_argument("--seconds", type=float, default=480.0, help="how long this may take")
    parser.add_argument("--again", action="store_true", help="also what the CSV has already")
    parser.set_defaults(name=name)
    return parser


def setting_of(parser: argparse.ArgumentParser, arguments: list[str] | None) -> Setting:
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + given.seconds
    return Setting(given.name, given.out, given.device, end, given.again, given)


def find_tool(name: str) -> str | None:
    """NVIDIA's tools lie on the PATH or beside nvcc."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(TOOL_FOLDERS))
