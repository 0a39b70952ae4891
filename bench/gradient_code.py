"""What Triton and nvcc make of the kernels of the weight's gradient, and what they and others move,
for bench.codegen.

Instructions are those of the longest way: every token ends a run whose row is written, so that no
branch is left out. Bytes are a model: what an algorithm reads and writes once each, in no cache;
that of the others by what their sources do. Nothing of it was timed.
"""

import functools
import re
from collections import Counter
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import cuda_code
from bench.disassembly import Function, loops, opcode, parsed, resources, sass
from bench.gradient import CASES, Case, make_ids
from bench.numbering_code import amd_figure, ways
from neftune_kernels import triton_gradients, triton_kernels
from neftune_kernels.reference import SUM_CHUNK

PER_ELEMENT = 13.0  # instructions for each element of the output's gradient
BY_FREQ = 35.0  # the same where every sum is divided, correctly rounded
REGISTERS = 72
TIMES_FLOOR = 1.3  # bytes
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Configuration(NamedTuple):
    target: str
    dtype: str
    embedding_dim: int = 4096
    scaled: bool = False
    by_freq: bool = False
    backend: str = "triton"  # "cuda": the scale is always a product, and d no constant

    @property
    def name(self) -> str:
        prefix = "" if self.backend == "triton" else f"{self.backend}-"
        what = f"{prefix}{self.target}-{self.dtype}-d{self.embedding_dim}"
        return what + "-scaled" * self.scaled + "-by_freq" * self.by_freq


class Code(NamedTuple):
    """Of the kernel that adds rows up; registers, memory and opcodes of both."""

    per_element: float
    registers: int
    stack_bytes: int
    shared_bytes: int
    wide: int  # 128-bit loads and stores
    opcodes: Counter[str]


KERNELS = {"sum_chunks": triton_gradients.sum_chunks, "carry_over": triton_gradients.carry_over}


@functools.cache
def compiled(kernel: str, configuration: Configuration, target: GPUTarget) -> Any:
    """As the launcher compiles it for rows that begin at 16 bytes."""
    dtype, d = configuration.dtype, configuration.embedding_dim
    element = f"*{TYPES[dtype]}"
    types = {"out": element, "grad": element, "scratch": "*fp32", "ids": "*i32", "order": "*i64"}
    kind = triton_kernels.row_kind(getattr(torch, dtype), d, d, 1, True)
    values = {
        "D": d,
        "CHUNK": SUM_CHUNK,
        "UNIT": SUM_CHUNK,
        "GROUP": SUM_CHUNK**2,
        "ALIGNED": kind != "columns",
        "PAIRS": kind == "pairs",
        "SCALED": configuration.scaled,
        "BY_FREQ": configuration.by_freq,
    }
    signature, constants, aligned = {}, {}, {}
    for place, parameter in enumerate(KERNELS[kernel].params):
        name = parameter.name
        signature[name] = types.get(name, parameter.annotation_type)
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", values[name]
        elif name in ("out", "grad", "scratch"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(KERNELS[kernel], signature, constants, aligned),
        target=target,
        options={"num_warps": 1, **triton_kernels.compile_options(target.backend)},
    )


ROW_LOADS = {"float32": 2, "bfloat16": 1, "float16": 1}  # of 16 bytes, by a thread


def row_loads(code: Function) -> list[int]:
    """Where sum_chunks asks for rows, whose sums it has in registers."""
    return [i for i, line in enumerate(code.lines) if re.match(r"LDG\S*128", opcode(line))]


def issued(code: Function, dtype: str) -> float:
    """Instructions of a chunk on the longest way."""
    longest = ways(code)[1]
    found = loops(code)
    if found:
        (loop,) = found
        first, trip = loop.first, longest - loop.first - 1
    else:  # Triton's jump back stands behind the last EXIT
        first = min(code.labels.values())
        trip = longest - first + 1
    return first + trip * SUM_CHUNK * ROW_LOADS[dtype] / len(row_loads(code))


@functools.cache
def function(kernel: str, configuration: Configuration, target: GPUTarget) -> Function:
    """Its machine code for an NVIDIA target."""
    if configuration.backend == "cuda":
        name, dtype, *_, by_freq, _ = configuration
        found = cuda_code.gradient_kernel(kernel, name, dtype, by_freq)
        return cuda_code.function(name, found, cuda_code.GRADIENTS)
    return parsed(kernel, sass(compiled(kernel, configuration, target).asm["cubin"]))


def used(kernel: str, configuration: Configuration, target: GPUTarget) -> tuple[int, int, int]:
    """Registers, bytes of the stack, bytes of shared memory."""
    if configuration.backend == "cuda":
        name = function(kernel, configuration, target).name
        found = cuda_code.usage(configuration.target, cuda_code.GRADIENTS)[name]
        return found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"]
    triton_kernel = compiled(kernel, configuration, target)
    shared = triton_kernel.metadata.shared
    if target.backend == "hip":
        text = triton_kernel.asm["amdgcn"]
        stack = amd_figure(text, "private_segment_fixed_size")
        return amd_figure(text, "vgpr_count"), stack, shared
    return *resources(triton_kernel.asm["cubin"]), shared


@functools.cache
def measure(configuration: Configuration, target: GPUTarget) -> Code:
    per_element, registers, stack, shared, wide = 0.0, 0, 0, 0, 0
    opcodes: Counter[str] = Counter()
    for name in KERNELS:
        own = used(name, configuration, target)
        registers, stack, shared = max(registers, own[0]), stack + own[1], max(shared, own[2])
        if target.backend == "hip":
            continue
        code = function(name, configuration, target)
        found = Counter(map(opcode, code.lines))
        opcodes.update(found)
        wide += sum(n for what, n in found.items() if what[:3] in ("LDG", "STG") and "128" in what)
        if name == "sum_chunks":
            elements = SUM_CHUNK * 2 * triton_gradients.HALF.value / target.warp_size
            per_element = issued(code, configuration.dtype) / elements
    return Code(per_element, registers, stack, shared, wide, opcodes)


# ---- bytes


class Counted(NamedTuple):
    """Of one case's ids, drawn as bench.gradient draws them."""

    occurring: int
    tens: int  # parts of ten tokens of an id
    parts: int  # sums that chunks leave behind, and groups of chunks
    read: int  # and how many are read again


def counted(ids: torch.Tensor) -> Counted:
    ordered = ids.sort().values
    occurring, counts = ordered.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    starts = ends - counts
    parts = read = 0
    for size in (SUM_CHUNK, SUM_CHUNK**2):
        units = (ends - 1) // size - starts // size + 1
        crossing = units[units > 1]
        parts += int(crossing.sum())
        read += int(crossing.sum())
    return Counted(occurring.numel(), int(((counts + 9) // 10).sum()), parts, read)


def moved(case: Case) -> dict[str, int]:
    """Bytes, by algorithm."""
    v, d, n, b = case.num_embeddings, case.embedding_dim, case.tokens, case.dtype.itemsize
    ids = make_ids(case, torch.Generator().manual_seed(0))
    found = counted(ids)
    rows, table, wide = n * d * b, v * d * b, 4 * d
    atomics = 2 * n * d  # elements read and written
    is_narrow = case.dtype != torch.float32
    sort = 4 * 2 * 12 * n  # four passes over int32 ids and int64 places
    return {
        "floor": 8 * n + rows + table,
        "ours": 28 * n
        + sort
        + 12 * n
        + rows
        + table
        + found.occurring * d * b
        + (found.parts + found.read) * wide,
        # EmbeddingBackwardKernel.cu: zeros, float32 sums of ten tokens each, and those added up
        "torch": 2 * sort + rows + table + 2 * found.tens * wide + found.occurring * d * b,
        # its decomposition: float32 zeros, atomic additions, and the table rounded
        "Inductor": 8 * n + rows + v * wide + 4 * atomics + (v * wide + table) * is_narrow,
        # ops/experimental/embedding.py: zeros and atomic additions in the weight's dtype
        "Liger": 8 * n + rows + table + atomics * b,
    }


# ---- limits

FORBIDDEN = ("LDS", "STS", "LDL", "STL", "BAR", "ATOM", "ATOMG", "RED", "SHFL")


def missed(configuration: Configuration, target: GPUTarget) -> list[str]:
    """Of the limits, in words."""
    code = measure(configuration, target)
    most = BY_FREQ if configuration.by_freq else PER_ELEMENT
    used = sorted({what.split(".")[0] for what in code.opcodes} & set(FORBIDDEN))
    wrong = {
        f"{code.per_element:.2f} instructions per element": code.per_element > most,
        f"{code.registers} registers": code.registers > REGISTERS,
        f"{code.stack_bytes} bytes of scratch": code.stack_bytes > 0,
        f"{code.shared_bytes} bytes of shared memory": code.shared_bytes > 0,
        f"{', '.join(used)}": bool(used),
        "no 128-bit accesses": target.backend == "cuda" and code.wide == 0,
    }
    return [what for what, is_wrong in wrong.items() if is_wrong]


def configurations(targets: tuple[str, ...]) -> list[Configuration]:
    return [
        *(Configuration(target, dtype) for target in targets for dtype in TYPES),
        *(Configuration(target, dtype, scaled=True) for target in targets for dtype in TYPES),
        *(Configuration("sm_90", dtype, by_freq=True) for dtype in TYPES),
        *(Configuration("sm_90", "bfloat16", d) for d in (576, 768, 1024, 2048)),
    ]


def cuda_configurations(targets: tuple[str, ...]) -> list[Configuration]:
    return [
        Configuration(target, dtype, by_freq=by_freq, backend="cuda")
        for by_freq in (False, True)
        for target in targets
        for dtype in TYPES
    ]


def report(targets: dict[str, GPUTarget], with_cuda: bool) -> dict[str, list[dict[str, Any]]]:
    """Two tables, printed; their rows."""
    print(
        "\nThe weight's gradient (deterministic_grad=True): instructions per element, longest way\n"
    )
    titles = ("/element", "at most", "regs", "128-bit", "stack", "shared")
    head = f"{'':7}{'target':8}{'dtype':10}{'d':>6}  {'':8}"
    print(head + "".join(f"{t:>9}" for t in titles))
    rows, chosen = [], configurations(tuple(targets))
    chosen += cuda_configurations(tuple(targets)) if with_cuda else []
    for configuration in chosen:
        target = targets[configuration.target]
        code, wrong = measure(configuration, target), missed(configuration, target)
        rows.append({**configuration._asdict(), **code._asdict(), "missed": wrong})
        how = "by_freq" if configuration.by_freq else "scaled" if configuration.scaled else ""
        most = BY_FREQ if configuration.by_freq else PER_ELEMENT
        print(
            f"{configuration.backend:7}{configuration.target:8}{configuration.dtype:10}"
            f"{configuration.embedding_dim:6}"
            f"  {how:8}{code.per_element:9.2f}{most:9}{code.registers:9}{code.wide:9}"
            f"{code.stack_bytes:9}{code.shared_bytes:9}"
            f"  {'missed: ' + ', '.join(wrong) if wrong else 'met'}"
        )
    print(
        f"\nBytes over the floor (the gradient read, (V, d) written), modelled from what each "
        f"algorithm reads and writes; at most {TIMES_FLOOR} of ours, in both languages\n"
    )
    print(f"{'':42}{'floor, MB':>10}" + "".join(f"{n:>10}" for n in list(moved(CASES[0]))[1:]))
    bytes_rows = []
    for case in CASES:
        found = moved(case)
        floor = found["floor"]
        bytes_rows.append({"case": case.name, **found})
        over = "".join(f"{found[name] / floor:10.2f}" for name in list(found)[1:])
        print(f"{case.name:42}{floor / 1e6:10.0f}{over}")
    return {"code": rows, "bytes": bytes_rows}
