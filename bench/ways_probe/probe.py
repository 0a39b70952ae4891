"""Judges noise by what arrives behind a lookup, by torch's global module hooks alone; it shares no
code with neftune_kernels.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

PAD = 0  # of the tiny tokenizer, which means it nowhere else
FIRST = int(os.environ.get("PROBE_FIRST", -1))  # opens every document of a packed row


def watch(tell: Callable[[dict[str, Any]], None]) -> list[Any]:
    """Calls `tell` for each forward of an embedding: whether it had grad, and of every row its
    length, and how far its real tokens and its padding are from the table's rows.

    Returns the hooks.
    """
    looked_up: list[tuple[Tensor, Tensor]] = []  # ids and the table's rows, until they arrive

    def after(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and args and args[0].dim() == 2:
            looked_up[:] = [(args[0], module.weight.detach()[args[0]].float())]

    def before(module: Any, args: Any) -> None:
        """The first module that is called with the embeddings: noise has been added by then."""
        for ids, clean in looked_up[:]:
            for value in args:
                if torch.is_tensor(value) and value.shape == clean.shape:
                    looked_up.clear()
                    tell(described(ids, (value.detach().float() - clean).abs()))
                    return

    return [register_module_forward_hook(after), register_module_forward_pre_hook(before)]


def documents(ids: Tensor, noise: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    begun = [*(ids == FIRST).nonzero().flatten().tolist(), len(ids)]
    for start, end in itertools.pairwise(begun):
        yield ids[start:end], noise[start:end]


def described(ids: Tensor, noise: Tensor) -> dict[str, Any]:
    rows = []
    samples = list(zip(ids, noise, strict=True))
    if FIRST >= 0:
        samples = [pair for row in samples for pair in documents(*row)]
    for tokens, row in samples:
        real = tokens != PAD
        here, padding = row[real], row[~real]
        rows.append(
            {
                "length": int(real.sum()),
                "largest": float(here.max()) if len(here) else 0.0,
                "square": float(here.square().mean()) if len(here) else 0.0,
                "padding": float(padding.max()) if len(padding) else 0.0,
            }
        )
    return {
        "grad": torch.is_grad_enabled(),
        "columns": ids.shape[1],
        "dim": noise.shape[-1],
        "rows": rows,
    }
