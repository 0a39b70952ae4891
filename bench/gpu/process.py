"""Processes with a limit, which end with whoever started them."""

import contextlib
import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(
    None
)  # loaded here: a child between fork and exec should do as little as possible
GRACE = 5.0  # seconds between asking a process to end and ending it


def end_with_parent() -> None:
    """Runs in the child: a step whose driver was killed must not go on beside the next call's."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Ended(NamedTuple):
    code: int | None  # None: it ran past its limit and was ended; negative: the signal it died of
    seconds: float

    def __str__(self) -> str:
        if self.code is None:
            return f"ended at its limit after {self.seconds:.0f} s"
        return f"exit status {self.code} after {self.seconds:.0f} s"


def run(
    command: list[str],
    limit: float,
    log: pathlib.Path,
    on_line: Callable[[str], None] | None = None,
    env: Mapping[str, str] | None = None,
) -> Ended:
    """stderr goes to the end of `log`; stdout to `on_line` as it comes, or to the log as well."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file if on_line is None else subprocess.PIPE,
            stderr=file,
            env=None if env is None else dict(env),
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    reader = None
    if on_line is not None:
        reader = threading.Thread(target=_read, args=(process, on_line), daemon=True)
        reader.start()
    try:
        code: int | None = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end(process)
        if reader is not None:
            reader.join(timeout=GRACE)
    return Ended(code, time.monotonic() - start)


def _read(process: "subprocess.Popen[bytes]", on_line: Callable[[str], None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        on_line(line.decode(errors="replace").rstrip("\n"))


def end(process: "subprocess.Popen[bytes]") -> None:
    """The process and all it started; asked first, so that compilers clear up behind themselves."""
    for kind, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)


def tail(log: pathlib.Path, lines: int = 30) -> str:
    """The last lines of a log, of at most 300 characters each."""
    if not log.exists():
        return ""
    found = log.read_bytes()[-(1 << 18) :].decode(errors="replace").splitlines()
    return "\n".join(line[:300] for line in found[-lines:])
