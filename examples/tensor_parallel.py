"""NEFTune under tensor parallelism: the ranks share their tokens, and their noise.

    .venv/bin/torchrun --nproc-per-node 2 examples/tensor_parallel.py

A tiny model on the CPU, by gloo: the table is sharded by rows, and the output and its noise are
those of one process with the same seed, bit for bit. Give a NEFTuneEmbedding its mask by keyword
here: torch's hooks drop further positional arguments.
"""

import argparse

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from neftune_kernels import NEFTuneEmbedding


def main() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"embed": NEFTuneEmbedding(128, 48, noise_alpha=5.0)})
    ids = torch.arange(1, 25).view(2, 12)
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    torch.manual_seed(1)
    alone = model["embed"](ids, attention_mask=mask, replica=0).detach()

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    parallelize_module(model, mesh, {"embed": rows})
    torch.manual_seed(1)
    sharded = model["embed"](ids, attention_mask=mask).detach()
    print(f"rank {dist.get_rank()}: as one process, bit for bit: {torch.equal(sharded, alone)}")
    return sharded, alone


if __name__ == "__main__":
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args()
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
