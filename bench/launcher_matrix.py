"""The launcher's test under every triton that installs: `python -m bench.launcher_matrix`.

Each version, of 3.6 to the newest on the package index, gets a virtual environment of its own
below build/launcher: this Python, torch for the CPU, numpy, pytest and that triton.
tests/test_launcher.py runs there, with that triton's own driver code over a driver that writes
launches down; no GPU is needed. What came out goes to bench/results/launcher.md. Exit status 1
where a version's launches differ.
"""

import argparse
import datetime
import os
import pathlib
import platform
import re
import subprocess
import sys
import venv
from typing import NamedTuple

from .junit import cases_of, failures, names_with

ROOT = pathlib.Path(__file__).parent.parent
TABLE = ROOT / "bench/results/launcher.md"
HEADING = """\
# Our launches beside Triton's own

Per version of triton: launches past `kernel[grid]`, each compared with what `kernel[grid]` hands
the driver for the same arguments: function, the bytes of every parameter, grid, block, shared
memory, stream and device; on the default stream, on another one and on a device that is not the
current one. Driver code and launcher are that triton's own. Below them, in the place of libcuda,
is tests/fake_libcuda.c. Equal: no launch differed, and all of tests/test_launcher.py passed.
"""
OLDEST = (3, 6)
TORCH = os.environ.get("TORCH", "torch==2.13.0")


class Outcome(NamedTuple):
    version: str
    launches: int
    verdict: str
    good: bool


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def versions_on_the_index() -> list[str]:
    """Oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "triton"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    listed = re.search(r"^Available versions: (.*)$", answer, re.MULTILINE)
    if listed is None:
        raise RuntimeError(
            f"pip named no versions of triton: {answer!r}; name them on the command line"
        )
    found = [version.strip() for version in listed[1].split(",")]
    return sorted((version for version in found if release(version) >= OLDEST), key=release)


def environment(version: str, build: pathlib.Path) -> pathlib.Path:
    """The Python of a virtual environment with that triton."""
    folder = build / version
    python, ready = folder / "bin/python", folder / ".ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        for packages in ((TORCH, "numpy", "pytest"), ("--no-deps", f"triton=={version}")):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        ready.touch()
    return python


def outcome(version: str, build: pathlib.Path) -> Outcome:
    try:
        python = environment(version, build)
    except subprocess.CalledProcessError:
        return Outcome(version, 0, "does not install here", True)
    report = build / f"{version}.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "tests/test_launcher.py", f"--junitxml={report}"]
    command += ["-o", "junit_family=xunit1"]  # the other has no place for the launches
    subprocess.run([str(word) for word in command], cwd=ROOT)
    if not report.exists():
        return Outcome(version, 0, "the tests did not run", False)
    cases = cases_of(report)
    launches = sum(
        int(found.get("value", "0"))
        for case in cases
        for found in case.iter("property")
        if found.get("name") == "launches"
    )
    wrong = failures(cases)
    skipped = names_with(cases, "skipped")
    if wrong:
        verdict = f"**{len(wrong)} of {len(cases)} tests fail**, first `{wrong[0]}`"
        return Outcome(version, launches, verdict, False)
    if skipped or not launches:
        return Outcome(version, launches, f"**not run**: {len(skipped)} tests skipped", False)
    return Outcome(version, launches, "equal", True)


def table(outcomes: list[Outcome], command: str) -> str:
    lines = [
        HEADING,
        "| triton | launches | verdict |",
        "|---|---:|---|",
        *(f"| {found.version} | {found.launches} | {found.verdict} |" for found in outcomes),
        "",
        f"{datetime.date.today()}, {TORCH} for the CPU, Python {platform.python_version()},",
        f"{platform.system()} {platform.machine()}; written by `{command}`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument(
        "versions", nargs="*", help="of triton; none: all from 3.6 on that pip finds"
    )
    options = parser.parse_args()
    build = ROOT / "build/launcher"
    build.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for version in options.versions or versions_on_the_index():
        outcomes.append(outcome(version, build))
        print(
            f"triton {version}: {outcomes[-1].launches} launches, {outcomes[-1].verdict}",
            flush=True,
        )
    TABLE.write_text(
        table(outcomes, " ".join(["python -m bench.launcher_matrix", *options.versions]))
    )
    print(f"wrote {TABLE.relative_to(ROOT)}")
    return 0 if all(found.good for found in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
