"""A source install with no compiler succeeds and says why there is no C++ kernel; the report runs;
the docs' examples hold.
"""

import doctest
import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import venv

import pytest
import torch

import neftune_kernels
from neftune_kernels import backends

ROOT = pathlib.Path(__file__).parent.parent


def run(*command, folder=None, **environment):
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def source_copy(folder):
    keep = shutil.ignore_patterns("*.so", "_build_error*.txt", "__pycache__")
    shutil.copytree(ROOT / "neftune_kernels", folder / "neftune_kernels", ignore=keep)
    shutil.copytree(ROOT / "neftune_run", folder / "neftune_run", ignore=keep)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "third_party", folder / "third_party", ignore=keep)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)


def install(tmp_path, **environment):
    """pip install of a source copy into a fresh environment that sees this one's torch and
    setuptools.
    """
    source, home = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    source_copy(source)
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = next((home / "lib").glob("python*")) / "site-packages"
    (site / "outer.pth").write_text(str(pathlib.Path(torch.__file__).parent.parent) + "\n")
    log = run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-v",
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        site,
        source,
        **{"NEFTUNE_BUILD_CUDA": "0", **environment},  # tests/test_cuda_build.py builds those
    )
    return log, lambda *code: run(
        python, *code, folder=home
    )  # not here: python -m would find this checkout first


@pytest.mark.skipif(os.name != "posix", reason="the kernel is built with g++ or clang++")
def test_install_without_a_compiler(tmp_path):
    log, python = install(tmp_path, CXX="no-such-compiler", CC="no-such-compiler")
    assert "NO C++ KERNEL" in log
    report = python("-m", "neftune_kernels")
    assert re.search(r"cpp +not built: .*no-such-compiler", report), report
    assert "SIMD level of the C++ kernel: none" in report
    code = (
        "import torch, neftune_kernels as nk; ids = torch.tensor([[1, 2]]); weight = "
        "torch.ones(3, 4)\n"
        "print(nk.__file__); out = nk.noisy_embedding(ids, weight, 5.0, seed=1); print('moved', "
        "bool((out != 1).all()))\n"
        "nk.noisy_embedding(ids, weight, 5.0, backend='reference')\n"
        "try: nk.noisy_embedding(ids, weight, 5.0, backend='cpp')\n"
        "except ValueError as error: print('refused:', error)"
    )
    out = python("-c", code)
    assert str(tmp_path) in out and "moved True" in out
    assert re.search(
        "refused: backend 'cpp' is not available: not built: .*no-such-compiler", out
    ), out
    starts_nothing(tmp_path, python)


def starts_nothing(tmp_path, python):
    """What is installed runs at Python's start under neftune-run, and only then."""
    (script,) = (tmp_path / "venv").rglob("neftune-run")
    site = script.parent.parent
    assert {file.name for file in site.glob("*.pth")} == {"outer.pth"}  # ours, to find torch
    assert not list(site.glob("*customize*")) and (site / "neftune_run").exists()
    code = (
        "import sys; print([name for name in sys.modules if 'custom' in name or 'neftune' in name])"
    )
    assert python("-c", code) == "[]\n"
    reached = run(script, tmp_path / "venv" / "bin" / "python", "-c", code, PYTHONPATH=str(site))
    assert reached.startswith("['sitecustomize']\n") and "neftune-run: no noise" in reached


def test_source_distribution_has_the_launcher(tmp_path):
    source_copy(tmp_path)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    run(sys.executable, "-c", code, folder=tmp_path)
    (file,) = (tmp_path / "dist").iterdir()
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    launcher = {"__init__.py", "__main__.py", "site/sitecustomize.py"}
    assert {f"neftune_run/{name}" for name in launcher} <= names


def test_install_with_a_compiler_builds(tmp_path):
    """Extension(optional=True) hides compile errors, so somebody has to look."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    log, python = install(tmp_path)
    assert "NO C++ KERNEL" not in log
    assert re.search(r"cpp +available", python("-m", "neftune_kernels"))


def test_library_that_does_not_load_says_why(tmp_path):
    source_copy(tmp_path)
    (tmp_path / "neftune_kernels" / "_C.abi3.so").write_bytes(b"not a library")
    report = run(sys.executable, "-m", "neftune_kernels", folder=tmp_path)
    assert re.search(r"cpp +_C.abi3.so failed to load: .*(too short|invalid ELF)", report), report


def test_switched_off_library_says_so():
    report = run(sys.executable, "-m", "neftune_kernels", NEFTUNE_DISABLE_CPP="1")
    assert re.search(r"cpp +switched off by NEFTUNE_DISABLE_CPP=1", report)


def test_report():
    report = run(sys.executable, "-m", "neftune_kernels")
    assert (
        f"neftune_kernels {neftune_kernels.__version__}" in report
        and f"torch {torch.__version__}" in report
    )
    assert (
        re.search(r"reference +available", report)
        and f"SIMD level of the C++ kernel: {backends.simd_level()}" in report
    )
    assert "CPU threads (torch.get_num_threads()): " in report


@pytest.mark.parametrize(
    "module",
    [
        "backends",
        "distributed",
        "functional",
        "integrations.lightning",
        "integrations.apply",
        "integrations.transformers",
        "modules",
        "schedules",
    ],
)
def test_docstring_examples(module):
    names = {**vars(neftune_kernels), "torch": torch, "nn": torch.nn}
    failed, attempted = doctest.testmod(
        importlib.import_module(f"neftune_kernels.{module}"), extraglobs=names
    )
    assert attempted > 0 and failed == 0


def test_import_is_quiet_and_light():
    """No printing, no warnings, no transformers at import."""
    heavy = "{'transformers', 'peft', 'trl', 'triton', 'lightning_utilities'}"
    code = f"import sys, neftune_kernels; assert not {heavy} & set(sys.modules), 'heavy import'"
    assert run(sys.executable, "-W", "error", "-c", code) == ""
