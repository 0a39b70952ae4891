"""What the compilers make of the kernels that number documents, for bench.codegen: instructions on
the longest and the shortest way through a program, against limits in microseconds.

Time is what the model says: a warp issues an instruction every 4 cycles at 1.98 GHz, launch and
loads beside. The shortest way is a row that is one run of real tokens; the longest takes every
branch, and every loop once.
"""

import functools
import re
from collections import Counter
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.cuda_code import Function, jump
from bench.disassembly import resources, sass
from neftune_kernels import triton_kernels, triton_numbering

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
CYCLES, GIGAHERTZ = 4, 1.98


class Given(NamedTuple):
    """What a call gives, as the kernels' signature has it."""

    mask: str | None = None
    position_ids: str | None = None
    is_padded: bool = False

    @property
    def is_numbered(self) -> bool:
        return self.mask not in (None, "u8") and not self.is_padded


GIVEN = {
    "bool mask": Given("u8"),
    "padding_idx": Given("i64", None, True),
    "int64 mask": Given("i64"),
    "float32 mask": Given("fp32"),
    "position_ids": Given(None, "i64"),
    "int64 mask, position_ids": Given("i64", "i64"),
}
SHAPES = ((8, 512), (8, 4096), (1, 65536))


class Numbering(NamedTuple):
    target: str
    given: str
    shape: tuple[int, int]


def kernels_of(configuration: Numbering) -> list[Any]:
    """In the order of their launches."""
    if configuration.shape[1] <= triton_kernels.ROW_BLOCKS[-1]:
        return [triton_numbering.number_rows]
    return [triton_numbering.summarise_pieces, triton_numbering.number_pieces]


@functools.cache
def compiled(kernel: Any, configuration: Numbering) -> Any:
    """As the launcher compiles it: a row's values side by side."""
    given, target = GIVEN[configuration.given], TARGETS[configuration.target]
    block = triton_kernels.numbering_block(configuration.shape[1])
    each, num_warps = triton_kernels.numbering_shape(block, target.warp_size)
    constants = {
        "PADDED": given.is_padded,
        "NUMBERED": given.is_numbered,
        "DENSE": True,
        "BLOCK": block,
        "EACH": each,
        "DEBUG": False,
        "LANES": triton_kernels.PIECES_AT_ONCE,
    }
    types = {
        "numbering": "*i32",
        "summary": "*i32",
        "mask": given.mask and f"*{given.mask}",
        "position_ids": given.position_ids and f"*{given.position_ids}",
    }
    signature, values = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        signature[name] = types.get(name) or parameter.annotation_type or "constexpr"
        if parameter.is_constexpr or name in types and types[name] is None:
            signature[name], values[name] = "constexpr", constants.get(name)
    options = triton_kernels.compile_options(target.backend, triton_kernels.NUMBERING_REGISTERS)
    return triton.compile(
        ASTSource(kernel, signature, values),
        target=target,
        options={"num_warps": num_warps, **options},
    )


def function_of(text: str) -> Function:
    """nvdisasm's text of one kernel."""
    lines: list[str] = []
    labels = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            lines.append(re.sub(r"/\*.*?\*/", "", line).strip(" ;\t"))
    return Function("", lines, labels)


def ways(code: Function) -> tuple[int, int]:
    """Instructions of the shortest and the longest way to an EXIT; loops are gone through once."""
    count = len(code.lines)
    shortest, longest = [count] * (count + 1), [0] * (count + 1)
    shortest[0] = 0
    ends = []
    for i, line in enumerate(code.lines):
        if shortest[i] == count:
            continue  # out of reach
        following = []
        conditional = line.startswith("@")
        target = jump(line, code.labels)
        if re.search(r"\bEXIT\b", line):
            ends.append((shortest[i] + 1, longest[i] + 1))
            following = [i + 1] if conditional else []
        elif target is not None:
            following = [*([target] if target > i else []), *([i + 1] if conditional else [])]
        else:
            following = [i + 1]
        for then in following:
            shortest[then] = min(shortest[then], shortest[i] + 1)
            longest[then] = max(longest[then], longest[i] + 1)
    return min(end[0] for end in ends), max(end[1] for end in ends)


if __name__ == "__main__":
    import sys

    for target in sys.argv[1:] or ("sm_90",):
        for shape in SHAPES:
            for given in GIVEN:
                c = Numbering(target, given, shape)
                tot = [0, 0]
                for k in kernels_of(c):
                    kernel = compiled(k, c)
                    if TARGETS[target].backend == "hip":
                        text = kernel.asm["amdgcn"]
                        print(
                            target,
                            shape,
                            given,
                            k.__name__,
                            {
                                n: int(re.search(rf"\.{n}:\s+(\d+)", text)[1])
                                for n in (
                                    "vgpr_count",
                                    "private_segment_fixed_size",
                                    "vgpr_spill_count",
                                    "sgpr_spill_count",
                                )
                            },
                            flush=True,
                        )
                        continue
                    s, l = ways(function_of(sass(kernel.asm["cubin"])))
                    tot[0] += s
                    tot[1] += l
                    r = resources(kernel.asm["cubin"])
                    print(
                        target,
                        shape,
                        given,
                        k.__name__,
                        s,
                        l,
                        f"{s * 4 / 1980:.2f} {l * 4 / 1980:.2f}",
                        r.registers,
                        r.stack_bytes,
                        kernel.metadata.shared,
                        kernel.metadata.num_warps,
                        flush=True,
                    )
                if len(kernels_of(c)) > 1:
                    print("   sum", tot, f"{tot[0] * 4 / 1980:.2f} {tot[1] * 4 / 1980:.2f}")
