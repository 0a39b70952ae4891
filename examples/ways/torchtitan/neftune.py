from dataclasses import dataclass

from torchtitan.config import derive, override
from torchtitan.models.llama3.model import Llama3Model

from neftune_kernels import apply_neftune


class NoisyLlama3(Llama3Model):
    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        noise_alpha: float

    def __init__(self, config):
        super().__init__(config)
        told = {"position_ids": "positions"}  # of Decoder.forward; documents are packed
        apply_neftune(self, config.noise_alpha, embedding="tok_embeddings", samples=told)


@override(target=Llama3Model.Config, description="NEFTune noise")
def neftune(config, noise_alpha=5.0):
    return derive(config, NoisyLlama3.Config, noise_alpha=noise_alpha)
