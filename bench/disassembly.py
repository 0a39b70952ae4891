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


class Function(NamedTuple):
    """One kernel: a text per instruction, up to the last EXIT, and where labels point."""

    name: str
    lines: list[str]
    labels: dict[str, int]


class Loop(NamedTuple):
    first: int
    last: int

    def holds(self, other: "Loop") -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


def parsed(name: str, sass: str) -> Function:
    """Of nvdisasm's text, up to the last EXIT: what lies behind are subroutines for denormals and
    the like.
    """
    lines: list[str] = []
    labels = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            lines.append(re.sub(r"/\*.*?\*/", "", line).strip(" ;\t"))
    end = max(i for i, line in enumerate(lines) if re.search(r"\bEXIT\b", line)) + 1
    return Function(name, lines[:end], labels)


def opcode(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]


def jump(line: str, labels: dict[str, int]) -> int | None:
    # ptxas leaves some loops by a call that nobody returns from
    found = re.search(r"\b(?:BRA\b|CALL\.REL\.NOINC).*`\((\.L_\w+)\)", line)
    return labels[found[1]] if found else None


def loops(code: Function) -> list[Loop]:
    targets = ((i, jump(line, code.labels)) for i, line in enumerate(code.lines))
    return [Loop(target, i) for i, target in targets if target is not None and target <= i]


class Resources(NamedTuple):
    registers: int
    stack_bytes: int


def resources(cubin: bytes) -> Resources:
    usage = on_binary("cuobjdump", cubin, "-res-usage")
    found = [re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK")]
    return Resources(*(int(match[1]) for match in found if match is not None))
