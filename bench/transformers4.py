"""What `make test-transformers4` ran, as a table: `python -m bench.transformers4 4.55.4 4.57.6`
reads build/transformers-VERSION.xml and writes bench/results/transformers4.md.
"""

import pathlib
import sys
from xml.etree import ElementTree

BUILD = pathlib.Path("build")
RESULT = pathlib.Path("bench/results/transformers4.md")


def line(version: str) -> str:
    root = ElementTree.parse(BUILD / f"transformers-{version}.xml").getroot()
    suite = root if root.tag == "testsuite" else root[0]
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return (
        f"| {version} | {passed} | {counts['failures'] + counts['errors']} | {counts['skipped']} |"
    )


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
