"""Which rows of quirks.py a model of transformers needs: `python -m bench.zoo_rows`, a part of
`make zoo`.

A row is needed where a model of its package is judged otherwise without it; of the others
tests/test_quirks.py demands a test that fails without them. What was found on these sources is kept
in build/zoo_rows.jsonl, for the table, and not looked for again.
"""

import multiprocessing
import os
import sys
import warnings
from typing import Any

import torch

from neftune_kernels.integrations import quirks

from . import zoo, zoo_models
from .resumed import ROOT, Bar, before_now, keep

FOUND = ROOT / "build/zoo_rows.jsonl"
Key = tuple[str, str]


def package_of(key: Key) -> str | None:
    """transformers.models' package that defines the row's class."""
    name = key[1].removesuffix(".forward")
    for module in list(sys.modules):
        parts = module.split(".")
        if parts[:2] == ["transformers", "models"] and parts[-1].startswith("modeling_"):
            found = getattr(sys.modules[module], name, None)
            if getattr(found, "__module__", None) == module:
                return parts[2]
    return None


def words(entry: zoo_models.Entry, kind: type[torch.nn.Module]) -> dict[str, str]:
    layouts = zoo.judged(entry, kind).get("layouts", {})
    return {layout: one["word"] for layout, one in layouts.items()}


def needed(key: Key, entries: list[zoo_models.Entry], queue: Any) -> None:
    """Puts the model and its verdicts with the row and without; or nothing needs it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    row = quirks.QUIRKS[key]
    for entry in entries:
        for kind in (entry.head, entry.base, *entry.others):
            if kind is None:
                continue
            try:
                model = zoo.ready(entry, kind).model
            except RuntimeError:
                continue
            if not any(quirks.key_of(one) == key for one in model.modules()):
                continue
            quirks.QUIRKS[key] = row
            told = words(entry, kind)
            del quirks.QUIRKS[key]
            untold = words(entry, kind)
            quirks.QUIRKS[key] = row
            differ = [layout for layout in told if told[layout] != untold.get(layout)]
            if differ:
                with_row, without = told[differ[0]], untold.get(differ[0], "NOTHING")
                queue.put(f"{kind.__name__} {differ[0]}: {without} without it, {with_row} with it")
                return
    queue.put("")


def looked_for(key: Key, entries: list[zoo_models.Entry]) -> str:
    """In a process of its own, as a verdict may hang."""
    package = package_of(key)
    own = [
        one
        for one in entries
        if any(
            kind is not None and kind.__module__.split(".")[2] == package
            for kind in (one.head, one.base, *one.others)
        )
    ]
    context: Any = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=needed, args=(key, own, queue))
    process.start()
    process.join(2 * zoo.LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
    return "" if queue.empty() else str(queue.get())


def main() -> int:
    sources = zoo.sources_now()
    entries = zoo_models.entries()
    done = before_now(FOUND, sources)
    keys = [key for key in quirks.QUIRKS if key[0] == "transformers"]
    bar = Bar(len(keys), len(done))
    for key in keys:
        if key[1] not in done:
            done[key[1]] = {"name": key[1], "why": looked_for(key, entries)}
            keep(FOUND, sources, done[key[1]])
            bar.show(len(done), key[1])
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    os.environ.setdefault("NEFTUNE_SELF_CHECK", "0")
    sys.exit(main())
