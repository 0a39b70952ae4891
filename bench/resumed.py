"""Sweeps that go on where they stopped: what was judged on these sources, and a bar of progress."""

import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent


def digest_of(files: Iterable[pathlib.Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def fingerprint(names: Iterable[str]) -> str:
    """Of what is judged and of what judges it: the package and these files of bench."""
    own = [ROOT / f"bench/{name}" for name in sorted(names)]
    return digest_of((*sorted((ROOT / "neftune_kernels").rglob("*.py")), *own))


def before_now(file: pathlib.Path, sources: str) -> dict[str, Any]:
    """By their names."""
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {one["name"]: one for one in lines if one["sources"] == sources}


def keep(file: pathlib.Path, sources: str, made: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps({"sources": sources, **made}) + "\n")


class Bar:
    """How many are done, in which time, and what is left."""

    def __init__(self, total: int, before: int) -> None:
        self.total, self.before, self.begun = total, before, time.monotonic()

    def show(self, done: int, name: str) -> None:
        seconds = time.monotonic() - self.begun
        left = seconds / max(1, done - self.before) * (self.total - done)
        bar = "#" * (30 * done // self.total)
        print(
            f"\r[{bar:30}] {done} of {self.total}, {seconds:.0f} s, {left:.0f} s to go, "
            f"{name:50.50}",
            end="" if done < self.total else "\n",
            flush=True,
        )


def judged_one_by_one(
    names: list[str],
    file: pathlib.Path,
    sources: str,
    judge: Callable[[str], dict[str, Any]],
    anew: bool,
) -> dict[str, Any]:
    """What `judge` says of each, by name: of those that the file does not hold yet, or of all."""
    done = {} if anew else before_now(file, sources)
    bar = Bar(len(names), len(done))
    for name in names:
        if name not in done:
            done[name] = {"name": name, **judge(name)}
            keep(file, sources, done[name])
            bar.show(len(done), name)
    return done
