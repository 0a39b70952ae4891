"""Device, driver and versions as JSON: `python -m bench.gpu.machine`.

Only asks; exit status 2 without the device. A process of its own, so that bench.first_gpu itself
never holds a context on the device.
"""

import json
import platform
import re
import subprocess
import sys

import torch

from .step import NO_DEVICE, PASSED, find_tool, parser_of, setting_of

QUERIES = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
STATE = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_throttle_reasons.active"


def ask(command: list[str], pattern: str = "(.*)") -> str:
    """The pattern's first group in what the command prints; the reason where there is none."""
    path = find_tool(command[0])
    if path is None:
        return f"no {command[0]} here"
    try:
        done = subprocess.run([path, *command[1:]], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} failed: {type(error).__name__}"
    found = re.search(pattern, done.stdout)
    return found[1].strip() if found else f"{command[0]} exit status {done.returncode}"


def nvidia_smi(queries: str) -> str:
    return ask(["nvidia-smi", f"--query-gpu={queries}", "--format=csv,noheader"])


def version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def describe(device: str) -> dict[str, str]:
    found = {
        "device": f"{platform.machine()} CPU, no GPU: this checks the program",
        "capability": "",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["multiprocessors"] = str(properties.multi_processor_count)
        found["nvidia-smi"] = f"{QUERIES}: {nvidia_smi(QUERIES)}"
        found["state"] = f"{STATE}: {nvidia_smi(STATE)}"
    found |= {
        package: version(package)
        for package in ("triton", "numpy", "scipy", "transformers", "pytest")
    }
    found |= {
        "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda),
        "Python": platform.python_version(),
    }
    found["nvcc"] = ask(["nvcc", "--version"], r"release [\d.]+, V([\d.]+)")
    found["g++"] = ask(["g++", "--version"])
    return found


def main(arguments: list[str] | None = None) -> int:
    setting = setting_of(parser_of(__doc__, "machine"), arguments)
    if setting.device == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device", file=sys.stderr)
        return NO_DEVICE
    print(json.dumps(describe(setting.device)))
    return PASSED


if __name__ == "__main__":
    sys.exit(main())
