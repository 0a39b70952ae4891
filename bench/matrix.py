"""The versions that the tests passed under: `make matrix`.

    python -m bench.matrix            goes on where it stopped; writes bench/results/matrix.md
    python -m bench.matrix NAMES      only these rows, anew

A row is an environment below build/matrix: a Python, a torch, what else the row names, and a wheel
of this tree, built by the row's compiler. Its tests are copied elsewhere and run there, so nothing
but the wheel is imported. Pythons are looked for by their names: python3.12, of pyenv's those that
PYENV_VERSION=3.10.13:3.12.1 lists. What a row had is read from its environment afterwards. Exit
status 1 where a test failed or a row was not built; such a row is tried again by the next call.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

from .junit import cases_of, counted, failures
from .resumed import ROOT, before_now, fingerprint, judged_one_by_one
from .zoo_table import WORST_FIRST, is_faulty, worst

RESULT = ROOT / "bench/results/matrix.md"
BUILD = ROOT / "build/matrix"
DONE = ROOT / "build/matrix.jsonl"
JOBS = os.environ.get("JOBS", "2")
BASE = os.environ.get("TORCH", "torch==2.13.0")
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"

TORCH = ("golden", "generator", "autograd", "ops", "modules")
KERNELS = (*TORCH, "backends")
TRAINER = ("patched_trainer",)
MODELS = (  # of bench.zoo
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("phi", "phi3", "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "olmo2"),
    *("cohere", "granite", "stablelm", "starcoder2", "bert", "roberta", "distilbert", "t5"),
    *("bart", "marian", "pegasus", "llava"),
)
TRITON = "triton"  # in its interpreter: the one that this torch brings
LISTED = ("torch", "triton", "numpy", "transformers")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "expecttest", "scipy", "sortedcontainers")
ACCELERATE = "accelerate==1.15.0"


class Row(NamedTuple):
    name: str
    python: str
    torch: str
    packages: tuple[str, ...]
    tests: tuple[str, ...]
    compiler: str = "g++"  # "": none is found
    models: tuple[str, ...] = ()


def _kernels(name: str, python: str, torch: str, *packages: str, compiler: str = "g++") -> Row:
    return Row(name, python, torch, packages or ("numpy",), KERNELS, compiler)


def _torch(python: str, version: str) -> Row:
    """With the triton that this torch asks for."""
    name = f"Python {python}, torch {version}"
    return Row(name, python, f"torch=={version}", ("numpy",), (*TORCH, TRITON))


def _transformers(version: str, models: tuple[str, ...] = ()) -> Row:
    packages = (f"transformers=={version}", ACCELERATE, "numpy")
    return Row(f"transformers {version}", HERE, BASE, packages, TRAINER, "", models)


ROWS = (
    _torch("3.10", "2.10.0"),
    _torch("3.12", "2.11.0"),
    _torch("3.12", "2.12.1"),
    _torch("3.13", "2.14.1"),
    _torch("3.13", "2.15.0"),
    _kernels("g++", HERE, BASE),
    _kernels("clang++", HERE, BASE, compiler="clang++"),
    _kernels("no compiler", HERE, BASE, compiler=""),
    _kernels("numpy 1", HERE, BASE, "numpy==1.26.4", "scipy==1.13.1"),
    *(_transformers(version) for version in ("4.55.4", "4.57.6")),
    *(
        _transformers(version, MODELS)
        for version in ("5.0.0", "5.5.4", "5.10.4", "5.15.1", "5.20.2", "5.23.0", "5.24.0")
    ),
)


def _run(command: list[Any], **options: Any) -> str:
    """What it printed; its last lines in the error where it fails."""
    words = [str(word) for word in command]
    made = subprocess.run(words, capture_output=True, text=True, **options)
    if made.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(made.stdout + made.stderr)[-800:]}")
    return made.stdout


def _newest(compiler: str) -> str:
    """Debian's clang++-19 and the like, else what is called so."""
    names = (
        [f"{compiler}-{version}" for version in range(30, 10, -1)] if "clang" in compiler else []
    )
    return next((name for name in names if shutil.which(name)), compiler)


def _build_environment(row: Row, folder: pathlib.Path) -> dict[str, str]:
    """The row's compiler alone is found, or none."""
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    environment |= {"NEFTUNE_BUILD_CPP": "1" if row.compiler else "auto", "NEFTUNE_BUILD_CUDA": "0"}
    if not row.compiler:
        return environment | {"PATH": str(folder / "bin"), "CC": "gcc", "CXX": "g++"}
    compiler = _newest(row.compiler)
    return environment | {"CC": compiler, "CXX": compiler}


def _environment(row: Row) -> pathlib.Path:
    """The Python of the row's environment, with today's wheel of this tree."""
    folder = BUILD / row.name.replace(" ", "-").replace(",", "")
    python, ready = folder / "bin/python", folder / ".ready"
    asked = "\n".join((row.torch, *row.packages, *TOOLS))
    if not ready.exists() or ready.read_text() != asked:
        shutil.rmtree(folder, ignore_errors=True)
        _run([f"python{row.python}", "-m", "venv", folder])
        pip = [python, "-m", "pip", "install", "--quiet"]
        _run([*pip, "-r", ROOT / "requirements-build.txt"])
        _run([*pip, row.torch, *row.packages, *TOOLS])
        ready.write_text(asked)
    with tempfile.TemporaryDirectory() as copy:  # builds leave files in the tree
        tree = pathlib.Path(copy) / "tree"
        for name in ("neftune_kernels", "neftune_run", "csrc", "third_party"):
            shutil.copytree(
                ROOT / name, tree / name, ignore=shutil.ignore_patterns("_C*", "_build*")
            )
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree / name)
        pip = [python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps"]
        _run([*pip, "--no-build-isolation", tree], env=_build_environment(row, folder))
    return python


ASKED = """
import importlib.metadata, json, platform
import neftune_kernels
found = {"Python": platform.python_version()}
for name in %r:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = "-"
found["C++"] = neftune_kernels.available_backends("cpu")["cpp"]
print(json.dumps(found))
"""


def _judged(
    row: Row, python: pathlib.Path, folder: pathlib.Path, environment: dict[str, str]
) -> tuple[str, list[str]]:
    """How many of the row's models are exact, and those that are wrong: by bench.zoo."""
    if not row.models:
        return "-", []
    command = [python, "-m", "bench.zoo", "--jobs", JOBS, *row.models]
    printed = _run(command, cwd=folder, env=environment)
    entries = json.loads(printed[printed.index("\n{") :])
    found = {name: worst(entry) or "not judged" for name, entry in entries.items()}
    totals = Counter(found.values())
    said = [f"{totals[word]} {word}" for word in (*WORST_FIRST[::-1], "not judged") if totals[word]]
    return ", ".join(said), [
        f"{name}: {found[name]}" for name in found if is_faulty([entries[name]])
    ]


def _copy_tests(folder: pathlib.Path) -> None:
    """And what they import, but the package itself."""
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copytree(ROOT / "examples", folder / "examples")
    bench = shutil.ignore_patterns("results", "__pycache__", "pins")
    shutil.copytree(ROOT / "bench", folder / "bench", ignore=bench)
    shutil.copy(ROOT / "pyproject.toml", folder)


def _tested(
    python: pathlib.Path,
    folder: pathlib.Path,
    environment: dict[str, str],
    names: Sequence[str],
    marks: str,
) -> list[ElementTree.Element]:
    report = BUILD / f"{python.parent.parent.name}.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "-n", JOBS, "--dist", "loadfile", "-m", marks]
    command += [f"--junitxml={report}", "-p", "no:cacheprovider"]
    words = [*map(str, command), *(f"tests/test_{name}.py" for name in names)]
    made = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if not report.exists() or made.returncode not in (0, 1):  # 1: tests failed
        raise RuntimeError(f"pytest ended with {made.returncode}: {made.stdout[-800:]}")
    return cases_of(report)


def _found(row: Row, folder: pathlib.Path) -> dict[str, Any]:
    python = _environment(row)
    _copy_tests(folder)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
        "NEFTUNE_REQUIRE_CPP": "1" if row.compiler else "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # JOBS processes share the cores
        "TOKENIZERS_PARALLELISM": "false",
    }
    had = json.loads(_run([python, "-c", ASKED % (LISTED,)], cwd=folder))
    names = [name for name in row.tests if name != TRITON]
    cases = _tested(python, folder, environment, names, "not long")
    if TRITON in row.tests:
        interpreted = environment | {"TRITON_INTERPRET": "1"}
        cases += _tested(python, folder, interpreted, [TRITON], "gpu and not long")
    models, unlike = _judged(row, python, folder, environment)
    counts = counted(cases)._asdict()
    counts["failed"] += len(unlike)
    return {**had, **counts, "models": models, "wrong": failures(cases) + unlike}


def judge(row: Row) -> dict[str, Any]:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = _found(row, pathlib.Path(folder))
        except RuntimeError as failed:
            found = {"error": str(failed)}
    return {**found, "seconds": round(time.monotonic() - begun)}


def last_results() -> dict[str, Any]:
    """Of each row what came of it last, on whichever sources."""
    lines = DONE.read_text().splitlines() if DONE.exists() else []
    found = map(json.loads, lines)
    return {one["name"]: one for one in found if "error" not in one}


def table(done: dict[str, Any]) -> str:
    head = (
        "row",
        "Python",
        *LISTED,
        "C++ kernel",
        "passed",
        "failed",
        "skipped",
        "models",
        "sources",
    )
    lines = [
        "# Versions that the tests passed under",
        "",
        "Each row is an environment of its own with a wheel of this tree by its compiler; the",
        "tests are copied elsewhere. Rows with a triton run the Triton kernels' tests too, in its",
        "interpreter: no GPU took part. Rows of torch run the tests of its ways to a kernel",
        f"({', '.join(TORCH)}), of compilers and numpy those of",
        f"{KERNELS[-1]} too, of transformers `patch_trainer()`'s and,",
        f"from 5.0 on, judge {len(MODELS)} models as [zoo.md](zoo.md) does: {', '.join(MODELS)}.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * (len(head) - 5)}{'---:|' * 3}---|---|",
    ]
    for row in ROWS:
        one = done.get(row.name)
        if one is None:
            lines.append(f"| {row.name} |{' |' * (len(head) - 6)} not run | | | | |")
            continue
        had = [one.get(name, "-") for name in ("Python", *LISTED)]
        kernel = (row.compiler or "none") if one.get("C++") == "available" else "-"
        counts = [str(one.get(name, "-")) for name in ("passed", "failed", "skipped")]
        models = str(one.get("models", "-"))
        lines.append(f"| {' | '.join((row.name, *had, kernel, *counts, models, one['sources']))} |")
    wrong = [
        f"- {row.name}: {', '.join(f'`{name}`' for name in done[row.name]['wrong'])}"
        for row in ROWS
        if done.get(row.name, {}).get("wrong")
    ]
    lines += ["", *(["Failed:", "", *wrong, ""] if wrong else [])]
    lines += [
        f"{datetime.date.today()}, {platform.system()} {platform.machine()};",
        "written by `make matrix`, which runs rows anew whose sources have changed.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", help="of rows; none: all that are not done yet")
    names = parser.parse_args().names
    by_name = {row.name: row for row in ROWS}
    if unknown := set(names) - set(by_name):
        parser.error(f"no rows {sorted(unknown)}; there are {', '.join(by_name)}")
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = fingerprint(["matrix.py"])
    before = before_now(DONE, sources)
    asked = names or [one for one in by_name if one not in before or "error" in before[one]]
    judged_one_by_one(asked, DONE, sources, lambda name: judge(by_name[name]), anew=True)
    done = before_now(DONE, sources)
    RESULT.write_text(table(last_results()))
    for name in asked:
        one = done[name]
        if "error" in one or one["failed"]:
            print(f"{name}: {one.get('error') or one['wrong']}")
    print(f"wrote {RESULT.relative_to(ROOT)}")
    return 1 if any("error" in done[name] or done[name]["failed"] for name in asked) else 0


if __name__ == "__main__":
    raise SystemExit(main())
