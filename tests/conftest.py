"""What every test shares: NaN-poisoned memory, the backends of this machine, hard batches, exact
comparison.
"""

import contextlib
import ctypes
import json
import math
import os
import pathlib
from typing import NamedTuple

import pytest
import torch

from neftune_kernels import backends, self_check

SIMD_LEVELS = ("scalar", "avx2", "avx512", "avx512bf16", "neon")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty, new_empty, empty_like and resize_ hand out NaN (integers: the largest), so a
    cell nobody writes is seen.
    """
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def no_self_check(monkeypatch):
    """A wrong kernel fails its test and is not replaced; tests/test_self_check.py turns it on."""
    monkeypatch.setattr(self_check, "ENABLED", False)
    monkeypatch.setenv("NEFTUNE_SELF_CHECK", "0")


def set_simd_level(level: str) -> bool:
    """Whether the native library can run this instruction set here; from now on it does."""
    function = backends.native.handle.neftune_kernels_set_simd_level
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    return function(level.encode()) == 0


def usable_simd_levels() -> tuple[str, ...]:
    if backends.native.handle is None:
        return ()
    chosen = backends.simd_level()
    levels = tuple(level for level in SIMD_LEVELS if set_simd_level(level))
    set_simd_level(chosen)
    return levels


CUDA_SHIM = os.environ.get(
    "NEFTUNE_CUDA_SHIM"
)  # the CUDA kernels' bodies for CPU tensors; see tests/test_cuda_build.py
cuda_shim = ctypes.CDLL(CUDA_SHIM) if CUDA_SHIM else None
KERNELS = (
    ("cuda",) if CUDA_SHIM else tuple(f"cpp-{level}" for level in usable_simd_levels()) or ("cpp",)
)


def require_native() -> None:
    """Skip, saying why, without the native library; fail instead where NEFTUNE_REQUIRE_CPP=1
    promises it.
    """
    if backends.native.handle is None:
        message = f"native library: {backends.native.reason}"
        if os.environ.get("NEFTUNE_REQUIRE_CPP") == "1":
            pytest.fail(f"NEFTUNE_REQUIRE_CPP=1, but {message}")
        pytest.skip(message)


@contextlib.contextmanager
def running(name: str):
    """The `backend=` argument of "reference", "cuda" or "cpp-<SIMD level>", with the library
    switched to that level meanwhile.
    """
    if name == "reference":
        yield name
        return
    if name == "cuda":
        reason, backends._cuda_reason = backends._cuda_reason, lambda device_type: ""
        try:
            yield name
        finally:
            backends._cuda_reason = reason
        return
    require_native()
    chosen = backends.simd_level()
    assert set_simd_level(name.removeprefix("cpp-")), f"the library no longer accepts {name}"
    try:
        yield "cpp"
    finally:
        set_simd_level(chosen)


@pytest.fixture(params=("reference", *KERNELS))
def backend(request):
    """Every backend of this machine, the C++ kernel once per instruction set."""
    with running(request.param) as name:
        yield name


@pytest.fixture(params=KERNELS)
def kernel(request):
    """Every backend that is to equal the reference."""
    with running(request.param) as name:
        yield name


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Batch(NamedTuple):
    input_ids: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) int64, 0: padding; further values number documents
    lengths: torch.Tensor  # (B,) int64, real tokens of each row


MASK_KINDS = (
    "full",
    "ragged",
    "left",
    "holes",
    "empty_rows",
    "empty_first",
    "nothing_real",
    "numbered",
)


def make_batch(
    kind: str, rows: int = 4, columns: int = 13, vocabulary: int = 11, seed: int = 0
) -> Batch:
    """Ids and a mask that is hard in the named way; "ragged" has a zero length, and row lengths are
    unequal wherever they can be.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocabulary, (rows, columns), generator=generator)
    column = torch.arange(columns).expand(rows, columns)
    lengths = torch.randint(1, columns + 1, (rows,), generator=generator)
    lengths[0], lengths[-1] = columns, min(3, columns)
    if kind == "full":
        mask = torch.ones(rows, columns, dtype=torch.int64)
    elif kind == "ragged":
        lengths[rows // 2] = 0
        mask = (column < lengths[:, None]).long()
    elif kind == "left":
        mask = (column >= columns - lengths[:, None]).long()
    elif kind == "holes":
        mask = (torch.rand(rows, columns, generator=generator) < 0.6).long()
    elif kind == "empty_rows":
        mask = (column < lengths[:, None]).long()
        mask[rows // 2 :] = 0
    elif kind == "empty_first":
        mask = (column < lengths[:, None]).long()
        mask[0] = 0
    elif kind == "nothing_real":
        mask = torch.zeros(rows, columns, dtype=torch.int64)
    elif (
        kind == "numbered"
    ):  # 1 1 2 2 0 3 1 0 0 ...: documents, holes between and within them, a number used again
        mask = (
            torch.randint(0, 4, (rows, columns), generator=generator)
            .repeat_interleave(2, dim=1)[:, :columns]
            .contiguous()
        )
    else:
        raise ValueError(f"no such batch: {kind}")
    return Batch(input_ids, mask, (mask != 0).sum(1))


BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Same dtype, shape and every bit: unlike torch.equal it tells -0.0 from 0.0.

    NaN equals NaN, its payload is nobody's promise.
    """
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left, right = (
        torch.where(value.isnan(), math.nan, value).contiguous().view(BITS[value.dtype])
        for value in (left, right)
    )
    return torch.equal(left, right)


def equals_oracle(out: torch.Tensor, expected) -> bool:
    """Whether (..., d) of any float dtype holds the very values of the oracle's (N, d) array, which
    is in float32 or float64.
    """
    wide = (
        out.double() if out.dtype == torch.float64 else out.float()
    )  # exact, sign of zero included
    return out.shape[-1] == expected.shape[-1] and same_bits(
        wide.reshape(expected.shape), torch.from_numpy(expected)
    )


def pytest_addoption(parser):
    parser.addoption(
        "--compatibility",
        metavar="FILE",
        help="write what tests proved of models, trainers and layouts, as JSON",
    )


@pytest.fixture
def proves(request):
    """proves(family, trainer, layout): a line of the compatibility table, if the test
    passes.
    """
    return lambda *line: request.node.user_properties.append(("compatibility", line))


def pytest_terminal_summary(terminalreporter):
    path = terminalreporter.config.getoption("--compatibility")
    if path is None:
        return
    passed = [report.user_properties for report in terminalreporter.stats.get("passed", [])]
    lines = sorted(
        {
            tuple(line)
            for properties in passed
            for name, line in properties
            if name == "compatibility"
        }
    )
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(json.dumps(lines, indent=1) + "\n")
