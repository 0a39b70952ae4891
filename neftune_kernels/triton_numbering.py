"""The documents of masks and position ids, numbered on a GPU and read by the row kernel: the tables
of layout.number_documents in one launch, for long rows in two.

A program has a row, or a piece of a row that is longer than a program; none waits for another, and
nothing must be zero before. A row that is one run of real tokens is three words, which the same
program finds out first. In all other rows a thread walks over a few neighbours, and threads meet in
two scans of one int32: the last real token before, and the documents and real tokens before.

Imported by triton_kernels, which launches this.
"""

import triton
import triton.language as tl

FAR = tl.constexpr(0x7FFFFFFF)
ROW_WORDS = tl.constexpr(4)  # layout.ROW_WORDS

# ---- device functions


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def value_at(values, column, stride, there, DENSE: tl.constexpr):
    """Of columns of a row; DENSE: its values lie side by side."""
    if DENSE:
        return tl.load(values + column, mask=there, other=0)
    else:
        return tl.load(values + column.to(tl.int64) * stride, mask=there, other=0)


@triton.jit
def is_real(value, padding_value, PADDED: tl.constexpr):
    if PADDED:
        return value.to(tl.int64) != padding_value
    else:
        return value != 0


@triton.jit
def store_pair(pointer, first, second, there):
    """Two int32 as one access."""
    low = first.to(tl.int64) & 0xFFFFFFFF
    tl.store(pointer.to(tl.pointer_type(tl.int64)), low | (second.to(tl.int64) << 32), mask=there)


@triton.jit
def check_values(value, there):
    tl.device_assert(
        (value >= 0) | (there == 0), "attention_mask must not have negative or NaN values"
    )
    if value.dtype.is_floating():
        wide = value.to(tl.float64)
        whole = (wide == tl.floor(wide)) & (wide < float("inf"))
        tl.device_assert(whole | (there == 0), "attention_mask must hold whole numbers")


@triton.jit
def run_of(
    begin,
    end,
    mask,
    position_ids,
    mask_column,
    ids_column,
    padding_value,
    PADDED: tl.constexpr,
    NUMBERED: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
    DEBUG: tl.constexpr,
):
    """Of the tokens begin .. end - 1 of a row: how many are real, the first of them, and how many
    of them do not plainly go on from the token before. At most one of these: they are one run.
    With a mask nothing is known of tokens before `begin`.
    """
    column = begin + tl.arange(0, BLOCK // EACH) * EACH
    known = begin if mask is not None else 0
    goes_on = (column > known) & (column <= end)  # the token before is real
    if position_ids is not None:
        place_before = value_at(position_ids, column - 1, ids_column, goes_on, DENSE).to(tl.int64)
    if mask is not None:
        value_before = value_at(mask, column - 1, mask_column, goes_on, DENSE)
        goes_on = goes_on & is_real(value_before, padding_value, PADDED)
    found = column * 0  # real tokens, and from bit 16 on those that do not go on
    first = column * 0 + FAR
    for j in tl.static_range(EACH):
        at = column + j
        inside = at < end
        real = inside
        breaks = goes_on == 0
        if mask is not None:
            value = value_at(mask, at, mask_column, inside, DENSE)
            if DEBUG and not PADDED:
                check_values(value, inside)
            real = inside & is_real(value, padding_value, PADDED)
            if NUMBERED:
                breaks = breaks | (value != value_before)
                value_before = value
            first = tl.minimum(first, tl.where(real, at, FAR))
        if position_ids is not None:
            place = value_at(position_ids, at, ids_column, inside, DENSE).to(tl.int64)
            breaks = breaks | (place - place_before != 1)
            place_before = place
        found += tl.where(real, tl.where(breaks, 0x10001, 1), 0)
        goes_on = real
    both = tl.sum(found)
    least = begin
    if mask is not None:
        least = tl.min(first)
    return both & 0xFFFF, least, both >> 16


@triton.jit
def openings(
    begin,
    end,
    previous,
    mask,
    position_ids,
    mask_column,
    ids_column,
    padding_value,
    PADDED: tl.constexpr,
    NUMBERED: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):
    """Of each thread's EACH neighbours, as bits: which are real, which open a further document; and
    the last real token up to them. previous: the last real token before `begin`, -1: none.
    """
    thread = tl.arange(0, BLOCK // EACH)
    column = begin + thread * EACH
    reals = thread * 0
    last = thread * 0 - 1
    for j in tl.static_range(EACH):
        at = column + j
        real = at < end
        if mask is not None:
            value = value_at(mask, at, mask_column, real, DENSE)
            real = real & is_real(value, padding_value, PADDED)
        reals += tl.where(real, 1 << j, 0)
        last = tl.where(real, at, last)
    before = column - 1  # the real token before in the row, -1: none
    if mask is not None:
        last = tl.associative_scan(last, 0, larger)
        before = tl.where(thread == 0, -1, tl.gather(last, tl.maximum(thread - 1, 0), 0))
        before = tl.maximum(before, previous)
    known = (before >= 0) & (column < end)
    if NUMBERED:
        value_before = value_at(mask, before, mask_column, known, DENSE)
    if position_ids is not None:
        place_before = value_at(position_ids, before, ids_column, known, DENSE).to(tl.int64)
    opens = thread * 0
    for j in tl.static_range(EACH):
        at = column + j
        real = (reals & (1 << j)) != 0
        further = at < 0
        if NUMBERED:
            value = value_at(mask, at, mask_column, at < end, DENSE)
            further = further | (value != value_before)
            value_before = tl.where(real, value, value_before)
        if position_ids is not None:
            place = value_at(position_ids, at, ids_column, at < end, DENSE).to(tl.int64)
            jump = place - place_before
            further = further | ((jump != 1) & (jump != (at - before).to(tl.int64)))
            place_before = tl.where(real, place, place_before)
        opens += tl.where(further & real & (before >= 0), 1 << j, 0)
        before = tl.where(real, at, before)
    return reals, opens, last


@triton.jit
def counted(reals, opens, EACH: tl.constexpr):
    """How many bits each thread has: openings, and from bit 16 on real tokens."""
    found = reals * 0
    for j in tl.static_range(EACH):
        found += ((opens >> j) & 1) + (((reals >> j) & 1) << 16)
    return found


@triton.jit
def store_documents(
    table,  # of the row
    record,  # of the row
    begin,
    end,
    reals,
    opens,
    documents,
    earlier,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):
    """Each token's document, and of every one that opens here where it does. documents, earlier:
    that have opened and real tokens that lie in the row before `begin`; returns what opens here.
    """
    found = counted(reals, opens, EACH)
    scanned = tl.cumsum(found)
    number = documents + ((scanned - found) & 0xFFFF)
    count = earlier + ((scanned - found) >> 16)
    column = begin + tl.arange(0, BLOCK // EACH) * EACH
    for j in tl.static_range(EACH):
        at = column + j
        opened = (opens >> j) & 1
        real = (reals >> j) & 1
        number += opened
        tl.store(record + at, tl.where(real != 0, number, -1), mask=at < end)
        store_pair(table + 2 * number, at, count, opened != 0)
        count += real
    return tl.max(scanned) & 0xFFFF


@triton.jit
def last_real(
    begin,
    end,
    mask,
    mask_column,
    padding_value,
    PADDED: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = begin + tl.arange(0, BLOCK)
    value = value_at(mask, column, mask_column, column < end, DENSE)
    real = (column < end) & is_real(value, padding_value, PADDED)
    return tl.max(tl.where(real, column, -1))


@triton.jit
def store_reals(
    record,
    begin,
    end,
    mask,
    mask_column,
    padding_value,
    PADDED: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """store_documents of a row that is one document."""
    column = begin + tl.arange(0, BLOCK)
    value = value_at(mask, column, mask_column, column < end, DENSE)
    real = is_real(value, padding_value, PADDED)
    tl.store(record + column, tl.where(real, 0, -1), mask=column < end)


@triton.jit
def store_row(numbering, table, row, documents, first, count, IS_ONE: tl.constexpr):
    """A row's words, and the table's entry of its first document. IS_ONE: rows are documents."""
    first = tl.where(count > 0, first, 0)
    before = row
    if not IS_ONE:
        before = tl.where(row == 0, 0, -1)
    words = numbering + row.to(tl.int64) * ROW_WORDS
    store_pair(words, documents, first, True)
    store_pair(words + 2, count, before, True)
    store_pair(table, first, first * 0, documents > 0)


@triton.jit
def documents_before(numbering, row):
    """How many documents the rows before this one hold."""
    documents = row * 0
    for start in range(0, row, 32):
        earlier = start + tl.arange(0, 32)
        words = numbering + earlier.to(tl.int64) * ROW_WORDS
        held = tl.load(words, mask=earlier < row, other=0)
        documents += tl.sum(tl.where(earlier < row, tl.maximum(held, 1), 0))
    return documents


@triton.jit
def numbered_token(column, row, numbering, rows, columns):
    """(document, position, length, real) of tokens of a row. A document that the row does not hold
    is padding.
    """
    words = numbering + row.to(tl.int64) * ROW_WORDS
    documents = tl.load(words)
    count = tl.load(words + 2)
    before = tl.load(words + 3)
    position = column - tl.load(words + 1)
    real = (position >= 0) & (position < count)
    length = position * 0 + count
    if before < 0:
        before = documents_before(numbering, row)
    document = position * 0 + before
    if documents > 0:
        num_tokens = rows.to(tl.int64) * columns
        start = row.to(tl.int64) * columns
        table = numbering + rows.to(tl.int64) * ROW_WORDS
        local = tl.load(table + num_tokens * 2 + start + column)
        held = tl.minimum(documents.to(tl.int64), num_tokens - start).to(tl.int32)
        real = (local >= 0) & (local < held)
        entry = table + (start + local) * 2
        has_next = real & (local + 1 < held)
        end = tl.load(entry + 3, mask=has_next, other=0)
        length = tl.where(has_next, end, count) - tl.load(entry + 1, mask=real, other=0)
        position = column - tl.load(entry, mask=real, other=0)
        document += local
    return document, position, length, real & (length > 0)


# ---- kernels

NUMBERING_INTEGERS = (
    "rows",
    "columns",
    "pieces",
    "mask_row",
    "mask_column",
    "ids_row",
    "ids_column",
    "padding_value",
)
NUMBERING_POINTERS = ("numbering", "summary", "mask", "position_ids")


@triton.jit(
    do_not_specialize=[name for name in NUMBERING_INTEGERS if name != "pieces"],
    do_not_specialize_on_alignment=["numbering", "mask", "position_ids"],
)
def number_rows(
    numbering,  # [4 · rows + 3 · rows · columns] int32, written
    mask,  # [rows, columns] integer or floating, bool as uint8, or None
    position_ids,  # [rows, columns] integer, or None
    rows: tl.int32,
    columns: tl.int32,  # tokens of a row, BLOCK at most
    mask_row: tl.int64,  # strides of mask, in elements
    mask_column: tl.int64,
    ids_row: tl.int64,  # strides of position_ids, in elements
    ids_column: tl.int64,
    padding_value: tl.int64,  # read where PADDED
    PADDED: tl.constexpr,  # mask holds ids, padding where they equal padding_value
    NUMBERED: tl.constexpr,  # mask values that differ number documents
    DENSE: tl.constexpr,  # the column strides are 1
    BLOCK: tl.constexpr,  # tokens of a program
    EACH: tl.constexpr,  # of a thread
    DEBUG: tl.constexpr,  # NEFTUNE_DEBUG=1
):
    """layout.number_documents. Grid (rows,)."""
    IS_ONE: tl.constexpr = (not NUMBERED) and position_ids is None
    row = tl.program_id(0)
    if mask is not None:
        mask += row.to(tl.int64) * mask_row
    if position_ids is not None:
        position_ids += row.to(tl.int64) * ids_row
    begin = row * 0
    count, first, breaks = run_of(
        begin,
        columns,
        mask,
        position_ids,
        mask_column,
        ids_column,
        padding_value,
        PADDED,
        NUMBERED,
        DENSE,
        BLOCK,
        EACH,
        DEBUG,
    )
    token = row.to(tl.int64) * columns
    table = numbering + rows.to(tl.int64) * ROW_WORDS + token * 2
    documents = row * 0
    if breaks > 1:
        record = numbering + rows.to(tl.int64) * (ROW_WORDS + 2 * columns.to(tl.int64)) + token
        if IS_ONE:
            store_reals(
                record, begin, columns, mask, mask_column, padding_value, PADDED, DENSE, BLOCK
            )
        else:
            reals, opens, _ = openings(
                begin,
                columns,
                begin - 1,
                mask,
                position_ids,
                mask_column,
                ids_column,
                padding_value,
                PADDED,
                NUMBERED,
                DENSE,
                BLOCK,
                EACH,
            )
            documents += store_documents(
                table, record, begin, columns, reals, opens, begin, begin, BLOCK, EACH
            )
        documents += 1
    store_row(numbering, table, row, documents, first, count, IS_ONE)


@triton.jit(
    do_not_specialize=[name for name in NUMBERING_INTEGERS if name != "rows"],
    do_not_specialize_on_alignment=["summary", "mask", "position_ids"],
)
def summarise_pieces(
    summary,  # [rows · pieces, 4] int32, written: first and last real column, real tokens, openings
    mask,  # as number_rows'
    position_ids,
    columns: tl.int32,
    pieces: tl.int32,  # of a row, each of BLOCK tokens but the last
    mask_row: tl.int64,
    mask_column: tl.int64,
    ids_row: tl.int64,
    ids_column: tl.int64,
    padding_value: tl.int64,
    PADDED: tl.constexpr,
    NUMBERED: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
    DEBUG: tl.constexpr,
):
    """The first launch of rows longer than a program. Grid (rows · pieces,).

    Where there is a mask, the openings leave out the piece's first real token, which may follow one
    of any earlier piece.
    """
    IS_ONE: tl.constexpr = (not NUMBERED) and position_ids is None
    unit = tl.program_id(0)
    row = unit // pieces
    begin = (unit - row * pieces) * BLOCK
    end = tl.minimum(begin + BLOCK, columns)
    if mask is not None:
        mask += row.to(tl.int64) * mask_row
    if position_ids is not None:
        position_ids += row.to(tl.int64) * ids_row
    count, first, breaks = run_of(
        begin,
        end,
        mask,
        position_ids,
        mask_column,
        ids_column,
        padding_value,
        PADDED,
        NUMBERED,
        DENSE,
        BLOCK,
        EACH,
        DEBUG,
    )
    last = tl.where(count > 0, first + count - 1, -1)
    opened = row * 0
    if mask is None:
        opened = breaks - (begin == 0).to(tl.int32)
    elif breaks > 1:
        if IS_ONE:
            last = last_real(begin, end, mask, mask_column, padding_value, PADDED, DENSE, BLOCK)
        else:
            reals, opens, lasts = openings(
                begin,
                end,
                begin * 0 - 1,
                mask,
                position_ids,
                mask_column,
                ids_column,
                padding_value,
                PADDED,
                NUMBERED,
                DENSE,
                BLOCK,
                EACH,
            )
            last = tl.max(lasts)
            opened = tl.sum(counted(reals, opens, EACH)) & 0xFFFF
    words = summary + unit.to(tl.int64) * 4
    store_pair(words, first, last, True)
    store_pair(words + 2, count, opened, True)


@triton.jit(
    do_not_specialize=list(NUMBERING_INTEGERS),
    do_not_specialize_on_alignment=list(NUMBERING_POINTERS),
)
def number_pieces(
    numbering,  # as number_rows'
    summary,  # of summarise_pieces
    mask,
    position_ids,
    rows: tl.int32,
    columns: tl.int32,
    pieces: tl.int32,
    mask_row: tl.int64,
    mask_column: tl.int64,
    ids_row: tl.int64,
    ids_column: tl.int64,
    padding_value: tl.int64,
    PADDED: tl.constexpr,
    NUMBERED: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
    LANES: tl.constexpr,  # pieces that are added up at a time
):
    """The second launch of rows longer than a program. Grid (rows · pieces,)."""
    IS_ONE: tl.constexpr = (not NUMBERED) and position_ids is None
    unit = tl.program_id(0)
    row = unit // pieces
    piece = unit - row * pieces
    if mask is not None:
        mask += row.to(tl.int64) * mask_row
    if position_ids is not None:
        position_ids += row.to(tl.int64) * ids_row
    summary += row.to(tl.int64) * pieces * 4
    documents = row * 0  # that have opened before the piece, but the row's first
    opened = row * 0  # in the row
    earlier = row * 0  # real tokens before the piece
    count = row * 0
    previous = row * 0 - 1  # the last real token before the piece
    first = row * 0 + FAR
    last = row * 0 - 1
    for start in range(0, pieces, LANES):
        lane = start + tl.arange(0, LANES)
        there = lane < pieces
        is_before = lane < piece
        words = summary + lane * 4
        lane_first = tl.load(words, mask=there, other=FAR)
        lane_last = tl.load(words + 1, mask=there, other=-1)
        lane_count = tl.load(words + 2, mask=there, other=0)
        lane_opened = tl.load(words + 3, mask=there, other=0)
        if mask is not None and not IS_ONE:
            before = tl.load(words - 3, mask=there & (lane > 0), other=-1)
            before = tl.maximum(tl.associative_scan(before, 0, larger), last)
            known = (lane_count > 0) & (before >= 0)
            further = lane < 0
            if NUMBERED:
                value = value_at(mask, lane_first, mask_column, known, DENSE)
                value_before = value_at(mask, before, mask_column, known, DENSE)
                further = further | (value != value_before)
            if position_ids is not None:
                place = value_at(position_ids, lane_first, ids_column, known, DENSE)
                place_before = value_at(position_ids, before, ids_column, known, DENSE)
                jump = place.to(tl.int64) - place_before.to(tl.int64)
                column_jump = (lane_first - before).to(tl.int64)
                further = further | ((jump != 1) & (jump != column_jump))
            lane_opened += (further & known).to(tl.int32)
        if not IS_ONE:
            documents += tl.sum(tl.where(is_before, lane_opened, 0))
            opened += tl.sum(lane_opened)
            earlier += tl.sum(tl.where(is_before, lane_count, 0))
            previous = tl.maximum(previous, tl.max(tl.where(is_before, lane_last, -1)))
        count += tl.sum(lane_count)
        first = tl.minimum(first, tl.min(lane_first))
        last = tl.maximum(last, tl.max(lane_last))
    is_run = (opened == 0) & ((count == 0) | (last - first + 1 == count))
    token = row.to(tl.int64) * columns
    table = numbering + rows.to(tl.int64) * ROW_WORDS + token * 2
    if piece == 0:
        held = tl.where(is_run, 0, opened + 1)
        store_row(numbering, table, row, held, first, count, IS_ONE)
    if is_run == 0:
        begin = piece * BLOCK
        end = tl.minimum(begin + BLOCK, columns)
        record = numbering + rows.to(tl.int64) * (ROW_WORDS + 2 * columns.to(tl.int64)) + token
        if IS_ONE:
            store_reals(record, begin, end, mask, mask_column, padding_value, PADDED, DENSE, BLOCK)
        else:
            reals, opens, _ = openings(
                begin,
                end,
                previous,
                mask,
                position_ids,
                mask_column,
                ids_column,
                padding_value,
                PADDED,
                NUMBERED,
                DENSE,
                BLOCK,
                EACH,
            )
            store_documents(
                table, record, begin, end, reals, opens, documents, earlier, BLOCK, EACH
            )


@triton.jit(
    do_not_specialize=["rows", "columns", "blocks"],
    do_not_specialize_on_alignment=["document", "position", "lengths", "numbering"],
)
def number_tokens(
    document,  # [rows · columns] int64, written
    position,  # [rows · columns] int64, written
    lengths,  # [rows · columns] int64, written, of the documents
    numbering,  # as number_rows'
    rows: tl.int32,
    columns: tl.int32,
    blocks: tl.int32,  # of a row
    BLOCK: tl.constexpr,
):
    """layout.mask_layout of a numbering. Grid (rows · blocks,)."""
    unit = tl.program_id(0)
    row = unit // blocks
    column = (unit - row * blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    token = row.to(tl.int64) * columns + column
    number, place, length, real = numbered_token(
        tl.minimum(column, columns - 1), row, numbering, rows, columns
    )
    tl.store(document + token, tl.where(real, number, -1).to(tl.int64), mask=inside)
    tl.store(position + token, place.to(tl.int64), mask=inside)
    tells = inside & (real | ((length == 0) & (column == 0)))  # or of a row without any
    tl.store(lengths + number, length.to(tl.int64), mask=tells)
