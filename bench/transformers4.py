"""What `make test-transformers4` ran, as a table: `python -m bench.transformers4 4.55.4 4.57.6`
reads build/transformers-VERSION.xml and writes bench/results/transformers4.md.
"""

import pathlib
import sys

from .junit import cases_of, counted

BUILD = pathlib.Path("build")
RESULT = pathlib.Path("bench/results/transformers4.md")


def line(version: str) -> str:
    found = counted(cases_of(BUILD / f"transformers-{version}.xml"))
    return f"| {version} | {found.passed} | {found.failed} | {found.skipped} |"


def main(versions: list[str]) -> None:
    lines = [
        "`patch_trainer()` under transformers 4, `make test-transformers4`"
        " (tests/test_patched_trainer.py):",
        "",
        "| transformers | passed | failed | skipped |",
        "|---|---:|---:|---:|",
        *(line(version) for version in versions),
    ]
    RESULT.write_text("\n".join(lines) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
