"""python -m neftune_kernels: versions, backends with the reasons why not, instruction set and
threads.
"""

import importlib.metadata
import platform
import sys

import torch

from . import __version__, available_backends
from .ops import native_cuda, simd_level


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
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
