"""NEFTune in PyTorch Lightning: one callback; validation has no noise, and nothing is left on the
model when training ends or fails.

    .venv/bin/python examples/lightning_module.py

A tiny random Llama on random tokens, on the CPU: it shows where the lines go, not that noise helps.
A model that comes from `from_pretrained` is in eval mode, where Lightning leaves it: call its
`train()`, as below, or neither dropout nor noise runs.
"""

import argparse
import logging
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from neftune_kernels.integrations.lightning import NEFTuneCallback
from neftune_kernels.schedules import warmup_schedule

VOCABULARY, LONGEST, STEPS = 128, 24, 20


class CausalLM(pl.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        self.model = LlamaForCausalLM(config).train()

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


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


def main(noise_alpha: float = 5.0, **trainer_options: Any) -> dict[str, Any]:
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    pl.seed_everything(0, verbose=False)
    module = CausalLM()
    # the alpha grows over 4 steps; NEFTuneCallback(noise_alpha=5.0) where it should not
    neftune = NEFTuneCallback(warmup_schedule(4, noise_alpha))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    options = {
        "max_steps": STEPS,
        "val_check_interval": STEPS,
        "log_every_n_steps": 5,
        "accelerator": "cpu",
        "devices": 1,
        **quiet,
    }
    trainer = pl.Trainer(callbacks=[neftune], **{**options, **trainer_options})
    training: Any = DataLoader(make_data(8 * STEPS, seed=1), batch_size=8)  # type: ignore[arg-type]
    validation: Any = DataLoader(make_data(16, seed=2), batch_size=8)  # type: ignore[arg-type]
    trainer.fit(module, training, validation)

    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    print(
        f"{trainer.global_step} steps: loss {logged['train_loss']:.3f}, validation (without "
        f"noise) {logged['val_loss']:.3f}"
    )
    for name in (
        "noise_alpha",
        "length_min",
        "length_max",
        "magnitude_min",
        "magnitude_max",
        "max_noise_ratio",
    ):
        if f"neftune/{name}" in logged:
            print(f"   neftune/{name} {logged[f'neftune/{name}']:.4g}")
    print(
        f"afterwards the embedding is a plain "
        f"{type(module.model.get_input_embeddings()).__name__} again"
    )
    return {
        "module": module,
        "model": module.model,
        "trainer": trainer,
        "logged": logged,
        "callback": neftune,
    }


if __name__ == "__main__":
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args()
    main()
