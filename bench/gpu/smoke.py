"""Every dtype, width, layout and backend against the reference: `python -m bench.gpu.smoke`.

The reference runs on the CPU, and every bit must be equal. Each case is called twice: the first
launch compiles and goes through Triton's own launcher, the second through the fast one.
"""

import sys
import time
from typing import Any

import torch
from torch import Tensor

from neftune_kernels import available_backends, noisy_embedding

from .clock import same_bits
from .report import table
from .step import FAILED, PASSED, Setting, parser_of, setting_of

BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("cpp",)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (
    4096,
    576,
    100,
)  # whole blocks; blocks and a rest; rows that are not aligned to 16 bytes in two of the dtypes
ROWS, COLUMNS, VOCABULARY = 4, 77, 1000
NOISE_ALPHA = 5.0
WHAT = "equals the reference"
CALLS = ("first launch", "second launch")


def layouts(generator: torch.Generator, vocabulary: int) -> dict[str, dict[str, Any]]:
    """Hard ones: holes, left padding, numbered and empty documents, positions that start again."""
    shape = (ROWS, COLUMNS)
    mask = torch.randint(0, 3, shape, generator=generator)
    mask[1, :40] = 0
    place = torch.arange(COLUMNS).repeat(ROWS, 1)
    place[:, 40:] -= 40
    tokens = ROWS * COLUMNS
    return {
        "nothing": {},
        "int64 mask": {"attention_mask": mask},
        "bool mask": {"attention_mask": mask != 0},
        "lengths": {"lengths": torch.tensor([COLUMNS, 0, 1, 50])},
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 5, 5, 300, tokens], dtype=torch.int32)},
        "position_ids": {"position_ids": place},
        "noise_mask": {
            "attention_mask": mask,
            "noise_mask": torch.rand(shape, generator=generator) < 0.5,
        },
        "padding_idx": {"padding_idx": vocabulary // 2},
        "embed_scale": {"embed_scale": 1.7, "lengths": torch.tensor([COLUMNS, 3, 70, 50])},
    }


def on(device: str, given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }


def difference(got: Tensor, expected: Tensor) -> str:
    """ "" where every bit is equal, else how many elements differ and the first of them."""
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    if same_bits(got, expected):
        return ""
    found = ((got != expected) & ~(got.isnan() & expected.isnan())).nonzero()
    if not len(found):
        return "differs in the sign of zeros or in NaN alone"
    first = tuple(found[0].tolist())
    values = f"{got[first].item()!r} instead of {expected[first].item()!r}"
    return f"{len(found)} of {got.numel()} elements differ, first at {first}: {values}"


def wrong_calls(
    backend: str, device: str, ids: Tensor, weight: Tensor, cases: dict[str, dict[str, Any]]
) -> list[tuple[str, str, str]]:
    """(layout, call, what is wrong) of one table of embeddings.

    A launch that raises is wrong, and no reason to leave out the rest.
    """
    found = []
    ids_there, weight_there = ids.to(device), weight.to(device)
    for layout, given in cases.items():
        arguments: dict[str, Any] = {"seed": 3, **given}
        expected = noisy_embedding(ids, weight, NOISE_ALPHA, **arguments, backend="reference")
        told = on(device, arguments)
        for call in CALLS:
            try:
                got = noisy_embedding(ids_there, weight_there, NOISE_ALPHA, **told, backend=backend)
                wrong = difference(got.cpu(), expected)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"[:300]
            if wrong:
                found.append((layout, call, wrong))
    return found


def smoke(setting: Setting) -> int:
    widths, vocabulary = ((64, 20), 50) if setting.tiny else (WIDTHS, VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (ROWS, COLUMNS), generator=generator)
    ids[2, ::5] = vocabulary // 2
    cases = layouts(generator, vocabulary)
    calls, all_wrong, counts = len(cases) * len(CALLS), 0, []
    for backend in BACKENDS[setting.device]:
        reason = available_backends(setting.device)[backend]
        if reason != "available":
            all_wrong += 1
            setting.write("backend", "failed", backend=backend, note=reason)
            print(f"- **{backend}** is not available: {reason}")
            continue
        for dtype in DTYPES:
            for width in widths:
                start = time.monotonic()
                weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
                wrong = wrong_calls(backend, setting.device, ids, weight, cases)
                fields = {
                    "shape": f"({ROWS}, {COLUMNS}, {width})",
                    "dtype": str(dtype).removeprefix("torch."),
                    "backend": backend,
                }
                for layout, call, what in wrong:
                    setting.write(call, "failed", layout=layout, note=what, **fields)
                    case = f"{layout}, {fields['dtype']}, d = {width}, {call}"
                    print(f"- **{backend}**, {case}: {what}")
                all_wrong += len(wrong)
                seconds = time.monotonic() - start
                note = f"{calls - len(wrong)} of {calls} calls equal"
                outcome = "failed" if wrong else "passed"
                setting.write(WHAT, outcome, seconds=seconds, note=note, **fields)
                counts.append((backend, fields["dtype"], width, note, f"{seconds:.1f} s"))
    print("\n" + table(("backend", "dtype", "d", WHAT, "took"), counts))
    return FAILED if all_wrong else PASSED


def main(arguments: list[str] | None = None) -> int:
    return smoke(setting_of(parser_of(__doc__, "smoke"), arguments))


if __name__ == "__main__":
    sys.exit(main())
