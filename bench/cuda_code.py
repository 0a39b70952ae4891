"""What nvcc makes of csrc/cuda, without a GPU; the rows of bench.codegen beside Triton's.

The kernels take d as an argument, so their columns are a loop. Counted are the instructions that a
warp issues for a row with noise, at
most: the longest way through the code up to EXIT that enters the noisy loop, whose body counts once
    for each trip.
"""

import functools
import json
import math
import pathlib
import re
import subprocess
import tempfile
from collections import Counter
from typing import NamedTuple

from bench.disassembly import Function, Loop, jump, loops, on_binary, opcode, parsed
from setup import CSRC, NVCC_FLAGS, find_toolkit

KERNELS = pathlib.Path(__file__).parent.parent / CSRC / "cuda" / "kernels.cu"
GRADIENTS = KERNELS.with_name("gradients.cu")
LANES = 32
ELEMENTS = {"float32": "Float32", "bfloat16": "BFloat16Pair", "float16": "Float16Pair"}
LAYOUT_KINDS = {
    "nothing": 0,
    "lengths": 1,
    "mask": 1,
    "cu_seqlens": 2,
    "numbering": 3,
}  # LayoutKind
ANY_LAYOUT = 4
BISECTIONS = 4  # of cu_seqlens: bounds of up to 14 documents


def nvcc_version() -> str:
    text = subprocess.run(
        [str(find_toolkit().nvcc), "--version"], capture_output=True, text=True, check=True
    ).stdout
    return re.search(r"release [\d.]+, V([\d.]+)", text)[1]  # type: ignore[index]


@functools.cache
def compile_kernels(
    target: str, source: pathlib.Path = KERNELS, *options: str
) -> tuple[bytes, str]:
    """(cubin, PTX) of all kernels of a source."""
    nvcc = str(find_toolkit().nvcc)
    flags = [flag for flag in NVCC_FLAGS if flag not in ("-Xfatbin", "-compress-all")]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *flags, f"-arch={target}", *options, "-cubin", str(source)]
        kept = ["-keep", "-keep-dir", folder, "-o", f"{folder}/kernels.cubin"]
        subprocess.run([*command, *kept], check=True, capture_output=True, text=True)
        return pathlib.Path(folder, "kernels.cubin").read_bytes(), pathlib.Path(
            folder, f"{source.stem}.ptx"
        ).read_text()


@functools.cache
def sections(target: str, source: pathlib.Path = KERNELS, *options: str) -> dict[str, str]:
    """Each kernel's disassembly by its mangled name."""
    parts = re.split(
        r"^\.text\.(\S+):$",
        on_binary("nvdisasm", compile_kernels(target, source, *options)[0], "-c"),
        flags=re.M,
    )
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def kernel_name(
    target: str,
    dtype: str,
    layout: str,
    scaled: bool,
    source: pathlib.Path = KERNELS,
    *options: str,
) -> str:
    """Of the instance that serves such calls; a scale has one kernel for all layouts."""
    flags = rf"LNS0_10LayoutKindE{ANY_LAYOUT if scaled else LAYOUT_KINDS[layout]}ELb{int(scaled)}E"
    (name,) = [
        name
        for name in sections(target, source, *options)
        if "noisy_vector_rows" in name and re.search(rf"\d{ELEMENTS[dtype]}E+{flags}", name)
    ]
    return name


@functools.cache
def function(target: str, name: str, source: pathlib.Path = KERNELS, *options: str) -> Function:
    return parsed(name, sections(target, source, *options)[name])


def noisy_loop(code: Function) -> Loop:
    """The one with most Philox rounds in it; further loops serve columns left over and rows without
    noise.
    """
    found = loops(code)
    inner = [loop for loop in found if not any(loop.holds(other) for other in found)]
    return max(
        inner,
        key=lambda loop: sum(
            line.startswith("I2F") for line in code.lines[loop.first : loop.last + 1]
        ),
    )


def columns_of(code: Function, loop: Loop) -> int:
    """Columns of one trip: each is converted from an integer once."""
    return sum(opcode(line).startswith("I2F") for line in code.lines[loop.first : loop.last + 1])


def path_length(code: Function, embedding_dim: int, threads: int = LANES) -> float:
    """Instructions of the longest way to an EXIT through the noisy loop, for a token's threads that
    all have the same number of blocks.
    """
    main = noisy_loop(code)
    own = embedding_dim / threads
    trips, left = divmod(own / 8, columns_of(code, main) / 8)
    assert left == int(left), f"{embedding_dim} columns do not fill {threads} threads"
    weights = [1.0] * len(code.lines)
    found = loops(code)
    for loop in sorted(found, key=lambda loop: loop.first - loop.last):
        if any(loop.holds(other) for other in found):
            continue
        inside = [opcode(line) for line in code.lines[loop.first : loop.last + 1]]
        rows = any(name.startswith("STG") for name in inside)
        counts_documents = any(name.startswith("REDUX") for name in inside)  # of 32 rows a trip
        is_noisy = any(name.startswith("I2F") for name in inside)
        if rows:
            weight = trips if loop == main else left if is_noisy else 0.0
        else:
            weight = 1.0 if counts_documents else BISECTIONS
        weights[loop.first : loop.last + 1] = [float(weight)] * len(inside)
    length = [-math.inf] * (len(code.lines) + 1)
    length[0], ends = 0.0, []
    for i, line in enumerate(code.lines):
        if i == main.first:
            length[i + 1 :] = [-math.inf] * (len(code.lines) - i)  # ways around the loop
        after = length[i] + weights[i]
        unconditional = not line.startswith("@") and re.match(r"(EXIT|BRA(\.[A-Z]+)? `)", line)
        target = jump(line, code.labels)
        if i > main.last and opcode(line) == "EXIT":
            ends.append(after)
        if target is not None and target > i:
            length[target] = max(length[target], after)
        if not unconditional:
            length[i + 1] = max(length[i + 1], after)
    return max(ends)


class Numbering(NamedTuple):
    """The kernels of one numbering: longest ways through them, loops gone through once, added up.

    The instance does not depend on what is given, so these are the most of any kinds of values.
    """

    plain: int  # of rows that are one run
    any_row: int
    registers: int
    stack_bytes: int
    spills: int
    launches: int
    opcodes: Counter[str]


NUMBERING_KERNELS = {
    (8, 512): ["number_rowsILi4E"],
    (8, 4096): ["number_rowsILi8E"],
    (1, 65536): ["summarise_pieces", "number_pieces"],
}
# Which only rows of several documents come to: the scan of a warp, entries of the table; of the
# first launch of two the last real token before.
NOT_PLAIN = {"summarise_pieces": r"SHFL\.IDX"}
OF_DOCUMENTS = r"SHFL\.UP|STG\.E\.64"


def longest(code: Function, without: str | None = None) -> int:
    """Instructions of the longest way to an EXIT that comes to no instruction `without`."""
    length: list[int | None] = [0, *[None] * len(code.lines)]
    ends = [0]
    for i, line in enumerate(code.lines):
        so_far = length[i]
        if so_far is None or (without is not None and re.match(without, opcode(line))):
            continue
        target = jump(line, code.labels)
        if opcode(line) == "EXIT":
            ends.append(so_far + 1)
        following = [target] if target is not None and target > i else []
        if not re.match(r"(EXIT|BRA(\.\w+)? `)", line):
            following.append(i + 1)
        for then in following:
            length[then] = max(length[then] or 0, so_far + 1)
    return max(ends)


@functools.cache
def numbering(target: str, shape: tuple[int, int]) -> Numbering:
    plain = any_row = registers = stack = spills = 0
    opcodes: Counter[str] = Counter()
    kernels = NUMBERING_KERNELS[shape]
    for kernel in kernels:
        (name,) = [name for name in sections(target) if kernel in name]
        code, used = function(target, name), usage(target)[name]
        plain += longest(code, NOT_PLAIN.get(kernel, OF_DOCUMENTS))
        any_row += longest(code)
        registers, stack = max(registers, used["REG"]), stack + used["STACK"] + used["LOCAL"]
        spills += sum(opcode(line).startswith(("LDL", "STL")) for line in code.lines)
        opcodes.update(map(opcode, code.lines))
    return Numbering(plain, any_row, registers, stack, spills, len(kernels), opcodes)


def ptx_of(name: str, target: str, source: pathlib.Path = KERNELS) -> str:
    """That kernel's alone."""
    _, text = compile_kernels(target, source)
    return text.split(f".entry {name}(", 1)[1].split("\n}", 1)[0]


def gradient_kernel(kernel: str, target: str, dtype: str, by_freq: bool) -> str:
    """Its mangled name, of the instance that serves rows read in vectors."""
    element = rf"VectorsI.*\d{ELEMENTS[dtype]}E+.*NarrowIds.*Lb{int(by_freq)}E"
    (name,) = [
        name for name in sections(target, GRADIENTS) if kernel in name and re.search(element, name)
    ]
    return name


class Measured(NamedTuple):
    instructions: float
    registers: int
    stack_bytes: int
    shared_bytes: int
    opcodes: Counter[str]


@functools.cache
def usage(target: str, source: pathlib.Path = KERNELS) -> dict[str, dict[str, int]]:
    """cuobjdump's resources of every kernel."""
    text = on_binary("cuobjdump", compile_kernels(target, source)[0], "-res-usage")
    found = re.findall(r"Function (\S+):\s+(REG:.*)", text)
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for name, line in found
    }


def lines_of(target: str, dtype: str, layout: str, scaled: bool) -> list[str]:
    """Of the kernel's noisy loop, twice: what one trip leaves on its way is seen in the next."""
    code = function(target, kernel_name(target, dtype, layout, scaled))
    loop = noisy_loop(code)
    return code.lines[: loop.first] + 2 * code.lines[loop.first : loop.last + 1]


def measure(
    target: str, dtype: str, embedding_dim: int, layout: str, scaled: bool, threads: int = LANES
) -> Measured:
    code = function(target, kernel_name(target, dtype, layout, scaled))
    used = usage(target)[code.name]
    opcodes = Counter(map(opcode, code.lines))
    return Measured(
        path_length(code, embedding_dim, threads),
        used["REG"],
        used["STACK"],
        used["SHARED"],
        opcodes,
    )


def write_artefacts(
    target: str, dtype: str, embedding_dim: int, layout: str, scaled: bool, folder: pathlib.Path
) -> None:
    """The kernel's code and how launch_rows would launch it."""
    name = kernel_name(target, dtype, layout, scaled)
    cubin, ptx = compile_kernels(target)
    launch = {
        "target": target,
        "kernel": name,
        "dtype": dtype,
        "d": embedding_dim,
        "block": ["threads_of_token", "min(128 / block.x, columns)", 1],
        "grid": ["ceil(columns / block.y)", "min(rows, 65535)", "ceil(rows / 65535)"],
        "parameters": [{"name": "arguments", "type": "RowArguments, csrc/cuda/launch.h"}],
        "nvcc": NVCC_FLAGS,
    }
    (folder / "kernel.cubin").write_bytes(cubin)
    (folder / "kernel.ptx").write_text(ptx)
    (folder / "kernel.sass").write_text(sections(target)[name])
    (folder / "launch.json").write_text(json.dumps(launch, indent=1) + "\n")
