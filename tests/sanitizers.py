"""g++ and clang++, each with its address and undefined-behaviour sanitizers, and Python under
them.
"""

import os
import platform
import shutil
import subprocess
import sys
from typing import NamedTuple

from test_install import run

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


class Compiler(NamedTuple):
    command: str
    sanitizers: tuple[str, ...]
    runtimes: tuple[str, ...]  # what must be in the process before Python

    def missing(self) -> str:
        """What this machine lacks of it, or ""."""
        if shutil.which(self.command) is None:
            return f"no {self.command} here"
        lacking = [name for name in self.runtimes if not os.path.isabs(self.path_of(name))]
        return f"{self.command} has no {lacking[0]} here" if lacking else ""

    def path_of(self, runtime: str) -> str:
        return run(self.command, f"-print-file-name={runtime}").strip()

    def run_python(self, *command, cwd, **variables) -> subprocess.CompletedProcess:
        """This Python with libraries in it that were compiled by this compiler's sanitizers."""
        environment = os.environ | {
            "LD_PRELOAD": " ".join(map(self.path_of, self.runtimes)),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env=environment | variables,
            capture_output=True,
            text=True,
        )


def newest_clang() -> str:
    """Debian's clang++-19 and the like, else what is called clang++."""
    versions = range(40, 15, -1)  # 16 is the first that reads all of the CUDA shim's C++20
    found = (name for n in versions if shutil.which(name := f"clang++-{n}"))
    return next(found, "clang++")


COMPILERS = {
    "g++": Compiler("g++", SANITIZERS, ("libasan.so", "libubsan.so")),
    "clang++": Compiler(
        newest_clang(),
        (*SANITIZERS, "-shared-libsan"),
        (f"libclang_rt.asan-{platform.machine()}.so",),  # one library holds both
    ),
}
