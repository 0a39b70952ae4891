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
    lengths: (num_samples,) int32 or int64, real tokens of each sample. Without `document`
        a token is real while its position is below it.
    cu_seqlens: (num_samples + 1,) int32 or int64 bounds over the flattened tokens; then
        the others are None.
    numbering: (4·rows + 3·N,) int32, what :func:`number_documents` returns; then the others are
        None.
    """

    document: Tensor | None = None
    position: Tensor | None = None
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    numbering: Tensor | None = None


ROWS = Layout()


def rows_and_columns(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """(..., T) → (product of the leading axes, T)."""
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, (shape[-1] if len(shape) else 1)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(value).__name__}: pass torch.as_tensor({name})"
        )


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
        check_tensor(name, value)
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
                    f"{_remedy(mask.shape, shape)}"
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


def _remedy(given: torch.Size, shape: tuple[int, ...]) -> str:
    """What to do about a mask of a shape that is a known mistake."""
    if given == (*shape, 1):
        return ": its last axis is one too many, mask.squeeze(-1)"
    if len(given) == 4 and len(shape) == 2:
        return ": one of four axes is made for attention, pass the tokenizer's"
    return ""


REAL_WHERE = "a token is real where it is not 0, padding where it is 0"
NUMBERS_TELL = ", and numbers tell documents apart; a soft mask is none"
NOISY_WHERE = "a token gets noise where it is not 0, none where it is 0"


def check_mask_values(mask: Tensor, name: str = "attention_mask", rule: str = REAL_WHERE) -> None:
    """On the CPU a mask of anything but whole numbers >= 0 is refused: additive masks (0 and -inf)
    and soft ones are caught here.
    """
    if not mask.dtype.is_signed or mask.device.type != "cpu":
        return
    bad = ~(mask >= 0)
    if mask.dtype.is_floating_point:
        bad = bad | (mask != mask.trunc()) | mask.isinf()
    if not bool(bad.any()):
        return
    value = float(mask[bad][0])
    if value >= 0:
        raise ValueError(
            f"{name} has values that are no whole numbers, such as {value:g}: {rule}"
            f"{NUMBERS_TELL if rule == REAL_WHERE else ''}"
        )
    raise ValueError(f"{name} has negative or NaN values, such as {value:g}: {rule}")


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


class Openings(NamedTuple):
    """Of the tokens of (rows, columns) masks and position ids; see :func:`openings`."""

    real: Tensor  # bool
    further: Tensor  # bool: opens a document inside its row
    first: (
        Tensor  # int64: column of the first real token of the document; -1 before the row's first
    )


def openings(attention_mask: Tensor | None, position_ids: Tensor | None) -> Openings:
    """Where documents open in (..., T) masks and position ids, at least one of them given.

    Every row opens a document, and so does every further real token whose mask value differs from
    its real predecessor's in the row or whose position id minus that predecessor's is neither 1 nor
    their column distance.
    """
    given = attention_mask if attention_mask is not None else position_ids
    assert given is not None
    if position_ids is not None and position_ids.shape != given.shape:
        raise ValueError(
            f"position_ids must have the attention_mask's shape {tuple(given.shape)}, got "
            f"{tuple(position_ids.shape)}"
        )
    rows, columns = rows_and_columns(given.shape)
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
    first = torch.where(further | (real & (previous < 0)), column, -1).cummax(dim=-1).values
    return Openings(real, further, first)


def mask_layout(
    attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The documents of :func:`openings`, numbered in row-major order, for each token by itself.

    Positions count columns from the document's first real token.

    Returns:
        document (N,) int64 with -1 for padding, position (N,) int64, lengths (N,) int64 indexed by
        document.
    """
    given = attention_mask if attention_mask is not None else position_ids
    assert given is not None
    if given.numel() == 0:
        empty = torch.empty(0, dtype=torch.int64, device=given.device)
        return empty, empty.clone(), empty.clone()
    real, further, first = openings(attention_mask, position_ids)
    column = torch.arange(real.shape[1], device=given.device).expand_as(real)
    document = (further | (column == 0)).flatten().cumsum(0) - 1
    lengths = torch.zeros_like(document).scatter_add_(0, document, real.flatten().long())
    return torch.where(real.flatten(), document, -1), (column - first).flatten(), lengths


def tail(
    input_ids: Tensor,
    token: int | None,
    is_end: bool,
    opens: Tensor | None = None,
    masked: bool = False,
) -> Tensor:
    """The padding at the ends of rows (..., T) that no mask tells: runs of the token, of 0 where it
    is None.

    opens: where documents open, so far as anything tells. Such a run is padding from the first
    document that opens in it on: pad_to_multiple_of appends position ids 0, others count anew.
    What goes on before is padding only where the token is named and no mask calls it real (masked);
    one that ends samples too (is_end) ends one there.
    """
    alike = input_ids == (0 if token is None else token)
    run = alike.flip(-1).cummin(-1).values.flip(-1)
    first = torch.arange(input_ids.shape[-1], device=input_ids.device) == 0
    run = run & ~first  # a row that is one token long is a sample
    anew = None if opens is None else (run & opens).cummax(-1).values
    if masked or token is None:
        return torch.zeros_like(run) if anew is None else anew
    if not is_end:
        return run
    inner = run & torch.cat((torch.zeros_like(run[..., :1]), run[..., :-1]), -1)
    # where the whole row is the token, its first is what ends the sample
    inner = inner | (run & alike[..., :1] & (run.sum(-1, keepdim=True) == run.shape[-1] - 1))
    return inner if anew is None else inner | anew


def untailed(
    input_ids: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    token: int | None,
    is_end: bool,
) -> Tensor:
    """What a padding-free batch tells, as a mask (..., T): bool where position_ids tell it, of the
    ids' shape; where cu_seqlens do, of the one row that ids are, the documents' numbers as int64.
    0 is the :func:`tail`, and what lies beyond the last of cu_seqlens.
    """
    if cu_seqlens is None:
        assert position_ids is not None
        if not input_ids.numel():
            return torch.ones_like(input_ids, dtype=torch.bool)
        jump = position_ids[..., 1:] - position_ids[..., :-1]
        opens = torch.nn.functional.pad(jump != 1, (1, 0))
        return ~tail(input_ids, token, is_end, opens)
    column = torch.arange(input_ids.numel(), device=input_ids.device)
    number = torch.searchsorted(cu_seqlens.long(), column, right=True)
    opens = torch.nn.functional.pad(number[1:] != number[:-1], (1, 0), value=True)
    outside = tail(input_ids.reshape(-1), token, is_end, opens) | (number == cu_seqlens.numel())
    return torch.where(outside, 0, number).view(input_ids.shape)


ROW_WORDS = 4  # documents, first, count, before


def number_documents(attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """The documents of :func:`openings` with next to nothing per token, in one int32 tensor.

    It holds three tables one after the other:

        words   (rows, 4)  documents, first, count, before; of each row
        table   (N, 2)     first, earlier; of the row's document k at the row's first token plus k
        record  (N,)       each token's document k in its row, -1 for padding

    documents: how many the row holds; 0: its real tokens are columns first .. first + count - 1 of
        one, and nothing need be written of it to the other two tables.
    first: the first real column of a document (of the row's first one).
    count: the row's real tokens.
    earlier: how many of them come before the document: as many as the next one has more, it has.
    before: the number of the row's document 0; -1: the sum of max(documents, 1) over the rows
        before.

    Args:
        attention_mask, position_ids: (..., T), at least one of them given; T < 2**31.
    """
    given = attention_mask if attention_mask is not None else position_ids
    assert given is not None
    rows, columns = rows_and_columns(given.shape)
    check_columns(columns)
    if given.numel() == 0:
        return torch.zeros(ROW_WORDS * rows, dtype=torch.int32, device=given.device)
    real, further, first = openings(attention_mask, position_ids)
    local = further.cumsum(dim=1)  # the number of the token's document in its row
    slot = (torch.arange(rows, device=given.device)[:, None] * columns + local).flatten()
    counts = torch.zeros_like(slot).scatter_add_(0, slot, real.flatten().long())
    firsts = torch.zeros_like(slot).scatter_reduce_(0, slot, first.flatten(), "amax")
    earlier = counts.view(rows, columns).cumsum(1).flatten() - counts
    row_first, row_count = firsts.view(rows, columns)[:, 0], real.sum(1)
    documents = local[:, -1] + 1
    last = columns - 1 - real.flip(1).int().argmax(dim=1)
    is_run = (documents == 1) & ((row_count == 0) | (last - row_first + 1 == row_count))
    before = documents.cumsum(0) - documents
    words = torch.stack((torch.where(is_run, 0, documents), row_first, row_count, before), dim=1)
    table = torch.stack((firsts, earlier), dim=1)
    record = torch.where(real, local, -1)
    return torch.cat((words.flatten(), table.flatten(), record.flatten())).to(torch.int32)


def numbered_tokens(
    numbering: Tensor, shape: torch.Size | tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """(document, position, length) of every token, each (N,) int64; -1 and 0 for padding."""
    rows, columns = rows_and_columns(shape)
    num_tokens = rows * columns
    check_numbering(numbering, rows, num_tokens)
    token = torch.arange(num_tokens, device=numbering.device)
    if num_tokens == 0:
        return token, token, token
    words = numbering[: ROW_WORDS * rows].view(rows, ROW_WORDS).long()
    table = numbering[ROW_WORDS * rows : -num_tokens].view(num_tokens, 2).long()
    record = numbering[-num_tokens:].long()
    row, column = token // columns, token % columns
    opened = words[:, 0].clamp(min=1)
    documents, first, count, before = words[row].unbind(1)
    before = torch.where(before < 0, (opened.cumsum(0) - opened)[row], before)
    is_run = documents == 0
    local = torch.where(is_run, 0, record)
    slot = token - column + local
    known = (local >= 0) & (local < documents.clamp(min=1)) & (slot < num_tokens)
    own = table[torch.where(known, slot, 0)]
    has_next = known & (local + 1 < documents) & (slot + 1 < num_tokens)
    end = torch.where(has_next, table[torch.where(has_next, slot + 1, 0)][:, 1], count)
    first = torch.where(is_run, first, own[:, 0])
    count = torch.where(is_run, count, end - own[:, 1])
    position = column - first
    real = known & (~is_run | ((position >= 0) & (position < count)))
    return torch.where(real, before + local, -1), position, torch.where(real, count, 0)


def check_columns(columns: int) -> None:
    if columns >= 2**31:
        raise ValueError(f"rows must have fewer than 2**31 tokens, got {columns}")


def check_numbering(numbering: Tensor, rows: int, num_tokens: int) -> None:
    size = ROW_WORDS * rows + 3 * num_tokens
    if numbering.dtype != torch.int32 or numbering.numel() != size:
        raise ValueError(
            f"numbering must be what number_documents returns for tokens of this shape, "
            f"(4·{rows} + 3·{num_tokens},) int32, got {numbering.dtype} of shape "
            f"{tuple(numbering.shape)}"
        )


def check_counts(layout: Layout, rows: int, num_tokens: int) -> None:
    wanted = {"document": num_tokens, "position": num_tokens}
    if layout.document is None:
        wanted["lengths"] = rows
    for name, count in wanted.items():
        tensor = getattr(layout, name)
        if tensor is not None and tensor.numel() != count:
            raise ValueError(f"{name} must have {count} elements, got {tensor.numel()}")


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
    check_counts(layout, rows, rows * columns)
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
    if layout.numbering is not None:
        document, position, length = numbered_tokens(layout.numbering, shape)
        return (document + sample_offset) & UINT32, (position + position_offset) & UINT32, length
    column = token % max(columns, 1)
    position = (
        (column if layout.position is None else layout.position.long()) + position_offset
    ) & UINT32
    document = token // max(columns, 1) if layout.document is None else layout.document
    if layout.lengths is None:
        length = torch.full_like(token, columns)
    elif layout.document is not None:
        held = (document >= 0) & (document < layout.lengths.numel())  # others are padding
        lengths = torch.nn.functional.pad(layout.lengths.long(), (0, 1))  # never empty
        length = torch.where(held, lengths[torch.where(held, document, 0)], 0)
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


def picked(
    layout: Layout, shape: torch.Size | tuple[int, ...], before: int, time_first: bool
) -> Layout:
    """Of the tokens from column `before` on, stored as (T, B) if `time_first`; `layout` is
    by_document of all tokens (..., T).
    """
    rows, columns = rows_and_columns(shape)
    assert layout.document is not None
    position = layout.position
    if position is None:
        position = torch.arange(columns, device=layout.document.device).expand(rows, columns)
    document, position = (
        values.reshape(rows, columns)[:, before:] for values in (layout.document, position)
    )
    if time_first:
        document, position = document.t(), position.t()
    return Layout(document.reshape(-1), position.reshape(-1), layout.lengths)
