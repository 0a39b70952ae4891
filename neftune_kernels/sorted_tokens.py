"""What the GPU kernels of the weight's gradient are given: tokens sorted by id, and scratch memory
for parts of sums.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference, reference_ops


class SortedTokens(NamedTuple):
    grad: Tensor  # (N, d), columns side by side, in the order of the tokens
    ids: Tensor  # (N,) int32 or int64, sorted; -1 or num_embeddings where out of range
    order: Tensor  # (N,) int64: the tokens that they belong to, those of one id in their own order
    scratch: Tensor  # (2 · chunks, d) float32


def sorted_tokens(grad: Tensor, input_ids: Tensor, out: Tensor) -> SortedTokens | None:
    """Of the operator `embedding_gradient.out`; None where there is nothing to add. No
    synchronisation.
    """
    reference_ops.check_gradient(grad, input_ids, out)
    num_embeddings, embedding_dim = out.shape
    tokens = input_ids.numel()
    if tokens == 0 or out.numel() == 0:
        return None
    rows = grad.reshape(tokens, embedding_dim)
    rows = rows if embedding_dim < 2 or rows.stride(1) == 1 else rows.contiguous()
    dtype = torch.int32 if num_embeddings < 2**31 else torch.int64  # half the passes of a sort
    ids, order = input_ids.reshape(-1).clamp(-1, num_embeddings).to(dtype).sort(stable=True)
    parts = 2 * -(-tokens // reference.SUM_CHUNK), embedding_dim
    scratch = torch.empty(*parts, dtype=torch.float32, device=out.device)
    return SortedTokens(rows, ids, order, scratch)
