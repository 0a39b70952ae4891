"""What this machine can do: `python -m bench.machine` prints the floors that NOTES.md and the
tables refer to.
"""

import argparse
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import neftune_kernels
from neftune_kernels import backends

from .cases import NOISE_ALPHA, backend_name

DEFAULT_CACHE = 32 << 20  # where the system does not tell
BUSY = 0.05  # share of the CPU time that others may take


def cpu_model() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line
        )
        named = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in named:
            family = (
                f" (family {named['cpu family']}, model {named['model']})"
                if "cpu family" in named
                else ""
            )
            return named["model name"] + family
    return platform.processor() or platform.machine()


def cache_sizes() -> dict[str, int]:
    """Level → bytes as the first core sees them: {"L1d": 32768, "L2": 1048576, "L3": 33554432}."""
    sizes = {}
    for index in sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level = (index / "type").read_text().strip(), (index / "level").read_text().strip()
        if kind != "Instruction":
            sizes[f"L{level}{'d' if kind == 'Data' else ''}"] = (
                int((index / "size").read_text().strip().removesuffix("K")) << 10
            )
    return sizes


def last_level_cache() -> int:
    return max(cache_sizes().values(), default=DEFAULT_CACHE)


def describe_bytes(count: int) -> str:
    return f"{count / 2**20:g} MiB" if count >= 1 << 20 else f"{count / 2**10:g} KiB"


def describe(threads: int) -> dict[str, str]:
    return {
        "cpu": cpu_model(),
        "caches": ", ".join(
            f"{level} {describe_bytes(size)}" for level, size in cache_sizes().items()
        )
        or "unknown",
        "simd": backends.simd_level(),
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "threads": str(threads),
        "torch": torch.__version__,
        "neftune_kernels": neftune_kernels.version.__version__,
        "backend": backend_name(),
    }


def machine_line(machine: dict[str, str]) -> str:
    return (
        f"{machine['cpu']}, {machine['caches']}; SIMD {machine['simd']}, {machine['threads']} "
        f"threads, torch {machine['torch']}, "
        f"neftune_kernels {machine['neftune_kernels']}, backend {machine['backend']}"
    )


def best_seconds(run: Callable[[], object], samples: int = 25, at_least: float = 0.002) -> float:
    """The fastest of several samples: a floor is what the machine can do.

    Rivals are compared by medians, interleaved, in compare.py.
    """
    run()
    first = time.perf_counter()
    run()
    iterations = max(1, round(at_least / max(time.perf_counter() - first, 1e-9)))
    taken = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(iterations):
            run()
        taken.append((time.perf_counter() - start) / iterations)
        if len(taken) >= 5 and time.perf_counter() - first > 2:  # the reference backend
            break
    return min(taken)


class Load:
    """What the rest of the machine does meanwhile: `others()` is the share of all CPU time since
    construction that went elsewhere.
    """

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """(all, not idle, own) CPU seconds so far; None where the system does not tell."""
        stat = pathlib.Path("/proc/stat")
        if not stat.exists():
            return None
        ticks = [
            int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]
        ]  # user nice system idle iowait irq softirq steal
        second, own = os.sysconf("SC_CLK_TCK"), os.times()
        return (
            sum(ticks) / second,
            (sum(ticks) - ticks[3] - ticks[4]) / second,
            own.user + own.system,
        )

    def others(self) -> float | None:
        end = self._now()
        if self._start is None or end is None:
            return None
        total, busy, own = (after - before for after, before in zip(end, self._start, strict=True))
        return max(0.0, busy - own) / total if total > 0 else 0.0


def is_busy(others: float | None) -> bool:
    """Whether a figure does not count; None: the system does not tell."""
    return others is not None and others > BUSY


def describe_load(others: float | None) -> str:
    """ "" for a machine that is ours, else the warning."""
    if others is None or not is_busy(others):
        return ""
    return (
        f"BUSY MACHINE: {others:.0%} of its CPU time went to other processes, no figure here counts"
    )


class Floors(NamedTuple):
    copy_bytes: (
        float  # bytes read and written per second by a copy far larger than the caches, all threads
    )
    arithmetic: dict[int, float]  # threads → elements per second and core of the noise alone

    def seconds(self, bytes_moved: int, elements: int, threads: int) -> tuple[float, float]:
        """(memory floor, arithmetic floor) of one call."""
        return bytes_moved / self.copy_bytes, elements / (max(self.arithmetic.values()) * threads)


def measure_floors(threads: int, dtype: torch.dtype = torch.float32) -> Floors:
    """Bandwidth of `Tensor.copy_`; and the noise alone: add_noise into one buffer of 64 rows that
    stays in cache, its input one row.
    """
    source = torch.ones(max(1 << 26, last_level_cache()), dtype=torch.float32)
    target = torch.zeros_like(source)
    copy_bytes = 2 * source.nbytes / best_seconds(lambda: target.copy_(source))
    embeddings = torch.zeros(1, 4096, dtype=dtype).expand(64, 4096)  # row stride 0
    out = torch.zeros(64, 4096, dtype=dtype)
    seed, alpha = torch.tensor(0), torch.full((), NOISE_ALPHA, dtype=torch.float64)
    arithmetic = {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        seconds = best_seconds(
            lambda: torch.ops.neftune_kernels.add_noise.out(embeddings, seed, alpha, out=out)
        )
        arithmetic[count] = out.numel() / seconds / count
    torch.set_num_threads(threads)
    return Floors(copy_bytes, arithmetic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    for name, value in describe(threads).items():
        print(f"{name:16} {value}")
    for dtype in (torch.float32, torch.bfloat16):
        floors = measure_floors(threads, dtype)
        rates = ", ".join(
            f"{rate / 1e9:.3g}e9 at {count} thread{'s'[: count > 1]}"
            for count, rate in floors.arithmetic.items()
        )
        if dtype == torch.float32:
            print(
                f"{'copy':16} {floors.copy_bytes / 1e9:.1f} GB/s read + written ({threads} "
                f"threads, far beyond the caches)"
            )
        print(
            f"{'noise alone':16} {str(dtype).removeprefix('torch.')}: {rates} elements per second "
            f"and core"
        )


if __name__ == "__main__":
    main()
