"""compute-sanitizer's four tools on a program of every kernel: `python -m bench.gpu.sanitizers`."""

import os
import sys

from . import process
from .report import fenced, table
from .step import (
    FAILED,
    NOT_HERE,
    PARTIAL,
    PASSED,
    Setting,
    find_tool,
    log_of,
    parser_of,
    setting_of,
)

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Substrings of our kernels' names: torch's are not on trial.
OURS = ("noisy", "number_", "summarise_pieces")
PROGRAM = ("-m", "bench.gpu.program", "checked")
# Every tensor is an allocation of its own then: a stray access leaves it.
NO_CACHING = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
FOUND_ERRORS = 9


def summary(text: str) -> str:
    lines = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
    return lines[-1] if lines else ""


def sanitizers(setting: Setting) -> int:
    tool = find_tool("compute-sanitizer")
    if tool is None:
        print("No compute-sanitizer on the PATH or in /usr/local/cuda.")
        return NOT_HERE
    rows = setting.earlier_rows()
    over = [row for row in rows if row["what"] in TOOLS and row["outcome"] != "cut off"]
    outcomes = {row["what"]: row["outcome"] for row in over}
    lines = []
    left = [name for name in TOOLS if name not in outcomes]
    for i, name in enumerate(left):
        log = log_of(setting.folder, f"{setting.name}-{name}")
        log.unlink(missing_ok=True)
        command = [tool, "--tool", name, "--error-exitcode", str(FOUND_ERRORS)]
        for substring in OURS:
            command += ["--kernel-name", f"kns={substring}"]
        command += [sys.executable, *PROGRAM, "--device", setting.device]
        limit = max(1.0, setting.left / (len(left) - i))
        ended = process.run(command, limit, log, env=os.environ | NO_CACHING)
        found = summary(log.read_text(errors="replace"))
        if ended.code is None:
            outcome = "cut off"
        else:
            outcome = "passed" if ended.code == 0 and found else "failed"
        outcomes[name], note = outcome, f"{found or 'no summary'}; {ended}"
        setting.write(name, outcome, seconds=ended.seconds, note=note)
        lines.append((name, outcome, note))
        if outcome != "passed":
            print(f"{name}:\n{fenced(process.tail(log, 40))}")
    print(table(("tool", "outcome", "what it says"), lines))
    if "failed" in outcomes.values():
        return FAILED
    return PARTIAL if "cut off" in outcomes.values() else PASSED


def main(arguments: list[str] | None = None) -> int:
    return sanitizers(setting_of(parser_of(__doc__, "sanitizers"), arguments))


if __name__ == "__main__":
    sys.exit(main())
