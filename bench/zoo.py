"""Every model type of the installed transformers that takes tokens, tiny and random, under
apply_neftune: `make zoo`.

    python -m bench.zoo             goes on where it stopped; writes bench/results/zoo.md
    python -m bench.zoo llama bert  only these, and says more

Judged by what arrives at the first block and by the whole output against noise put in by hand
(bench/judge.py). What was judged on these sources is kept in build/zoo.jsonl.
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import judge, zoo_models
from .judge import Subject
from .resumed import ROOT, Bar, before_now, fingerprint, keep
from .witness import Sequence, packed, padded
from .zoo_models import COLUMNS, DOCUMENTS, FIRST_ID, LAST_ID, REAL, ROWS, Entry

DONE = ROOT / "build/zoo.jsonl"
LIMIT = 150.0  # seconds of an entry
LAYOUTS = ("right", "left", "packed", "none")


def sources_now() -> str:
    return fingerprint(("judge.py", "witness.py", "zoo.py", "zoo_models.py"))


# ---- one entry


class Told(NamedTuple):
    given: dict[str, Any]
    sequences: list[Sequence]
    words: list[dict[str, Any]]


def told(parameters: list[str], layout: str) -> Told | None:
    """The tokens of a layout, as a model with such a forward is given them; None: it cannot be."""
    names = [name for name in zoo_models.IDS if name in parameters]
    generator = torch.Generator().manual_seed(2)
    if layout == "packed":
        if names != ["input_ids"] or "position_ids" not in parameters:
            return None
        ids = torch.randint(FIRST_ID, LAST_ID + 1, (1, sum(DOCUMENTS)), generator=generator)
        positions = torch.cat([torch.arange(one) for one in DOCUMENTS])[None]
        given = {"input_ids": ids, "position_ids": positions}
        return Told(given, [packed(ids, DOCUMENTS)], [{"position_ids": positions}])
    real = torch.arange(COLUMNS) < torch.tensor(REAL)[:, None]  # (rows, columns)
    if layout == "left":
        real = real.flip(1)
    made = Told({}, [], [])
    for name in names:
        ids = torch.randint(FIRST_ID, LAST_ID + 1, (ROWS, COLUMNS), generator=generator)
        mask_name = name.replace("input_ids", "attention_mask")
        masked = layout != "none" and mask_name in parameters
        if layout != "none" and name == names[0] and not masked:
            return None
        made.given[name] = ids
        if masked:
            made.given[mask_name] = real.long()
        made.sequences.append(padded(ids, real if masked else torch.ones_like(real)))
        made.words.append({"attention_mask": real.long()} if masked else {})
    return made


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for name in ("p", "drop_prob", "dropout", "layerdrop", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


class Built(NamedTuple):
    model: nn.Module
    others: dict[str, Any]  # what it needs beside its tokens
    way: str


def ready(entry: Entry, kind: type[nn.Module]) -> Built:
    """The first way of shrinking whose model runs.

    Raises:
        RuntimeError: none does; with what each said.
    """
    parameters = zoo_models.taken(entry, kind)
    tokens = told(parameters, "none")
    assert tokens is not None
    said = []
    for way in zoo_models.WAYS:
        try:
            model = zoo_models.build(entry, kind, way)
            without_dropout(model)
        except Exception as error:
            said.append(f"{way}: {_short(error)}")
            continue
        last = ""
        for others in ({}, *zoo_models.other_inputs(entry, model, tokens.given)):
            try:
                torch.manual_seed(0)
                model(**tokens.given, **_plain(parameters), **others)
            except Exception as error:
                last = last or _short(error)
                continue
            return Built(model, others, way)
        said.append(f"{way}: {last}")
    raise RuntimeError("; ".join(dict.fromkeys(said)))


def _plain(parameters: list[str]) -> dict[str, Any]:
    return {"use_cache": False} if "use_cache" in parameters else {}


def _short(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__} at {where}: {text[:160]}"


def judged(entry: Entry, kind: type[nn.Module]) -> dict[str, Any]:
    """The verdicts on one model class: of each layout, and of what else must hold."""
    try:
        built = ready(entry, kind)
    except RuntimeError as error:
        return {"unbuilt": str(error)}
    parameters = zoo_models.taken(entry, kind)
    made: dict[str, Any] = {"way": built.way, "layouts": {}}
    state = judge.State(built.model)
    for layout in LAYOUTS:
        tokens = told(parameters, layout)
        if tokens is None:
            continue
        rows = next(iter(tokens.given.values())).shape[0]
        others = {name: _rows(value, rows) for name, value in built.others.items()}
        given = {**tokens.given, **others, **_plain(parameters)}
        subject = Subject(built.model, given, tokens.sequences, tokens.words)
        try:
            expected = judge.expectation(subject, state)
        except judge.Unusable as error:
            made["layouts"][layout] = {"word": "NOT JUDGED", "detail": str(error)}
            continue
        except Exception as error:
            made["layouts"][layout] = {"word": "NOT TAKEN", "detail": _short(error)}
            continue
        verdict = judge.judge(subject, state, expected)
        made["layouts"][layout] = {
            name: value for name, value in verdict._asdict().items() if value and name != "options"
        }
        factors = {f"{one:.6g}" for one in expected.factors.values()}
        made["layouts"][layout]["factors"] = sorted(factors)
        if layout != "packed" and "around" not in made and verdict.options is not None:
            made["around"] = judge.around(subject, state, expected, verdict.options)
    return made


def _rows(value: Any, rows: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == ROWS and rows != ROWS:
        return value[:rows]
    return value


def is_judged(made: dict[str, Any]) -> bool:
    """Whether a class of an entry has a verdict: a part may be judged where the whole cannot."""
    layouts = [
        one
        for role in made.values()
        if isinstance(role, dict)
        for one in role.get("layouts", {}).values()
    ]
    return any(not one["word"].startswith("NOT") for one in layouts)


def work(entry: Entry, queue: Any) -> None:
    torch.set_num_threads(1)
    torch.set_default_device("cpu")
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (models print; the process ends soon)
    begun = time.monotonic()
    made: dict[str, Any] = {"name": entry.name}
    kinds = [("head", entry.head), ("base", entry.base)]
    kinds += [(f"other {number}", kind) for number, kind in enumerate(entry.others)]
    for role, kind in kinds:
        if kind is not None and not (role.startswith("other") and is_judged(made)):
            try:
                made[role] = {"class": kind.__name__, **judged(entry, kind)}
            except Exception as error:
                text = traceback.format_exc()[-1500:]
                made[role] = {"class": kind.__name__, "broken": _short(error), "trace": text}
    made["seconds"] = round(time.monotonic() - begun, 1)
    queue.put(made)


# ---- all of them


def run_all(entries: list[Entry], done: dict[str, Any], sources: str, jobs: int) -> None:
    context: Any = multiprocessing.get_context("fork")
    waiting = [one for one in entries if one.name not in done]
    running: list[tuple[Any, Any, Entry, float]] = []
    gc.collect()
    gc.freeze()
    bar = Bar(len(entries), len(done))
    while waiting or running:
        while waiting and len(running) < jobs:
            entry, queue = waiting.pop(0), context.SimpleQueue()
            process = context.Process(target=work, args=(entry, queue))
            process.start()
            running.append((process, queue, entry, time.monotonic()))
        time.sleep(0.05)
        for one in list(running):
            process, queue, entry, since = one
            if not queue.empty():
                made = queue.get()
            elif not process.is_alive():
                made = {"name": entry.name, "head": {"broken": f"exit {process.exitcode}"}}
            elif time.monotonic() - since > LIMIT:
                process.kill()
                made = {"name": entry.name, "head": {"broken": f"more than {LIMIT:.0f} s"}}
            else:
                continue
            process.join()
            running.remove(one)
            done[entry.name] = made
            keep(DONE, sources, made)
            bar.show(len(done), entry.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help="of model types; none: all")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    sources = sources_now()
    entries = [one for one in zoo_models.entries() if one.name not in zoo_models.NO_TOKENS]
    if arguments.names:
        entries = [one for one in entries if one.name in arguments.names]
    done = {} if arguments.names else before_now(DONE, sources)
    run_all(entries, done, sources, arguments.jobs)
    if arguments.names:
        print(json.dumps(done, indent=1))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    os.environ.setdefault("NEFTUNE_SELF_CHECK", "0")
    sys.exit(main())
