"""What the compilers make of the kernels that number documents, for bench.codegen: instructions on
the shortest and on the longest way through a program, against limits in microseconds.

The model: a warp issues an instruction every 4 cycles at 1.98 GHz; launches and loads come on top.
The shortest way is that of rows that are one run of real tokens. The longest takes every branch
where it is longer. Loops are gone through once: 32 pieces of a row at a time.
"""

import functools
import re
from collections import Counter
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import cuda_code
from bench.disassembly import Function, jump, loops, opcode, parsed, resources, sass
from neftune_kernels import triton_kernels, triton_numbering

CYCLES = 4  # between two instructions of one warp
GIGAHERTZ = 1.98


class Given(NamedTuple):
    """What a call gives, by the types of the kernels' parameters."""

    mask: str | None = None
    position_ids: str | None = None
    is_padded: bool = False  # mask holds ids

    @property
    def is_numbered(self) -> bool:
        return self.mask not in (None, "*u8") and not self.is_padded


GIVEN = {
    "bool mask": Given("*u8"),
    "padding_idx": Given("*i64", is_padded=True),
    "int64 mask": Given("*i64"),
    "float32 mask": Given("*fp32"),
    "position_ids": Given(position_ids="*i64"),
    "mask and ids": Given("*i64", "*i64"),
}
MOST_PLAIN = 0.8  # us of a row that is one run
MOST = {(8, 512): 1.5, (8, 4096): 2.5, (1, 65536): 2.5}  # us of any row
READING = 70  # instructions that the row kernel has more than with `lengths`, at most


class Numbering(NamedTuple):
    target: str
    given: str
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        rows, columns = self.shape
        return f"{self.target}-{self.given.replace(' ', '_')}-{rows}x{columns}"


def microseconds(instructions: int) -> float:
    return instructions * CYCLES / GIGAHERTZ / 1e3


class Program(NamedTuple):
    """Counts of the kernels of one numbering, added up where there are two. Of an AMD one no ways
    are known.
    """

    shortest: int
    longest: int
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    launches: int
    opcodes: Counter[str]

    @property
    def microseconds(self) -> tuple[float, float]:
        return microseconds(self.shortest), microseconds(self.longest)


def kernels_of(configuration: Numbering) -> list[Any]:
    """In the order of their launches."""
    if configuration.shape[1] <= triton_kernels.ROW_BLOCKS[-1]:
        return [triton_numbering.number_rows]
    return [triton_numbering.summarise_pieces, triton_numbering.number_pieces]


@functools.cache
def compiled(kernel: Any, configuration: Numbering, target: GPUTarget) -> Any:
    """As the launcher compiles it for values side by side."""
    given = GIVEN[configuration.given]
    block = triton_kernels.numbering_block(configuration.shape[1])
    each, num_warps = triton_kernels.numbering_shape(block, target.warp_size)
    types = {"numbering": "*i32", "summary": "*i32", **given._asdict()}
    values = {
        "PADDED": given.is_padded,
        "NUMBERED": given.is_numbered,
        "DENSE": True,
        "BLOCK": block,
        "EACH": each,
        "DEBUG": False,
        "LANES": triton_kernels.PIECES_AT_ONCE,
    }
    signature, constants = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        signature[name] = types.get(name, parameter.annotation_type)
        if parameter.is_constexpr or signature[name] is None:
            signature[name], constants[name] = "constexpr", values.get(name)
    options = triton_kernels.compile_options(target.backend, triton_kernels.NUMBERING_REGISTERS)
    return triton.compile(
        ASTSource(kernel, signature, constants),
        target=target,
        options={"num_warps": num_warps, **options},
    )


def ways(code: Function) -> tuple[int, int]:
    """Instructions of the shortest and of the longest way to an EXIT, neither around a loop."""
    unreached = len(code.lines) + 1
    shortest, longest = [unreached] * unreached, [0] * unreached
    shortest[0], ends, found = 0, [], loops(code)
    for i, line in enumerate(code.lines):
        after = shortest[i] + 1, longest[i] + 1
        if shortest[i] == unreached:
            continue
        target, goes_on = jump(line, code.labels), not re.match(r"(EXIT|BRA(\.\w+)? `)", line)
        following = []
        if target is not None and target > i:
            around = any(i < loop.first and loop.last < target for loop in found)
            following += [] if around else [target]
        if goes_on:
            following.append(i + 1)
        if opcode(line) == "EXIT":
            ends.append(after)
        for then in following:
            shortest[then] = min(shortest[then], after[0])
            longest[then] = max(longest[then], after[1])
    return min(end[0] for end in ends), max(end[1] for end in ends)


def amd_figure(text: str, name: str) -> int:
    return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]


@functools.cache
def measure(configuration: Numbering, target: GPUTarget) -> Program:
    shortest = longest = registers = stack = spills = shared = 0
    opcodes: Counter[str] = Counter()
    kernels = kernels_of(configuration)
    for kernel in kernels:
        found = compiled(kernel, configuration, target)
        shared = max(shared, found.metadata.shared)
        if target.backend == "hip":
            text = found.asm["amdgcn"]
            registers = max(registers, amd_figure(text, "vgpr_count"))
            stack += amd_figure(text, "private_segment_fixed_size")
            spills += amd_figure(text, "vgpr_spill_count") + amd_figure(text, "sgpr_spill_count")
            opcodes.update(re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE))
            continue
        code = parsed(kernel.__name__, sass(found.asm["cubin"]))
        own, used = ways(code), resources(found.asm["cubin"])
        shortest, longest = shortest + own[0], longest + own[1]
        registers, stack = max(registers, used.registers), stack + used.stack_bytes
        opcodes.update(map(opcode, code.lines))
        spills += sum(opcode(line).startswith(("LDL", "STL")) for line in code.lines)
    return Program(shortest, longest, registers, stack, spills, shared, len(kernels), opcodes)


ATOMIC = re.compile(r"^(ATOM|RED)\b|_atomic_")


def missed(configuration: Numbering, target: GPUTarget) -> list[str]:
    """Of the limits, in words."""
    code = measure(configuration, target)
    return _missed(code, code.microseconds, configuration.shape)


def cuda_missed(target: str, shape: tuple[int, int]) -> list[str]:
    """Of the limits, by the CUDA C++ kernels; of all kinds of values, which share an instance."""
    code = cuda_code.numbering(target, shape)
    return _missed(code, (microseconds(code.plain), microseconds(code.any_row)), shape)


def _missed(code: Any, taken: tuple[float, float], shape: tuple[int, int]) -> list[str]:
    plain, any_row = taken
    wrong = {
        f"{code.stack_bytes} bytes of scratch": code.stack_bytes > 0,
        f"{code.spills} spills": code.spills > 0,
        f"{code.registers} registers": code.registers > triton_kernels.NUMBERING_REGISTERS,
        "atomics": any(map(ATOMIC.match, code.opcodes)),
        f"{plain:.2f} us of plain rows": plain > MOST_PLAIN,
        f"{any_row:.2f} us of any row": any_row > MOST[shape],
    }
    return [what for what, is_wrong in wrong.items() if is_wrong]


def configurations(targets: tuple[str, ...]) -> list[Numbering]:
    return [Numbering(t, given, shape) for t in targets for shape in MOST for given in GIVEN]


def report(targets: dict[str, GPUTarget]) -> list[dict[str, Any]]:
    """The table, printed; its rows."""
    print(
        "\nNumbering documents: instructions of a program on the shortest way (a row that is one "
        "run) and on the longest, in us by the model\n"
    )
    titles = ("plain", "us", "any", "us", "at most", "regs", "scratch", "launches")
    print(f"{'target':8}{'tokens':>12}  {'given':13}" + "".join(f"{t:>9}" for t in titles))
    rows = []
    for configuration in configurations(tuple(targets)):
        target = targets[configuration.target]
        code, wrong = measure(configuration, target), missed(configuration, target)
        plain, any_row = code.microseconds
        rows.append({**configuration._asdict(), **code._asdict(), "missed": wrong})
        print(
            f"{configuration.target:8}{configuration.shape!s:>12}  {configuration.given:13}"
            f"{code.shortest:9}{plain:9.2f}{code.longest:9}{any_row:9.2f}"
            f"{MOST[configuration.shape]:9.1f}{code.registers:9}{code.stack_bytes + code.spills:9}"
            f"{code.launches:9}  {'missed: ' + ', '.join(wrong) if wrong else 'met'}"
        )
    return rows


def cuda_report(targets: tuple[str, ...]) -> list[dict[str, Any]]:
    """The same of the CUDA C++ kernels, whose plain rows are the longest of any kinds of values."""
    rows = []
    for target in targets:
        for shape in MOST:
            code, wrong = cuda_code.numbering(target, shape), cuda_missed(target, shape)
            rows.append(
                {"target": target, "shape": shape, "given": "anything, CUDA C++"}
                | code._asdict()
                | {"missed": wrong}
            )
            print(
                f"{target:8}{shape!s:>12}  {'any, CUDA C++':13}"
                f"{code.plain:9}{microseconds(code.plain):9.2f}"
                f"{code.any_row:9}{microseconds(code.any_row):9.2f}"
                f"{MOST[shape]:9.1f}{code.registers:9}{code.stack_bytes + code.spills:9}"
                f"{code.launches:9}  {'missed: ' + ', '.join(wrong) if wrong else 'met'}"
            )
    return rows
