"""attention_mask | lengths | cu_seqlens | position_ids → which sample, which position and how many
real tokens each token has.

Shapes: tokens of shape (..., T) are rows of T; N is their number. A 0-D input is one row of one
    token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

UINT32 = 0xFFFFFFFF
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
UNSIGNED_DTYPES = (
    torch.uint16,
    torch.uint32,
    torch.uint64,
)  # torch compares these nowhere: they are widened first
MASK_DTYPES = (
    torch.bool,
    *INTEGER_DTYPES,
    *UNSIGNED_DTYPES,
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
)


class Layout(NamedTuple):
    """Where tokens lie in their samples; every field None: each row is one sample of T real tokens.

    document: (N,) int64, each token's sample, -1 for padding; None: the row.
    position: (N,) int64, each token's place in its sample; None: the column.
    lengths: (samples,) int32 or int64, real tokens of each sample. Without `document` a token is
        real while its position is below it.
    cu_seqlens: (samples + 1,) int32 or int64 bounds over the flattened tokens; then the other three
        are None.
    """

    document: Tensor | None = None
    position: Tensor | None = None
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None


ROWS = Layout()


def rows_and_columns(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """(..., T) → (product of the leading axes, T)."""
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, (shape[-1] if len(shape) else 1)


def check_layout(
    shape: torch.Size | tuple[int, ...],
    device: torch.device,
    attention_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    noise_mask: Tensor | None = None,
) -> Tensor | None:
    """Refuse what contradicts itself or does not fit tokens of this shape; returns position_ids
    broadcast to it.
    """
    given = {"attention_mask": attention_mask, "lengths": lengths, "cu_seqlens": cu_seqlens}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(
            f"at most one of attention_mask, lengths and cu_seqlens may be given, got "
            f"{' and '.join(names)}"
        )
    if cu_seqlens is not None and position_ids is not None:
        raise ValueError(
            "position_ids goes alone, with attention_mask or with lengths: cu_seqlens already "
            "gives every token its position"
        )
    for name, value in (*given.items(), ("position_ids", position_ids), ("noise_mask", noise_mask)):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.device != device:
            raise ValueError(
                f"{name} is on {value.device}, the tokens are on {device}: they must be on one "
                f"device"
            )
    for name, mask in (("attention_mask", attention_mask), ("noise_mask", noise_mask)):
        if mask is not None:
            if mask.dtype not in MASK_DTYPES:
                raise TypeError(f"{name} must be bool, integer or float, got {mask.dtype}")
            if mask.shape != shape:
                raise ValueError(
                    f"{name} must have the tokens' shape {tuple(shape)}, got {tuple(mask.shape)}"
                )
    if lengths is not None:
        if lengths.dtype not in INTEGER_DTYPES:
            raise TypeError(f"lengths must be an integer tensor, got {lengths.dtype}")
        if lengths.shape != shape[:-1]:
            raise ValueError(
                f"lengths must have the leading axes {tuple(shape[:-1])} of the tokens' shape, "
                f"got {tuple(lengths.shape)}"
            )
    if cu_seqlens is not None:
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
            raise ValueError(
                f"cu_seqlens must have shape (documents + 1,), got {tuple(cu_seqlens.shape)}"
            )
    if position_ids is not None:
        if position_ids.dtype not in INTEGER_DTYPES:
            raise TypeError(f"position_ids must be an integer tensor, got {position_ids.dtype}")
        if position_ids.shape != shape:
            if (
                position_ids.dim() < 2
                or position_ids.shape[-1:] != shape[-1:]
                or position_ids.shape[:-1].numel() != 1
            ):
                raise ValueError(
                    f"position_ids must have the tokens' shape {tuple(shape)} or be one row of "
                    f"it, got {tuple(position_ids.shape)}"
                )
            position_ids = position_ids.reshape(shape[-1]).expand(shape)
    return position_ids


REAL_WHERE = "a token is real where it is not 0, padding where it is 0"
NOISY_WHERE = "a token gets noise where it is not 0, none where it is 0"


def check_mask_values(mask: Tensor, name: str = "attention_mask", rule: str = REAL_WHERE) -> None:
    """NaN and negative mask values are refused on the CPU; additive masks (0 and -inf) are caught
    here.
    """
    if mask.dtype.is_signed and mask.device.type == "cpu":
        bad = ~(mask >= 0)
        if bool(bad.any()):
            raise ValueError(
                f"{name} has negative or NaN values, such as {float(mask[bad][0]):g}: {rule}"
            )


def check_lengths_values(lengths: Tensor) -> None:
    if lengths.device.type == "cpu" and bool((lengths < 0).any()):
        raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")


def check_cu_seqlens_values(cu_seqlens: Tensor, num_tokens: int) -> None:
    if cu_seqlens.device.type != "cpu":
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != num_tokens:
        raise ValueError(
            f"cu_seqlens must run from 0 to the number of tokens {num_tokens}, got {first} to "
            f"{last}"
        )
    falls = cu_seqlens[1:] < cu_seqlens[:-1]
    if bool(falls.any()):
        i = int(falls.nonzero()[0])
        raise ValueError(
            f"cu_seqlens must not decrease, got {int(cu_seqlens[i])} before "
            f"{int(cu_seqlens[i + 1])}"
        )


def mask_layout(
    attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Number the documents of (..., T) masks and position ids, at least one of them given, in
    row-major order.

    Every row opens a document, and so does every further real token whose mask value differs from
    its real predecessor's in the row or whose position id minus that predecessor's is neither 1 nor
    their column distance. Positions count columns from the document's first real token.

    Returns:
        document (N,) int64 with -1 for padding, position (N,) int64, lengths (N,) int64 indexed by
        document.
    """
    given = attention_mask if attention_mask is not None else position_ids
    assert given is not None
    rows, columns = rows_and_columns(given.shape)
    if rows * columns == 0:
        empty = torch.empty(0, dtype=torch.int64, device=given.device)
        return empty, empty.clone(), empty.clone()
    column = torch.arange(columns, device=given.device).expand(rows, columns)
    real = torch.ones_like(column, dtype=torch.bool)
    if attention_mask is not None:
        check_mask_values(attention_mask)
        if attention_mask.dtype in UNSIGNED_DTYPES:
            attention_mask = attention_mask.to(torch.int64)
        attention_mask = attention_mask.reshape(rows, columns)
        real = attention_mask != 0
    last = torch.where(real, column, -1).cummax(dim=-1).values
    previous = torch.nn.functional.pad(
        last[:, :-1], (1, 0), value=-1
    )  # column of the real predecessor, -1: none
    opens = torch.zeros_like(real)
    if attention_mask is not None:
        opens = opens | (attention_mask != attention_mask.gather(1, previous.clamp(min=0)))
    if position_ids is not None:
        ids = position_ids.reshape(rows, columns).long()
        jump = ids - ids.gather(1, previous.clamp(min=0))
        opens = opens | ((jump != 1) & (jump != column - previous))
    further = opens & real & (previous >= 0)
    document = (further | (column == 0)).flatten().cumsum(0) - 1
    first = torch.where(further | (real & (previous < 0)), column, -1).cummax(dim=-1).values
    real = real.flatten()
    lengths = torch.zeros_like(document).scatter_add_(0, document, real.long())
    return torch.where(real, document, -1), (column - first).flatten(), lengths


def per_token(
    layout: Layout,
    shape: torch.Size | tuple[int, ...],
    device: torch.device,
    sample_offset: int = 0,
    position_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sample, position, length) of every token, each (N,) int64; length 0 marks padding.

    Offsets wrap mod 2³².
    """
    rows, columns = rows_and_columns(shape)
    token = torch.arange(rows * columns, device=device)
    if layout.cu_seqlens is not None:
        check_cu_seqlens_values(layout.cu_seqlens, token.numel())
        bounds = layout.cu_seqlens.long()
        document = torch.searchsorted(bounds, token, right=True) - 1
        inside = (document >= 0) & (document < bounds.numel() - 1)
        if bounds.numel() == 1:
            bounds = torch.nn.functional.pad(bounds, (0, 1))
        document = document.clamp(0, bounds.numel() - 2)
        position = token - bounds[document]
        length = torch.where(inside, bounds[document + 1] - bounds[document], 0)
        return (document + sample_offset) & UINT32, (position + position_offset) & UINT32, length
    column = token % max(columns, 1)
    position = (
        (column if layout.position is None else layout.position.long()) + position_offset
    ) & UINT32
    document = token // max(columns, 1) if layout.document is None else layout.document
    if layout.lengths is None:
        length = torch.full_like(token, columns)
    elif layout.document is not None:
        length = torch.where(document >= 0, layout.lengths[document.clamp(min=0)], 0)
    else:
        check_lengths_values(layout.lengths)
        length = layout.lengths.long()[document]
        length = torch.where(position < length, length, 0)
    return (document + sample_offset) & UINT32, position, length


def noisy_documents(noise_mask: Tensor, layout: Layout, position_offset: int = 0) -> Tensor:
    """The document of every token that gets noise, (N,) int64: -1 for padding and where the (...,
    T) noise_mask is 0.
    """
    check_mask_values(noise_mask, "noise_mask", NOISY_WHERE)
    if noise_mask.dtype in UNSIGNED_DTYPES:
        noise_mask = noise_mask.to(torch.int64)
    document, _, length = per_token(layout, noise_mask.shape, noise_mask.device, 0, position_offset)
    return torch.where((length > 0) & (noise_mask.reshape(-1) != 0), document, -1)


def by_document(layout: Layout, document: Tensor, shape: torch.Size | tuple[int, ...]) -> Layout:
    """The same samples with each token's document given, as :func:`noisy_documents` finds it:
    lengths and positions stay what they were.
    """
    if layout.cu_seqlens is not None:
        bounds = layout.cu_seqlens.long()
        token = torch.arange(document.shape[0], device=document.device)
        lengths = torch.nn.functional.pad(
            bounds[1:] - bounds[:-1], (0, 1)
        )  # one more than documents: never empty
        return Layout(document, token - bounds[document.clamp(min=0)], lengths)
    if layout.lengths is not None:
        return layout._replace(document=document)
    rows, columns = rows_and_columns(shape)
    return Layout(
        document,
        layout.position,
        torch.full((rows,), columns, dtype=torch.int64, device=document.device),
    )
