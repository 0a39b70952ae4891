"""What calls should take on GPUs that nobody here has: `python -m bench.predict`.

Bytes, instructions, loads in flight and launches of the compiled code, divided by what the makers
publish. A call takes its launches and the slowest of four limits. Nothing here was measured on a
GPU: `make gpu` is what will contradict it.
"""

import argparse
import pathlib
from typing import Any, NamedTuple

import torch
import triton

from bench import codegen, inductor_code, numbering_code
from bench.codegen import Configuration
from bench.numbering_code import CYCLES, Numbering
from neftune_kernels import triton_kernels

LAUNCH = 3.1e-6  # seconds from one kernel's end to the next one's first row: a launch and one load
LATENCY = 0.6e-6  # of a load from the device's memory
LOAD = 16  # bytes
REGISTERS = 65536  # of 32 bits, of one processor; AMD has more
FLOAT64 = ("DADD", "DMUL", "DFMA", "DSETP")


class GPU(NamedTuple):
    """As published: NVIDIA's and AMD's data sheets and white papers, CUDA's programming guide
    (arithmetic throughput), the CDNA3 instruction set's guide.
    """

    name: str
    target: str
    processors: int
    clock: float  # Hz, boost
    issued: float  # instructions of a warp, or of a wave of 64, per cycle and processor
    float64: float  # lanes per cycle and processor
    bandwidth: float  # bytes per second
    threads: int  # resident, of one processor
    programs: int  # resident, of one processor


GPUS = [
    GPU("A100", "sm_80", 108, 1.41e9, 4, 32, 2.039e12, 2048, 32),
    GPU("H100", "sm_90", 132, 1.98e9, 4, 64, 3.35e12, 2048, 32),
    GPU("H200", "sm_90", 132, 1.98e9, 4, 64, 4.8e12, 2048, 32),
    GPU("B200", "sm_100", 148, 1.965e9, 4, 64, 8.0e12, 2048, 32),
    GPU("RTX 4090", "sm_89", 128, 2.52e9, 4, 2, 1.008e12, 1536, 24),
    GPU("MI300X", "gfx942", 304, 2.1e9, 1, 64, 5.3e12, 2048, 32),
]


class Work(NamedTuple):
    """Of one call, all of its launches together; 0 where it is not known."""

    launches: int
    bytes: float  # moved between the device's memory and the processors
    instructions: float = 0.0  # of all warps
    float64: float = 0.0  # likewise, those of double precision
    chain: float = 0.0  # instructions of the longest program
    reading: int = 0  # threads of a program
    in_flight: int = 0  # loads of a thread
    registers: int = 0
    lanes: int = 32
    earlier: float = 0.0  # instructions of the longest programs of the launches before the last


class Predicted(NamedTuple):
    seconds: float
    limit: str  # what binds beside the launches

    def __str__(self) -> str:
        return f"{1e6 * self.seconds:.1f} {self.limit}"


LIMITS = {
    "b": "bytes over bandwidth",
    "i": "instructions over issue rate",
    "d": "float64 instructions over their rate",
    "f": "bytes read over loads in flight and their latency",
    "c": "the longest program's chain",
}


def predict(work: Work, gpu: GPU) -> Predicted:
    cycles = gpu.processors * gpu.clock
    seconds = {
        "b": work.bytes / gpu.bandwidth,
        "i": work.instructions / (gpu.issued * cycles),
        "d": work.float64 * work.lanes / (gpu.float64 * cycles),
        "f": 0.0,
        "c": work.chain * CYCLES / gpu.clock,
    }
    if work.in_flight:
        by_registers = REGISTERS // (work.registers * work.reading)
        programs = min(gpu.programs, gpu.threads // work.reading, by_registers)
        flying = gpu.processors * programs * work.reading * work.in_flight * LOAD
        seconds["f"] = work.bytes / 2 * LATENCY / flying
    limit = max(seconds, key=lambda name: seconds[name])
    before = work.launches * LAUNCH + work.earlier * CYCLES / gpu.clock
    return Predicted(before + seconds[limit], limit)


def of_ours(gpu: GPU, tokens: int, d: int, layout: str, dtype: str = "bfloat16") -> Work:
    lanes = codegen.TARGETS[gpu.target].warp_size
    shares = triton_kernels.row_shares(tokens, d, lanes)
    is_tiled = shares == 1 and triton_kernels.has_tiles(1, tokens, d)
    configuration = Configuration(gpu.target, dtype, d, layout, shares=shares, is_tiled=is_tiled)
    if layout == "capturable":
        configuration = configuration._replace(layout="nothing", capturable=True)
    code = codegen.measure(configuration)
    elements = codegen.launch_description(configuration)["elements_per_program"]
    threads = round(elements / code.elements_per_thread)
    warps = tokens * d / elements * threads / lanes
    doubles = sum(code.opcodes[name] for name in FLOAT64)
    size = codegen.DTYPES[dtype].itemsize
    return Work(
        launches=1,
        bytes=2 * size * tokens * d,
        instructions=code.instructions * warps,
        float64=doubles * warps,
        chain=code.instructions,
        reading=threads,
        in_flight=codegen.loads_in_flight(configuration),
        registers=code.registers,
        lanes=lanes,
    )


def of_masked(gpu: GPU, batch: int, length: int, d: int, is_plain: bool) -> Work:
    """With an int64 mask, whose rows are one run each (is_plain) or hold several documents: its
    numbering's launches and the row kernel.
    """
    numbering = Numbering(gpu.target, "int64 mask", (batch, length))
    code = numbering_code.measure(numbering, codegen.TARGETS[gpu.target])
    every = sum(code.opcodes.values())  # where no ways are known: AMD's
    longest = (code.shortest if is_plain else code.longest) or every
    row = of_ours(gpu, batch * length, d, "numbering")
    # The mask is read, and per token a word of the record written and read.
    moved = (8 if is_plain else 16) * batch * length
    return row._replace(
        launches=row.launches + code.launches, bytes=row.bytes + moved, earlier=longest
    )


def of_rival(rival: dict[str, Any], tokens: int, d: int) -> Work:
    """instructions_per_element are those of a thread: sm_90's, taken for every target."""
    elements = tokens * d
    return Work(
        launches=rival["launches"],
        bytes=rival["bytes_per_element"] * elements,
        instructions=rival["instructions_per_element"] * elements / 32,
    )


# ATen's own kernels: what each moves, in elements. Their instructions are not counted.
EAGER = {
    "F.embedding": [2],
    "HF hook": [2, 1, 1, 3],  # the lookup, zeros_like, uniform_, the sum
}


def of_eager(name: str, tokens: int, d: int) -> Work:
    moved = EAGER[name]
    return Work(len(moved), 2.0 * sum(moved) * tokens * d)


SHAPES = [(1, 8, 4096), (1, 512, 4096), (8, 512, 4096), (8, 4096, 4096), (4, 2048, 576)]
LAYOUTS = ("nothing", "capturable", "lengths", "cu_seqlens")


def table(gpu: GPU, rivals: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    columns: dict[str, list[str]] = {}
    for batch, length, d in SHAPES:
        tokens = batch * length
        works = {"copy, 1 launch": Work(1, 4.0 * tokens * d)}
        works |= {name: of_eager(name, tokens, d) for name in EAGER}
        works |= {f"ours, {layout}": of_ours(gpu, tokens, d, layout) for layout in LAYOUTS}
        works |= {
            f"ours, mask, {name}": of_masked(gpu, batch, length, d, is_plain)
            for name, is_plain in (("padded", True), ("documents", False))
        }
        works |= {rival["name"]: of_rival(rival, tokens, d) for rival in rivals}
        for name, work in works.items():
            columns.setdefault(name, []).append(str(predict(work, gpu)))
    return list(columns.items())


def starts_table(starts: list[dict[str, Any]]) -> list[str]:
    """From the ids to the first matmul, under torch.compile."""
    gpu = next(one for one in GPUS if one.name == "H100")
    tokens, rows = inductor_code.BATCH * inductor_code.LENGTH, []
    for start in starts:
        d, work = start["d"], of_rival(start, tokens, start["d"])
        if start["ours"]:
            row = of_ours(gpu, tokens, d, "nothing")
            work = work._replace(
                bytes=work.bytes + row.bytes, instructions=work.instructions + row.instructions
            )
        per_element = 32 * work.instructions / (tokens * d)
        beside = f" + {' and '.join(start['uncounted'])}" if start["uncounted"] else ""
        rows.append(
            f"| {start['name']} | {work.launches} | {work.bytes / (tokens * d):g} "
            f"| {per_element:.1f}{beside} | {predict(work, gpu)} |"
        )
    return rows


def report() -> str:
    rivals, starts = inductor_code.rivals(), inductor_code.starts()
    lines = [
        "# Predicted GPU times",
        "",
        "No GPU has run this: bytes, instructions, loads in flight and launches of the compiled",
        "code, over published rates. Microseconds of one forward in bfloat16; the letter is the",
        f"limit that binds beside {1e6 * LAUNCH:g} us a launch: "
        + "; ".join(f"{letter} {what}" for letter, what in LIMITS.items())
        + ".",
        "ATen's kernels and copies count their bytes alone; caches count nothing, so small tensors",
        "that stay in L2 are faster than said. compiled: torch.compile's code for sm_90. mask: an",
        "int64 one, numbered by one launch more, in rows that are one run or hold documents.",
    ]
    names = " | ".join(map(str, SHAPES))
    for gpu in GPUS:
        lines += ["", f"## {gpu.name} ({gpu.target})", "", f"| | {names} |"]
        lines += ["|---|" + "---:|" * len(SHAPES)]
        lines += [f"| {name} | {' | '.join(row)} |" for name, row in table(gpu, rivals)]
    lines += [
        "",
        "## From the ids to the first matmul, under torch.compile",
        "",
        f"({inductor_code.BATCH}, {inductor_code.LENGTH}) tokens in bfloat16 on an H100: lookup,",
        "noise and the first norm. Bytes and instructions per element of the embeddings.",
        "",
        "| | launches | bytes | instructions | us |",
        "|---|---:|---:|---:|---:|",
        *starts_table(starts),
        "",
        f"torch {torch.__version__}, triton {triton.__version__}; written by "
        "`python -m bench.predict`.",
    ]
    return "\n".join(lines) + "\n"


RESULT = pathlib.Path(__file__).parent / "results" / "predict.md"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    text = report()
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
