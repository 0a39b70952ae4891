"""Wrong code that the tests must see: every mutant of mutants.toml against its own test files.

    python -m bench.mutants             those not decided yet; writes bench/results/mutants.md
    python -m bench.mutants overlap     only those whose name holds the word, anew

A mutant is one text of one file replaced, in a copy of the working tree. It is killed where its
tests fail, after they passed unchanged. What was decided stands in bench/results/mutants.json for
as long as neither the file, nor the mutant, nor its tests change: a run that was stopped goes on,
in another clone too. The exit status is 1 where a mutant survives that is not explained as
equivalent, or an explained one dies.
"""

import argparse
import ast
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time
from typing import Any, NamedTuple

import tomllib
import torch

from setup import COMPILE_FLAGS, SIMD_FLAGS, TORCH_INCLUDE, TORCH_TARGET_VERSION, kernel

from .machine import cpu_model

ROOT = pathlib.Path(__file__).parent.parent
LIST = pathlib.Path(__file__).with_name("mutants.toml")
RESULT = pathlib.Path(__file__).parent / "results" / "mutants.md"
WORK = ROOT / "build" / "mutants"
TREE = WORK / "tree"
OUTCOMES = RESULT.with_suffix(".json")
OBJECTS = WORK / "objects.txt"  # of which sources
LIBRARY = pathlib.Path("neftune_kernels", "_C.abi3.so")
SHARED_BY_TESTS = ("tests/conftest.py", "tests/oracle.py")
SECONDS = 900  # the longest one pytest may take: a mutant that does not end is killed
NO_VERDICT = (3, 4, 5)  # pytest's own: an internal error, a wrong command, no test
RUNS = {
    "python": ({}, ["-m", "pytest"], "not long"),
    "interpreter": ({"TRITON_INTERPRET": "1"}, ["-m", "pytest"], "gpu and not long"),
    "ir": ({}, ["-m", "ttsem.sanitize", "pytest"], "gpu and not long"),
}


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # stands in the file exactly once
    new: str
    tests: list[str]
    run: str = "python"  # how pytest runs: a key of RUNS
    equivalent: str = ""  # why no test can tell

    @property
    def suite(self) -> str:
        return " ".join((self.run, *self.tests))


class NoVerdict(Exception):
    """Neither passed nor failed: pytest did not run the tests."""


class Outcome(NamedTuple):
    killed: bool
    by: str  # the first test that failed
    seconds: float


def read_list(tree: pathlib.Path = ROOT) -> list[Mutant]:
    """The list, every entry of which applies to the files of this tree."""
    mutants = [Mutant(**entry) for entry in tomllib.loads(LIST.read_text())["mutant"]]
    names = [mutant.name for mutant in mutants]
    if len(set(names)) != len(names) or len(names) > 150:
        raise SystemExit(f"{LIST.name}: names must differ, and be 150 at most, got {len(names)}")
    for mutant in mutants:
        source = (tree / mutant.file).read_text()
        found = source.count(mutant.old)
        if found != 1 or mutant.old == mutant.new:
            raise SystemExit(f"{mutant.name!r}: {mutant.file} holds its old text {found} times")
        if mutant.file.endswith(".py"):
            try:
                ast.parse(source.replace(mutant.old, mutant.new))
            except SyntaxError as error:
                raise SystemExit(f"{mutant.name!r} is no Python: {error}") from error
        for test in mutant.tests:
            file, *names = test.split("::")
            source = (tree / file).read_text()
            if not all(re.search(rf"^ *(def )?{name}\b", source, re.MULTILINE) for name in names):
                raise SystemExit(f"{mutant.name!r}: there is no {test}")
    return mutants


def digest(*values: str) -> str:
    return hashlib.sha256("\0".join(values).encode()).hexdigest()[:16]


def texts(names: list[str]) -> list[str]:
    return [(TREE / name.split("::")[0]).read_text() for name in names]


def key_of(mutant: Mutant) -> str:
    files = texts([mutant.file, *mutant.tests, *SHARED_BY_TESTS])
    return digest("mutant", *map(str, mutant), *files)


def key_of_suite(mutant: Mutant) -> str:
    """Of the tests without a mutant: they must pass whatever the package is now."""
    sources = sorted(
        str(path.relative_to(TREE))
        for folder in ("neftune_kernels", "csrc")
        for path in (TREE / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".cu")
    )
    return digest("suite", mutant.suite, *texts([*sources, *mutant.tests, *SHARED_BY_TESTS]))


def make_tree() -> None:
    """The working tree's files but for what git ignores, and the native libraries."""
    shutil.rmtree(TREE, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = [name for name in listed.stdout.split("\0") if name]
    names += [str(path.relative_to(ROOT)) for path in (ROOT / "neftune_kernels").glob("*.so")]
    for name in names:
        if (ROOT / name).is_file():
            (TREE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, TREE / name)


def object_of(source: str, folder: pathlib.Path) -> pathlib.Path:
    return folder / pathlib.Path(source).with_suffix(".o").name


def compile_library(changed: str | None) -> None:
    """The CPU library of the tree from objects: all of them for None or a changed header, which are
    the unchanged code's for None.
    """
    kept, fresh = WORK / "objects", WORK / "changed"
    kept.mkdir(exist_ok=True)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    sources = [str(source) for source in kernel().sources]
    header = changed is not None and changed.endswith(".h")
    again = sources if changed is None or header else [changed]
    into = kept if changed is None else fresh
    for source in again:
        flags = [*COMPILE_FLAGS, "-O1", "-fPIC", *SIMD_FLAGS.get(pathlib.Path(source).name, [])]
        headers = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem"]
        command = ["g++", *flags, *headers, str(TORCH_INCLUDE.resolve()), "-c", source]
        subprocess.run([*command, "-o", str(object_of(source, into))], cwd=TREE, check=True)
    objects = [
        object_of(source, fresh if object_of(source, fresh).exists() else kept)
        for source in sources
    ]
    libraries = (f"-L{pathlib.Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu")
    link = ["g++", "-shared", *map(str, objects), *libraries, "-o", str(TREE / LIBRARY)]
    subprocess.run(link, check=True)


def is_compiled(file: str) -> bool:
    return file.startswith("csrc/") and not file.startswith("csrc/cuda/")


def run_tests(mutant: Mutant) -> Outcome:
    variables, command, marks = RUNS[mutant.run]
    options = ["-q", "-x", "-m", marks, "-p", "no:cacheprovider"]
    environment = os.environ | variables | {"NEFTUNE_REQUIRE_CPP": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command, *options, *mutant.tests],
            cwd=TREE,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Outcome(True, "it does not end", SECONDS)
    seconds = round(time.monotonic() - start, 1)
    if done.returncode in NO_VERDICT:
        raise NoVerdict(f"{mutant.suite}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    by = failed[1] if failed else f"exit status {done.returncode}" if done.returncode else ""
    return Outcome(done.returncode != 0, by, seconds)


def decide(mutant: Mutant) -> Outcome:
    path = TREE / mutant.file
    original = path.read_text()
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        if is_compiled(mutant.file):
            compile_library(mutant.file)
        return run_tests(mutant)
    finally:
        path.write_text(original)
        if is_compiled(mutant.file):
            shutil.copy2(WORK / "unchanged.so", TREE / LIBRARY)


def write_result(mutants: list[Mutant], outcomes: dict[str, Any]) -> None:
    rows, verdicts = [], []
    for mutant in mutants:
        killed, by, _ = outcomes.get(key_of(mutant), (None, "", 0))
        if killed is None:
            verdict = "not run"
        elif killed:
            verdict = "killed"
        else:
            verdict, by = ("equivalent" if mutant.equivalent else "SURVIVED"), mutant.equivalent
        verdicts.append(verdict)
        by = by.replace("|", "\\|")
        rows.append(f"| {mutant.name} | {mutant.file} | {verdict} | {by} |")
    counts = ", ".join(
        f"{verdicts.count(verdict)} {verdict}"
        for verdict in ("killed", "equivalent", "SURVIVED", "not run")
    )
    text = [
        "# Mutants",
        "",
        "Each is one text of one file replaced (bench/mutants.toml), run against its own test",
        "files after these passed unchanged. The first test that failed killed it.",
        "",
        f"{len(mutants)} mutants: {counts}.",
        "",
        "| mutant | file | verdict | by |",
        "|---|---|---|---|",
        *rows,
        "",
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {cpu_model()}; written by `python -m bench.mutants`.",
    ]
    RESULT.write_text("\n".join(text) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("word", nargs="?", default="", help="only mutants whose name holds it")
    parser.add_argument("--minutes", type=float, default=180, help="begin no mutant after these")
    arguments = parser.parse_args()
    make_tree()
    mutants = read_list(TREE)
    WORK.mkdir(parents=True, exist_ok=True)
    outcomes = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}

    def decided(key: str, outcome: Outcome) -> Outcome:
        outcomes[key] = outcome
        lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in outcomes.items())
        OUTCOMES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return outcome

    def known(key: str) -> Outcome | None:
        return Outcome(*outcomes[key]) if key in outcomes else None

    if any(is_compiled(mutant.file) for mutant in mutants):
        sources = sorted((TREE / "csrc").rglob("*.[hc]*"))
        stamp = digest(*(path.read_text() for path in sources))
        if not OBJECTS.exists() or OBJECTS.read_text() != stamp:
            compile_library(None)
            shutil.copy2(TREE / LIBRARY, WORK / "unchanged.so")
            OBJECTS.write_text(stamp)
        shutil.copy2(WORK / "unchanged.so", TREE / LIBRARY)
    wrong = []
    start = time.monotonic()
    for mutant in mutants:
        if time.monotonic() - start > 60 * arguments.minutes:
            break
        if arguments.word not in mutant.name or (not arguments.word and known(key_of(mutant))):
            continue
        suite = key_of_suite(mutant)
        if not known(suite):
            print(f"unchanged: {mutant.suite}", flush=True)
        unchanged = known(suite) or run_tests(mutant)
        if unchanged.killed:
            wrong.append(f"without a mutant {unchanged.by} fails: {mutant.suite}")
            continue
        decided(suite, unchanged)
        try:
            outcome = decided(key_of(mutant), decide(mutant))
        except subprocess.CalledProcessError:
            wrong.append(f"it does not compile: {mutant.name}")
            continue
        except NoVerdict as error:
            wrong.append(f"pytest could not run {mutant.name}: {error}")
            continue
        write_result(mutants, outcomes)
        said = f"killed by {outcome.by}" if outcome.killed else "SURVIVED"
        print(f"{mutant.name}: {said}, {outcome.seconds} s", flush=True)
    write_result(mutants, outcomes)
    wrong += [
        f"not as it should be: {mutant.name}"
        for mutant in mutants
        if (found := known(key_of(mutant))) and found.killed == bool(mutant.equivalent)
    ]
    for line in wrong:
        print(line)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
