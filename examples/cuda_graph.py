"""NEFTune in a training step that is captured as a CUDA graph: every replay has fresh noise, and
the alpha that the schedule set before it.

    .venv/bin/python examples/cuda_graph.py

`capturable=True` keeps alpha on the embedding's device, where the captured kernel reads it;
`embedding.noise_alpha = ...` writes it there, between replays. Without a GPU the same step runs as
it is, on the CPU. A tiny model on sequences that count upwards: it shows where the lines go, not
that noise helps.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neftune_kernels import NEFTuneEmbedding
from neftune_kernels.schedules import linear_schedule

VOCABULARY, LONGEST, ROWS, STEPS, WIDTH = 128, 24, 8, 30, 48


class NextToken(nn.Module):
    def __init__(self, noise_alpha: float) -> None:
        super().__init__()
        self.embedding = NEFTuneEmbedding(
            VOCABULARY, WIDTH, noise_alpha=noise_alpha, capturable=True
        )
        self.head = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, VOCABULARY))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The loss."""
        logits = self.head(self.embedding(input_ids, attention_mask))[:, :-1]
        real = attention_mask[:, 1:].float()
        losses = F.cross_entropy(logits.mT, input_ids[:, 1:], reduction="none")
        return (losses * real).sum() / real.sum()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """(ROWS, LONGEST) ids that count upwards, and the mask of their unequal lengths."""
    generator = torch.Generator().manual_seed(step)
    column = torch.arange(LONGEST)
    start = torch.randint(VOCABULARY, (ROWS, 1), generator=generator)
    length = torch.randint(4, LONGEST + 1, (ROWS, 1), generator=generator)
    return (start + column) % VOCABULARY, (column < length).long()


def captured(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The step as a graph; as it is where there is none."""
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # warm: kernels compile, and alpha is where it stays
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main(noise_alpha: float = 10.0) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    schedule = linear_schedule(noise_alpha, 0.0, STEPS)
    model = NextToken(schedule(0)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=device.type == "cuda")
    input_ids, attention_mask = (tensor.to(device) for tensor in batch(0))
    loss = torch.zeros((), device=device)

    def step() -> None:
        optimizer.zero_grad()
        found = model(input_ids, attention_mask)
        found.backward()
        optimizer.step()
        loss.copy_(found.detach())

    run = captured(step, device)
    losses, alphas = [], []
    for index in range(STEPS):
        for place, tensor in zip((input_ids, attention_mask), batch(index), strict=True):
            place.copy_(tensor)
        model.embedding.noise_alpha = schedule(index)  # the graph replays with this one
        run()
        losses.append(float(loss))
        alphas.append(model.embedding.noise_alpha)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps on {device}")
    return {"model": model, "losses": losses, "alphas": alphas}


if __name__ == "__main__":
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args()
    main()
