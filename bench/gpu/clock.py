"""Device time and host time, apart; on a CPU, which has but one, plain loops in their place."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[[], object]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class CpuClock:
    """Checks the program that measures; its figures are nobody's."""

    rounds = 3
    host_calls = 2

    def synchronise(self) -> None:
        pass

    def release_memory(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 0

    def record(self, runs: Sequence[Run]) -> Callable[[], float]:
        def replay() -> float:
            start = time.perf_counter()
            for run in runs:
                run()
            return (time.perf_counter() - start) / len(runs)

        return replay


class CudaClock:
    """Device seconds by the replay of a CUDA graph: no launch from Python lies between kernels."""

    rounds = 21
    host_calls = 50

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def synchronise(self) -> None:
        torch.cuda.synchronize()

    def release_memory(self) -> None:
        torch.cuda.empty_cache()

    def peak_bytes(self) -> int:
        """Most bytes that tensors took since the last call."""
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def record(self, runs: Sequence[Run]) -> Callable[[], float]:
        """A graph of all runs; its replay gives seconds per run.

        The results stay alive, so that each has a place of its own.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, fills caches and the allocator's pool
            for run in runs[:2]:
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        kept: list[object] = []
        with torch.cuda.graph(graph):
            kept.extend(run() for run in runs)
        graph.replay()

        def replay(kept: list[object] = kept) -> float:
            self._begin.record()
            graph.replay()
            self._end.record()
            torch.cuda.synchronize()
            return float(self._begin.elapsed_time(self._end)) * 1e-3 / len(runs)

        return replay


Clock = CpuClock | CudaClock


def clock_of(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


def host_seconds(run: Run, clock: Clock, samples: int = 7) -> float:
    """What the caller waits for: so few calls that the launch queue takes them all."""
    taken = []
    for _ in range(samples):
        run()
        clock.synchronise()
        start = time.perf_counter()
        for _ in range(clock.host_calls):
            run()
        taken.append((time.perf_counter() - start) / clock.host_calls)
        clock.synchronise()
    return statistics.median(taken)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Unlike torch.equal it tells -0.0 from 0.0, and NaN equals the same NaN."""
    return left.dtype == right.dtype and torch.equal(
        left.view(BITS[left.dtype]), right.view(BITS[right.dtype])
    )
