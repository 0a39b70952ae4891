"""What a sweep found: CSV, tables in Markdown, a figure."""

import csv
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from .seed_statistics import (
    Interval,
    best_held_out,
    differences_at_equal_training_loss,
    interval,
)
from .sweep_runs import HOOK, NONE, OURS, Arm, Recipe, Run

COLUMNS = ("noise", "alpha", "seed", "step", "training_loss", "held_out_loss")


class Sweep(NamedTuple):
    runs: list[Run]  # of whole seeds, every arm of each
    recipe: Recipe
    seeds: int  # asked for
    command: str

    @property
    def arms(self) -> list[Arm]:
        return list(dict.fromkeys(run.arm for run in self.runs))

    @property
    def whole(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    def of(self, arm: Arm) -> list[Run]:
        """By seed."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)


# ---- what is compared


def final_training_loss(run: Run) -> float:
    return run.points[-1].training_loss


def best_held_out_loss(run: Run) -> float:
    return best_held_out(run.points).held_out_loss


def difference_of(measure: Callable[[Run], float]) -> Callable[[Run, Run], float | None]:
    return lambda one, other: measure(one) - measure(other)


DIFFERENCES: dict[str, Callable[[Run, Run], float | None]] = {
    "best held-out loss": difference_of(best_held_out_loss),
    "training loss at the end": difference_of(final_training_loss),
    "held-out loss at equal training loss": lambda one, other: differences_at_equal_training_loss(
        one.points, other.points
    ),
}


def pairs_of_arms(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Every noise against none, then ours against the hook at the same alpha."""
    none = Arm(NONE, 0.0)
    against_none = [(arm, none) for arm in arms if arm != none]
    both = [(arm, Arm(HOOK, arm.alpha)) for arm in arms if arm.noise == OURS]
    return against_none + [(ours, hook) for ours, hook in both if hook in arms]


def paired(sweep: Sweep, one: Arm, other: Arm, name: str) -> list[float]:
    """By seed; seeds in which it does not exist are left out."""
    runs = zip(sweep.of(one), sweep.of(other), strict=True)
    found = [DIFFERENCES[name](*pair) for pair in runs]
    return [value for value in found if value is not None]


def interval_of(values: Sequence[float]) -> Interval | None:
    return interval(values) if len(values) > 1 else None


# ---- CSV


def write_csv(path: Path, sweep: Sweep) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for run in sweep.runs:
            for step, *losses in run.points:
                shown = (f"{loss:.6f}" for loss in losses)
                rows.writerow((run.arm.noise, f"{run.arm.alpha:g}", run.seed, step, *shown))


# ---- tables


def shown(found: Interval | None, sign: str = "") -> str:
    return "-" if found is None else f"{found.mean:{sign}.3f} ± {found.half:.3f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = f"|---|{'---:|' * (len(head) - 1)}"
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def means(sweep: Sweep) -> list[str]:
    rows = []
    for arm in sweep.arms:
        runs = sweep.of(arm)
        steps = [best_held_out(run.points).step for run in runs]
        loudness = [run.noise_to_embedding for run in runs]
        rows.append(
            [
                arm.label,
                f"{fmean(loudness):.3f}",
                shown(interval([best_held_out_loss(run) for run in runs])),
                f"{min(steps)} to {max(steps)}",
                shown(interval([final_training_loss(run) for run in runs])),
            ]
        )
    head = ["arm", "noise / embedding", "best held-out loss", "at step", "training loss at the end"]
    return table(head, rows)


def differences(sweep: Sweep) -> list[str]:
    rows, count, away = [], 0, 0
    for one, other in pairs_of_arms(sweep.arms):
        cells = []
        for name in DIFFERENCES:
            values = paired(sweep, one, other, name)
            found = interval_of(values)
            fewer = "" if len(values) == len(sweep.whole) else f" ({len(values)} seeds)"
            mark = " *" if found is not None and found.excludes_zero else ""
            cells.append(shown(found, "+") + fewer + mark)
            count += found is not None
            away += bool(mark)
        rows.append([f"{one.label} − {other.label}", *cells])
    return [
        *table(["difference", *DIFFERENCES], rows),
        "",
        f"\\* the interval excludes 0: {away} of {count}. Without any effect {count / 20:.1f} of "
        f"{count} would,",
        "on average: the intervals are not widened for their number.",
    ]


def device_name(recipe: Recipe) -> str:
    if recipe.device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def setting(sweep: Sweep) -> list[str]:
    recipe = sweep.recipe
    precision = "bfloat16 autocast" if recipe.device == "cuda" else "float32"
    return [
        f"{recipe.model or 'SmolLM2-135M-Instruct'}, every weight trained in {precision}, AdamW at "
        f"a constant {recipe.learning_rate:g};",
        f"{recipe.data or 'chatterbot-corpus'}: {recipe.train} pairs to train on, "
        f"{recipe.held_out} held out, of at most {recipe.max_length} tokens;",
        f"{recipe.epochs} epochs of {recipe.steps // recipe.epochs} steps of {recipe.batch_size} "
        f"pairs; evaluated every {recipe.evaluate_every} steps,",
        f"noise off, on all held-out pairs and {recipe.train_measured} training pairs. "
        f"{len(sweep.whole)} of {sweep.seeds} seeds.",
    ]


def spent(sweep: Sweep) -> str:
    """On a CPU its own time: that of the wall grows with whatever else the machine does."""
    if sweep.recipe.device == "cuda":
        wall = sum(run.wall_seconds for run in sweep.runs)
        return f"{len(sweep.runs)} runs, {wall / 60:.0f} minutes one after another"
    cpu = sum(run.cpu_seconds for run in sweep.runs)
    return f"{len(sweep.runs)} runs, {cpu / 60:.0f} minutes of CPU time"


def report(sweep: Sweep) -> str:
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers")]
    lines = [
        "# Does the noise help? A sweep over alpha",
        "",
        *setting(sweep),
        "",
        "Losses are nats per answer token. ± is Student's 95 % interval over seeds, each with a",
        "split, an order of the data and a noise of its own. noise / embedding: rms over rms, over",
        "real tokens of all training batches.",
        "",
        *means(sweep),
        "",
        "Differences, paired by seed; below 0 the first has the lower loss. Equal training loss:",
        "the lowest that both runs of the pair were measured at.",
        "",
        *differences(sweep),
        "",
        f"{time.strftime('%Y-%m-%d')}, {device_name(sweep.recipe)}, {', '.join(versions)}, Python "
        f"{platform.python_version()}.",
        f"{spent(sweep)}; written by",
        f"`{sweep.command}`.",
    ]
    return "\n".join(lines) + "\n"


# ---- figure

TEXT, FAINT = "#1f2328", "#59636e"
GREENS = ("#8fd0ae", "#1a7f5a", "#0b4a33", "#062a1d")
GREYS = ("#b4bcc6", "#7a8491", "#59636e")


def colours(arms: Sequence[Arm]) -> dict[Arm, str]:
    """Darker for a larger alpha."""
    found = {Arm(NONE, 0.0): "#d95f02"}
    for noise, shades in ((OURS, GREENS), (HOOK, GREYS)):
        mine = sorted(arm for arm in arms if arm.noise == noise)
        found.update({arm: shades[min(i, len(shades) - 1)] for i, arm in enumerate(mine)})
    return found


def mean_points(runs: Sequence[Run]) -> list[tuple[float, ...]]:
    """(step, training loss, held-out loss) of every evaluation, mean over seeds."""
    by_evaluation = zip(*(run.points for run in runs), strict=True)
    return [tuple(map(fmean, zip(*points, strict=True))) for points in by_evaluation]


def draw_losses(axes: Any, sweep: Sweep, against: int, label: str) -> None:
    palette = colours(sweep.arms)
    for arm in sweep.arms:
        runs = sweep.of(arm)
        line = {"color": palette[arm], "linestyle": "--" if arm.noise == HOOK else "-"}
        columns = list(zip(*mean_points(runs), strict=True))
        axes.plot(columns[against], columns[2], marker="o", markersize=4, label=arm.label, **line)
        for run in runs:
            seen = list(zip(*run.points, strict=True))
            axes.plot(seen[against], seen[2], linewidth=0.5, alpha=0.35, **line)
    axes.set_xlabel(label, color=FAINT)
    axes.set_ylabel("held-out loss", color=FAINT)


def draw_differences(axes: Any, sweep: Sweep, name: str, labelled: bool) -> None:
    palette = colours(sweep.arms)
    compared = pairs_of_arms(sweep.arms)
    for row, (one, other) in enumerate(compared):
        values = paired(sweep, one, other, name)
        axes.plot(values, [row] * len(values), ".", color=palette[one], alpha=0.45, markersize=5)
        found = interval_of(values)
        if found is not None:
            line = {"color": palette[one], "elinewidth": 1.8, "capsize": 3, "markersize": 5}
            axes.errorbar(found.mean, row + 0.22, xerr=found.half, fmt="o", **line)
    axes.axvline(0, color=TEXT, linewidth=1, linestyle=(0, (4, 3)))
    names = [f"{one.label} − {other.label}" for one, other in compared]
    axes.set_yticks(range(len(names)), names if labelled else [""] * len(names), fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(axis="y", length=0)
    axes.set_title(name, loc="left", fontsize=9, color=TEXT)


def draw(path: Path, sweep: Sweep) -> None:
    """Held-out loss over steps and over training loss; below, the paired differences."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(11, 8), layout="constrained", facecolor="white")
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    over_steps, over_training = above.subplots(1, 2, sharey=True)
    draw_losses(over_steps, sweep, 0, "step")
    draw_losses(over_training, sweep, 1, "training loss, noise off; training runs to the right")
    over_training.set_xscale("log")
    over_training.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    over_training.xaxis.set_major_formatter("{x:g}")
    over_training.xaxis.set_minor_formatter(NullFormatter())
    over_training.invert_xaxis()
    over_steps.set_xticks([point.step for point in sweep.runs[0].points])
    over_training.set_ylabel("")
    over_steps.legend(frameon=False, fontsize=8)
    rows = below.subplots(1, len(DIFFERENCES), squeeze=False)[0]
    for i, name in enumerate(DIFFERENCES):
        draw_differences(rows[i], sweep, name, labelled=i == 0)
    for axes in (over_steps, over_training, *rows):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=FAINT)
    above.suptitle(
        f"Fine-tuning under each noise, {len(sweep.whole)} seeds; thin lines are single seeds",
        color=TEXT,
        fontsize=11,
    )
    below.suptitle(
        "Differences paired by seed (dots) and their 95 % intervals; left of the dashed line the "
        "first has the lower loss",
        color=TEXT,
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def write_report(output: Path, sweep: Sweep) -> None:
    """OUTPUT.csv, OUTPUT.md and OUTPUT.png."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_csv(output.with_name(f"{output.name}.csv"), sweep)
    output.with_name(f"{output.name}.md").write_text(report(sweep), encoding="utf-8")
    draw(output.with_name(f"{output.name}.png"), sweep)
