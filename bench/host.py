"""Host time that apply_neftune adds to a small model's forward, beside transformers' own hook:
`python -m bench.host`.

A 2-layer Llama at (1, 8), where nothing but overhead is left. The three models are timed in every
round, in a new random order; what is added is taken within a round. The Python calls that are added
say on a busy machine what times cannot. Needs transformers.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.neftune import activate_neftune

from neftune_kernels import apply_neftune

from .machine import describe

NOTHING, OURS, THEIRS = "no noise", "apply_neftune", "transformers' own hook"
# of what transformers' hook adds; the specification of this command
LIMITS = {"no mask": 1.0, "attention_mask": 2.0}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return transformers.LlamaForCausalLM(config).train()


def make_models() -> dict[str, nn.Module]:
    models = {name: make_model() for name in (NOTHING, OURS, THEIRS)}
    apply_neftune(models[OURS], 5.0)
    activate_neftune(models[THEIRS], 5.0)
    return models


def time_rounds(
    models: dict[str, nn.Module], given: dict[str, Tensor], rounds: int, forwards: int
) -> dict[str, list[float]]:
    """Seconds of one forward, a value per round."""
    for model in models.values():
        for _ in range(20):
            model(**given)
    taken: dict[str, list[float]] = {name: [] for name in models}
    names, order = list(models), torch.Generator().manual_seed(0)
    for _ in range(rounds):
        for i in torch.randperm(len(names), generator=order).tolist():
            model = models[names[i]]
            start = time.perf_counter()
            for _ in range(forwards):
                model(**given)
            taken[names[i]].append((time.perf_counter() - start) / forwards)
    return taken


def count_calls(model: nn.Module, given: dict[str, Tensor]) -> int:
    """Python functions called by one forward."""
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        model(**given)
    finally:
        sys.setprofile(None)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--forwards", type=int, default=50, help="in a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(describe(1).values()))
    models = make_models()
    ids = torch.arange(8)[None]
    batches = {
        "no mask": {"input_ids": ids},
        "attention_mask": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }
    print(
        "| batch | no noise, us | ours adds | transformers' hook adds | ratio | at most "
        "| Python calls, ours | theirs |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, given in batches.items():
        taken = time_rounds(models, given, options.rounds, options.forwards)
        base = taken[NOTHING]
        ours, theirs = (
            statistics.median(1e6 * (one - b) for one, b in zip(taken[who], base, strict=True))
            for who in (OURS, THEIRS)
        )
        calls = {who: count_calls(models[who], given) for who in models}
        print(
            f"| {name} | {1e6 * statistics.median(base):.0f} | {ours:.0f} | {theirs:.0f} "
            f"| {ours / theirs:.1f} | {LIMITS[name]} "
            f"| {calls[OURS] - calls[NOTHING]} | {calls[THEIRS] - calls[NOTHING]} |"
        )


if __name__ == "__main__":
    main()
