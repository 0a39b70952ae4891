"""reference.py as operators: over all tokens of a call, by chunks, with the variants."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import layout as layouts
from . import reference
from .noise import check_variant

REFERENCE_CHUNK = 1 << 20  # elements the reference computes at once: bounds its int64 scratch


def extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes a tensor reaches: [first, second)."""
    if tensor.numel() == 0:
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_apart(out: Tensor, **read: Tensor | None) -> None:
    """Refuse an output in the memory of an argument, which would be written while it is read; but
    for inputs_embeds itself.
    """
    begin, end = extent(out)
    for name, tensor in read.items():
        if tensor is None or tensor.device != out.device:
            continue
        first, last = extent(tensor)
        in_place = name == "inputs_embeds" and first == begin and tensor.is_contiguous()
        if first < end and begin < last and not in_place:
            unless = " unless it is the same tensor" if name == "inputs_embeds" else ""
            raise RuntimeError(f"out must not overlap {name}{unless}")


class Drawn(NamedTuple):
    """What decides the noise of an operator's call, as its flat arguments say it."""

    seed: Tensor
    noise_alpha: Tensor
    layout: layouts.Layout
    offsets: tuple[int, int, int]  # replica, sample_offset, position_offset
    distribution: str = "uniform"
    equal_variance: bool = True

    def tensors(self) -> dict[str, Tensor | None]:
        return {"seed": self.seed, "noise_alpha": self.noise_alpha, **self.layout._asdict()}


def rows_out(rows: Callable[[slice], Tensor], shape: torch.Size, drawn: Drawn, out: Tensor) -> None:
    """reference.py over all tokens, a bounded number of rows at a time.

    rows: of a slice of the N tokens, their (n, d) embeddings; out: (N·d values), contiguous.
    """
    replica, sample_offset, position_offset = drawn.offsets
    embedding_dim = out.shape[-1]
    sample, position, length = layouts.per_token(
        drawn.layout, shape, out.device, sample_offset, position_offset
    )
    flat = out.view(sample.numel(), embedding_dim)
    for chunk in chunks(sample.numel(), embedding_dim):
        noise = reference.neftune_noise(
            (sample[chunk], position[chunk], length[chunk]),
            embedding_dim,
            drawn.noise_alpha,
            drawn.seed,
            replica,
            drawn.distribution,
            drawn.equal_variance,
        )
        flat[chunk] = reference.add_noise(rows(chunk), noise)


def chunks(num_rows: int, embedding_dim: int) -> list[slice]:
    rows = max(1, REFERENCE_CHUNK // max(1, embedding_dim))
    return [slice(start, start + rows) for start in range(0, num_rows, rows)]


def noisy_embedding_out(
    input_ids: Tensor,
    weight: Tensor,
    seed: Tensor,
    noise_alpha: Tensor,
    document: Tensor | None = None,
    position: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    numbering: Tensor | None = None,
    replica: int = 0,
    sample_offset: int = 0,
    position_offset: int = 0,
    padding_idx: int = -1,
    embed_scale: float = 1.0,
    *,
    out: Tensor,
) -> None:
    drawn = Drawn(
        seed,
        noise_alpha,
        layouts.Layout(document, position, lengths, cu_seqlens, numbering),
        (replica, sample_offset, position_offset),
    )
    check_apart(out, input_ids=input_ids, weight=weight, **drawn.tensors())
    ids = input_ids.reshape(-1).long()
    outside = (ids < 0) | (ids >= weight.shape[0])
    if ids.device.type == "cpu" and bool(outside.any()):
        raise IndexError(
            f"input_ids must lie in [0, num_embeddings = {weight.shape[0]}), got "
            f"{int(ids[outside][0])}"
        )
    safe = torch.where(outside, 0, ids)

    def rows(chunk: slice) -> Tensor:
        if (
            weight.shape[0] == 0
        ):  # only an accelerator gets here with tokens: every id is out of range
            return weight.new_full((outside[chunk].numel(), weight.shape[1]), float("nan"))
        embedded = reference.embed(safe[chunk], weight, embed_scale)
        if ids.device.type == "cpu":
            return embedded
        return torch.where(outside[chunk, None], float("nan"), embedded)

    rows_out(rows, input_ids.shape, drawn, out)


def add_noise_out(
    inputs_embeds: Tensor,
    seed: Tensor,
    noise_alpha: Tensor,
    document: Tensor | None = None,
    position: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    numbering: Tensor | None = None,
    replica: int = 0,
    sample_offset: int = 0,
    position_offset: int = 0,
    *,
    out: Tensor,
) -> None:
    embedding_dim = inputs_embeds.shape[-1]
    embeddings = inputs_embeds.reshape(inputs_embeds.shape[:-1].numel(), embedding_dim)
    drawn = Drawn(
        seed,
        noise_alpha,
        layouts.Layout(document, position, lengths, cu_seqlens, numbering),
        (replica, sample_offset, position_offset),
    )
    check_apart(out, inputs_embeds=inputs_embeds, **drawn.tensors())
    rows_out(lambda chunk: embeddings[chunk], inputs_embeds.shape[:-1], drawn, out)


def add_variant_noise(
    inputs_embeds: Tensor,
    seed: Tensor,
    noise_alpha: Tensor,
    document: Tensor | None = None,
    position: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    numbering: Tensor | None = None,
    replica: int = 0,
    sample_offset: int = 0,
    position_offset: int = 0,
    distribution: str = "normal",
    equal_variance: bool = True,
    *,
    uniform: str,
) -> Tensor:
    """reference.py; or the same with the draws of the add_noise operator `uniform`, which are its
    noise of step 1 on zeros.
    """
    check_variant(distribution, equal_variance, 1)
    layout = layouts.Layout(document, position, lengths, cu_seqlens, numbering)
    offsets = (replica, sample_offset, position_offset)
    if distribution == "uniform":
        add = getattr(torch.ops.neftune_kernels, uniform)
        noisy: Tensor = add(inputs_embeds, seed, noise_alpha, *layout, *offsets)
        return noisy
    device, shape, embedding_dim = (
        inputs_embeds.device,
        inputs_embeds.shape[:-1],
        inputs_embeds.shape[-1],
    )
    embeddings = inputs_embeds.reshape(shape.numel(), embedding_dim)
    out = inputs_embeds.new_empty(inputs_embeds.shape)
    if uniform == "reference_add_noise":
        drawn = Drawn(seed, noise_alpha, layout, offsets, distribution, equal_variance)
        rows_out(lambda chunk: embeddings[chunk], shape, drawn, out)
        return out
    sample, place, length = layouts.per_token(layout, shape, device, 0, position_offset)
    counts = cu_seqlens if lengths is None else lengths
    num_samples = shape.numel() if counts is None else counts.numel()
    # Every sample counts one token, so alpha / √(1·d) is 2³¹ exactly and the noise is the lattice
    # value x itself.
    lattice = getattr(torch.ops.neftune_kernels, uniform)(
        torch.zeros((), dtype=torch.float32, device=device).expand(inputs_embeds.shape),
        seed,
        torch.full((), 2.0**31 * math.sqrt(embedding_dim), dtype=torch.float64, device="cpu"),
        torch.where(length > 0, sample, -1),
        place,
        torch.ones(num_samples, dtype=torch.int64, device=device),
        None,
        None,
        replica,
        sample_offset,
    ).view_as(embeddings)
    flat = out.view_as(embeddings)
    for chunk in chunks(shape.numel(), embedding_dim):
        noise = reference.scaled_draws(
            lattice[chunk], length[chunk], embedding_dim, noise_alpha, distribution, equal_variance
        )
        flat[chunk] = reference.add_noise(embeddings[chunk], noise)
    return out


def noisy_documents(
    noise_mask: Tensor,
    document: Tensor | None = None,
    position: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    numbering: Tensor | None = None,
    position_offset: int = 0,
) -> Tensor:
    return layouts.noisy_documents(
        noise_mask,
        layouts.Layout(document, position, lengths, cu_seqlens, numbering),
        position_offset,
    )


def check_gradient(grad: Tensor, input_ids: Tensor, out: Tensor) -> None:
    if grad.shape != (*input_ids.shape, out.shape[1]) or out.dtype != grad.dtype:
        raise RuntimeError(
            f"grad of {tuple(input_ids.shape)} ids for out {tuple(out.shape)} {out.dtype}, got "
            f"{tuple(grad.shape)} {grad.dtype}"
        )


def sorted_gradient_out(
    grad: Tensor,
    ids: Tensor,
    order: Tensor,
    scratch: Tensor,
    chunk: int,
    padding_idx: int,
    embed_scale: float,
    scale_grad_by_freq: bool,
    *,
    out: Tensor,
) -> None:
    """embedding_gradient_out of tokens that are sorted by id, stably."""
    how = padding_idx, embed_scale, scale_grad_by_freq
    embedding_gradient_out(grad[order], ids, *how, out=out)


def embedding_gradient_out(
    grad: Tensor,
    input_ids: Tensor,
    padding_idx: int,
    embed_scale: float,
    scale_grad_by_freq: bool,
    *,
    out: Tensor,
) -> None:
    check_gradient(grad, input_ids, out)
    check_apart(out, grad=grad, input_ids=input_ids)
    ids = input_ids.reshape(-1).long()
    if out.device.type != "cpu":  # where sums have another definition, and are for the host to add
        rows, ids = reference.chunked_gradient(
            grad.reshape(ids.numel(), out.shape[1]).cpu(),
            ids.cpu(),
            out.shape[0],
            padding_idx,
            embed_scale,
            scale_grad_by_freq,
        )
        out[ids.to(out.device)] = rows.to(out.device)
        return
    outside = (ids < 0) | (ids >= out.shape[0])
    if bool(outside.any()):
        raise IndexError(
            f"input_ids must lie in [0, num_embeddings = {out.shape[0]}), got "
            f"{int(ids[outside][0])}"
        )
    kept = ids != padding_idx
    rows, ids = reference.embedding_gradient(
        grad.reshape(ids.numel(), out.shape[1])[kept], ids[kept], embed_scale, scale_grad_by_freq
    )
    out[ids] = rows
