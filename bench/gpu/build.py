"""Both native parts in place, CUDA for this GPU alone, no network: `python -m bench.gpu.build`."""

import os
import pathlib
import sys

import torch

from . import process
from .report import fenced
from .step import FAILED, PASSED, Setting, parser_of, setting_of

LIBRARIES = {
    "cpp": ("_C.*so", "_build_error.txt"),
    "cuda": ("_C_cuda.*so", "_build_error_cuda.txt"),
}
PACKAGE = pathlib.Path("neftune_kernels")


def environment(device: str) -> dict[str, str]:
    if device == "cpu":
        return {"NEFTUNE_BUILD_CUDA": "0"}
    major, minor = torch.cuda.get_device_capability(0)
    return {"NEFTUNE_BUILD_CUDA": "1", "NEFTUNE_CUDA_ARCHS": f"{major}{minor}"}


def run_setup(setting: Setting, variables: dict[str, str]) -> process.Ended:
    settings = " ".join(f"{name}={value}" for name, value in variables.items())
    print(f"`{settings} python setup.py build_ext --inplace`")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    ended = process.run(command, setting.left, setting.log, env=os.environ | variables)
    if ended.code != 0:
        print(f"\n{ended}; the log's end:\n{fenced(process.tail(setting.log))}")
    return ended


def build(setting: Setting) -> int:
    variables = environment(setting.device)
    ended = run_setup(setting, variables)
    if ended.code and variables["NEFTUNE_BUILD_CUDA"] == "1":
        # The failure leaves the C++ kernel, too, out of the package.
        run_setup(setting, {"NEFTUNE_BUILD_CUDA": "0"})
    print()
    failed = ended.code != 0
    for backend in LIBRARIES if setting.device == "cuda" else ("cpp",):
        pattern, reason_name = LIBRARIES[backend]
        built, reason = sorted(PACKAGE.glob(pattern)), PACKAGE / reason_name
        if built:
            outcome, note = "passed", f"{built[0]}, {built[0].stat().st_size} bytes"
        else:
            failed, outcome = True, "failed"
            note = reason.read_text().strip()[:500] if reason.exists() else "not built"
        setting.write("library", outcome, backend=backend, note=note)
        print(f"- {backend}: {note}")
    return FAILED if failed else PASSED


def main(arguments: list[str] | None = None) -> int:
    return build(setting_of(parser_of(__doc__, "build"), arguments))


if __name__ == "__main__":
    sys.exit(main())
