"""The plot of noise_quality.py: how far shares of values lie from a uniform's."""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

COLOURS = {"torch bfloat16": "#8c96a3", "bfloat16": "#1a7f5a"}
LABELS = {"torch bfloat16": "uniform_(-1, 1) of torch", "bfloat16": "this package"}
TITLES = ("Share of values up to x, less a uniform's", "The same around 0")
TEXT = "#1f2328"


def draw(path: pathlib.Path, curves: dict[str, Any], count: int) -> None:
    """curves: of each of LABELS, by panels, (x, distance); count: draws."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.4), facecolor="white")
    for axes, title in zip(panels, TITLES, strict=True):
        for who, label in LABELS.items():
            at, distance = curves[who][TITLES.index(title)]
            axes.plot(at, distance, color=COLOURS[who], linewidth=0.9, label=label)
        axes.axhline(0, color=TEXT, linewidth=0.6, linestyle=(0, (4, 3)))
        axes.set_title(title, loc="left", fontsize=10, color=TEXT)
        axes.set_xlabel("x", color=TEXT, fontsize=9)
        axes.tick_params(labelsize=8, colors="#59636e")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[1].legend(fontsize=8, frameon=False, loc="center right")
    figure.suptitle(f"bfloat16 noise of magnitude 1, {count} draws", color=TEXT, fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)
