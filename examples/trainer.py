"""NEFTune in transformers.Trainer, two ways: a callback, or
`TrainingArguments(neftune_noise_alpha=...)` made exact by patch_trainer().

    .venv/bin/python examples/trainer.py

A tiny random Llama on random tokens, on the CPU: it shows where the lines go, not that noise helps.
Both ways train the very same weights, bit for bit. The second is for configuration files that can
only set the argument; TRL's trainers take either.
"""

import argparse
import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from neftune_kernels.integrations.transformers import NEFTuneCallback, patch_trainer

VOCABULARY, LONGEST, STEPS = 128, 24, 16


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


def train(callbacks: list[Any], **options: Any) -> Any:
    transformers.set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=4,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        trainer = Trainer(
            LlamaForCausalLM(config),
            arguments,
            train_dataset=make_data(8 * STEPS, seed=1),
            callbacks=callbacks,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return trainer


def main(noise_alpha: float = 5.0) -> dict[str, Any]:
    with_callback = train([NEFTuneCallback(noise_alpha)])

    patch = patch_trainer()  # once, before training; for the whole process
    with_argument = train([], neftune_noise_alpha=noise_alpha)
    patch.undo()

    losses = [entry["loss"] for entry in with_callback.state.log_history if "loss" in entry]
    logged = {
        name: value
        for name, value in with_callback.state.log_history[-2].items()
        if name.startswith("neftune/")
    }
    pairs = zip(with_callback.model.parameters(), with_argument.model.parameters(), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs)
    print(
        f"NEFTuneCallback: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps; the log's "
        f"last entry:"
    )
    print(
        "   "
        + ", ".join(
            f"{name.removeprefix('neftune/')} {value:.4g}" for name, value in logged.items()
        )
    )
    print(
        f"neftune_noise_alpha= with patch_trainer(): {'the same' if same else 'OTHER'} weights, "
        f"bit for bit"
    )
    return {
        "model": with_callback.model,
        "same": same,
        "losses": losses,
        "logged": logged,
        "argument": with_argument.model,
    }


if __name__ == "__main__":
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args()
    main()
