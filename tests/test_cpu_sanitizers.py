"""The C++ CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, at every instruction
set of this machine; and without a warning, by g++ and, where it is there, clang++.

NEFTUNE_REQUIRE_CPP=1 makes a missing g++ a failure instead of a skip.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_install import run, source_copy

from setup import COMPILE_FLAGS, SIMD_FLAGS, TORCH_TARGET_VERSION, kernel, torch_folder

ROOT = pathlib.Path(__file__).parent.parent
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def require(compiler):
    if shutil.which(compiler) is None:
        reason = f"no {compiler} here: the CPU kernels are not compiled by it"
        if compiler == "g++" and os.environ.get("NEFTUNE_REQUIRE_CPP") == "1":
            pytest.fail(f"NEFTUNE_REQUIRE_CPP=1, but {reason}")
        pytest.skip(reason)


def options_of(source):
    """What setup.py compiles this source with, but for optimisation."""
    return [
        *COMPILE_FLAGS,
        *WARNINGS,
        *SIMD_FLAGS.get(source.name, []),
        *(f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", torch_folder() / "include"),
    ]


def warnings_of(compiler, source):
    """Of the front end, in a second: "" for none."""
    command = [compiler, *options_of(source), "-fsyntax-only", source]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode != 0) == bool(done.stderr)
    return done.stderr


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_no_warnings(compiler, tmp_path):
    require(compiler)
    for name in kernel().sources:
        assert warnings_of(compiler, ROOT / name) == ""
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text("int sign(unsigned value, int unused) { return value < -1; }\n")
    assert "unused" in warnings_of(compiler, wrong)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A copy of the sources and tests whose library has the sanitizers in it."""
    require("g++")
    folder = tmp_path_factory.mktemp("sanitized")
    source_copy(folder)
    shutil.copytree(ROOT / "tests", folder / "tests")

    def compiled(name):
        source = folder / name
        run(
            "g++",
            *options_of(source),
            *("-O0", "-g1", "-fPIC", *SANITIZERS),  # -O1 takes thrice as long to compile
            *("-c", source, "-o", source.with_suffix(".o")),
        )
        return source.with_suffix(".o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, kernel().sources))
    library = folder / "neftune_kernels" / "_C.abi3.so"
    libraries = (f"-L{torch_folder() / 'lib'}", "-ltorch_cpu")
    run("g++", "-shared", *SANITIZERS, *objects, *libraries, "-o", library)
    return folder


def run_tests(folder, *arguments):
    """How many tests of the copy passed, all of them under the sanitizers."""
    runtimes = [run("g++", f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan")]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", ""))),
        "NEFTUNE_REQUIRE_CPP": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
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
