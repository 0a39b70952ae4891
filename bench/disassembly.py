"""NVIDIA machine code as text, by the tools inside the triton wheel."""

import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

import triton


def on_binary(tool: str, binary: bytes, *arguments: str) -> str:
    """Output of nvdisasm or cuobjdump on a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        command = [
            str(pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool),
            *arguments,
            str(path),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sass(cubin: bytes) -> str:
    return on_binary("nvdisasm", cubin, "-c")


def sass_instructions(text: str) -> list[str]:
    """One text per instruction, predicates included, up to the last EXIT: what lies behind are
    subroutines for denormals and the like.
    """
    lines = [
        re.sub(r"/\*.*?\*/", "", line).strip(" ;\t")
        for line in text.splitlines()
        if re.search(r"/\*[0-9a-f]{4,}\*/", line)
    ]
    return lines[: max(i for i, line in enumerate(lines) if re.search(r"\bEXIT\b", line)) + 1]


class Resources(NamedTuple):
    registers: int
    stack_bytes: int


def resources(cubin: bytes) -> Resources:
    usage = on_binary("cuobjdump", cubin, "-res-usage")
    found = [re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK")]
    return Resources(*(int(match[1]) for match in found if match is not None))
