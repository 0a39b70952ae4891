"""Other processors and systems, as far as they go without one: NEON under qemu, what a universal
build for macOS compiles, sources that are empty where they do not belong.
"""

import pathlib
import shutil
import sys

import pytest
from sanitizers import COMPILERS
from test_install import run

import setup

ROOT = pathlib.Path(__file__).parent.parent
CPU = ROOT / "csrc" / "cpu"


# ---- other systems, as far as they go without one


def test_universal_builds_compile_each_source_for_its_processor(tmp_path, monkeypatch):
    """clang's own plan for macOS: the flags of x86_64 reach that half alone."""
    clang = COMPILERS["clang++"].command
    if shutil.which(clang) is None:
        pytest.skip("no clang++ here: what it makes of a universal build is not looked at")
    monkeypatch.setattr(sys, "platform", "darwin")
    flags = setup.simd_flags()["rows_avx512.cpp"]
    both = ("--target=x86_64-apple-macos11", "-arch", "x86_64", "-arch", "arm64")
    source = ROOT / "csrc" / "cpu" / "rows_avx512.cpp"
    plan = run(clang, *both, *flags, "-###", "-c", source, "-o", tmp_path / "rows.o")
    halves = {
        processor: [line for line in plan.splitlines() if f'"-triple" "{processor}-' in line]
        for processor in ("x86_64", "arm64")
    }
    assert all(len(lines) == 1 for lines in halves.values()), plan
    assert '"+avx512f"' in halves["x86_64"][0] and "avx512" not in halves["arm64"][0].split(
        "rows_avx512.cpp"
    )[0].replace(str(source), "")


@pytest.mark.parametrize("name", ["rows_avx512bf16", "rows_avx512", "rows_avx2", "rows_neon"])
def test_a_source_is_empty_on_other_processors(name, tmp_path):
    """Without any flag, by the compiler's front end."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    other = ("-U__x86_64__", "-U__aarch64__")
    run("g++", "-std=c++17", *other, "-c", ROOT / "csrc/cpu" / f"{name}.cpp", "-o", tmp_path / "o")
    assert "kernels_" not in run("nm", tmp_path / "o")
