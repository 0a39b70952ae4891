"""Host time of a launch without a GPU: `python -m bench.launch`.

Triton kernels are compiled for sm_90 and the driver's last step, which would hand them to the GPU,
does nothing. Beside our launcher stands Triton's own `kernel[grid](...)` with the same arguments
and the same step left out. The CUDA C++ operator is csrc/cuda/ops.cpp on CPU tensors, from the
operator's call to the kernel's launch, device guard and stream left out; F.embedding is a whole
call of 8 tokens, d = 64.
"""

import argparse
import ctypes
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from neftune_kernels import backends, triton_kernels

from .interleaved import ratios, spread

MOST_MICROSECONDS = 3.0
MOST_SHARE = 0.25  # of kernel[grid]


CSRC = pathlib.Path(__file__).parent.parent / "csrc"
STUB = """
#define NEFTUNE_CUDA_DISPATCH_KEY CPU
#include "tensors.h"
namespace neftune_kernels {
struct Device {
  explicit Device(const Tensor&) {}
  void check(const Tensor&, const char*) const {}
  static bool is_on_host(const Tensor&) { return true; }
  void* stream() const { return nullptr; }
};
}  // namespace neftune_kernels
#include "cuda/ops.cpp"
namespace neftune_kernels {
const char* launch_noisy_rows(const RowArguments&, ElementType, void*) { return nullptr; }
const char* launch_number_documents(const DocumentArguments&, void*) { return nullptr; }
const char* launch_number_tokens(const TokenArguments&, void*) { return nullptr; }
}  // namespace neftune_kernels
"""


def load_cuda_operators() -> bool:
    """Register the CUDA operators for CPU tensors, with launches that do nothing."""
    if shutil.which("g++") is None:
        return False
    torch_folder = pathlib.Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = pathlib.Path(folder, "stub.cpp"), pathlib.Path(folder, "stub.so")
        source.write_text(STUB)
        flags = [
            "-O3",
            "-std=c++17",
            "-fPIC",
            "-shared",
            "-fvisibility=hidden",
            "-w",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        ]
        paths = [f"-I{CSRC}", f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
        subprocess.run(
            ["g++", *flags, *paths, str(source), "-ltorch_cpu", "-o", str(library)], check=True
        )
        ctypes.CDLL(str(library))
    return True


class StubUtils:
    def load_binary(self, *args: Any) -> tuple[Any, ...]:
        return object(), 0, 40, 0, 1024

    def unload_module(self, *args: Any) -> None:
        pass

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class StubDriver:
    """What Triton asks of a driver, with launches that end in Python."""

    utils = StubUtils()

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1  # as a CPU tensor's get_device()

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def microseconds(
    runs: dict[str, Callable[[], object]], rounds: int, calls: int
) -> dict[str, list[float]]:
    """Per call, the runs in turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds):
        for name in list(runs) if round_ % 2 else list(reversed(runs)):
            run = runs[name]
            run()
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            taken[name].append((time.perf_counter() - begin) / calls * 1e6)
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--calls", type=int, default=500)
    arguments = parser.parse_args()
    driver.set_active(StubDriver())  # type: ignore[no-untyped-call]
    ids, weight = (
        torch.zeros(8, 512, dtype=torch.int64),
        torch.zeros(32, 4096, dtype=torch.bfloat16),
    )
    out = torch.empty(8, 512, 4096, dtype=torch.bfloat16)
    seed, alpha, lengths = (
        torch.zeros((), dtype=torch.int64),
        torch.tensor(5.0, dtype=torch.float64),
        torch.full((8,), 512),
    )
    recorded: list[Any] = []
    launch = triton_kernels.Launcher.__call__

    def recording(
        self: Any, key: Any, found: Any, index: Any, grid: Any, args: Any, num_warps: int
    ) -> None:
        recorded[:] = [grid, args, num_warps]
        launch(self, key, found, index, grid, args, num_warps)

    triton_kernels.Launcher.__call__ = recording  # type: ignore[method-assign]
    triton_kernels.noisy_embedding_out(ids, weight, seed, alpha, None, None, lengths, out=out)
    triton_kernels.Launcher.__call__ = launch  # type: ignore[method-assign]
    grid, args, num_warps = recorded
    options = {"num_warps": num_warps, **triton_kernels.compile_options("cuda")}
    runs: dict[str, Callable[[], object]] = {
        "ours: nothing given": lambda: triton_kernels.noisy_embedding_out(
            ids, weight, seed, alpha, out=out
        ),
        "ours: lengths": lambda: triton_kernels.noisy_embedding_out(
            ids, weight, seed, alpha, None, None, lengths, out=out
        ),
        "kernel[grid]": lambda: triton_kernels.noisy_rows[grid](*args, **options),
    }
    if load_cuda_operators():
        cuda = backends.CUDA.noisy_embedding_out
        runs["CUDA C++: nothing given"] = lambda: cuda(ids, weight, seed, alpha, out=out)
        runs["CUDA C++: lengths"] = lambda: cuda(
            ids, weight, seed, alpha, None, None, lengths, out=out
        )
    few_ids, few_rows = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(32, 64)
    runs["F.embedding"] = lambda: torch.nn.functional.embedding(few_ids, few_rows)
    taken = microseconds(runs, arguments.rounds, arguments.calls)
    print(
        f"host time of one launch, microseconds, median of {arguments.rounds} interleaved rounds "
        f"[p10, p90]; triton {triton.__version__}\n"
    )
    missed = 0
    for name, values in taken.items():
        median, low, high = spread(values)
        share = ratios(values, taken["kernel[grid]"]).median
        line = f"  {name:24}{median:7.2f}  [{low:.2f}, {high:.2f}]  {share:5.2f} of kernel[grid]"
        if name not in ("kernel[grid]", "F.embedding"):
            met = median <= MOST_MICROSECONDS and share <= MOST_SHARE
            missed += not met
            line += (
                f"  target <= {MOST_MICROSECONDS} and <= {MOST_SHARE}: {'met' if met else 'missed'}"
            )
        print(line)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
