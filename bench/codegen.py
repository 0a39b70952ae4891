"""What the compilers make of the Triton and CUDA C++ kernels, without a GPU: `python -m
bench.codegen [--out DIR]`.

Every configuration is compiled for its target by Triton or nvcc and disassembled by the tools
inside the triton wheel; instructions per element, memory accesses and registers stand beside the
targets. The same functions serve tests/test_codegen.py.
"""

import argparse
import functools
import json
import pathlib
import re
from collections import Counter
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import cuda_code, gradient_code, inductor_code, numbering_code
from bench.disassembly import opcode, parsed, resources, sass
from neftune_kernels import triton_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
NVIDIA = ("sm_80", "sm_90", "sm_100")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRITON_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
LAYOUT_POINTERS = {  # which of noisy_rows' layout pointers are given
    "nothing": (),
    "lengths": ("lengths",),
    "mask": ("document", "position", "lengths"),
    "cu_seqlens": ("cu_seqlens",),
    "numbering": ("numbering",),
}
LAYOUT_TENSORS = ("document", "position", "lengths", "cu_seqlens", "numbering")
POINTERS = ("out", "source", "input_ids", "seed", "noise_alpha", *LAYOUT_TENSORS)
CONSTEXPRS = ("D", "ROW_STRIDE", "BLOCKS", "PIECES", "SHARES", "TOKENS", "KIND", "SCALED", "DEBUG")
GRID = (
    "(columns, min(rows, 65535), ceil(rows / 65535)) for rows·columns = tokens; "
    "one program per token, all of its d columns"
)


class Configuration(NamedTuple):
    target: str
    dtype: str
    embedding_dim: int
    layout: str = "nothing"
    scaled: bool = False
    backend: str = "triton"
    capturable: bool = False  # the kernel reads alpha
    shares: int = 1  # programs of a token
    is_tiled: bool = False  # a program has several tokens

    @property
    def name(self) -> str:
        prefix = "" if self.backend == "triton" else f"{self.backend}-"
        what = f"{self.dtype}-d{self.embedding_dim}-{self.layout}"
        what += f"-{self.shares}_shares" if self.shares > 1 else ""
        what += "-tiled" if self.is_tiled else ""
        what += ("-scaled" if self.scaled else "") + ("-capturable" if self.capturable else "")
        return f"{prefix}{self.target}-{what}"


class Code(NamedTuple):
    """Counts of one compiled configuration; instructions are those of Triton's straight line up to
    EXIT, or of the way cuda_code counts.
    """

    instructions: float
    elements_per_thread: float
    registers: int
    opcodes: Counter[str]
    stack_bytes: int
    shared_bytes: int

    @property
    def per_element(self) -> float:
        return self.instructions / self.elements_per_thread


def launch_description(configuration: Configuration) -> dict[str, Any]:
    """The parameters of noisy_rows in order, with their types and the values of constexprs, as the
    launcher would choose them.
    """
    target = TARGETS[configuration.target]
    d = configuration.embedding_dim
    num_warps, values = triton_kernels.row_constants(
        DTYPES[configuration.dtype],
        d,
        d,
        1,
        True,
        configuration.scaled,
        target.warp_size,
        configuration.shares,
        configuration.is_tiled,
    )
    constants = dict(zip(CONSTEXPRS, values, strict=True))
    given = ("out", "source", "input_ids", "seed", *LAYOUT_POINTERS[configuration.layout])
    given += ("noise_alpha",) * configuration.capturable
    parameters = []
    for parameter in triton_kernels.noisy_rows.params:
        name = parameter.name
        if name in constants:
            parameters.append({"name": name, "type": "constexpr", "value": constants[name]})
        elif name in POINTERS and name not in given:
            parameters.append({"name": name, "type": "constexpr", "value": None})
        elif name in POINTERS:
            kind = TRITON_TYPES[configuration.dtype] if name in ("out", "source") else "i64"
            kind = {"numbering": "i32", "noise_alpha": "fp64"}.get(name, kind)
            parameters.append({"name": name, "type": f"*{kind}"})
        else:
            parameters.append({"name": name, "type": parameter.annotation_type})
    return {
        "target": configuration.target,
        "dtype": configuration.dtype,
        "d": d,
        "layout": configuration.layout,
        "scaled": configuration.scaled,
        "num_warps": num_warps,
        "elements_per_program": d * constants["TOKENS"] // configuration.shares,
        "grid": GRID,
        "parameters": parameters,
        "triton": triton.__version__,
    }


@functools.cache
def compile_rows(configuration: Configuration, **changed: bool) -> Any:
    """Triton's CompiledKernel of noisy_rows, with the launcher's own options; `changed` ones only
    to show what they would do.
    """
    description = launch_description(configuration)
    signature = {parameter["name"]: parameter["type"] for parameter in description["parameters"]}
    constants = {
        parameter["name"]: parameter["value"]
        for parameter in description["parameters"]
        if parameter["type"] == "constexpr"
    }
    aligned = {(POINTERS.index(name),): [["tt.divisibility", 16]] for name in ("out", "source")}
    target = TARGETS[configuration.target]
    options = {
        "num_warps": description["num_warps"],
        **triton_kernels.compile_options(target.backend),
        **changed,
    }
    return triton.compile(
        ASTSource(triton_kernels.noisy_rows, signature, constants, aligned),
        target=target,
        options=options,
    )


@functools.cache
def disassembly(configuration: Configuration) -> str:
    """SASS for NVIDIA, GCN assembly for AMD."""
    kernel = compile_rows(configuration)
    if TARGETS[configuration.target].backend == "hip":
        return str(kernel.asm["amdgcn"])
    return sass(kernel.asm["cubin"])


def instruction_lines(configuration: Configuration) -> list[str]:
    """One text per instruction up to the end of the program."""
    text = disassembly(configuration)
    if TARGETS[configuration.target].backend == "cuda":
        return parsed("noisy_rows", text).lines
    body = text[text.index("noisy_rows:") :].splitlines()
    lines = [line.split(";")[0].strip() for line in body if re.match(r"\t[a-z]", line)]
    return lines[: max(i for i, line in enumerate(lines) if line.startswith("s_endpgm")) + 1]


def cuda_threads(configuration: Configuration) -> int:
    """Of a token, as kernels.cu chooses them."""
    narrow = 4 if configuration.embedding_dim <= 1024 else 2
    parts = narrow if configuration.is_tiled else 1
    return cuda_code.LANES * configuration.shares // parts


@functools.cache
def measure(configuration: Configuration) -> Code:
    if configuration.backend == "cuda":
        threads = cuda_threads(configuration)
        instructions, used_registers, stack_bytes, shared_bytes, found = cuda_code.measure(
            *configuration[:5], threads
        )
        return Code(
            instructions,
            configuration.embedding_dim / threads,
            used_registers,
            found,
            stack_bytes,
            shared_bytes,
        )
    lines = instruction_lines(configuration)
    opcodes = Counter(map(opcode, lines))
    kernel, target = compile_rows(configuration), TARGETS[configuration.target]
    threads = kernel.metadata.num_warps * target.warp_size
    if target.backend == "hip":
        text = disassembly(configuration)
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
        stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])  # type: ignore[index]
        instructions = sum(count for name, count in opcodes.items() if name.startswith("v_"))
    else:
        registers, stack = resources(kernel.asm["cubin"])
        instructions = len(lines)
    return Code(
        instructions,
        launch_description(configuration)["elements_per_program"] / threads,
        registers,
        opcodes,
        stack,
        kernel.metadata.shared,
    )


FIGURES_OF = "3.9"  # the triton whose code the targets are set for


class Target(NamedTuple):
    per_element: float
    stretch: float | None


def target_of(configuration: Configuration) -> Target:
    """The most instructions per element that this project allows itself."""
    target, dtype, d, layout, scaled, backend, capturable, shares, is_tiled = configuration
    if shares > 1:  # latency counts there
        return Target(60.0, None)
    if is_tiled and backend == "cuda":
        return Target(17.0 if d == 576 else 15.6, 14.0)
    if is_tiled and target in NVIDIA:
        return Target(12.5 if layout in ("nothing", "lengths", "cu_seqlens") else 16.0, 11.0)
    if backend == "cuda" and not scaled:
        if layout == "nothing":
            return Target(11.0, None) if dtype == "float32" else Target(12.0, 11.0)
        return Target(13.0 if layout in ("cu_seqlens", "numbering") else 12.5, 12.0)
    if backend == "cuda":
        return Target(16.0, 14.0)
    if target == "gfx942":
        return Target(16.0, None)
    if target == "gfx950":
        return Target(11.0, None)
    if d == 576:  # 2.25 pieces, of which each row has 3; long calls are tiled
        return Target(21.1, 17.0)
    if d == 768:
        return Target(15.6, 14.0)
    if d < 2048:
        return Target(17.5, 14.0)
    if d != 4096:
        return Target(14.0, 12.5)
    if scaled:
        return Target(15.5, 14.0)
    if dtype == "float32":
        return Target(11.0, 10.0)
    known = layout == "nothing" and not capturable  # the one step of all rows
    return Target(11.5, 10.5) if known else Target(12.5, 11.0)


REGISTER_TARGET = Target(64, 40)
FORBIDDEN = re.compile(
    r"^(LDS|STS|LDL|STL|SHFL|BAR|ATOM|RED)\b|^(ds_|scratch_|buffer_.*lds|s_barrier)"
)

LANES = re.compile(r"^(SHFL|ds_bpermute)")


def row_accesses(configuration: Configuration) -> tuple[int, int]:
    """(128-bit, narrower) accesses of rows; scalars (ids, seed, lengths, bounds) are of no weight
    and not counted.
    """
    opcodes = measure(configuration).opcodes
    if TARGETS[configuration.target].backend == "hip":
        wide = sum(
            n
            for name, n in opcodes.items()
            if re.match(r"(global|flat|buffer)_(load|store)_dwordx4", name)
        )
        narrow = sum(
            n
            for name, n in opcodes.items()
            if re.match(r"(global|flat|buffer)_store_(?!dwordx4)", name)
        )
        return wide, narrow
    wide = sum(
        n for name, n in opcodes.items() if name.startswith(("LDG", "STG")) and "128" in name
    )
    return wide, sum(
        n for name, n in opcodes.items() if name.startswith("STG") and "128" not in name
    )


ROW_LOAD = re.compile(r"LDG\S*\.128|(global|flat|buffer)_load_dwordx4")
ROW_STORE = re.compile(r"STG\S*\.128|(global|flat|buffer)_store_dwordx4")


def loads_in_flight(configuration: Configuration) -> int:
    """The most 16-byte loads of a thread that no store of its row waits behind: the compiler keeps
    them in the order that the kernel has them in.
    """
    if configuration.backend == "cuda":
        lines = cuda_code.lines_of(*configuration[:2], *configuration[3:5])
    else:
        lines = instruction_lines(configuration)
    most = loads = stores = 0
    for name in map(opcode, lines):
        loads += ROW_LOAD.match(name) is not None
        stores += ROW_STORE.match(name) is not None
        most = max(most, loads - stores)
    return most


def forbidden(configuration: Configuration) -> dict[str, int]:
    """Spills, local and shared memory, shuffles and barriers; a tile may vote, and hand its tokens'
    bounds round.
    """
    return {
        name: count
        for name, count in measure(configuration).opcodes.items()
        if FORBIDDEN.match(name) and not (configuration.is_tiled and LANES.match(name))
    }


CONFIGURATIONS = [
    *(
        Configuration(t, dtype, 4096, layout)
        for t in NVIDIA
        for dtype in ("bfloat16", "float16")
        for layout in LAYOUT_POINTERS
    ),
    *(
        Configuration(t, dtype, 4096, scaled=True)
        for t in NVIDIA
        for dtype in ("bfloat16", "float16")
    ),
    *(Configuration(t, "float32", 4096) for t in NVIDIA),
    *(
        Configuration("sm_90", "bfloat16", d, "lengths")
        for d in (576, 768, 896, 1024, 1536, 2048, 3072, 5120, 8192)
    ),
    *(
        Configuration("sm_90", "bfloat16", d, "lengths", is_tiled=True)
        for d in (576, 768, 896, 1024, 1536, 2048)
    ),
    *(
        Configuration(t, dtype, 576, layout, is_tiled=True)
        for t in NVIDIA
        for dtype in ("bfloat16", "float32")
        for layout in LAYOUT_POINTERS
        if (t, dtype, layout) != ("sm_90", "bfloat16", "lengths")
    ),
    Configuration("sm_90", "float16", 576, "lengths", is_tiled=True),
    Configuration("sm_90", "bfloat16", 768, capturable=True, is_tiled=True),
    *(Configuration(t, "bfloat16", 576, "lengths", is_tiled=True) for t in ("gfx942", "gfx950")),
    *(
        Configuration(t, "bfloat16", 4096, layout, shares=shares)
        for t in NVIDIA
        for layout in ("nothing", "lengths")
        for shares in (4, 16)
    ),
    *(Configuration(t, "bfloat16", 4096) for t in ("gfx942", "gfx950")),
    *(Configuration(t, "bfloat16", 4096, capturable=True) for t in (*NVIDIA, "gfx942", "gfx950")),
    Configuration("sm_90", "bfloat16", 4096, "lengths", capturable=True),
    Configuration("sm_90", "bfloat16", 768, capturable=True),
]
CUDA_CONFIGURATIONS = [
    *(
        Configuration(t, dtype, 4096, layout, False, "cuda")
        for t in NVIDIA
        for dtype in DTYPES
        for layout in LAYOUT_POINTERS
    ),
    *(
        Configuration(t, dtype, d, "lengths", False, "cuda", is_tiled=True)
        for t in NVIDIA
        for dtype in DTYPES
        for d in (576, 768, 2048)
    ),
    *(Configuration(t, "bfloat16", 4096, "lengths", False, "cuda", shares=4) for t in NVIDIA),
    *(Configuration(t, dtype, 4096, "nothing", True, "cuda") for t in NVIDIA for dtype in DTYPES),
]


def row(configuration: Configuration) -> dict[str, Any]:
    code, target = measure(configuration), target_of(configuration)
    wide, narrow = row_accesses(configuration)
    met = code.per_element <= target.per_element
    if TARGETS[configuration.target].backend == "cuda":
        met = (
            met
            and code.registers <= REGISTER_TARGET.per_element
            and not narrow
            and not forbidden(configuration)
        )
    return {
        **configuration._asdict(),
        "per_element": round(code.per_element, 2),
        "target": target.per_element,
        "stretch": target.stretch,
        "met": met and code.stack_bytes == 0 and code.shared_bytes == 0,
        "registers": code.registers,
        "elements_per_thread": code.elements_per_thread,
        "accesses_128_bit": wide,
        "loads_in_flight": loads_in_flight(configuration),
        "narrower_stores": narrow,
        "stack_bytes": code.stack_bytes,
        "shared_bytes": code.shared_bytes,
        "forbidden": forbidden(configuration),
        "kernels": 1,
        "bytes_per_element": 2 * DTYPES[configuration.dtype].itemsize,
    }


def numbering_instructions(target: str, embedding_dim: int = 4096, backend: str = "triton") -> int:
    """How many more the row kernel has where documents are numbered than with lengths."""
    numbering, lengths = (
        measure(
            Configuration(target, "bfloat16", embedding_dim, layout, False, backend)
        ).instructions
        for layout in ("numbering", "lengths")
    )
    return int(numbering - lengths)


def write_artefacts(configuration: Configuration, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if configuration.backend == "cuda":
        cuda_code.write_artefacts(*configuration[:5], folder)
        return
    kernel = compile_rows(configuration)
    (folder / "launch.json").write_text(
        json.dumps(launch_description(configuration), indent=1) + "\n"
    )
    if TARGETS[configuration.target].backend == "hip":
        (folder / "kernel.hsaco").write_bytes(kernel.asm["hsaco"])
        (folder / "kernel.amdgcn").write_text(disassembly(configuration))
    else:
        (folder / "kernel.ptx").write_text(kernel.asm["ptx"])
        (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
        (folder / "kernel.sass").write_text(disassembly(configuration))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder for report.json and each configuration's code"
    )
    arguments = parser.parse_args()
    try:
        configurations, nvcc = [*CONFIGURATIONS, *CUDA_CONFIGURATIONS], cuda_code.nvcc_version()
    except RuntimeError as error:
        configurations, nvcc = (
            CONFIGURATIONS,
            f"none, so the CUDA C++ kernels are left out: {error}",
        )
    print(
        f"triton {triton.__version__}, nvcc {nvcc}; product and sum separate; instructions per "
        f"element up to EXIT\n"
    )
    titles = ("/element", "at most", "stretch", "regs", "128-bit", "  in flight")
    print(
        f"{'':7}{'target':8}{'dtype':10}{'d':>6}  {'layout':18}{'scale':6}"
        + "".join(f"{title:>9}" for title in titles)
        + "  verdict"
    )
    rows = []
    for configuration in configurations:
        found = row(configuration)
        rows.append(found)
        stretch = found["stretch"]
        verdict = (
            "missed"
            if not found["met"]
            else "stretch"
            if stretch is not None and found["per_element"] <= stretch
            else "met"
        )
        layout = "capturable" if configuration.capturable else configuration.layout
        layout += ", tiled" if configuration.is_tiled else ""
        print(
            f"{configuration.backend:7}{configuration.target:8}{configuration.dtype:10}"
            f"{configuration.embedding_dim:6}  {layout:18}"
            f"{'yes' if configuration.scaled else '':6}"
            f"{found['per_element']:9.2f}{found['target']:9}"
            f"{stretch if stretch is not None else '-':>9}"
            f"{found['registers']:9}{found['accesses_128_bit']:9}{found['loads_in_flight']:11}"
            f"  {verdict}"
            + (
                f" {found['forbidden']} stack {found['stack_bytes']} shared {found['shared_bytes']}"
                if verdict == "missed"
                else ""
            )
        )
        if arguments.out:
            write_artefacts(configuration, arguments.out / configuration.name)
    missed = sum(not found["met"] for found in rows)
    print(
        f"\n{len(rows) - missed} of {len(rows)} targets met, {missed} missed; each is one launch "
        f"and reads and writes every row once\n"
    )
    numbering = numbering_code.report(TARGETS)
    backends: tuple[str, ...] = ("triton",)
    if len(configurations) > len(CONFIGURATIONS):
        numbering += numbering_code.cuda_report(NVIDIA)
        backends = ("triton", "cuda")
    reading = {f"{b} {t}": numbering_instructions(t, 4096, b) for b in backends for t in NVIDIA}
    print(
        f"The row kernel has so many instructions more than with lengths: {reading}, at most "
        f"{numbering_code.READING}\n"
    )
    nvidia = {name: TARGETS[name] for name in NVIDIA}
    gradients = gradient_code.report(nvidia, with_cuda="cuda" in backends)
    rivals = inductor_code.rivals()
    print(
        f"\nWhat torch.compile (torch {torch.__version__}) makes of the same on sm_90, bfloat16, d "
        f"= {inductor_code.D}"
    )
    inductor_code.print_rows(rivals)
    if arguments.out:
        report = {
            "triton": triton.__version__,
            "torch": torch.__version__,
            "rows": rows,
            "numbering": numbering,
            "reading": reading,
            "gradients": gradients,
            "rivals": rivals,
        }
        (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
