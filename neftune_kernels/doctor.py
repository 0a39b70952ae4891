"""`python -m neftune_kernels.doctor [MODEL]`: what transformers' own NEFTune hook and this
package do to one ragged and one packed batch, as a table and a picture.

Each number is the magnitude of the noise that a sample really got at the model's first block, over
the paper's alpha / sqrt(L·d): 1 is right. Padding has a number of its own: 0 is right.
"""

import argparse
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .integrations.apply import apply_neftune
from .noise import check_alpha

TEXTS = (
    "NEFTune adds noise to the embeddings of the tokens while a model is fine-tuned, scaled by the "
    "length of each sample: the longer the sample, the smaller the noise of each of its tokens.",
    "A batch is as long as its longest sample, and the others are padded to that length.",
    "A packed row holds many samples, and each has a length of its own.",
    "Short samples feel it most.",
    "Yes.",
)
PLACES_OF_THE_HOOK = ("transformers.integrations.neftune", "transformers.trainer_utils")
NO_TRANSFORMERS = (
    'the doctor needs transformers, whose noise it shows: pip install "neftune_kernels[demo]"'
)
NO_PICTURE = 'no picture: matplotlib is missing, pip install "neftune_kernels[bench]"'


class Batch(NamedTuple):
    """What a model is called with, and whose each token is."""

    name: str
    given: dict[str, Tensor]
    sample: Tensor  # of each token, in the shape of input_ids, also of padding
    real: Tensor  # likewise, bool


class Row(NamedTuple):
    """One sample of a batch: magnitudes over the paper's. None: it has no padding."""

    batch: str
    sample: int
    tokens: int
    hook: float
    hook_padding: float | None
    ours: float
    ours_padding: float | None


def import_transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise ImportError(NO_TRANSFORMERS) from None


def hook_of_transformers() -> Callable[..., Any]:
    """The hook that TrainingArguments(neftune_noise_alpha=...) puts on an embedding."""
    for place in PLACES_OF_THE_HOOK:
        try:
            module = importlib.import_module(place)
        except ImportError:
            continue
        if hook := getattr(module, "neftune_post_forward_hook", None):
            return hook  # type: ignore[no-any-return]
    version = import_transformers().__version__
    raise ImportError(f"transformers {version} has no NEFTune hook that the doctor knows")


def tiny_model() -> tuple[nn.Module, Callable[[str], list[int]]]:
    """A random Llama over bytes, which needs no files."""
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config), lambda text: [1 + byte for byte in text.encode()]


def model_from(path: str) -> tuple[nn.Module, Callable[[str], list[int]]]:
    """A causal language model and its tokenizer, by transformers' own loaders."""
    transformers = import_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).float()
    return model, lambda text: list(tokenizer(text)["input_ids"])


def ragged(samples: list[list[int]], padding: int) -> Batch:
    """Right-padded rows, (B, T)."""
    columns = max(map(len, samples))
    ids = torch.full((len(samples), columns), padding)
    for row, sample in zip(ids, samples, strict=True):
        row[: len(sample)] = torch.tensor(sample)
    real = torch.arange(columns) < torch.tensor([[len(sample)] for sample in samples])
    owner = torch.arange(len(samples))[:, None].expand(-1, columns)
    return Batch("ragged", {"input_ids": ids, "attention_mask": real.long()}, owner, real)


def packed(samples: list[list[int]]) -> Batch:
    """All in one row, (1, N), told apart by position ids that begin anew."""
    ids = torch.tensor([[token for sample in samples for token in sample]])
    places = torch.cat([torch.arange(len(sample)) for sample in samples])[None]
    lengths = torch.tensor([len(sample) for sample in samples])
    owner = torch.arange(len(samples)).repeat_interleave(lengths)[None]
    return Batch(
        "packed",
        {"input_ids": ids, "position_ids": places},
        owner,
        torch.ones_like(ids, dtype=torch.bool),
    )


def looked_up(model: nn.Module, batch: Batch, training: bool) -> Tensor:
    """What the input embedding hands on in one forward, float64 (B, T, d)."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    seen: list[Tensor] = []
    hook = embedding.register_forward_hook(
        lambda module, args, output: seen.append(output.detach().double())
    )
    model.train(training)
    try:
        model(**batch.given)
    finally:
        hook.remove()
    return seen[0]


def with_hook(model: nn.Module, batch: Batch, noise_alpha: float) -> Tensor:
    """The same under transformers' own hook, as its trainer puts it on."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    embedding.neftune_noise_alpha = noise_alpha
    hook = embedding.register_forward_hook(hook_of_transformers())
    try:
        return looked_up(model, batch, training=True)
    finally:
        hook.remove()
        del embedding.neftune_noise_alpha


def magnitude(noise: Tensor, tokens: Tensor) -> float | None:
    """Of uniform noise (B, T, d), from the rms over the tokens where (B, T) is True."""
    if not bool(tokens.any()):
        return None
    return float(noise[tokens].square().mean().mul(3).sqrt())


def examine(model: nn.Module, batch: Batch, noise_alpha: float) -> tuple[list[Row], Any]:
    """Every sample's row, and what handle.check() found of this batch."""
    clean = looked_up(model, batch, training=False)
    theirs = with_hook(model, batch, noise_alpha) - clean
    with apply_neftune(model, noise_alpha) as handle:
        checked = handle.check(**batch.given)
        ours = looked_up(model, batch, training=True) - clean
    site = checked["sites"][0]
    # what the model multiplies its lookup by reaches the first block with either noise
    factor = abs(next((site[one] for one in ("measured", "multiplier") if site[one]), 1.0))
    rows = []
    for sample in range(int(batch.sample.max()) + 1):
        mine = batch.sample == sample
        tokens, padding = mine & batch.real, mine & ~batch.real
        length = int(tokens.sum())
        paper = noise_alpha / (length * clean.shape[-1]) ** 0.5 / factor
        numbers = [
            None if found is None else found / paper
            for noise in (theirs, ours)
            for found in (magnitude(noise, tokens), magnitude(noise, padding))
        ]
        rows.append(Row(batch.name, sample + 1, length, *numbers))  # type: ignore[arg-type]
    return rows, checked


def table(rows: list[Row]) -> str:
    head = ("batch", "sample", "tokens", "hook", "padding", "ours", "padding")
    lines = [head]
    for row in rows:
        numbers = ("-" if value is None else f"{value:.2f}" for value in row[3:])
        lines.append((row.batch, str(row.sample), str(row.tokens), *numbers))  # type: ignore[arg-type]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def draw(rows: list[Row], noise_alpha: float, path: pathlib.Path) -> bool:
    """Whether there is a picture: without matplotlib there is none."""
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        return False
    names = list(dict.fromkeys(row.batch for row in rows))
    figure = figures.Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True)
    kinds = (
        ("hook", "transformers' hook", "#d95f02", None),
        ("hook_padding", "its padding", "#f6c6a0", "//"),
        ("ours", "neftune_kernels", "#1b6ca8", None),
        ("ours_padding", "its padding", "#a7cbe6", "//"),
    )
    for axis, name in zip(axes, names, strict=True):
        shown = [row for row in rows if row.batch == name]
        for number, (field, label, colour, hatch) in enumerate(kinds):
            heights = [getattr(row, field) for row in shown]
            places = [i + 0.2 * (number - 1.5) for i in range(len(shown))]
            axis.bar(
                places,
                [height or 0.0 for height in heights],
                width=0.19,
                color=colour,
                hatch=hatch,
                edgecolor="white" if hatch is None else "grey",
                linewidth=0.5,
                label=label,
            )
            for place, height in zip(places, heights, strict=True):
                if height == 0:
                    axis.text(place, 0.015, "0", ha="center", fontsize=8, color=kinds[2][2])
        axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set_xticks(range(len(shown)), [f"{row.tokens}" for row in shown])
        axis.set_xlabel("real tokens of the sample")
        axis.set_title(f"{name} batch")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("magnitude / the paper's")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(kinds), frameon=False)
    figure.suptitle(f"NEFTune's noise as it arrives, alpha {noise_alpha:g}: 1 is right")
    figure.savefig(path, dpi=150)
    return True


def read_texts(path: pathlib.Path | None) -> list[str]:
    """One text a line; our own without a file."""
    if path is None:
        return list(TEXTS)
    texts = [line for line in path.read_text().splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text: one a line is wanted")
    return texts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m neftune_kernels.doctor", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument(
        "model", nargs="?", help="a causal language model's path or name; a tiny one without"
    )
    parser.add_argument("--texts", type=pathlib.Path, help="a file, one text a line")
    parser.add_argument("--alpha", type=float, default=5.0, help="noise_alpha, 5 unless said")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("noise.png"), help="the picture"
    )
    parsed = parser.parse_args(arguments)
    alpha = check_alpha(parsed.alpha)
    if alpha == 0:
        parser.error("--alpha 0 is no noise: there is nothing to see")
    torch.manual_seed(0)
    model, tokens_of = tiny_model() if parsed.model is None else model_from(parsed.model)
    samples = [tokens for text in read_texts(parsed.texts) if (tokens := tokens_of(text))]
    padding = getattr(model.config, "pad_token_id", None)
    rows: list[Row] = []
    verdicts = []
    for batch in (ragged(samples, padding or 0), packed(samples)):
        found, checked = examine(model, batch, alpha)
        rows += found
        verdicts.append((batch.name, checked))
    print(f"{type(model).__name__}, alpha {alpha:g}: magnitude of the noise over the paper's")
    print("hook: transformers' own; ours: neftune_kernels; 1.00 is right, 0.00 for padding\n")
    print(table(rows))
    for name, checked in verdicts:
        print(f"\nhandle.check() of the {name} batch:\n{checked}")
    print(f"\n{parsed.out}" if draw(rows, alpha, parsed.out) else f"\n{NO_PICTURE}")
    return 0 if all(checked["ok"] for _, checked in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
