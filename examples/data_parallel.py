"""NEFTune under DistributedDataParallel: every rank has noise of its own, though all are seeded
alike.

    .venv/bin/torchrun --nproc-per-node 2 examples/data_parallel.py

A tiny random Llama on the CPU, by gloo. What tells the ranks apart is a number, `replica`, which
`apply_neftune` works out at each call.
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from neftune_kernels import apply_neftune


def main() -> dict[str, float]:
    torch.manual_seed(0)  # on every rank, as trainers do
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).train()
    handle = apply_neftune(model, noise_alpha=5.0)
    parallel = DistributedDataParallel(model)

    # the same batch on both ranks, so that only the noise can make their losses differ
    ids = torch.arange(1, 25).view(2, 12)
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    loss = parallel(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    lengths = handle.stats()["length_min"], handle.stats()["length_max"]
    print(f"rank {dist.get_rank()}: lengths {lengths}, loss {loss.item():.6f}")
    return {"loss": loss.item(), "gradient": float(model.get_input_embeddings().weight.grad.sum())}


if __name__ == "__main__":
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args()
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
