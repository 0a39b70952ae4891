"""The weight's gradient in Triton: tokens sorted by id, chunks of 32 rows added in float32, and
what an id has in several chunks carried over by two more launches. The order of every sum is that
of reference.chunked_gradient; no atomics, so the same bits at every call.

A run is the tokens of one id, side by side once they are sorted. A run inside a chunk is added and
written there. Of a run that crosses chunks each chunk leaves a part in scratch memory, where it has
two places: the head, for the run that comes into it, and the tail, for one that begins in it and
goes on. `carry_over` adds up the parts within 32 chunks, leaving what goes beyond these in the same
places, and then within all.

A program is one warp with 256 columns: what threads share are only loads and stores.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import reference, self_check
from .sorted_tokens import sorted_tokens
from .triton_kernels import Launcher, row_kind, unpacked

HALF = tl.constexpr(128)  # of a program's columns
AHEAD = tl.constexpr(4)  # rows, or parts, that are asked for before the first is added

# ---- device functions


@triton.jit
def places_of(strip, D: tl.constexpr, PAIRS: tl.constexpr):
    """Where a strip's two halves lie in a part, and where the places of the first end.

    PAIRS: a row is words of two 16-bit values; a part holds all its even columns and then all odd
    ones.
    """
    lane = tl.arange(0, HALF).to(tl.int64)
    if PAIRS:
        first = strip * HALF + lane
        last, width = first + D // 2, D // 2
    else:
        first = strip * (2 * HALF) + lane
        last, width = first + HALF, D
    return first, last, width


@triton.jit
def loaded_row(
    grad,
    order,
    token,
    is_token,
    is_added,
    grad_row,
    places,
    ALIGNED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A strip of a token's row as it lies in memory: its words twice, or its two halves."""
    at_first, at_last, width = places
    width = tl.where(is_added, width, 0)
    offset = tl.load(order + token, mask=is_token, other=0) * grad_row
    if ALIGNED:
        offset = tl.multiple_of(offset, 8)
    source = grad + offset
    if PAIRS:
        words = source.to(tl.pointer_type(tl.uint32))
        first = tl.load(words + at_first, mask=at_first < width, other=0)
        last = first
    else:
        first = tl.load(source + at_first, mask=at_first < width, other=0)
        last = tl.load(source + at_last, mask=at_last < width, other=0)
    return first, last


@triton.jit
def widened(values, DTYPE: tl.constexpr, PAIRS: tl.constexpr):
    """Two float32 halves."""
    first, last = values
    if PAIRS:
        first, last = unpacked(first, DTYPE)
    else:
        first, last = first.to(tl.float32), last.to(tl.float32)
    return first, last


@triton.jit
def loaded_part(scratch, place, is_part, places, D: tl.constexpr):
    at_first, at_last, width = places
    scratch += place * D
    first = tl.load(scratch + at_first, mask=at_first < tl.where(is_part, width, 0), other=0)
    last = tl.load(scratch + at_last, mask=at_last < tl.where(is_part, D, 0), other=0)
    return first, last


@triton.jit
def store_part(scratch, place, first, last, places, D: tl.constexpr):
    at_first, at_last, width = places
    scratch += place * D
    tl.store(scratch + at_first, first, mask=at_first < width)
    tl.store(scratch + at_last, last, mask=at_last < D)


@triton.jit
def store_sum(
    out,
    id,
    first,
    last,
    count,
    scale,
    strip,
    places,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    SCALED: tl.constexpr,
    BY_FREQ: tl.constexpr,
):
    """The id's row: cast(sum · scale / count)."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    if SCALED:
        first *= scale
        last *= scale
    if BY_FREQ:
        divisor = tl.full((HALF,), 0.0, tl.float32) + count.to(tl.float32)
        first, last = tl.div_rn(first, divisor), tl.div_rn(last, divisor)
    out += id.to(tl.int64) * D
    if PAIRS:
        column = strip * (2 * HALF) + tl.arange(0, 2 * HALF)
        both = tl.join(first, last).reshape(2 * HALF)
        tl.store(out + column, both.to(DTYPE), mask=column < D)
    else:
        at_first, at_last, _ = places
        tl.store(out + at_first, first.to(DTYPE), mask=at_first < D)
        tl.store(out + at_last, last.to(DTYPE), mask=at_last < D)


@triton.jit
def has_row(id, num_embeddings, padding_idx):
    """Not padding, and in range."""
    return (id >= 0) & (id < num_embeddings) & (id != padding_idx)


@triton.jit
def first_beyond(ids, id, low, high, STEP: tl.constexpr):
    """The first place in [low, high) with an id beyond that one, by bisection; high if there is
    none. Places lie STEP ids apart.
    """
    while low < high:
        middle = (low + high) >> 1
        if tl.load(ids + middle * STEP) <= id:
            low = middle + 1
        else:
            high = middle
    return low


# ---- kernels

INTEGERS = ("tokens", "num_embeddings", "padding_idx")


@triton.jit(
    do_not_specialize=[*INTEGERS, "grad_row", "scale"],
    do_not_specialize_on_alignment=["ids", "order"],
)
def sum_chunks(
    out,  # [num_embeddings, D] float32, bfloat16 or float16, contiguous
    scratch,  # [2 · chunks, D] float32
    grad,  # [tokens, D] of out's dtype, columns side by side
    ids,  # [tokens] int32 or int64, sorted; -1 or num_embeddings where out of range
    order,  # [tokens] int64: the rows of grad
    tokens: tl.int64,
    num_embeddings: tl.int64,
    padding_idx: tl.int64,  # -1 for none
    grad_row: tl.int64,  # stride, in elements
    scale: tl.float32,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows begin at 16 bytes
    PAIRS: tl.constexpr,  # and hold 16-bit values
    SCALED: tl.constexpr,  # scale is not 1
    BY_FREQ: tl.constexpr,
):
    """A strip of one chunk. Grid (chunks · strips,)."""
    STRIPS: tl.constexpr = (D + 2 * HALF - 1) // (2 * HALF)
    DTYPE: tl.constexpr = grad.dtype.element_ty
    chunk = (tl.program_id(0) // STRIPS).to(tl.int64)
    strip = tl.program_id(0) % STRIPS
    places = places_of(strip, D, PAIRS)
    start = chunk * CHUNK  # of the run
    end = tl.minimum(start + CHUNK, tokens)
    id = tl.load(ids + start)
    comes = tl.load(ids + start - 1, mask=start > 0, other=-1) == id
    first = tl.full((HALF,), 0.0, tl.float32)
    last = tl.full((HALF,), 0.0, tl.float32)
    for token in range(start, end, AHEAD):
        following = ()  # ids; behind the last token stands one that has no row
        rows = ()
        added = id
        for k in tl.static_range(AHEAD):
            is_added = has_row(added, num_embeddings, padding_idx)
            row = loaded_row(
                grad, order, token + k, token + k < end, is_added, grad_row, places, ALIGNED, PAIRS
            )
            rows += (row,)  # type: ignore[assignment]
            added = tl.load(ids + token + k + 1, mask=token + k + 1 < tokens, other=-1)
            following += (added,)  # type: ignore[assignment]
        for k in tl.static_range(AHEAD):
            more_first, more_last = widened(rows[k], DTYPE, PAIRS)
            first += more_first
            last += more_last
            goes = following[k] == id
            if (token + k + 1 == end) | (goes == 0):
                if has_row(id, num_embeddings, padding_idx):
                    if comes | goes:
                        place = 2 * chunk + tl.where(comes, 0, 1)
                        store_part(scratch, place, first, last, places, D)
                    else:
                        count = token + k + 1 - start
                        store_sum(
                            out,
                            id,
                            first,
                            last,
                            count,
                            scale,
                            strip,
                            places,
                            D,
                            PAIRS,
                            SCALED,
                            BY_FREQ,
                        )
                first = tl.full((HALF,), 0.0, tl.float32)
                last = tl.full((HALF,), 0.0, tl.float32)
                comes = id < id
                start = token + k + 1
            id = following[k]


@triton.jit(do_not_specialize=[*INTEGERS, "scale"], do_not_specialize_on_alignment=["ids"])
def carry_over(
    out,  # as sum_chunks'
    scratch,
    ids,
    tokens: tl.int64,
    num_embeddings: tl.int64,
    padding_idx: tl.int64,
    scale: tl.float32,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,  # tokens whose parts are there: a chunk's, or a group's
    GROUP: tl.constexpr,  # tokens whose units are added here; 0: all of them
    PAIRS: tl.constexpr,
    SCALED: tl.constexpr,
    BY_FREQ: tl.constexpr,
):
    """A strip of the run that goes on from a unit, if this is its first unit in the group: from the
    tail it leaves there, or the head where it came into the group. A unit's head is its first
    chunk's, its tail its last chunk's. Grid ((units - 1) · strips,).
    """
    STRIPS: tl.constexpr = (D + 2 * HALF - 1) // (2 * HALF)
    unit = (tl.program_id(0) // STRIPS).to(tl.int64)
    strip = tl.program_id(0) % STRIPS
    begin = unit * UNIT
    end = begin + UNIT
    limit = tokens
    opens = begin == 0
    if GROUP > 0:
        limit = tl.minimum((begin // GROUP + 1) * GROUP, tokens)
        opens = begin % GROUP == 0
    id = tl.load(ids + end - 1)
    goes = (end < limit) & (tl.load(ids + end) == id)
    if goes & has_row(id, num_embeddings, padding_idx):
        comes = tl.load(ids + begin - 1, mask=begin > 0, other=-1) == id
        if opens | (comes == 0):
            places = places_of(strip, D, PAIRS)
            stop = first_beyond(ids, id, unit + 2, (limit + UNIT - 1) // UNIT, UNIT)
            bound = stop * UNIT
            leaves = tl.load(ids + bound, mask=bound < tokens, other=-1) == id
            head = 2 * (begin // CHUNK)
            place = tl.where(comes, head, 2 * (end // CHUNK) - 1)
            first, last = loaded_part(scratch, place, id == id, places, D)
            for other in range(unit + 1, stop, AHEAD):
                parts = ()
                for k in tl.static_range(AHEAD):
                    place = 2 * ((other + k) * UNIT // CHUNK)
                    is_part = other + k < stop
                    part = loaded_part(scratch, place, is_part, places, D)
                    parts += (part,)  # type: ignore[assignment]
                for k in tl.static_range(AHEAD):
                    more_first, more_last = parts[k]  # type: ignore[var-annotated]
                    first += more_first
                    last += more_last
            if comes | leaves:
                place = tl.where(comes, head, 2 * (bound // CHUNK) - 1)
                store_part(scratch, place, first, last, places, D)
            else:
                count = tokens
                if BY_FREQ:
                    count = first_beyond(ids, id, bound - UNIT, tl.minimum(bound, tokens), 1)
                    count -= first_beyond(ids, id - 1, begin, end, 1)
                store_sum(
                    out, id, first, last, count, scale, strip, places, D, PAIRS, SCALED, BY_FREQ
                )


# ---- launcher

launch_chunks = Launcher(sum_chunks)
launch_carries = Launcher(carry_over)


def embedding_gradient_out(
    grad: Tensor,
    input_ids: Tensor,
    padding_idx: int,
    embed_scale: float,
    scale_grad_by_freq: bool,
    *,
    out: Tensor,
) -> Any:
    """The operator `embedding_gradient.out` on a GPU, for a contiguous `out`: a sort and up to
    three launches on the current stream, no synchronisation after the first of its kind.

    NotImplemented where its first sums are wrong.
    """
    found = sorted_tokens(grad, input_ids, out)
    if found is None:
        return None
    rows, ids, order, scratch = found
    chunk, device, (num_embeddings, embedding_dim) = reference.SUM_CHUNK, out.device, out.shape
    tokens = rows.shape[0]
    chunks, strips = -(-tokens // chunk), -(-embedding_dim // (2 * HALF.value))
    aligned = (out.data_ptr() | rows.data_ptr()) % 16 == 0
    kind = row_kind(rows.dtype, embedding_dim, rows.stride(0), 1, aligned)
    form = (kind == "pairs", embed_scale != 1, scale_grad_by_freq)
    memory = out.get_device(), out.data_ptr() & 15, rows.data_ptr() & 15
    key: tuple[Any, ...] = (*memory, rows.dtype, ids.dtype, embedding_dim, chunk, kind, *form)
    numbers = tokens, num_embeddings, padding_idx

    def launch(launcher: Launcher, key: Any, programs: int, args: tuple[Any, ...]) -> None:
        found = launcher.compiled.get(key)
        launcher(key, found, memory[0], (programs * strips, 1, 1), args, 1)

    sizes = embedding_dim, chunk
    launch(
        launch_chunks,
        key,
        chunks,
        (
            *(out, scratch, rows, ids, order, *numbers, rows.stride(0), embed_scale),
            *(*sizes, kind != "columns", *form),
        ),
    )
    levels = 0
    for unit, group in ((chunk, chunk**2), (chunk**2, 0)):
        crossed = (tokens - 1) // unit
        if crossed:
            args = (out, scratch, ids, *numbers, embed_scale, *sizes, unit, group, *form)
            launch(launch_carries, (*key, unit), crossed, args)
            levels += 1
    if launch_chunks.to_be_checked((*key, levels), device):
        launch_chunks.checked.add((*key, levels))
        how = padding_idx, embed_scale, scale_grad_by_freq
        if not self_check.gradient_agrees("triton", out, rows, input_ids, *how):
            return NotImplemented
    return None
