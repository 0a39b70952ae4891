"""The compiled kernels of Triton and CUDA C++, without a GPU: targets, memory accesses, rounding.

The functions of bench.codegen.
"""

import importlib.util
import json
import math
import os
import re
import shutil
from collections import Counter

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip(
        "triton is not installed: what its compiler makes of the kernels is not checked",
        allow_module_level=True,
    )
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 turns the compiler off", allow_module_level=True)

import torch
import triton

from bench import (
    codegen,
    cuda_code,
    disassembly,
    gradient_code,
    inductor_code,
    numbering_code,
)
from bench.codegen import CONFIGURATIONS, CUDA_CONFIGURATIONS, Configuration
from neftune_kernels import triton_kernels

QUICK = {
    *(
        Configuration(target, "bfloat16", 4096, layout)
        for target in codegen.NVIDIA
        for layout in ("nothing", "lengths")
    ),
    *(Configuration("sm_90", "bfloat16", 4096, layout) for layout in ("mask", "cu_seqlens")),
    *(Configuration("sm_90", dtype, 4096) for dtype in ("float16", "float32")),
    Configuration("sm_80", "bfloat16", 4096, scaled=True),
    *(Configuration("sm_90", "bfloat16", d, "lengths") for d in (576, 768, 896, 1536, 2048)),
    *(Configuration("sm_90", "bfloat16", 4096, "lengths", shares=shares) for shares in (4, 16)),
    *(Configuration("sm_90", "bfloat16", d, "lengths", is_tiled=True) for d in (576, 2048)),
    Configuration("sm_90", "bfloat16", 576, "numbering", is_tiled=True),
    Configuration("gfx942", "bfloat16", 4096),
}


def needs_nvcc(configuration):
    if configuration.backend == "cuda":
        try:
            cuda_code.nvcc_version()
        except RuntimeError as error:
            if os.environ.get("NEFTUNE_REQUIRE_CUDA_BUILD") == "1":
                pytest.fail(f"NEFTUNE_REQUIRE_CUDA_BUILD=1, but {error}")
            pytest.skip(f"what nvcc makes of the CUDA kernels is not checked: {error}")


@pytest.mark.parametrize(
    "configuration",
    [
        *(
            pytest.param(c, id=c.name, marks=() if c in QUICK else pytest.mark.long)
            for c in CONFIGURATIONS
        ),
        *(pytest.param(c, id=c.name) for c in CUDA_CONFIGURATIONS),
    ],
)
def test_targets(configuration):
    """Instructions per element, registers, 128-bit rows, four loads of a row on their way, no
    spills, shared memory, shuffles or barriers. The number of instructions is that of one triton;
    the rest holds for all.
    """
    needs_nvcc(configuration)
    code = codegen.measure(configuration)
    if configuration.target in codegen.NVIDIA:
        assert code.registers <= codegen.REGISTER_TARGET.per_element
    wide, narrow = codegen.row_accesses(configuration)
    assert wide > 0 and narrow == 0
    assert code.stack_bytes == code.shared_bytes == 0 and not codegen.forbidden(configuration)
    loads = codegen.loads_in_flight(configuration)
    own = code.elements_per_thread * codegen.DTYPES[configuration.dtype].itemsize / 16
    few = configuration.backend == "cuda" and configuration.target == "sm_80"
    most = 3 if few and configuration.dtype != "float32" else 4  # kernels.cu
    assert loads >= min(most, math.ceil(own)), f"{loads} of {own} loads on their way"
    target = codegen.target_of(configuration).per_element
    other = not triton.__version__.startswith(f"{codegen.FIGURES_OF}.")
    if code.per_element > target and other and configuration.backend == "triton":
        pytest.skip(
            f"triton {triton.__version__} needs {code.per_element:.2f} instructions per element; "
            f"the target of {target} is of {codegen.FIGURES_OF}"
        )
    assert code.per_element <= target


@pytest.mark.parametrize(
    "configuration",
    [
        pytest.param(c, id=c.name, marks=() if c.target == "sm_90" else pytest.mark.long)
        for c in numbering_code.configurations(tuple(codegen.TARGETS))
    ],
)
def test_numbering_targets(configuration):
    """Time by the model, no spills, no scratch, no atomics; and nothing is gone through more often
    for what is in a mask: a left-padded row takes no longer than a right-padded one.
    """
    target = codegen.TARGETS[configuration.target]
    for kernel in numbering_code.kernels_of(configuration):
        code = numbering_code.compiled(kernel, configuration, target).asm["ttir"]
        loops = len(re.findall(r"\bscf\.(?:for|while)\b", code))
        assert loops == (kernel.__name__ == "number_pieces"), "the one that adds up pieces"
    missed = numbering_code.missed(configuration, target)
    if missed and not triton.__version__.startswith(f"{codegen.FIGURES_OF}."):
        missed = [what for what in missed if " us of " not in what]
    assert not missed


QUICK_GRADIENTS = {
    *(gradient_code.Configuration("sm_90", dtype) for dtype in codegen.DTYPES),
    gradient_code.Configuration("sm_80", "bfloat16", scaled=True),
}


@pytest.mark.parametrize(
    "configuration",
    [
        *(
            pytest.param(c, id=c.name, marks=() if c in QUICK_GRADIENTS else pytest.mark.long)
            for c in gradient_code.configurations(codegen.NVIDIA)
        ),
        *(pytest.param(c, id=c.name) for c in gradient_code.cuda_configurations(codegen.NVIDIA)),
    ],
)
def test_gradient_targets(configuration):
    """Instructions per element, registers, no spills, shared memory, shuffles, barriers or atomics;
    four rows asked for before the first is added (two of float32 where CUDA C++ divides).
    """
    needs_nvcc(configuration)
    target = codegen.TARGETS[configuration.target]
    missed = gradient_code.missed(configuration, target)
    is_triton = configuration.backend == "triton"
    if missed and is_triton and not triton.__version__.startswith(f"{codegen.FIGURES_OF}."):
        missed = [what for what in missed if " per element" not in what]
    assert not missed
    code = gradient_code.function("sum_chunks", configuration, target)
    rows = gradient_code.row_loads(code)
    is_divided = configuration.by_freq and not is_triton
    assert len(rows) == (8 if configuration.dtype == "float32" and not is_divided else 4)
    names = [disassembly.opcode(line) for line in code.lines]
    adds = [place for place, name in enumerate(names) if name == "FADD"]
    assert max(rows) < min(i for i, name in enumerate(names) if name.startswith("STG"))
    assert is_triton or max(rows) < min(adds)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("kernel", gradient_code.KERNELS)
def test_places_of_the_gradient_have_64_bits(kernel, dtype):
    """Tokens, ids and places beyond 2**31: of single integers a strip's number alone, at most d /
    256, is multiplied or added in 32 bits.
    """
    configuration = gradient_code.Configuration("sm_90", dtype)
    code = gradient_code.compiled(kernel, configuration, codegen.TARGETS["sm_90"]).asm["ttir"]
    made = dict(re.findall(r"^\s*(%\w+) = (.*)$", code, re.MULTILINE))
    narrow = re.findall(r"arith\.(?:muli|addi|subi|shli) (%\w+), .* : i32 ", code)
    assert narrow and all(made[value].startswith("arith.remsi") for value in narrow)
    assert re.search(r"arith\.muli .* : i64 ", code)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("kernel", gradient_code.KERNELS)
def test_places_of_the_cuda_gradient_have_64_bits(kernel, dtype):
    """Likewise: the number of a warp's unit alone is made of products of 32 bits."""
    needs_nvcc(gradient_code.Configuration("sm_90", dtype, backend="cuda"))
    name = cuda_code.gradient_kernel(kernel, "sm_90", dtype, False)
    code = cuda_code.ptx_of(name, "sm_90", cuda_code.GRADIENTS)
    grid = dict(re.findall(r"mov\.u32\s+(%r\d+), %(\w+\.\w);", code))
    narrow = re.findall(r"(?:mul|mad)\.lo\.[su]32\s+(%r\d+), (%r\d+), (%r\d+)", code)
    (block, *fold), (_, *warps) = narrow
    assert {grid.get(one) for one in fold} == {"ctaid.z", "nctaid.y"} and block in warps
    assert re.search(r"(?:mul|mad)\.lo\.s64", code)


@pytest.mark.parametrize("case", gradient_code.CASES, ids=lambda case: case.name)
def test_bytes_of_the_gradient(case):
    moved = gradient_code.moved(case)
    assert moved["ours"] <= gradient_code.TIMES_FLOOR * moved["floor"]
    assert moved["ours"] < min(moved["torch"], moved["Inductor"])


def test_parts_are_counted():
    """20 ids, then one of 33 tokens in chunks 0 and 1, and one of 2000 in chunks 1 to 64 of groups
    0 to 2.
    """
    ids = torch.cat((torch.arange(20), torch.full((33,), 20), torch.full((2000,), 21)))
    found = gradient_code.counted(ids[torch.randperm(len(ids))])
    assert found == (22, 20 + 4 + 200, 2 + 64 + 3, 2 + 64 + 3)


@pytest.mark.parametrize("shape", numbering_code.MOST, ids=str)
@pytest.mark.parametrize("target", codegen.NVIDIA)
def test_cuda_numbering_targets(target, shape):
    """The same of the CUDA C++ kernels, of whose ways the longest alone is known."""
    needs_nvcc(Configuration(target, "bfloat16", 4096, backend="cuda"))
    assert not numbering_code.cuda_missed(target, shape)
    assert cuda_code.numbering(target, shape).launches == (2 if shape == (1, 65536) else 1)


def test_plain_rows_have_a_way_of_their_own():
    needs_nvcc(Configuration("sm_90", "bfloat16", 4096, backend="cuda"))
    for shape in numbering_code.MOST:
        code = cuda_code.numbering("sm_90", shape)
        assert 100 < code.plain < 0.6 * code.any_row


@pytest.mark.parametrize("target", codegen.NVIDIA)
def test_cuda_reading_a_numbering(target):
    needs_nvcc(Configuration(target, "bfloat16", 4096, backend="cuda"))
    found = codegen.numbering_instructions(target, 4096, "cuda")
    assert 0 < found <= numbering_code.READING


def test_reading_a_numbering():
    """What the row kernel does to find a token in it, beside `lengths`."""
    for embedding_dim in (576, 4096):
        found = codegen.numbering_instructions("sm_90", embedding_dim)
        if not triton.__version__.startswith(f"{codegen.FIGURES_OF}."):
            pytest.skip(f"the target is of triton {codegen.FIGURES_OF}")
        assert found <= numbering_code.READING


def test_ways_through_a_program():
    """The shorter and the longer of two branches, a loop once and never around it."""
    lines = ["@P0 BRA `(.L_out)", "MOV", "@P1 BRA `(.L_loop)", "@P2 BRA `(.L_end)"]
    lines += ["MOV", "MOV", "@P3 EXIT", "MOV", "EXIT", "MOV", "EXIT"]
    code = cuda_code.Function("", lines, {".L_out": 9, ".L_loop": 1, ".L_end": 8})
    assert numbering_code.ways(code) == (5, 9)


def ptx_counts(kernel):
    ptx = kernel.asm["ptx"]
    names = (
        "fma.rn.f32",
        "mul.rn.f32",
        "add.rn.f32",
        "sqrt.rn.f64",
        "div.rn.f64",
        "cvt.rn.f32.s16",
    )
    return {
        name: len(re.findall(rf"^\s*(?:@%p\d+ )?{re.escape(name)}\s", ptx, re.MULTILINE))
        for name in names
    }


def test_product_and_sum_stay_apart():
    """One fma per element, the noise's own exact sum; one add per element; with a scale one product
    more; sqrt and quotient rounded.
    """
    configuration = Configuration("sm_90", "float32", 4096, "lengths", scaled=True)
    elements = int(codegen.measure(configuration).elements_per_thread)
    counts = ptx_counts(codegen.compile_rows(configuration))
    assert counts["fma.rn.f32"] == counts["add.rn.f32"] == counts["cvt.rn.f32.s16"] == elements
    assert counts["mul.rn.f32"] >= elements
    assert counts["sqrt.rn.f64"] == counts["div.rn.f64"] == 1
    opcodes = codegen.measure(configuration).opcodes
    assert opcodes["FADD"] == elements, "the assembler has not contracted them either"


def test_contraction_would_be_seen():
    """The same code with fusion allowed has fewer sums: what the test above sees does change."""
    configuration = Configuration("sm_90", "float32", 4096, "nothing", scaled=True)
    fused = codegen.compile_rows(configuration, enable_fp_fusion=True)
    text = disassembly.sass(fused.asm["cubin"])
    sums = len(re.findall(r"\bFADD\b", text))
    assert sums < codegen.measure(configuration).opcodes["FADD"]


def test_debug_adds_our_asserts_alone(monkeypatch):
    """NEFTUNE_DEBUG=1: one for the ids, one for the lengths. TRITON_DEBUG=1 is debug=True: none."""
    configuration = Configuration("sm_90", "bfloat16", 64, "lengths")

    def asserts(**changed):
        kernel = codegen.compile_rows.__wrapped__(configuration, **changed)
        return kernel.asm["ttir"].count("tt.assert ")

    assert asserts() == asserts(debug=True) == 0
    assert asserts(debug=True, sanitize_overflow=True) > 2, "Triton's own, which a valid call fails"
    monkeypatch.setattr(triton_kernels, "DEBUG", True)
    assert asserts() == 2


@pytest.mark.parametrize("scaled", (False, True))
@pytest.mark.parametrize("dtype", codegen.DTYPES)
@pytest.mark.parametrize("target", codegen.NVIDIA)
def test_cuda_product_and_sum_stay_apart(target, dtype, scaled):
    """In the machine code, column by column: one fma, the noise's own exact sum; one add; a scale's
    product; nothing packed.
    """
    needs_nvcc(Configuration(target, dtype, 4096, "nothing", scaled, "cuda"))
    code = cuda_code.function(target, cuda_code.kernel_name(target, dtype, "nothing", scaled))
    loop = cuda_code.noisy_loop(code)
    counts = Counter(
        codegen.opcode(line).split(".")[0] for line in code.lines[loop.first : loop.last + 1]
    )
    columns = cuda_code.columns_of(code, loop)
    loads = 3 if target == "sm_80" and dtype != "float32" else 4
    assert columns == loads * (4 if dtype == "float32" else 8)
    assert counts["FFMA"] == counts["FADD"] == columns
    assert counts["FMUL"] in ((columns, columns + 1) if scaled else (0, 1)), (
        "one more is the half step, where it is not kept"
    )
    assert not [
        name
        for name in counts
        if re.match(r"(FFMA2|FADD2|FMUL2|HFMA2\.BF16|HADD2\.BF16|DFMA)$", name)
    ]


def test_cuda_contraction_would_be_seen(tmp_path):
    """The same kernels with operators for intrinsics and -fmad=true: fewer sums than columns."""
    needs_nvcc(Configuration("sm_90", "float32", 4096, "nothing", True, "cuda"))
    shutil.copytree(cuda_code.KERNELS.parent.parent, tmp_path / "csrc")
    changed = tmp_path / "csrc/cuda/kernels.cu"
    for path in (changed, changed.with_name("kernel.h")):
        text = re.sub(
            r"__fadd_rn\((.*?), (noise(?:\[\d\])?|__fmul_rn\(.*?\))\)",
            r"((\1) + (\2))",
            path.read_text(),
        )
        text = text.replace(
            "__float_as_uint(__fmul_rn(__uint_as_float(word), scale))",
            "__float_as_uint(__uint_as_float(word) * scale)",
        )
        path.write_text(text)
    name = cuda_code.kernel_name("sm_90", "float32", "nothing", True, changed, "-fmad=true")
    code = cuda_code.function("sm_90", name, changed, "-fmad=true")
    loop = cuda_code.noisy_loop(code)
    sums = sum(line.startswith("FADD") for line in code.lines[loop.first : loop.last + 1])
    assert sums < cuda_code.columns_of(code, loop)


def test_cuda_artefacts(tmp_path):
    configuration = Configuration("sm_90", "bfloat16", 4096, "lengths", False, "cuda")
    needs_nvcc(configuration)
    codegen.write_artefacts(configuration, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "kernel.ptx",
        "kernel.cubin",
        "kernel.sass",
        "launch.json",
    }
    launch = json.loads((tmp_path / "launch.json").read_text())
    ptx = (tmp_path / "kernel.ptx").read_text()
    assert (
        f".entry {launch['kernel']}(" in ptx
        and "EXIT" in (tmp_path / "kernel.sass").read_text()
        and launch["d"] == 4096
    )
    assert re.search(r"\.target sm_90", ptx) and "fma.rn.bf16" not in ptx


def test_the_way_through_the_code_is_counted():
    """cuda_code.path_length on a few lines: the loop by its trips, ways around it not at all, the
    longer of two branches.
    """
    lines = [
        "MOV",
        "@P0 BRA `(.L_out)",
        "@P1 BRA `(.L_short)",
        "MOV",
        "MOV",
        "I2F",
        "STG",
        "@P2 BRA `(.L_loop)",
        "EXIT",
        "MOV",
        "MOV",
        "EXIT",
    ]
    code = cuda_code.Function("", lines, {".L_out": 9, ".L_short": 5, ".L_loop": 5})
    assert cuda_code.path_length(code, 32 * 7) == 5 + 7 * 3 + 1


def test_artefacts(tmp_path):
    """Code and launch description of one configuration, complete enough to execute it."""
    configuration = Configuration("sm_90", "bfloat16", 4096, "lengths")
    codegen.write_artefacts(configuration, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "kernel.ptx",
        "kernel.cubin",
        "kernel.sass",
        "launch.json",
    }
    launch = json.loads((tmp_path / "launch.json").read_text())
    names = [parameter["name"] for parameter in launch["parameters"]]
    assert names == [parameter.name for parameter in triton_kernels.noisy_rows.params]
    runtime = [parameter for parameter in launch["parameters"] if parameter["type"] != "constexpr"]
    declared = re.findall(r"\.param \.(\w+)", (tmp_path / "kernel.ptx").read_text().split(")")[0])
    assert len(declared) == len(runtime) + 2  # Triton adds two scratch pointers
    assert launch["d"] == launch["elements_per_program"] == 4096 and launch["num_warps"] == 1


def test_cached_launches(monkeypatch):
    """A second call goes straight to the compiled kernel, with its own arguments; what the code
    depends on makes a key of its own.
    """
    import torch

    from bench.launch import StubDriver

    runs = []

    class Recording(StubDriver):
        def launcher_cls(self, src, metadata):
            return lambda *args: runs.append((src.fn.__name__, args))

    monkeypatch.setattr(triton.runtime.driver, "_active", Recording())
    launcher = triton_kernels.Launcher(triton_kernels.noisy_rows)
    compiles = []
    compile_ = launcher._compile
    launcher._compile = lambda *args: (compiles.append(args[0]), compile_(*args))
    monkeypatch.setattr(triton_kernels, "launch_rows", launcher)
    seed, alpha = torch.tensor(1), torch.tensor(5.0, dtype=torch.float64)

    def embed(ids, weight, **layout):
        triton_kernels.noisy_embedding_out(
            ids, weight, seed, alpha, **layout, out=weight.new_empty(*ids.shape, weight.shape[1])
        )

    ids, weight = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 64, dtype=torch.bfloat16)
    embed(ids, weight)
    embed(torch.zeros(7, 9, dtype=torch.int64), weight)
    assert len(compiles) == 1 and len(runs) == 2
    first, second = (args for _, args in runs)
    assert first[:3] == (3, 2, 1) and second[:3] == (9, 7, 1)
    names = [parameter.name for parameter in triton_kernels.noisy_rows.params]
    given = dict(zip(names, second[-len(names) :], strict=True))
    assert (
        given["rows"] == 7
        and given["columns"] == 9
        and given["D"] == 64
        and given["KIND"] == "pairs"
    )
    for count, (other_ids, other_weight, layout) in enumerate(
        (
            (ids.int(), weight, {}),
            (ids, weight.float(), {}),
            (ids, torch.zeros(5, 65, dtype=torch.bfloat16)[:, 1:], {}),
            (ids, weight, {"lengths": torch.tensor([3, 1])}),
            (ids, weight, {"lengths": torch.tensor([3, 1], dtype=torch.int32)}),
            (ids, weight, {"embed_scale": 2.0}),
        ),
        start=2,
    ):
        embed(other_ids, other_weight, **layout)
        embed(other_ids, other_weight, **layout)
        assert len(compiles) == count and len(runs) == 2 * count


@pytest.mark.skipif(
    torch.__version__ < "2.13",
    reason="the rivals' code is taken out of Inductor 2.13, whose internals the tool follows",
)
def test_what_inductor_makes_of_the_rivals():
    """HF's hook: zeros, their copy, the draw, the sum.

    The rand_like rewrite fuses, and still costs three times our instructions.
    """
    hook, rewrite = inductor_code.rivals()
    assert (hook["launches"], hook["bytes_per_element"]) == (4, 14.0) and hook["uncounted"] == [
        "clone",
        "uniform_",
    ]
    assert (rewrite["launches"], rewrite["bytes_per_element"]) == (2, 4.0) and not rewrite[
        "uncounted"
    ]
    ours = codegen.measure(Configuration("sm_90", "bfloat16", inductor_code.D))
    assert rewrite["instructions_per_element"] > 3 * ours.per_element


@pytest.mark.long
@pytest.mark.skipif(
    torch.__version__ < "2.13",
    reason="the code is taken out of Inductor 2.13, whose internals the tool follows",
)
def test_what_inductor_makes_of_the_starts_of_models():
    """From the ids to the first matmul: opacity costs a launch and a read of the embeddings."""
    found = {start["name"]: start for start in inductor_code.starts()}
    for model, moved, behind in (("Llama, d = 4096", 6.0, 4.0), ("GPT-2, d = 1024", 8.0, 8.0)):
        clean, ours = found[f"{model}, no noise"], found[f"{model}, ours"]
        assert (clean["launches"], clean["bytes_per_element"], clean["ours"]) == (1, moved, 0)
        # behind our kernel, which moves 4 bytes: Llama's residual is what it wrote
        assert (ours["launches"], ours["bytes_per_element"], ours["ours"]) == (2, behind, 1)
        rewrite = found[f"{model}, rand_like rewrite"]
        assert rewrite["instructions_per_element"] > 4 * clean["instructions_per_element"]
        hook = found[f"{model}, HF hook"]
        assert (hook["launches"], hook["bytes_per_element"]) == (4, moved + 10)
