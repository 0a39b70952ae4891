"""The compatibility table of docs/models.md from what the tests proved:
`python docs/compatibility.py FILE` after `pytest --compatibility FILE`.
"""

import argparse
import json
import pathlib
from importlib.metadata import version

PAGE = pathlib.Path(__file__).resolve().parent / "models.md"
BEGIN, END = "<!-- compatibility: make compatibility -->", "<!-- end of compatibility -->"
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "pytorch-lightning")


def table(lines: list[tuple[str, str, str]]) -> str:
    """One row per model family and trainer, with every layout that a passed test used."""
    layouts: dict[tuple[str, str], list[str]] = {}
    for family, trainer, layout in lines:
        layouts.setdefault((trainer, layout), []).append(family)
    merged: dict[tuple[str, str], list[str]] = {}
    for (trainer, layout), families in layouts.items():
        merged.setdefault((trainer, ", ".join(sorted(families))), []).append(layout)
    rows = [
        f"| {families} | {trainer} | {'; '.join(found)} |"
        for (trainer, families), found in sorted(merged.items())
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return "\n".join(
        [
            f"Versions: {versions}.",
            "",
            "| models | used by | layouts and kinds |",
            "|---|---|---|",
            *rows,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=pathlib.Path, help="what pytest --compatibility wrote")
    lines = [tuple(line) for line in json.loads(parser.parse_args().file.read_text())]
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    PAGE.write_text(f"{head}{BEGIN}\n{table(lines)}\n{END}{tail}")
    print(f"{len(lines)} combinations written to {PAGE.name}")


if __name__ == "__main__":
    main()
