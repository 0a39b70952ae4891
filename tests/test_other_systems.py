"""Other processors and systems, as far as they go without one: NEON under qemu, what a universal
build for macOS compiles, sources that are empty where they do not belong.

NEFTUNE_REQUIRE_NEON=1 makes a missing cross compiler or emulator a failure instead of a skip.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from sanitizers import COMPILERS
from test_install import run, source_copy

import setup

ROOT = pathlib.Path(__file__).parent.parent
CPU = ROOT / "csrc" / "cpu"
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"  # g++-aarch64-linux-gnu and qemu-user
NATIVE = "g++"


def rows_test(compiler, folder, source_folder=CPU.parent):
    """tests/rows_test.cpp with the kernels of that compiler's processor, linked statically."""
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-w", "-I", source_folder)
    objects = []
    for source in (ROOT / "tests/rows_test.cpp", *sorted((source_folder / "cpu").glob("*.cpp"))):
        if source.name in ("ops.cpp", "gradients.cpp"):
            continue  # the operators, which need torch
        own = setup.SIMD_FLAGS.get(source.name, []) if compiler == NATIVE else []
        objects.append(folder / f"{source.stem}.o")
        run(compiler, *flags, *own, "-c", source, "-o", objects[-1])
    run(compiler, "-static", *objects, "-o", folder / "rows_test")
    return folder / "rows_test"


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
