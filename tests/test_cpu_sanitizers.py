"""The C++ CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, at every instruction
set of this machine; and without a warning, the CUDA kernels' bodies too: by g++ and, where it is
there, clang++, of the newest version that is.

NEFTUNE_REQUIRE_CPP=1 makes a missing g++ a failure instead of a skip.
"""

import os
import pathlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sanitizers import COMPILERS
from test_install import run, source_copy

from setup import (
    COMPILE_FLAGS,
    CUDA_SOURCES,
    SIMD_FLAGS,
    TORCH_INCLUDE,
    TORCH_TARGET_VERSION,
    kernel,
)

ROOT = pathlib.Path(__file__).parent.parent
TORCH_OPTIONS = [
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    *("-isystem", ROOT / TORCH_INCLUDE),
]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
SHIM_OPTIONS = [
    *("-std=c++20", "-Wno-unused-function", "-Wno-unknown-pragmas"),
    "-Wno-unused-const-variable",  # the shim drops __launch_bounds__ and what it names
    *("-include", ROOT / "tests" / "cuda_shim.h"),
]


def require(compiler):
    if missing := COMPILERS[compiler].missing():
        reason = f"{missing}: the CPU kernels are not compiled by it"
        if compiler == "g++" and os.environ.get("NEFTUNE_REQUIRE_CPP") == "1":
            pytest.fail(f"NEFTUNE_REQUIRE_CPP=1, but {reason}")
        pytest.skip(reason)


def options_of(source, compiler):
    """What setup.py compiles this source with, but for optimisation."""
    return [
        *COMPILE_FLAGS,
        *WARNINGS,
        *SIMD_FLAGS.get(source.name, []),
        *(["-Wno-unknown-warning-option"] if compiler == "clang++" else []),  # g++'s own names
        *TORCH_OPTIONS,
    ]


def warnings_of(compiler, source, options):
    """Of the front end, in a second: "" for none."""
    command = [COMPILERS[compiler].command, *options, "-fsyntax-only", source]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode != 0) == bool(done.stderr)
    return done.stderr


@pytest.mark.parametrize("compiler", list(COMPILERS))
def test_no_warnings(compiler, tmp_path):
    require(compiler)
    for name in kernel().sources:
        assert warnings_of(compiler, ROOT / name, options_of(ROOT / name, compiler)) == ""
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text("int sign(unsigned value, int unused) { return value < -1; }\n")
    assert "unused" in warnings_of(compiler, wrong, options_of(wrong, compiler))


@pytest.mark.parametrize("source", ["ops.cpp", *CUDA_SOURCES])
def test_no_warnings_of_the_cuda_bodies(source):
    """By clang++; tests/test_cuda_build.py runs what g++ makes of them."""
    require("clang++")
    options = [*WARNINGS, *SHIM_OPTIONS, *TORCH_OPTIONS, "-x", "c++"]
    assert warnings_of("clang++", ROOT / "csrc" / "cuda" / source, options) == ""


@pytest.fixture(scope="module", params=list(COMPILERS))
def sanitized(request, tmp_path_factory):
    """A compiler, and a copy of the sources and tests whose library has its sanitizers in it."""
    require(name := request.param)
    compiler = COMPILERS[name]
    folder = tmp_path_factory.mktemp("sanitized")
    source_copy(folder)
    shutil.copytree(ROOT / "tests", folder / "tests")

    def compiled(source):
        source = folder / source
        run(
            compiler.command,
            *options_of(source, name),
            *("-O0", "-g1", "-fPIC", *compiler.sanitizers),  # -O1 takes thrice as long to compile
            *("-c", source, "-o", source.with_suffix(".o")),
        )
        return source.with_suffix(".o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, kernel().sources))
    library = folder / "neftune_kernels" / "_C.abi3.so"
    libraries = (f"-L{pathlib.Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu")
    run(compiler.command, "-shared", *compiler.sanitizers, *objects, *libraries, "-o", library)
    return compiler, folder


def run_tests(sanitized, *arguments):
    """How many tests of the copy passed, all of them under the sanitizers."""
    compiler, folder = sanitized
    done = compiler.run_python(
        *("-m", "pytest", "-qs", "-p", "no:cacheprovider", *arguments),
        cwd=folder,
        PYTHONPATH=os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", ""))),
        NEFTUNE_REQUIRE_CPP="1",
    )
    assert done.returncode == 0, done.stderr[:3000] + done.stdout[-3000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_hard_memory(sanitized):
    """Strides, neighbours, small layouts, drawn calls, and rows without elements, which may have no
    address, at every instruction set: what reads or writes beside its tensors is seen.
    """
    hard = "no_columns or strided or beside_its_source or every_small_layout or calls_equal"
    files = ("tests/test_backends.py", "tests/test_properties.py")
    assert run_tests(sanitized, *files, "-m", "not long", "-k", hard) >= 50


@pytest.mark.long
def test_equality_matrix(sanitized):
    assert run_tests(sanitized, "tests/test_backends.py", "-m", "not long") >= 450
