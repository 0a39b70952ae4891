"""The recipe of examples/ways/automodel on a CPU, two training steps: around its setup, whose place
a tiny model takes, since NeMo Automodel's recipe asks for CUDA's memory. For `make ways`.
"""

from unittest import mock

import torch
from neftune import Recipe
from nemo_automodel.components.training.neftune import NEFTune
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
from transformers import AutoModelForCausalLM, AutoTokenizer

from .ways import LENGTHS


def setup(recipe: Recipe) -> None:
    """What the recipe's own setup leaves where its YAML has `neftune: {noise_alpha: 5}`."""
    model = AutoModelForCausalLM.from_pretrained("model").train()
    recipe.__dict__.update(model_parts=[model], neftune=NEFTune(noise_alpha=5.0))
    recipe.neftune.activate(model)


def main() -> None:
    recipe = Recipe.__new__(Recipe)
    with mock.patch.object(TrainFinetuneRecipeForNextTokenPrediction, "setup", setup):
        recipe.setup()
    (model,) = recipe.model_parts
    tokenizer = AutoTokenizer.from_pretrained("model")
    texts = [" ".join([f"w{3 + i}"] * length) for i, length in enumerate(LENGTHS)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for four in (texts[:4], texts[4:]):
        batch = tokenizer(four, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
