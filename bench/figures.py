"""The plot of compare.py: time relative to F.embedding, one panel per shape and dtype."""

import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from .cases import Case

COLOURS = {
    "ours": "#1a7f5a",
    "HF hook": "#8c96a3",
    "official": "#b4bcc6",
    "HF hook, compiled": "#8c96a3",
    "official, compiled": "#b4bcc6",
}
TEXT = "#1f2328"


def draw(path: pathlib.Path, relative: dict[Case, dict[str, float]], caption: str) -> None:
    """relative: case → provider → ratio to F.embedding, and "F.embedding" → its seconds."""
    shapes, dtypes = (
        list(dict.fromkeys(case.key for case in relative)),
        list(dict.fromkeys(case.dtype for case in relative)),
    )
    figure, grid = plt.subplots(
        len(shapes),
        len(dtypes),
        figsize=(6.2 * len(dtypes), 0.9 + 1.75 * len(shapes)),
        squeeze=False,
        facecolor="white",
    )
    for case, measured in relative.items():
        axes = grid[shapes.index(case.key)][dtypes.index(case.dtype)]
        names = [name for name in COLOURS if name in measured]
        ratios = [measured[name] for name in names]
        axes.barh(range(len(names)), ratios, color=[COLOURS[name] for name in names], height=0.72)
        for i, ratio in enumerate(ratios):
            label = f"{ratio:.2f}x" if ratio < 3 else f"{ratio:.1f}x"
            beside = (max(ratio, 1.0), i)  # never across the dashed line
            axes.annotate(
                label,
                beside,
                (5, 0),
                textcoords="offset points",
                va="center",
                color=TEXT,
                fontsize=9,
            )
        axes.axvline(1, color=TEXT, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(names)), names, color=TEXT, fontsize=9)
        axes.get_yticklabels()[0].set_fontweight("bold")
        axes.invert_yaxis()
        axes.set_xlim(0, max(*ratios, 1.0) * 1.15)
        milliseconds = measured["F.embedding"] * 1e3
        axes.set_title(
            f"{case.model} {case.shape}, {case.dtype_name}", loc="left", fontsize=10, color=TEXT
        )
        axes.set_title(
            f"F.embedding {milliseconds:.3g} ms", loc="right", fontsize=9, color="#59636e"
        )
        axes.tick_params(axis="x", labelsize=8, colors="#59636e")
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    figure.suptitle(
        "Embedding with NEFTune noise: time relative to F.embedding without noise (dashed)",
        color=TEXT,
        fontsize=12,
    )
    figure.text(0.5, 0.004, caption, ha="center", va="bottom", fontsize=7.5, color="#59636e")
    figure.tight_layout(rect=(0, 0.02, 1, 0.995))
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)
