"""NEFTune by hand inside Trainer.compute_loss: add_noise on inputs_embeds, on LoRA with frozen
embeddings and gradient checkpointing.

    .venv/bin/python examples/compute_loss.py

For a loss that builds its own embeddings; else apply_neftune or NEFTuneCallback is one line. A tiny
random Llama on random tokens, on the CPU. What goes wrong when the embedding is called as
`embed.forward(ids)`: that skips forward hooks, also the one by which enable_input_require_grads()
lets gradients through frozen embeddings, and with reentrant checkpointing the loss then requires no
grad.
"""

import argparse
import tempfile
import warnings
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from neftune_kernels import add_noise

VOCABULARY, LONGEST, STEPS = 128, 24, 12


class NoisyTrainer(Trainer):  # type: ignore[misc]
    noise_alpha = 5.0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        embed = self.accelerator.unwrap_model(model).get_input_embeddings()
        inputs_embeds = embed(inputs["input_ids"])  # never embed.forward(...), see above
        if model.training:
            # each data-parallel rank draws its own noise
            mask, replica = inputs["attention_mask"], self.args.process_index
            inputs_embeds = add_noise(
                inputs_embeds, self.noise_alpha, attention_mask=mask, replica=replica
            )
        others = {name: value for name, value in inputs.items() if name != "input_ids"}
        return super().compute_loss(
            model, {**others, "inputs_embeds": inputs_embeds}, *args, **kwargs
        )


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


def train(use_reentrant: bool, noise_alpha: float) -> NoisyTrainer:
    transformers.set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    model.enable_input_require_grads()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=4,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        )
        trainer = NoisyTrainer(model, arguments, train_dataset=make_data(8 * STEPS, seed=1))
        trainer.noise_alpha = noise_alpha
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return trainer


def main(noise_alpha: float = 5.0) -> dict[bool, NoisyTrainer]:
    # transformers before 5.23 has no other spelling
    warnings.filterwarnings(
        "ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning
    )
    trained = {}
    for use_reentrant in (True, False):
        trainer = trained[use_reentrant] = train(use_reentrant, noise_alpha)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        print(
            f"use_reentrant={use_reentrant}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, gradient "
            f"norms {min(norms):.3f} to {max(norms):.3f}"
        )
    return trained


if __name__ == "__main__":
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args()
    main()
