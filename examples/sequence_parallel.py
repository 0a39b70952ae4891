"""NEFTune under sequence parallelism: each rank has some columns of the same samples.

    .venv/bin/torchrun --nproc-per-node 2 examples/sequence_parallel.py

Nothing in a shard shows how long its samples are, nor that the ranks share them. So three things
are said: the whole samples' lengths, each shard's places in them, and one replica for all ranks.
The shards, put together, are then the result of one process, bit for bit.
"""

import argparse

import torch
import torch.distributed as dist
from torch import Tensor

from neftune_kernels import NEFTuneEmbedding


def main() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    embedding = NEFTuneEmbedding(128, 48, noise_alpha=5.0, replica=0)
    ids = torch.arange(1, 25).view(2, 12)
    lengths = torch.tensor([12, 7])  # of the whole samples
    whole = embedding(ids, lengths=lengths, seed=3).detach()

    rank, shard = dist.get_rank(), 12 // dist.get_world_size()
    places = torch.arange(rank * shard, (rank + 1) * shard)
    mine = embedding(
        ids[:, places], lengths=lengths, position_ids=places.expand(2, -1), seed=3
    ).detach()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    joined = torch.cat(parts, dim=1)
    print(f"rank {rank}: shards are the whole, bit for bit: {torch.equal(joined, whole)}")
    return joined, whole


if __name__ == "__main__":
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args()
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
