"""What a caller says of the samples its tokens belong to, and the layout that operators take."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import Backend
from .layout import ROWS, Layout, by_document, check_layout, picked

PER_TOKEN = ("attention_mask", "position_ids", "noise_mask")  # shaped as the ids


class Samples(NamedTuple):
    """The layout arguments of a call; padded_ids is our own, see :func:`real_tokens`."""

    attention_mask: Tensor | None = None
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    position_ids: Tensor | None = None
    noise_mask: Tensor | None = None  # tokens that get noise; the others count all the same
    padded_ids: Tensor | None = (
        None  # nothing else is said: tokens equal to padding_idx are padding
    )
    padding_idx: int = -1
    time_first: bool = False  # the tokens are stored (T, B); all that is said is of (B, T)
    before: int = 0  # columns of the attention_mask before the tokens: a cache's

    def at(self, place: Callable[[Tensor], Tensor], shape: torch.Size, to: torch.Size) -> "Samples":
        """What is said of ids of this shape, said of a lookup of some of them, of shape `to`:
        `place` takes values of the ids to those of the lookup. Rows that are one there stay
        samples of their own.
        """
        said = self
        joined = joins_rows(shape, to) and self.cu_seqlens is None  # which count flattened tokens
        if self.lengths is not None:
            token = torch.arange(shape[-1], device=self.lengths.device)
            said = self._replace(attention_mask=token < self.lengths[..., None], lengths=None)
        if self.cu_seqlens is not None:  # numbered; a document that goes on in a row is another
            token = torch.arange(shape.numel(), device=self.cu_seqlens.device)
            number = torch.searchsorted(self.cu_seqlens.long(), token, right=True).view(shape)
            said = self._replace(attention_mask=number, cu_seqlens=None)
        if self.before and self.attention_mask is not None:
            said = self._replace(attention_mask=self.attention_mask[..., self.before :], before=0)
        if joined and said.attention_mask is not None:
            said = said._replace(attention_mask=_numbered_rows(said.attention_mask.expand(shape)))
        fields: dict[str, Any] = {
            name: place(value.expand(shape))
            for name in ("attention_mask", "position_ids", "noise_mask")
            if (value := getattr(said, name)) is not None
        }
        return said._replace(**fields)

    def check(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """Refuse what contradicts itself or does not fit tokens of this shape; returns position_ids
        broadcast to it.
        """
        return check_layout(shape, device, *self[:5])


UNSAID = Samples()


# Functions and no properties: the Dynamo of torch 2.10 reads no property of a NamedTuple.


def says_nothing(samples: Samples) -> bool:
    """Whether nothing is said at all."""
    return samples.noise_mask is None and says_no_padding(samples) and not samples.time_first


def says_no_padding(samples: Samples) -> bool:
    """Whether nothing says which tokens are real."""
    return (
        samples.attention_mask is None
        and samples.lengths is None
        and samples.cu_seqlens is None
        and samples.position_ids is None
        and samples.padded_ids is None
    )


def is_mask_alone(samples: Samples) -> bool:
    """Whether an attention_mask is all that is said."""
    return (
        samples.attention_mask is not None
        and samples.lengths is None
        and samples.cu_seqlens is None
        and samples.position_ids is None
        and samples.noise_mask is None
        and samples.padded_ids is None
        and not samples.time_first
        and not samples.before
    )


def joins_rows(shape: torch.Size, to: torch.Size) -> bool:
    """Whether ids of this shape, looked up in that one, have several of their rows in one."""
    if not len(shape) or not len(to):
        return False
    return to.numel() == shape.numel() and to[-1] > shape[-1]


def _numbered_rows(mask: Tensor) -> Tensor:
    """The mask with other numbers in every row: its rows are joined, and stay documents apart."""
    rows = mask.numel() // max(mask.shape[-1], 1)
    number = torch.arange(rows, device=mask.device).view(*mask.shape[:-1], 1)
    wide = mask.double() if mask.is_floating_point() else mask.long()
    return torch.where(wide != 0, wide * rows + number, 0)


def time_first(samples: Samples, shape: torch.Size) -> Samples:
    """What is said of ids (T, B), whose columns are samples, by masks and position ids shaped as
    they are, lengths (B,).
    """
    check_time_first(shape)
    if samples.cu_seqlens is not None:
        raise ValueError(
            "cu_seqlens bounds documents of flattened rows: with batch_first=False, where columns "
            "are samples, give attention_mask or lengths"
        )
    given = {name: getattr(samples, name) for name in PER_TOKEN}
    for name, value in given.items():
        fits = (shape, (shape[0], 1)) if name == "position_ids" else (shape,)
        # Dynamo's `in` takes a shape that varies for another than the one it is
        if isinstance(value, Tensor) and not any(value.shape == one for one in fits):
            raise ValueError(
                f"{name} must have the shape {tuple(shape)} of the ids, which batch_first=False "
                f"takes for (T, B), got {tuple(value.shape)}"
            )
    turned: dict[str, Any] = {
        name: v.t() if isinstance(v, Tensor) else v for name, v in given.items()
    }
    return samples._replace(**turned, time_first=True)


def check_time_first(shape: torch.Size) -> None:
    if len(shape) != 2:
        raise ValueError(
            f"batch_first=False takes ids of shape (T, B), got {tuple(shape)}: reshape them, or "
            "leave batch_first=True where rows are samples"
        )


def said(
    attention_mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    noise_mask: Tensor | None,
) -> Samples:
    """The layout arguments of a public call; UNSAID itself where none is given."""
    if (
        attention_mask is None
        and lengths is None
        and cu_seqlens is None
        and position_ids is None
        and noise_mask is None
    ):
        return UNSAID
    return Samples(attention_mask, lengths, cu_seqlens, position_ids, noise_mask)


def real_tokens(input_ids: Tensor, padding_idx: int, samples: Samples) -> Samples:
    """Where nothing else tells padding, tokens equal to padding_idx (-1: none) are padding."""
    if padding_idx < 0 or not says_no_padding(samples):
        return samples
    ids = input_ids.t() if samples.time_first else input_ids
    return samples._replace(padded_ids=ids, padding_idx=padding_idx)


def make_layout(
    shape: torch.Size,
    device: torch.device,
    samples: Samples,
    backend: Backend,
    position_offset: int = 0,
) -> Layout:
    """Check what the caller says and put it as the operators take it, which add the offset to
    positions themselves.
    """
    if says_nothing(samples):
        return ROWS
    before, is_turned = samples.before, samples.time_first
    if is_turned:
        check_time_first(shape)
        shape = torch.Size((shape[1], shape[0]))
    if before:
        shape = torch.Size((*shape[:-1], shape[-1] + before))
    position_ids = samples.check(shape, device)
    noise_mask = samples.noise_mask
    if noise_mask is None and not is_turned and not before:
        return _layout_of_samples(samples, position_ids, backend)
    layout = ROWS
    if not says_no_padding(samples):
        layout = _layout_of_samples(samples, position_ids, backend, per_token=True)
    if noise_mask is None:
        noise_mask = torch.ones((), dtype=torch.bool, device=device).expand(shape)
    document = torch.ops.neftune_kernels.noisy_documents(
        noise_mask.detach(), *layout, position_offset
    )
    layout = by_document(layout, document, shape)
    return picked(layout, shape, before, is_turned) if before or is_turned else layout


def _layout_of_samples(
    samples: Samples, position_ids: Tensor | None, backend: Backend, per_token: bool = False
) -> Layout:
    """make_layout but for what needs masks numbered token by token: noise masks, (T, B), caches.

    Kernels that number documents read any strides and mask dtype.
    """
    if samples.padded_ids is not None:
        padded = samples.padded_ids, samples.padding_idx
        if per_token:
            return Layout(*backend.padding_layout(*padded))
        return Layout(numbering=backend.number_padding(*padded))
    if samples.cu_seqlens is not None:
        return Layout(cu_seqlens=samples.cu_seqlens.contiguous())
    if samples.lengths is not None:
        lengths = samples.lengths
        position = None if position_ids is None else position_ids.reshape(-1)
        if backend.name != "triton":
            lengths = lengths if lengths.dtype in (torch.int32, torch.int64) else lengths.long()
            position = None if position is None else position.long()
        return Layout(position=position, lengths=lengths.reshape(-1))
    mask = None if samples.attention_mask is None else samples.attention_mask.detach()
    if per_token:
        return Layout(*backend.mask_layout(mask, position_ids))
    return Layout(numbering=backend.number_documents(mask, position_ids))
