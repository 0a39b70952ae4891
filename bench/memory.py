"""Peak extra memory of one forward, and of forward and backward: `python -m bench.memory`.

How: torch's profiler records every allocation and release of the CPU allocator, also those inside
    operators and C++ kernels
(`profile_memory=True`); the peak is the largest running sum of what was requested since the call
began. Weight, ids and the gradient that arrives from above exist before. Beside it stands what the
process's resident set grew by (Linux: VmHWM after a reset through /proc/self/clear_refs, the C
library's free lists trimmed first), which would also show scratch taken behind the allocator's
back, and shows what was released midway but kept by the C library (HF's hook with backward).

The promise: the output and O(tokens) bytes, forward and backward; no second (tokens, d) buffer. So
what ours takes beyond the result (the output; with backward also the (V, d) gradient) must stay
below a fixed number of bytes per token, whatever d is.
"""

import argparse
import contextlib
import ctypes
import gc
import os
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # read when torch is imported: no profiler messages between the lines of the table

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from neftune_kernels import noisy_embedding

from .cases import DTYPES, NOISE_ALPHA, SHAPES, Case, Inputs, hf_hook, make_case, make_inputs
from .machine import describe, machine_line

PER_TOKEN = (
    128  # bytes, forward: the layout of a mask and what computing it takes, all 1-D int64 or bool
)
PER_TOKEN_BACKWARD = (
    640  # a narrow strip of columns at a time; a whole bfloat16 row of SmolLM2 would be 1152
)
SLACK = 4096


class Peak(NamedTuple):
    allocated: int  # bytes, torch's allocator
    resident: int | None  # bytes, the process


def allocator_peak(run: Callable[[], object]) -> int:
    """The largest sum of live bytes that the CPU allocator handed out during `run`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [
        event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"
    ]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def resident_peak(run: Callable[[], object]) -> int | None:
    """Growth of the resident set's high-water mark during `run`; None where the system does not
    tell.
    """
    clear, status = pathlib.Path("/proc/self/clear_refs"), pathlib.Path("/proc/self/status")

    def kilobytes(field: str) -> int:
        return next(
            int(line.split()[1])
            for line in status.read_text().splitlines()
            if line.startswith(field)
        )

    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        clear.write_text("5")
        before = kilobytes("VmRSS")
        run()
        return max(0, kilobytes("VmHWM") - before) << 10
    except OSError:
        return None


class Subject(NamedTuple):
    name: str
    run: Callable[[Inputs], Tensor]
    ours: bool


def scaled(scale: float) -> list[Subject]:
    """F.embedding and ours with an embed_scale; HF's hook has none."""
    if scale == 1:
        return [
            Subject(
                "F.embedding", lambda inputs: F.embedding(inputs.input_ids, inputs.weight), False
            ),
            Subject(
                "ours",
                lambda inputs: noisy_embedding(inputs.input_ids, inputs.weight, NOISE_ALPHA),
                True,
            ),
            Subject(
                "ours, attention_mask",
                lambda inputs: noisy_embedding(
                    inputs.input_ids,
                    inputs.weight,
                    NOISE_ALPHA,
                    attention_mask=inputs.attention_mask,
                ),
                True,
            ),
            Subject("HF hook", hf_hook, False),
        ]
    return [
        Subject(
            "F.embedding · scale",
            lambda inputs: F.embedding(inputs.input_ids, inputs.weight) * scale,
            False,
        ),
        Subject(
            "ours",
            lambda inputs: noisy_embedding(
                inputs.input_ids, inputs.weight, NOISE_ALPHA, embed_scale=scale
            ),
            True,
        ),
    ]


def measure(subject: Subject, inputs: Inputs, backward: bool) -> Peak:
    gradient = torch.ones_like(inputs.out) if backward else None

    def run() -> Tensor:
        out = subject.run(inputs)
        if gradient is not None:
            out.backward(gradient)
        return out

    def forget() -> None:
        inputs.weight.grad = None
        gc.collect()

    run()  # first calls allocate caches of their own
    forget()
    resident = resident_peak(run)
    forget()
    allocated = allocator_peak(run)
    forget()
    return Peak(allocated, resident)


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.2f}"


def measure_case(case: Case) -> int:
    """Prints the table of one case; returns how many of ours break the promise."""
    output, gradient = (
        case.elements * case.dtype.itemsize,
        case.num_embeddings * case.embedding_dim * case.dtype.itemsize,
    )
    print(
        f"\n{case.model} {case.shape} V={case.num_embeddings} {case.dtype_name}: one (tokens, d) "
        f"buffer {mebibytes(output)} MiB, the "
        f"weight's gradient {mebibytes(gradient)} MiB"
    )
    print(f"  {'':56} {'peak MiB':>9} {'beyond':>9} {'resident':>9}")
    inputs, broken = make_inputs(case)[0], 0
    for frozen in (True, False):
        weight = nn.Parameter(inputs.weight, requires_grad=not frozen)
        for scale in (1.0, 1.5):
            for backward in (False,) if frozen else (False, True):
                result = output + (gradient if backward else 0)
                allowed = (PER_TOKEN_BACKWARD if backward else PER_TOKEN) * case.tokens + SLACK
                for subject in scaled(scale):
                    peak = measure(subject, inputs._replace(weight=weight), backward)
                    beyond, verdict = peak.allocated - result, ""
                    if subject.ours:
                        broken += beyond > allowed
                        verdict = (
                            "ok" if beyond <= allowed else f"TOO MUCH, allowed {mebibytes(allowed)}"
                        )
                    weight_is = "frozen" if frozen else "with grad"
                    passes = "forward + backward" if backward else "forward"
                    what = f"{weight_is}, {passes}, scale {scale:g}: "
                    print(
                        f"  {what + subject.name:56} {mebibytes(peak.allocated):>9} "
                        f"{mebibytes(beyond):>9} "
                        f"{mebibytes(peak.resident):>9}  {verdict}".rstrip()
                    )
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama2-7b", "smollm2"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine_line(describe(options.threads)))
    broken = sum(
        measure_case(make_case(key, DTYPES[dtype]))
        for key in options.shapes
        for dtype in options.dtypes
    )
    print(f"\n{broken} measurements of ours beyond the promise")
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main())
