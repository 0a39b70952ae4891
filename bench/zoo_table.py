"""bench/results/zoo.md from what `make zoo` judged: `python -m bench.zoo_table`."""

import json
import platform
import sys
import time
from collections import Counter
from typing import Any

import torch

import neftune_kernels
from neftune_kernels.integrations.quirks import QUIRKS

from .judge import FINE
from .resumed import ROOT, before_now
from .zoo_models import NO_TOKENS

RESULT = ROOT / "bench/results/zoo.md"
DONE = ROOT / "build/zoo.jsonl"
ROWS = ROOT / "build/zoo_rows.jsonl"
# The worst of an entry's verdicts is its own.
WORST_FIRST = (
    "CRASH",
    "SILENT WRONG",
    "NO WAY OUT",
    "FALSE ALARM",
    "WARNED",
    "REFUSED",
    "EXACT",
)
HEADING = """\
# Every model type of transformers that takes tokens

A tiny random model of each, its outermost head and its base class, under `apply_neftune(model, 5)`:
right and left padding with real ids under it, packed by position_ids, no mask. Judged by what
arrives at the first block against alpha / sqrt(L d) u, and by the whole output against the clean
model with that noise put in by hand; then eval, no-grad, state_dict, removal, and the gradient
against the clean model's with the same embeddings put in by hand as constants: as plainly applied,
or as a message told to.

EXACT: the paper's noise, no warning. WARNED, REFUSED: the message was right, and what it tells to
do ended EXACT. NO WAY OUT: it did not. FALSE ALARM: exact, with a warning that is not true.
"""

ROWS_HEADING = """\
Without the row the entry is judged otherwise. Of each other row tests/test_quirks.py holds a model
with its package's published forward, whose test fails without the row."""


def roles(entry: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, one) for name, one in entry.items() if isinstance(one, dict)]


def words(entry: dict[str, Any]) -> dict[str, list[str]]:
    """Verdict → where: "LlamaModel left"."""
    found: dict[str, list[str]] = {}
    for _, role in roles(entry):
        for layout, verdict in role.get("layouts", {}).items():
            found.setdefault(verdict["word"], []).append(f"{role['class']} {layout}")
    return found


def worst(entry: dict[str, Any]) -> str | None:
    """None: no model of it was judged."""
    found = words(entry)
    return next((word for word in WORST_FIRST if word in found), None)


def is_faulty(entries: list[dict[str, Any]]) -> bool:
    """Whether something is wrong: a factor without its row, say, a warning that is not true, or a
    gradient.
    """
    return any(
        worst(one) not in (None, *FINE) or any(role.get("around") for _, role in roles(one))
        for one in entries
    )


def reason(entry: dict[str, Any]) -> str:
    for _, role in roles(entry):
        for key in ("unbuilt", "broken"):
            if key in role:
                return str(role[key])
        for verdict in role.get("layouts", {}).values():
            return str(verdict.get("detail", ""))
    return "nothing was tried"


def first_of(entry: dict[str, Any], word: str) -> dict[str, Any]:
    verdicts = [verdict for _, role in roles(entry) for verdict in role.get("layouts", {}).values()]
    return next(one for one in verdicts if one["word"] == word)


def written(entries: list[dict[str, Any]], rows: dict[str, str], versions: str) -> str:
    judged = {one["name"]: word for one in entries if (word := worst(one)) is not None}
    totals = Counter(judged.values())
    around = {
        one["name"]: sorted({kind for _, role in roles(one) for kind in role.get("around", [])})
        for one in entries
    }
    lines = [HEADING]
    lines += ["| verdict | entries |", "|---|---|"]
    lines += [f"| {word} | {totals[word]} |" for word in WORST_FIRST]
    lines += [f"| not judged | {len(entries) - len(judged)} of {len(entries)} |", ""]
    lines += [versions, ""]
    lines += [
        "## Not EXACT",
        "",
        "| entry | verdict | where | what | done |",
        "|---|---|---|---|---|",
    ]
    for one in sorted(entries, key=lambda one: str(one["name"])):
        word = judged.get(one["name"])
        if word in (None, "EXACT"):
            continue
        assert word is not None
        verdict = first_of(one, word)
        where = words(one)[word]
        shown = f"{where[0]} and {len(where) - 1} more" if len(where) > 1 else where[0]
        what = _cell(verdict.get("detail") or verdict.get("message", ""))
        lines.append(f"| {one['name']} | {word} | {shown} | {what} | {verdict.get('remedy', '')} |")
    faulty = {name: kinds for name, kinds in around.items() if kinds}
    lines += ["", "## eval, no-grad, state_dict, gradient, removal", ""]
    lines += [f"- {name}: {', '.join(kinds)}" for name, kinds in sorted(faulty.items())]
    lines += [] if faulty else ["No fault."]
    lines += ["", "## Not judged", ""]
    lines += [
        f"- {one['name']}: {_cell(reason(one))}"
        for one in sorted(entries, key=lambda one: str(one["name"]))
        if one["name"] not in judged
    ]
    lines += ["", "## Rows of quirks.py that a model needs", ""]
    lines += [ROWS_HEADING, ""]
    lines += [f"- `{row}`: {why}" for row, why in sorted(rows.items()) if why]
    lines += ["", "## Take no tokens, though their forwards name input_ids", ""]
    lines += [f"- {name}: {why}" for name, why in sorted(NO_TOKENS.items())]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= 160 else flat[:157] + "..."


def main() -> int:
    import transformers

    sources = json.loads(DONE.read_text().splitlines()[-1])["sources"]
    entries = list(before_now(DONE, sources).values())
    seconds = sum(one.get("seconds", 0.0) for one in entries)
    versions = (
        f"{time.strftime('%Y-%m-%d')}, transformers {transformers.__version__}, torch "
        f"{torch.__version__}, neftune_kernels {neftune_kernels.version.__version__}, sources "
        f"{sources}, Python {platform.python_version()}; {seconds / 60:.0f} minutes of one core; "
        "written by `make zoo`."
    )
    rows = {name: one["why"] for name, one in before_now(ROWS, sources).items()}
    if missing := [name for top, name in QUIRKS if top == "transformers" and name not in rows]:
        raise SystemExit(f"not looked for on these sources: {missing}; python -m bench.zoo_rows")
    RESULT.write_text(written(entries, rows, versions))
    return int(is_faulty(entries))


if __name__ == "__main__":
    sys.exit(main())
