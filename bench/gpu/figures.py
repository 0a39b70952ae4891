"""Plots of a results.csv, drawn anywhere: `python -m bench.first_gpu --plot results.csv`.

The one place that needs matplotlib.
"""

import ast
import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from .report import Row, read_rows

LINES = {  # (what, layout, backend) → (label, colour, style)
    ("copy", "", ""): ("copy of the bytes", "#b4bcc6", ":"),
    ("ours", "nothing", "triton"): ("ours, Triton", "#1a7f5a", "-"),
    ("ours", "int64 mask", "triton"): ("ours, Triton, int64 mask", "#1a7f5a", "--"),
    ("ours", "nothing", "cuda"): ("ours, CUDA C++", "#0969da", "-"),
    ("ours", "int64 mask", "cuda"): ("ours, CUDA C++, int64 mask", "#0969da", "--"),
    ("ours", "nothing", "cpp"): ("ours, C++", "#1a7f5a", "-"),
    ("HF hook", "", ""): ("HF hook", "#bf8700", "-"),
    ("official", "", ""): ("official", "#bc4c00", "-"),
    ("HF hook, compiled", "", ""): ("HF hook, rand_like, compiled", "#bf8700", "--"),
    ("official, compiled", "", ""): ("official, rand_like, compiled", "#bc4c00", "--"),
}
TEXT = "#1f2328"


def points_of(
    rows: list[Row],
) -> dict[tuple[str, int], dict[tuple[str, str, str], dict[int, float]]]:
    """(dtype, d) → provider → tokens → device time over F.embedding's; the later of two."""
    panels: dict[tuple[str, int], dict[tuple[str, str, str], dict[int, float]]] = {}
    for row in rows:
        key = (row["what"], row["layout"], row["backend"])
        if row["step"].startswith("times-") and row["outcome"] == "passed" and key in LINES:
            rows_, columns, width = ast.literal_eval(row["shape"])
            panels.setdefault((row["dtype"], width), {}).setdefault(key, {})[rows_ * columns] = (
                float(row["ratio"])
            )
    return panels


def draw(csv_path: pathlib.Path) -> list[pathlib.Path]:
    """One plot per device beside the CSV; the panels' x is tokens."""
    rows, drawn = read_rows(csv_path), []
    for device in dict.fromkeys(row["device"] for row in rows):
        panels = points_of([row for row in rows if row["device"] == device])
        if not panels:
            continue
        dtypes, widths = (
            list(dict.fromkeys(dtype for dtype, _ in panels)),
            sorted({width for _, width in panels}),
        )
        size = (0.8 + 3.4 * len(widths), 1.2 + 3.0 * len(dtypes))
        figure, grid = plt.subplots(
            len(dtypes), len(widths), figsize=size, squeeze=False, facecolor="white", sharey=True
        )
        for (dtype, width), providers in panels.items():
            axes = grid[dtypes.index(dtype)][widths.index(width)]
            for key, (label, colour, style) in LINES.items():
                found = sorted(providers.get(key, {}).items())
                if found:
                    axes.plot(
                        *zip(*found, strict=True),
                        style,
                        color=colour,
                        label=label,
                        marker=".",
                        linewidth=1.4,
                    )
            axes.axhline(1, color=TEXT, linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_title(f"d = {width}, {dtype}", loc="left", fontsize=10, color=TEXT)
            axes.set_xlabel("tokens", fontsize=8)
            axes.tick_params(labelsize=8)
        handles = {
            label: line
            for axes in grid.flat
            for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=8, frameon=False
        )
        figure.suptitle(
            f"Device time over F.embedding's (line at 1), {device}", fontsize=12, color=TEXT
        )
        figure.tight_layout(rect=(0, 0.11, 1, 1))
        name = "".join(letter if letter.isalnum() else "-" for letter in device)[:60]
        path = csv_path.with_name(f"{csv_path.stem}-{name}.png")
        figure.savefig(path, dpi=130, facecolor="white")
        plt.close(figure)
        drawn.append(path)
    return drawn
