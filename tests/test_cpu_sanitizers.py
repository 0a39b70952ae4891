"""The C++ CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, at every instruction
set of this machine.

NEFTUNE_REQUIRE_CPP=1 makes a missing compiler a failure instead of a skip.
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
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A copy of the sources and tests whose library has the sanitizers in it."""
    if shutil.which("g++") is None:
        reason = "no g++ here: the CPU kernels are not run under sanitizers"
        if os.environ.get("NEFTUNE_REQUIRE_CPP") == "1":
            pytest.fail(f"NEFTUNE_REQUIRE_CPP=1, but {reason}")
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("sanitized")
    source_copy(folder)
    shutil.copytree(ROOT / "tests", folder / "tests")
    torch = torch_folder()

    def compiled(name):
        source = folder / name
        run(
            "g++",
            *COMPILE_FLAGS,
            *("-O0", "-g1", "-fPIC", *SANITIZERS),  # -O1 takes thrice as long to compile
            *SIMD_FLAGS.get(source.name, []),
            *(f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", torch / "include"),
            *("-c", source, "-o", source.with_suffix(".o")),
        )
        return source.with_suffix(".o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, kernel().sources))
    library = folder / "neftune_kernels" / "_C.abi3.so"
    libraries = (f"-L{torch / 'lib'}", "-ltorch_cpu")
    run("g++", "-shared", *SANITIZERS, *objects, *libraries, "-o", library)
    return folder


def run_tests(folder, *arguments):
    """How many tests of the copy passed, all of them under the sanitizers."""
    runtimes = [run("g++", f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan")]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
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


def test_rows_without_elements(sanitized):
    """They may have no address: nothing is copied from it, or to it."""
    assert run_tests(sanitized, "tests/test_backends.py", "-k", "no_columns") >= 2


@pytest.mark.long
def test_equality_matrix(sanitized):
    assert run_tests(sanitized, "tests/test_backends.py", "-m", "not long") >= 450
