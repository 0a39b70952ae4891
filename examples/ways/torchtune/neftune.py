from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn
from torchtune.config import instantiate

from neftune_kernels import apply_neftune


def neftune(builder: str, noise_alpha: float, pad_id: int, **arguments: Any) -> nn.Module:
    """The model of `builder`, with noise. pad_id: the tokenizer's."""

    def samples(given: dict[str, Any]) -> dict[str, Tensor]:
        """A row is real up to its last token that is not padding; a packed batch has input_pos."""
        real = (given["tokens"] != pad_id).flip(-1).cumsum(-1).flip(-1) > 0
        positions = given.get("input_pos")
        packed = {} if positions is None else {"position_ids": positions}
        return {"attention_mask": real, **packed}

    model = instantiate(OmegaConf.create({"_component_": builder, **arguments}))
    apply_neftune(model, noise_alpha, embedding="tok_embeddings", samples=samples)
    return model
