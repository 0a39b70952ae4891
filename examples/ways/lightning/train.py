"""A Lightning CLI of one's own, as it is: `python train.py fit --config fit.yaml`."""

import json
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


class CausalLM(pl.LightningModule):
    def __init__(self, pretrained: str, learning_rate: float = 2e-5) -> None:
        super().__init__()
        self.model: Any = AutoModelForCausalLM.from_pretrained(pretrained).train()
        self.learning_rate = learning_rate

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.learning_rate)


class Texts(pl.LightningDataModule):
    def __init__(self, file: str, pretrained: str, batch_size: int = 4) -> None:
        super().__init__()
        with open(file) as lines:
            self.texts = [json.loads(line)["text"] for line in lines]
        self.tokenizer: Any = AutoTokenizer.from_pretrained(pretrained)
        self.batch_size = batch_size

    def collate(self, texts: list[str]) -> dict[str, Tensor]:
        batch = self.tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {**batch, "labels": labels}

    def train_dataloader(self) -> Any:
        load: Any = torch.utils.data.DataLoader
        return load(self.texts, self.batch_size, collate_fn=self.collate)


if __name__ == "__main__":
    LightningCLI(CausalLM, Texts)
