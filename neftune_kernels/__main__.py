"""python -m neftune_kernels: versions, backends with the reasons why not, instruction set and
threads.
"""

import argparse
import importlib.metadata
import os
import platform
import sys

import torch

from . import __version__, available_backends, self_check
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
            cases = list(self_check.compare(backend, device))
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
