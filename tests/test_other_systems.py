"""Other processors and systems, as far as they go without one: NEON under qemu, what a universal
build for macOS compiles, sources that are empty where they do not belong.

NEFTUNE_REQUIRE_NEON=1 makes a missing cross compiler or emulator a failure instead of a skip.
"""

import math
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import zipfile

import golden_vectors
import numpy as np
import pytest
import test_golden
import torch
from sanitizers import COMPILERS
from test_install import run, source_copy

import setup

ROOT = pathlib.Path(__file__).parent.parent
CPU = ROOT / "csrc" / "cpu"
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"  # g++-aarch64-linux-gnu and qemu-user
NATIVE = "g++"


def rows_test(compiler, folder, source_folder=CPU.parent, program="rows_test"):
    """That program of tests/ with the kernels of that compiler's processor, linked statically."""
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-w", "-I", source_folder)
    objects = []
    for source in (ROOT / f"tests/{program}.cpp", *sorted((source_folder / "cpu").glob("*.cpp"))):
        if source.name in ("ops.cpp", "gradients.cpp"):
            continue  # the operators, which need torch
        own = setup.SIMD_FLAGS.get(source.name, []) if compiler == NATIVE else []
        objects.append(folder / f"{source.stem}.o")
        run(compiler, *flags, *own, "-c", source, "-o", objects[-1])
    run(compiler, "-static", *objects, "-o", folder / program)
    return folder / program


def require_emulator():
    missing = [name for name in (CROSS, QEMU, NATIVE) if shutil.which(name) is None]
    if missing:
        reason = f"no {' and no '.join(missing)} here: the NEON kernels are not run"
        if os.environ.get("NEFTUNE_REQUIRE_NEON") == "1":
            pytest.fail(f"NEFTUNE_REQUIRE_NEON=1, but {reason}")
        pytest.skip(reason)


def test_neon_gives_the_bits_of_this_processor(tmp_path):
    """Rows, sums and Philox under qemu: NEON against scalar there, and both against this one."""
    require_emulator()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here = run(rows_test(NATIVE, tmp_path / "here")).splitlines()
    there = run(QEMU, rows_test(CROSS, tmp_path / "there")).splitlines()
    assert there[0] == "levels: scalar neon" and here[0].startswith("levels: scalar")
    assert here[1].startswith("digest: ") and here[1] == there[1]


@pytest.mark.parametrize(
    "old, new",
    [
        ("vdupq_n_u32(0x7FFF)", "vdupq_n_u32(0x8000)"),
        pytest.param("vdupq_n_u16(0x8000)", "vdupq_n_u16(0)", marks=pytest.mark.long),
        pytest.param(
            "vaddq_u32(block.lanes, vdupq_n_u32(4))", "block.lanes", marks=pytest.mark.long
        ),
        pytest.param("source + 20, out + 20", "source + 20, out + 16", marks=pytest.mark.long),
    ],
)
def test_wrong_neon_is_seen(tmp_path, old, new):
    require_emulator()
    shutil.copytree(CPU.parent, tmp_path / "csrc")
    path = tmp_path / "csrc" / "cpu" / "simd.h"
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    done = subprocess.run(
        [QEMU, rows_test(CROSS, tmp_path, tmp_path / "csrc")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "WRONG: a row, neon" in done.stdout


# ---- the golden vectors, row by row

UNIFORM = [
    case
    for case in golden_vectors.read()["cases"]
    if case["arguments"].get("distribution", "uniform") == "uniform"
]
OUTPUTS = [  # of the kernels' dtypes, in an order of their element types
    (case, dtype)
    for case in UNIFORM
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype in golden_vectors.dtypes(case)
]


def bits(value):
    """A float32's, of a Python float."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def rows_of(case, dtype):
    """Of each token its line for golden_rows.cpp, None where no kernel is needed: no noise, no
    scale; and its row of the weight.
    """
    element = (torch.float32, torch.bfloat16, torch.float16).index(dtype)
    ids, weight, keywords = golden_vectors.call(case, dtype)
    scale, columns = keywords.get("embed_scale", 1.0), weight.shape[1]
    alpha = keywords["noise_alpha"] * keywords.get("sign", 1)
    lines, rows = [], []
    for id, place in zip(ids.flatten().tolist(), test_golden.places_of(ids, keywords), strict=True):
        row = weight[id].contiguous()
        sample, position, length = place or (0, 0, 0)
        with np.errstate(over="ignore"):
            magnitude = np.float32(alpha / math.sqrt(length * columns)) if length else 0.0
        step = float(magnitude) * 2.0**-31 if abs(magnitude) >= 2.0**-90 else 0.0
        kind = ("n" if scale == 1 else "s") if step else "p"
        words = (keywords["seed"] % 2**64, keywords.get("replica", 0), bits(scale), bits(step))
        numbers = (element, columns, *words, position, sample)
        source = row.view(torch.uint8).numpy().tobytes().hex()
        line = " ".join((kind, *(f"{number:x}" for number in numbers), source))
        lines.append(None if kind == "p" and scale == 1 else line)
        rows.append(row)
    return lines, rows


def judge(printed):
    """The levels that gave the bits of every golden vector; AssertionError at one that did not."""
    levels = []
    calls = [(case, dtype, *rows_of(case, dtype)) for case, dtype in OUTPUTS]
    printed = iter(printed.splitlines())
    for level in printed:
        levels.append(level)
        for case, dtype, lines, rows in calls:
            out = [
                row
                if line is None
                else torch.frombuffer(bytearray.fromhex(next(printed)), dtype=dtype)
                for line, row in zip(lines, rows, strict=True)
            ]
            if out:
                spelled = golden_vectors.spelled(torch.stack(out))
                assert spelled == golden_vectors.expected(case, dtype), (level, case["name"])
    return levels


def golden_rows(folder, source_folder=CPU.parent):
    """What the program printed under the emulator."""
    program = rows_test(CROSS, folder, source_folder, "golden_rows")
    lines = [line for call in OUTPUTS for line in rows_of(*call)[0] if line is not None]
    assert len(lines) > 2000
    done = subprocess.run([QEMU, program], input="\n".join(lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_neon_gives_the_golden_rows(tmp_path):
    """Of all cases with uniform noise, scalar code beside it; the other distributions are no
    kernels.
    """
    require_emulator()
    assert judge(golden_rows(tmp_path)) == ["scalar", "neon"]


# ---- other systems, as far as they go without one


HEADERS = {  # what the kernels include of a system's own, for want of it
    "cstdint": "#include <stdint.h>",
    "math.h": 'extern "C" { float fmaf(float, float, float); float fabsf(float); }',
}


@pytest.mark.parametrize("name", ["avx512bf16", "avx512", "avx2", "neon", "scalar"])
def test_universal_builds_compile_each_source_for_its_processor(tmp_path, monkeypatch, name):
    """Both halves of a macOS library by clang, each with all flags of the source."""
    clang = COMPILERS["clang++"].command
    if shutil.which(clang) is None:
        pytest.skip("no clang++ here: what it makes of a universal build is not looked at")
    monkeypatch.setattr(sys, "platform", "darwin")
    flags = setup.simd_flags().get(f"rows_{name}.cpp", [])
    assert set(flags[::2]) <= {"-Xarch_x86_64"} and all(flag[:2] == "-m" for flag in flags[1::2])
    for header, text in HEADERS.items():
        (tmp_path / header).write_text(text)
    options = (
        "-std=c++17",
        "-O1",
        "-nostdlibinc",
        "-ffreestanding",
        "-ffp-contract=off",
        "-isystem",
        tmp_path,
        *flags,
    )
    halves = {}
    for processor in ("x86_64", "arm64"):
        target = f"--target={processor}-apple-macos11"
        run(clang, target, *options, "-c", CPU / f"rows_{name}.cpp", "-o", tmp_path / processor)
        halves[processor] = f"kernels_{name}".encode() in (tmp_path / processor).read_bytes()
    x86_only, arm_only = name.startswith("avx"), name == "neon"
    assert halves == {"x86_64": not arm_only, "arm64": not x86_only}


@pytest.mark.parametrize("name", ["rows_avx512bf16", "rows_avx512", "rows_avx2", "rows_neon"])
def test_a_source_is_empty_on_other_processors(name, tmp_path):
    """Without any flag, by the compiler's front end."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    other = ("-U__x86_64__", "-U__aarch64__")
    run("g++", "-std=c++17", *other, "-c", ROOT / "csrc/cpu" / f"{name}.cpp", "-o", tmp_path / "o")
    assert "kernels_" not in run("nm", tmp_path / "o")


@pytest.mark.long
def test_a_wheel_for_another_processor_needs_its_compiler_alone(tmp_path):
    """No torch of that processor: headers and what is linked to come from the tree."""
    require_emulator()
    source_copy(tmp_path)
    host = {
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "CC": CROSS.replace("g++", "gcc"),
        "CXX": CROSS,
        "LDSHARED": f"{CROSS} -shared",
        "LDCXXSHARED": f"{CROSS} -shared",
        "NEFTUNE_BUILD_CPP": "1",
        "NEFTUNE_BUILD_CUDA": "0",
    }
    run(sys.executable, "setup.py", "-q", "bdist_wheel", folder=tmp_path, **host)
    (wheel,) = (tmp_path / "dist").glob("*-cp310-abi3-linux_aarch64.whl")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("neftune_kernels/_C.abi3.so")
    machine = int.from_bytes(library[18:20], "little")  # ELF's e_machine
    assert machine == 183  # AArch64
    assert b"libtorch_cpu.so" in library and b"neon" in library and b"kernels_avx2" not in library
