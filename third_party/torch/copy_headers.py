"""Copies here what the kernels include of the torch that this Python has, and its licence."""

import importlib.metadata
import pathlib
import shutil
import subprocess

import torch

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
INSTALLED = pathlib.Path(torch.__file__).parent / "include"


def included(source: pathlib.Path, include: pathlib.Path) -> set[pathlib.Path]:
    """The headers in that folder which the source includes, themselves or by another, relative."""
    options = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-I", str(include)]
    rule = subprocess.run(
        ["g++", *options, "-M", str(source)], capture_output=True, text=True, check=True
    ).stdout
    found = map(pathlib.Path, rule.replace("\\\n", " ").split())
    return {path.relative_to(include) for path in found if path.is_relative_to(include)}


def main() -> None:
    shutil.rmtree(HERE / "include", ignore_errors=True)
    for source in sorted(CSRC.rglob("*.cpp")):
        for header in included(source, INSTALLED):
            target = HERE / "include" / header
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(INSTALLED / header, target)
    files = importlib.metadata.files("torch") or []
    (licence,) = (file for file in files if file.match("*.dist-info/licenses/LICENSE"))
    shutil.copyfile(licence.locate(), HERE / "LICENSE")
    print(f"of torch {torch.__version__}: {len([*HERE.rglob('*.h')])} headers and the licence")


if __name__ == "__main__":
    main()
