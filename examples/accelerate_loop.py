"""A training loop of your own with Hugging Face Accelerate, and NEFTune noise that fades out while
it runs.

    .venv/bin/python examples/accelerate_loop.py

A tiny random Llama on random tokens, on the CPU: it shows where the lines go, not that noise helps.
The noise belongs to the model, so `accelerator.prepare`, gradient accumulation and mixed precision
need nothing; under data parallelism each rank draws its own.
"""

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from neftune_kernels import apply_neftune
from neftune_kernels.schedules import linear_schedule

VOCABULARY, LONGEST = 128, 24
OPTIMIZER_STEPS, ACCUMULATED = 12, 2


def make_data(rows: int, seed: int) -> list[dict[str, Tensor]]:
    """Rows that count upwards from a random token, of unequal length, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(rows):
        start, length = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in ((0, VOCABULARY), (4, LONGEST + 1))
        )
        column = torch.arange(LONGEST)
        mask = (column < length).long()
        ids = (1 + (start + column) % (VOCABULARY - 1)) * mask  # 0 is padding
        data.append(
            {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}
        )
    return data


def main(noise_alpha: float = 5.0) -> dict[str, Any]:
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader: Any = DataLoader(make_data(8 * OPTIMIZER_STEPS * ACCUMULATED, seed=1), batch_size=8)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    schedule = linear_schedule(noise_alpha, 0.0, OPTIMIZER_STEPS)
    losses, alphas, step = [], [], 0
    with apply_neftune(
        accelerator.unwrap_model(model), schedule(0)
    ) as handle:  # taken off again at the end, or when something fails
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if accelerator.sync_gradients:
                alphas.append(handle.noise_alpha)
                step += 1
                handle.noise_alpha = schedule(step)
        stats = handle.stats()

    print(
        f"{step} optimizer steps of {ACCUMULATED} batches: loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    )
    print(f"noise_alpha {alphas[0]:g} -> {alphas[-1]:.3g}; {stats['calls']} forwards had noise")
    if stats["calls"]:
        print(
            f"last batch: {stats['samples']} samples of {stats['length_min']} to "
            f"{stats['length_max']} real tokens, magnitudes "
            f"{stats['magnitude_min']:.4f} to {stats['magnitude_max']:.4f} = alpha/sqrt(L*d), "
            f"backend {stats['backend']}"
        )
    print(
        f"afterwards the embedding is a plain {type(model.get_input_embeddings()).__name__} again"
    )
    return {
        "model": accelerator.unwrap_model(model),
        "losses": losses,
        "alphas": alphas,
        "stats": stats,
    }


if __name__ == "__main__":
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args()
    main()
