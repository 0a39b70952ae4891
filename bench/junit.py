"""What pytest's --junitxml says."""

import pathlib
from typing import NamedTuple
from xml.etree import ElementTree


class Counts(NamedTuple):
    passed: int = 0
    failed: int = 0
    skipped: int = 0


def cases_of(report: pathlib.Path) -> list[ElementTree.Element]:
    return list(ElementTree.parse(report).getroot().iter("testcase"))


def names_with(cases: list[ElementTree.Element], *kinds: str) -> list[str]:
    # Not by truth: an element without children is false.
    return [
        case.get("name", "") for case in cases if any(case.find(kind) is not None for kind in kinds)
    ]


def failures(cases: list[ElementTree.Element]) -> list[str]:
    return names_with(cases, "failure", "error")


def counted(cases: list[ElementTree.Element]) -> Counts:
    failed, skipped = len(failures(cases)), len(names_with(cases, "skipped"))
    return Counts(len(cases) - failed - skipped, failed, skipped)
