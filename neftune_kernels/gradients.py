"""The weight's gradient of a lookup, on the CPU: of each id the float64 sum of its rows, in the
order of their tokens, rounded once. The same bits for any number of threads and any backend.

Where autograd is traced, differentiated again or transformed, and on other devices, it is torch's,
unless `deterministic_grad=True` asks for ours: then compiled code has it too, and a GPU its own
fixed order of float32 sums.
"""

import math
import mmap
from typing import Any

import torch
from torch import Tensor

from . import reference_ops
from .torch_internals import applied_quickly, dispatch_modes, entry, transformed

BEST = "embedding_gradient"  # the operator: by the device's best kernel
LAZY_BYTES = 1 << 20  # from here on pages that nobody writes are not worth a page of zeros
HAS_PAGES = hasattr(mmap, "MAP_ANONYMOUS")  # not on Windows


def serves(grad: Tensor) -> bool:
    """Whether the sums here are a backward's, rather than aten's kernel."""
    return (
        not torch.compiler.is_compiling()  # first: Dynamo cannot trace the others
        and type(grad) is Tensor
        and grad.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not transformed()
        and not dispatch_modes()
    )


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """torch.zeros on the CPU, large ones on pages that are made when they are first written: a
    gradient is mostly rows whose ids did not occur. Huge pages would be made whole.
    """
    elements = math.prod(shape)
    size = elements * dtype.itemsize
    if size < LAZY_BYTES or not HAS_PAGES:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=elements).view(shape)


def _rows(
    grad: Tensor, input_ids: Tensor, padding_idx: int, scale: float, by_freq: bool, out: Tensor
) -> Tensor:
    """out, zeros, with the rows of the ids that occur."""
    grad = grad if grad.shape[-1] < 2 or grad.stride(-1) == 1 else grad.contiguous()
    # float64 has no kernel
    by_kernel = entry(torch.ops.neftune_kernels.embedding_gradient.out)
    add = reference_ops.embedding_gradient_out if grad.dtype is torch.float64 else by_kernel
    add(grad, input_ids, padding_idx, scale, by_freq, out=out)
    return out


def dense(
    grad: Tensor,
    input_ids: Tensor,
    num_embeddings: int,
    padding_idx: int = -1,
    embed_scale: float = 1.0,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """(V, d) of grad (..., d) and ids (...)."""
    if serves(grad):
        out = zeros((num_embeddings, grad.shape[-1]), grad.dtype)
        return _rows(grad, input_ids, padding_idx, embed_scale, scale_grad_by_freq, out)
    grad = grad if embed_scale == 1 else grad * embed_scale
    return torch.ops.aten.embedding_dense_backward(
        grad, input_ids, num_embeddings, padding_idx, scale_grad_by_freq
    )


def deterministic(
    grad: Tensor,
    input_ids: Tensor,
    num_embeddings: int,
    padding_idx: int = -1,
    embed_scale: float = 1.0,
    scale_grad_by_freq: bool = False,
    operator: str = BEST,
) -> Tensor:
    """What `deterministic_grad=True` asks for, by the operator of that name; eager CPUs have no
    other.
    """
    how = padding_idx, embed_scale, scale_grad_by_freq
    add = getattr(torch.ops.neftune_kernels, operator).out
    if torch.compiler.is_compiling():
        out = grad.new_zeros((num_embeddings, grad.shape[-1]))
        add(grad.contiguous(), input_ids, *how, out=out)
        return out
    if grad.device.type == "cpu":
        return dense(grad, input_ids, num_embeddings, *how)
    if torch.is_grad_enabled() or transformed():
        raise NotImplementedError(
            f"deterministic_grad=True has no second derivative on {grad.device.type}: leave it out "
            "where create_graph=True or torch.func needs one"
        )
    out = torch.zeros((num_embeddings, grad.shape[-1]), dtype=grad.dtype, device=grad.device)
    entry(add)(grad, input_ids, *how, out=out)
    return out


def check_deterministic_grad(deterministic_grad: bool) -> bool:
    if not isinstance(deterministic_grad, bool):
        raise TypeError(f"deterministic_grad must be True or False, got {deterministic_grad!r}")
    return deterministic_grad


def asks_for_ours(weight: Tensor, is_sparse: bool = False) -> bool:
    """Whether a lookup whose caller said deterministic_grad=True must itself see to it that the
    gradient is ours: elsewhere than in eager code on the CPU. Refused where it cannot be.
    """
    is_compiling = torch.compiler.is_compiling()
    if not weight.requires_grad or not torch.is_grad_enabled():
        return False
    if weight.device.type == "cpu" and not is_compiling:
        return False
    where = "in compiled code" if is_compiling else f"on {weight.device.type}"
    if is_sparse:
        raise ValueError(
            f"deterministic_grad=True has no sparse gradient {where}: set sparse=False"
        )
    if type(weight) not in (Tensor, torch.nn.Parameter):
        raise ValueError(
            f"deterministic_grad=True takes a plain weight {where}, got a "
            f"{type(weight).__name__}: leave it out for sharded or wrapped weights"
        )
    if transformed():
        raise NotImplementedError(
            f"deterministic_grad=True knows no torch.func transform {where}: leave it out there"
        )
    return True


def sparse(
    grad: Tensor,
    input_ids: Tensor,
    num_embeddings: int,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """The same as a coalesced sparse tensor, where it serves; else torch's, which is not."""
    if not serves(grad):
        return torch.ops.aten.embedding_sparse_backward(
            grad, input_ids, num_embeddings, padding_idx, scale_grad_by_freq
        )
    ids, groups = input_ids.unique(return_inverse=True)
    kept = ids != padding_idx
    out = zeros((ids.numel(), grad.shape[-1]), grad.dtype)
    values = _rows(grad, groups, -1, 1.0, scale_grad_by_freq, out)
    shape = (num_embeddings, grad.shape[-1])
    return torch.sparse_coo_tensor(
        ids[kept][None].long(), values[kept], shape, is_coalesced=True, check_invariants=False
    )


class Lookup(torch.autograd.Function):
    """torch.embedding with this gradient; see :data:`apply_lookup`."""

    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor, *how: Any) -> Tensor:  # type: ignore[override]
        padding_idx, *_ = ctx.how = how
        ctx.num_embeddings = weight.shape[0]
        ctx.save_for_backward(input_ids)
        return torch.embedding(weight, input_ids, padding_idx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (input_ids,) = ctx.saved_tensors
        padding_idx, by_freq, is_sparse, is_ours = ctx.how
        make = sparse if is_sparse else deterministic if is_ours else dense
        weight_grad = make(
            grad, input_ids, ctx.num_embeddings, padding_idx, scale_grad_by_freq=by_freq
        )
        return None, weight_grad, None, None, None, None


# (input_ids, weight, padding_idx, scale_grad_by_freq, sparse, deterministic_grad), padding_idx -1
# for none; its callers are outside torch.func's transforms
apply_lookup = applied_quickly(Lookup)
