"""A training with MMEngine of one's own, as it is: `python training.py config.py`."""

import json
import sys

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, FUNCTIONS, MODELS
from mmengine.runner import Runner
from transformers import AutoModelForCausalLM, AutoTokenizer


@MODELS.register_module()
class CausalLM(BaseModel):
    def __init__(self, pretrained):
        super().__init__()
        self.llm = AutoModelForCausalLM.from_pretrained(pretrained)

    def forward(self, mode="tensor", **batch):
        return {"loss": self.llm(**batch).loss}


@DATASETS.register_module()
class Texts(torch.utils.data.Dataset):
    def __init__(self, file, pretrained):
        tokenizer = AutoTokenizer.from_pretrained(pretrained)
        with open(file) as lines:
            self.rows = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return torch.tensor(self.rows[index])


@FUNCTIONS.register_module()
def padded(rows):
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    labels = pad(rows, batch_first=True, padding_value=-100)
    return {"input_ids": pad(rows, batch_first=True), "attention_mask": mask, "labels": labels}


if __name__ == "__main__":
    Runner.from_cfg(Config.fromfile(sys.argv[1])).train()
