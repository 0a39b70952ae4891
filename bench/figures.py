"""The picture of bench.compare: everything over the same call without noise, as in the tables."""

import pathlib
from functools import partial
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .cases import BASE, COMPILED_HOOK, HOOK, OFFICIAL, OURS, RAGGED
from .compare_tables import (
    SHAPE,
    STEP,
    Machines,
    Row,
    cpu_of,
    grouped,
    is_void,
    shape,
    share_of_step,
    steps_of,
    swept_value,
)

COLOURS = {
    OURS: "#1a7f5a",
    HOOK: "#d1711f",
    OFFICIAL: "#8c96a3",
    COMPILED_HOOK: "#e5b28a",
}
TEXT, FAINT = "#1f2328", "#59636e"
LABELS = {  # of the sweeps that are drawn
    "tokens": "tokens of the batch",
    "embedding_dim": "d, embedding_dim",
    "num_embeddings": "V, num_embeddings",
}
STYLES: dict[str, Any] = {"float32": "-", "bfloat16": (0, (4, 2))}


def finish(axes: Any, title: str, found: list[dict[str, Row]]) -> None:
    """What was drawn of these rows: its title, and VOID over it where one of them was disturbed."""
    axes.set_title(title, loc="left", fontsize=10, color=TEXT)
    axes.tick_params(labelsize=8, colors=FAINT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if any(is_void(row) for providers in found for row in providers.values()):
        stamp_void(axes)


def stamp_void(axes: Any) -> None:
    """Over what other processes disturbed: nobody takes a figure from it."""
    axes.text(
        0.5,
        0.5,
        "VOID",
        transform=axes.transAxes,
        ha="center",
        va="center",
        fontsize=36,
        color="#b3261e",
        alpha=0.6,
        rotation=20,
    )


def say(axes: Any, text: str, x: float, y: float) -> None:
    """Behind the end of a bar."""
    axes.annotate(
        text, (x, y), (3, 0), textcoords="offset points", va="center", fontsize=7, color=TEXT
    )


def bars(axes: Any, rows: list[Row], dtype: str) -> None:
    found = [
        providers
        for providers in grouped(rows, SHAPE).values()
        if providers[BASE]["dtype"] == dtype
    ]
    names = [name for name in COLOURS if any(name in providers for providers in found)]
    height = 0.8 / max(len(names), 1)
    for place, providers in enumerate(found):
        for i, name in enumerate(names):
            if name not in providers:
                continue
            ratio, at = float(providers[name]["ratio"]), place - 0.4 + (i + 0.5) * height
            axes.barh(at, ratio, height=height * 0.9, color=COLOURS[name])
            say(axes, f"{ratio:.2f}" if ratio < 3 else f"{ratio:.1f}", max(ratio, 1.0), at)
    labels = [
        f"{shape(one[BASE])}\n{float(one[BASE]['median_ms']):.3g} ms without" for one in found
    ]
    axes.set_yticks(range(len(found)), labels, fontsize=8, color=TEXT)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color=TEXT, linewidth=1, linestyle=(0, (4, 3)))
    largest = max(
        (float(row["ratio"]) for providers in found for row in providers.values()), default=1.0
    )
    axes.set_xlim(0.7, 2 * largest)
    finish(axes, f"Ragged batches with a mask, {dtype}", found)


def lines(axes: Any, rows: list[Row], section: str) -> None:
    found = list(grouped(rows, section).values())
    for dtype, style in STYLES.items():
        for name in (OURS, HOOK):
            points = sorted(
                (swept_value(section, one[BASE]), float(one[name]["ratio"]))
                for one in found
                if one[BASE]["dtype"] == dtype
            )
            axes.plot(
                [point[0] for point in points],
                [point[1] for point in points],
                color=COLOURS[name],
                linestyle=style,
                marker="o",
                markersize=3,
                linewidth=1.3,
            )
    axes.axhline(1, color=TEXT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.set_xlabel(LABELS[section], fontsize=8, color=FAINT)
    finish(axes, f"Sweep of {LABELS[section].split(',')[0]}, {RAGGED}", found)


def steps(axes: Any, rows: list[Row]) -> None:
    """What is added at the lookup, in % of the whole step without noise."""
    found = list(grouped(rows, STEP).values())
    labels: list[str] = []
    for place, (lookup, step) in enumerate(steps_of(found)):
        whole = float(step[BASE]["median_ms"])
        labels.append(f"{step[BASE]['case']}\n{whole:.0f} ms without".replace(", ", "\n", 1))
        for i, name in enumerate((OURS, HOOK)):
            share = share_of_step(lookup[name], lookup[BASE], step[BASE])
            at = place - 0.2 + 0.4 * i
            axes.barh(at, share, height=0.36, color=COLOURS[name])
            say(axes, f"{share:.2f} %", max(share, 0), at)
    axes.set_yticks(range(len(labels)), labels, fontsize=8, color=TEXT)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    finish(axes, "What noise adds to a training step, %", found)


def draw_machine(row_of_axes: Any, rows: list[Row]) -> None:
    """What was not measured is left out; nothing is cut off."""
    upper, lower = row_of_axes
    present = {row["section"] for row in rows}
    parts: list[tuple[str, Any, Any]] = [(STEP, upper[0], steps)]
    parts += [
        (SHAPE, axes, partial(bars, dtype=dtype))
        for axes, dtype in zip(upper[1:], STYLES, strict=True)
    ]
    parts += [
        (section, axes, partial(lines, section=section))
        for axes, section in zip(lower, LABELS, strict=True)
    ]
    for section, axes, draw_part in parts:
        if section in present:
            draw_part(axes, rows)
        else:
            axes.set_axis_off()
    upper[0].annotate(
        cpu_of(rows),
        (0, 1),
        (0, 26),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=11,
        fontweight="bold",
        color=TEXT,
    )


def legend(figure: Any) -> None:
    handles: list[Artist] = [Patch(color=colour) for colour in COLOURS.values()]
    handles += [Line2D([], [], color=FAINT, linestyle=style) for style in STYLES.values()]
    labels = [*COLOURS, *(f"{name} (sweeps)" for name in STYLES)]
    figure.legend(
        handles,
        labels,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.02),
        ncols=len(labels),
        frameon=False,
        fontsize=9,
    )


def draw(path: pathlib.Path, machines: Machines) -> None:
    figure, grid = plt.subplots(
        2 * len(machines),
        3,
        figsize=(14, 6.8 * len(machines) + 0.8),
        squeeze=False,
        facecolor="white",
        gridspec_kw={"height_ratios": [1.25, 1] * len(machines)},
    )
    for i, rows in enumerate(machines.values()):
        draw_machine(grid[2 * i : 2 * i + 2], rows)
    legend(figure)
    figure.suptitle(
        f"What NEFTune noise costs: time over {BASE} without noise (dashed), both axes logarithmic",
        color=TEXT,
        fontsize=12,
    )
    caption = "\n".join(rows[0]["machine"] for rows in machines.values())
    figure.text(0.5, 0.004, caption, ha="center", va="bottom", fontsize=7, color=FAINT)
    figure.tight_layout(rect=(0, 0.06, 1, 0.985))
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)
