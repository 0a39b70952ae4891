"""python -m neftune_kernels: versions, backends with the reasons why not, instruction set and
threads.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import __version__, available_backends, noisy_embedding, self_check
from .backends import native_cuda, simd_level


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    lines = [
        f"neftune_kernels {__version__}, Python {platform.python_version()}, torch "
        f"{torch.__version__}"
    ]
    lines.append(
        ", ".join(
            f"{package} {_version(package)}"
            for package in ("triton", "transformers", "trl", "peft")
        )
    )
    lines.append("")
    devices = ["cpu"]
    if torch.accelerator.is_available():
        devices.append(torch.accelerator.current_accelerator().type)  # type: ignore[union-attr]
    for device in devices:
        lines.append(f"backends on {device}:")
        lines += [f"  {name:<10} {reason}" for name, reason in available_backends(device).items()]
    lines.append("")
    lines.append(f"SIMD level of the C++ kernel: {simd_level()}")
    lines.append(f"CUDA C++ kernels: {native_cuda.reason or 'loaded'}")
    lines.append(f"CPU threads (torch.get_num_threads()): {torch.get_num_threads()}")
    switches = {name: value for name, value in os.environ.items() if name.startswith("NEFTUNE_")}
    if switches:
        lines.append(
            "switches: " + ", ".join(f"{name}={switches[name]}" for name in sorted(switches))
        )
    return "\n".join(lines)


# ---- --check


WIDTHS = (20, 576, 4096)  # columns: read one by one, in one piece, in several


class Case(NamedTuple):
    backend: str
    dtype: torch.dtype
    embedding_dim: int
    layout: str
    same: bool


def _layouts(device: torch.device) -> dict[str, dict[str, Any]]:
    """Keywords of noisy_embedding for ids (3, 41)."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 3, (3, 41), generator=generator)
    told: dict[str, dict[str, Tensor]] = {
        "nothing": {},
        "attention_mask": {"attention_mask": mask},
        "bool attention_mask": {"attention_mask": mask != 0},
        "lengths": {"lengths": torch.tensor([41, 0, 7])},
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 5, 5, 100, 123])},
        "position_ids": {"position_ids": torch.arange(41).expand(3, 41) % 11},
        "noise_mask": {"noise_mask": mask != 1},
    }
    return {
        name: {word: value.to(device) for word, value in given.items()}
        for name, given in told.items()
    }


def compare(backend: str, device: torch.device) -> Iterator[Case]:
    """noisy_embedding by the backend against the reference on the CPU: every dtype, layout and kind
    of row, each twice, as the first call of a kernel is launched in another way.
    """
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 100, (3, 41), generator=generator)
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for embedding_dim in WIDTHS:
            weight = torch.randn(100, embedding_dim, generator=generator).to(dtype)
            on_device = input_ids.to(device), weight.to(device)
            for layout, given in _layouts(device).items():
                expected = noisy_embedding(
                    input_ids,
                    weight,
                    5.0,
                    **_layouts(cpu)[layout],
                    embed_scale=1.7,
                    seed=3,
                    replica=1,
                    backend="reference",
                )
                outs = [
                    noisy_embedding(
                        *on_device,
                        5.0,
                        **given,
                        embed_scale=1.7,
                        seed=3,
                        replica=1,
                        backend=backend,
                    )
                    for _ in range(2)
                ]
                same = all(self_check.same_bits(out.cpu(), expected) for out in outs)
                yield Case(backend, dtype, embedding_dim, layout, same)


def check() -> bool:
    """Print, for every backend present, how many results equal the reference's; whether all do."""
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        devices.append(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    right = True
    for device in devices:
        for backend, reason in available_backends(device.type).items():
            if backend == "reference" and device.type == "cpu":
                continue  # what the others are compared with
            if reason != "available":
                print(f"{backend} on {device.type}: not compared, {reason}")
                continue
            cases = list(compare(backend, device))
            wrong = [case for case in cases if not case.same]
            print(f"{backend} on {device.type}: {len(cases) - len(wrong)} of {len(cases)} equal")
            for case in wrong:
                print(f"  WRONG: {case.dtype}, {case.embedding_dim} columns, {case.layout}")
            right = right and not wrong
    return right


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m neftune_kernels", description=__doc__)
    about = "compare every backend present with the reference, bit for bit; exits 1 if one differs"
    parser.add_argument("--check", action="store_true", help=about)
    arguments = parser.parse_args()
    print(report())
    if not arguments.check:
        return 0
    print()
    return 0 if check() else 1


if __name__ == "__main__":
    sys.exit(main())
