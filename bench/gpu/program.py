"""A small program for NVIDIA's tools to watch: `python -m bench.gpu.program checked|profiled`.

Every launch of it is one of ours or a lookup; inputs are made by torch.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from neftune_kernels import available_backends, noisy_embedding

from .smoke import BACKENDS

NOISE_ALPHA = 5.0
PROFILED = ((8, 512, 4096), (1, 8, 4096), (1, 65536, 1024))  # (B, T, d)


def layouts(rows: int, columns: int, device: str) -> Iterator[dict[str, Any]]:
    tokens = rows * columns
    mask = torch.randint(0, 3, (rows, columns), device=device)
    yield {}
    yield {"attention_mask": mask}
    yield {"lengths": torch.full((rows,), columns - 1, device=device)}
    yield {"cu_seqlens": torch.tensor([0, tokens // 2, tokens // 2, tokens], device=device)}
    yield {"position_ids": torch.arange(columns, device=device)[None] % 11}
    yield {"padding_idx": 3, "embed_scale": 1.7}


def checked(backend: str, device: str) -> int:
    """Every layout, at widths of whole blocks, of a rest and of rows that are not aligned."""
    calls = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (20, 576, 4096) if device == "cuda" else (20,):
            ids, weight = (
                torch.randint(30, (3, 41), device=device),
                torch.zeros(30, width, dtype=dtype, device=device),
            )
            for given in layouts(3, 41, device):
                noisy_embedding(ids, weight, NOISE_ALPHA, seed=1, **given, backend=backend)
                calls += 1
    return calls


def profiled(backend: str, device: str) -> int:
    calls = 0
    for rows, columns, width in PROFILED if device == "cuda" else ((2, 3, 8),):
        ids = torch.randint(32000, (rows, columns), device=device)
        weight = torch.zeros(32000, width, dtype=torch.bfloat16, device=device)
        F.embedding(ids, weight)
        ones = torch.ones(rows, columns, dtype=torch.int64, device=device)
        masks: tuple[dict[str, Any], ...] = ({}, {"attention_mask": ones})
        for given in masks:
            noisy_embedding(ids, weight, NOISE_ALPHA, seed=1, **given, backend=backend)
            calls += 1
    return calls


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("checked", "profiled"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args(arguments)
    for backend in BACKENDS[given.device]:
        reason = available_backends(given.device)[backend]
        if reason != "available":
            print(f"{backend}: {reason}")
            continue
        calls = (checked if given.kind == "checked" else profiled)(backend, given.device)
        print(f"{backend}: {calls} calls")
    if given.device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
