"""The launcher of the weight's gradient in CUDA C++ (csrc/cuda/gradients.cu): the sums of
triton_gradients.py, in the same order.
"""

from typing import Any

from torch import Tensor

from . import ops, reference, self_check
from .sorted_tokens import sorted_tokens


def embedding_gradient_out(
    grad: Tensor,
    input_ids: Tensor,
    padding_idx: int,
    embed_scale: float,
    scale_grad_by_freq: bool,
    *,
    out: Tensor,
) -> Any:
    """The operator `cuda_embedding_gradient.out`, for a contiguous `out`: a sort and up to three
    launches on the current stream, no synchronisation after the first of its kind.

    NotImplemented where its first sums are wrong.
    """
    tokens = sorted_tokens(grad, input_ids, out)
    if tokens is None:
        return None
    how = padding_idx, embed_scale, scale_grad_by_freq
    ops.OUT["cuda_sorted_gradient"](*tokens, reference.SUM_CHUNK, *how, out=out)
    chunks = tokens.scratch.shape[0] // 2
    launches = 1 + (chunks > 1) + (chunks > reference.SUM_CHUNK)
    kind = "gradient", out.dtype, scale_grad_by_freq, launches
    done = "cuda", out.device.type, repr(kind)
    if done not in self_check.passed and self_check.wanted(out.device):
        if not self_check.gradient_agrees("cuda", out, tokens.grad, input_ids, *how):
            return NotImplemented
        self_check.passed.add(done)
    return None
