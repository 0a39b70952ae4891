"""`pytest -m gpu` where little is installed: a GPU machine has torch, triton, numpy, scipy, pytest
and transformers, and whatever these need; no package of ours, no plugins, no trainers.
"""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PRESENT = ("torch", "triton", "numpy", "scipy", "pytest", "transformers", "setuptools")
# Runs before anything is imported: what is not needed by PRESENT can neither be imported nor found
# by its metadata, which transformers asks as well, nor does it register plugins.
PROGRAM = """
import importlib.machinery
import importlib.metadata
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

found = importlib.machinery.PathFinder
allowed, waiting = set(), [*sys.argv[1].split(",")]
while waiting:
    name = canonicalize_name(waiting.pop())
    if name in allowed:
        continue
    try:
        requires = importlib.metadata.requires(name) or ()
    except importlib.metadata.PackageNotFoundError:
        continue
    allowed.add(name)
    for requirement in map(Requirement, requires):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            waiting.append(requirement.name)
hidden = {
    module
    for module, names in importlib.metadata.packages_distributions().items()
    if not any(canonicalize_name(name) in allowed for name in names)
} - {"neftune_kernels"}


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in hidden else found.find_spec(name, path, target)

    @staticmethod
    def find_distributions(*context):
        for distribution in found.find_distributions(*context):
            name = distribution.metadata["Name"]
            if name and canonicalize_name(name) in allowed:
                yield distribution

    invalidate_caches = staticmethod(found.invalidate_caches)


builtin = (importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter)
sys.meta_path[:] = [*builtin, Finder]
print("hidden:", *sorted(hidden))

import pytest

sys.exit(pytest.main(sys.argv[2:]))
"""


def run(*arguments):
    """pytest with few packages; without the working directory on the path, as `pytest` has it."""
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", PROGRAM]
    command += [",".join(PRESENT), "-p", "no:cacheprovider", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_collects_with_few_packages():
    done = run("-m", "gpu", "--collect-only", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    hidden = done.stdout.split("hidden:", 1)[1].splitlines()[0].split()
    assert not set(PRESENT) & set(hidden)
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected == {
        "tests/test_cuda.py",
        "tests/test_cuda_gradients.py",
        "tests/test_triton.py",
        "tests/test_triton_gradients.py",
    }


def test_hidden_is_hidden(tmp_path):
    """The test above can fail: a file that needs more is an error of the collection."""
    pytest.importorskip("expecttest")
    (tmp_path / "test_needs_more.py").write_text("import expecttest\n")
    done = run("--collect-only", "-q", f"--rootdir={tmp_path}", str(tmp_path))
    assert done.returncode == 2 and "No module named 'expecttest'" in done.stdout
