"""The Triton backend: lookup, scale and noise in one launch; masks and position ids numbered in one
more, in two where rows are long (triton_numbering.py).

The formula is that of reference.py, with one rewriting that changes no bit: x·step = (h +
½)·65536·step, where h is the signed 16-bit half, equals fma(h, 65536·step, 32768·step), because
that sum is (h + ½)·65536·step exactly and is rounded once. So a noise value costs a 16-bit
conversion and one fma. (Not so for an infinite step: alphas beyond float32 are left to the
reference.) Embedding and noise are added apart from it: `enable_fp_fusion=False` keeps the compiler
from contracting them.

Imported only when the backend is used. Triton: Tillet, Kung and Cox 2019, "Triton: an intermediate
language and compiler for tiled neural network computations".
"""

import ctypes
import math
import operator
import os
import threading
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import self_check
from .layout import ROW_WORDS, Layout, check_columns, check_numbering, rows_and_columns
from .triton_numbering import (
    number_pieces,
    number_rows,
    number_tokens,
    numbered_token,
    summarise_pieces,
)

# ---- device functions


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-7: uint32 counter words (tensors or scalars that broadcast) and uint32 key words
    to four uint32 words.
    """
    for _ in tl.static_range(7):
        product0 = (
            c0.to(tl.uint64) * 0xD2511F53
        )  # one 32x32 → 64 multiplication; tl.umulhi would take a second one
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def word_noise(word, step):
    """The noise of columns 2k and 2k+1 from word k: float32."""
    low = word.to(tl.int16).to(tl.float32)
    high = (word >> 16).to(tl.int16).to(tl.float32)
    return tl.fma(low, step * 65536, step * 32768), tl.fma(high, step * 65536, step * 32768)


@triton.jit
def uniform_noise(block, position, sample, replica, k0, k1, step):
    """The noise of columns 8·block .. 8·block + 7: eight float32 tensors of block's shape."""
    w0, w1, w2, w3 = philox(block.to(tl.uint32), position, sample, replica, k0, k1)
    n0, n1 = word_noise(w0, step)
    n2, n3 = word_noise(w1, step)
    n4, n5 = word_noise(w2, step)
    n6, n7 = word_noise(w3, step)
    return n0, n1, n2, n3, n4, n5, n6, n7


@triton.jit
def noise_step(length, alpha, D: tl.constexpr):
    """float32(alpha / √(L·d)) · 2⁻³¹ of an int64 length >= 1; 0 where the magnitude's absolute
    value is below 2⁻⁹⁰.
    """
    bound = alpha / tl.sqrt(length.to(tl.float64) * D)
    step = bound.to(tl.float32) * 4.656612873077393e-10
    return tl.where(tl.abs(step) < 3.76158192263132e-37, 0.0, step)


@triton.jit
def scaled(value, scale, DTYPE: tl.constexpr, SCALED: tl.constexpr):
    """cast(W(value)·W(scale)) as float32."""
    if SCALED:
        value = (value * scale).to(DTYPE).to(tl.float32)
    return value


@triton.jit
def lanes(SIZE: tl.constexpr, TOKENS: tl.constexpr):
    """0 to SIZE - 1, in a tile of several tokens along its columns."""
    lane = tl.arange(0, SIZE)
    if TOKENS > 1:
        lane = lane[None, :]
    return lane


@triton.jit
def joined(even, odd, SIZE: tl.constexpr, TOKENS: tl.constexpr):
    """even[0], odd[0], even[1], ..., of each token."""
    both = tl.join(even, odd)
    return both.reshape(TOKENS, SIZE) if TOKENS > 1 else both.reshape(SIZE)


@triton.jit
def interleaved(v0, v1, v2, v3, SIZE: tl.constexpr, TOKENS: tl.constexpr):
    """v0[0], v1[0], v2[0], v3[0], v0[1], ...: in registers alone, as each thread holds whole
    blocks.
    """
    return joined(tl.join(v0, v2), tl.join(v1, v3), SIZE, TOKENS)


@triton.jit
def unpacked(words, DTYPE: tl.constexpr):
    """The two 16-bit floats in each uint32, as float32."""
    if DTYPE.is_bf16():
        return (words << 16).to(tl.float32, bitcast=True), (words & 0xFFFF0000).to(
            tl.float32, bitcast=True
        )
    low = words.to(tl.uint16).to(tl.float16, bitcast=True)
    high = (words >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def loaded(
    piece, source, D: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, KIND: tl.constexpr
):
    """A piece of a row as vectors hold it: 32-bit words twice, or the two halves of its blocks."""
    lane = lanes(4 * BLOCKS, TOKENS)
    if KIND == "pairs":  # 16-bit rows, 16-byte aligned: a thread's block is one 128-bit access
        pair = piece * (4 * BLOCKS) + lane
        first = tl.load(source.to(tl.pointer_type(tl.uint32)) + pair, mask=pair < D // 2, other=0)
        last = first
    else:
        # float32 rows, 16-byte aligned: a thread's block is two 128-bit accesses, so that no layout
        # is converted
        column = piece * (8 * BLOCKS) + lane // 4 * 8 + lane % 4
        first = tl.load(source + column, mask=column < D, other=0)
        last = tl.load(source + column + 4, mask=column + 4 < D, other=0)
    return first, last


@triton.jit
def stored(
    piece,
    values,  # of `loaded`
    target,
    served,  # the tokens of a tile whose values these are
    counter,
    step,
    scale,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    KIND: tl.constexpr,
    NOISY: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Scale a piece, add its noise, round, store."""
    DTYPE: tl.constexpr = target.dtype.scalar.element_ty
    SIZE: tl.constexpr = 4 * BLOCKS
    first, last = values
    if NOISY:
        position, sample, replica, k0, k1 = counter
        block = piece * BLOCKS + lanes(BLOCKS, TOKENS)
        n0, n1, n2, n3, n4, n5, n6, n7 = uniform_noise(
            block, position, sample, replica, k0, k1, step
        )
    lane = lanes(SIZE, TOKENS)
    if KIND == "pairs":
        if NOISY or SCALED:
            even, odd = unpacked(first, DTYPE)
            even = scaled(even, scale, DTYPE, SCALED)
            odd = scaled(odd, scale, DTYPE, SCALED)
            if NOISY:
                even += interleaved(n0, n2, n4, n6, SIZE, TOKENS)
                odd += interleaved(n1, n3, n5, n7, SIZE, TOKENS)
            column = piece * (8 * BLOCKS) + lanes(8 * BLOCKS, TOKENS)
            both = joined(even, odd, 8 * BLOCKS, TOKENS)
            tl.store(target + column, both.to(DTYPE), mask=(column < D) & served)
        else:
            pair = piece * SIZE + lane
            words = target.to(tl.pointer_type(tl.uint32))
            tl.store(words + pair, first, mask=(pair < D // 2) & served)
    else:
        column = piece * (8 * BLOCKS) + lane // 4 * 8 + lane % 4
        first = scaled(first, scale, DTYPE, SCALED)
        last = scaled(last, scale, DTYPE, SCALED)
        if NOISY:
            first += interleaved(n0, n1, n2, n3, SIZE, TOKENS)
            last += interleaved(n4, n5, n6, n7, SIZE, TOKENS)
        tl.store(target + column, first, mask=(column < D) & served)
        tl.store(target + column + 4, last, mask=(column + 4 < D) & served)


@triton.jit
def pieces_at(
    piece,
    source,
    target,
    noisy,  # the tokens of a tile that get noise
    plain,  # those that get none
    counter,
    step,
    scale,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    KIND: tl.constexpr,
    NOISY: tl.constexpr,
    SCALED: tl.constexpr,
):
    """COUNT pieces, four 16-byte loads on their way all the time: the next is asked for only once
    the last has been stored, since for all that the compiler knows it might lie there.
    """
    v0 = loaded(piece, source, D, BLOCKS, TOKENS, KIND)
    v1, v2, v3 = v0, v0, v0
    AHEAD: tl.constexpr = 4 if KIND == "pairs" else 2
    if COUNT > 1:
        v1 = loaded(piece + 1, source, D, BLOCKS, TOKENS, KIND)
    if AHEAD == 4:
        if COUNT > 2:
            v2 = loaded(piece + 2, source, D, BLOCKS, TOKENS, KIND)
        if COUNT > 3:
            v3 = loaded(piece + 3, source, D, BLOCKS, TOKENS, KIND)
    for k in tl.static_range(COUNT):
        if NOISY:
            stored(
                piece + k,
                v0,
                target,
                noisy,
                counter,
                step,
                scale,
                D,
                BLOCKS,
                TOKENS,
                KIND,
                True,
                SCALED,
            )
        if TOKENS > 1 or not NOISY:  # the others keep their bits
            stored(
                piece + k,
                v0,
                target,
                plain,
                counter,
                step,
                scale,
                D,
                BLOCKS,
                TOKENS,
                KIND,
                False,
                SCALED,
            )
        following = v0
        if k + AHEAD < COUNT:
            following = loaded(piece + k + AHEAD, source, D, BLOCKS, TOKENS, KIND)
        if AHEAD == 4:
            v0, v1, v2, v3 = v1, v2, v3, following
        else:
            v0, v1 = v1, following


@triton.jit
def columns_of(
    piece,
    source,
    target,
    source_column,
    counter,
    step,
    scale,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    NOISY: tl.constexpr,
    SCALED: tl.constexpr,
):
    """A piece of any strides, any d, any alignment: a column at a time."""
    DTYPE: tl.constexpr = target.dtype.element_ty
    position, sample, replica, k0, k1 = counter
    block = piece * BLOCKS + tl.arange(0, BLOCKS)
    if NOISY:
        n0, n1, n2, n3, n4, n5, n6, n7 = uniform_noise(
            block, position, sample, replica, k0, k1, step
        )
    first_column = block.to(tl.int64) * 8
    for k in tl.static_range(8):
        column = first_column + k
        value = tl.load(source + column * source_column, mask=column < D, other=0)
        if NOISY or SCALED:
            wide = scaled(value.to(tl.float32), scale, DTYPE, SCALED)
            if NOISY:
                wide += (n0, n1, n2, n3, n4, n5, n6, n7)[k]
            value = wide.to(DTYPE)
        tl.store(target + column, value, mask=column < D)


@triton.jit
def row_pieces(
    source,
    target,
    source_column,
    noisy,
    plain,
    counter,
    step,
    scale,
    first,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    PIECES: tl.constexpr,
    KIND: tl.constexpr,
    NOISY: tl.constexpr,
    SCALED: tl.constexpr,
):
    """PIECES pieces of one row, or of each of a tile, from the first on: load, scale, add noise,
    round, store.
    """
    if KIND == "columns":
        for piece in range(PIECES):
            columns_of(
                first + piece,
                source,
                target,
                source_column,
                counter,
                step,
                scale,
                D,
                BLOCKS,
                NOISY,
                SCALED,
            )
    else:
        # pieces of a loop: padding, and rows that are too long for one straight line
        LOOPED: tl.constexpr = 0 if NOISY and PIECES <= 16 else PIECES // 4 * 4
        REST: tl.constexpr = PIECES - LOOPED
        for piece in range(0, LOOPED, 4):
            pieces_at(
                first + piece,
                source,
                target,
                noisy,
                plain,
                counter,
                step,
                scale,
                4,
                D,
                BLOCKS,
                TOKENS,
                KIND,
                NOISY,
                SCALED,
            )
        if REST > 0:
            pieces_at(
                first + LOOPED,
                source,
                target,
                noisy,
                plain,
                counter,
                step,
                scale,
                REST,
                D,
                BLOCKS,
                TOKENS,
                KIND,
                NOISY,
                SCALED,
            )


@triton.jit
def document_of(token, cu_seqlens, num_samples):
    """The document whose bounds hold a token, or each of a tile's, by bisection; outside of all -1
    or num_samples.
    """
    bounds = (num_samples + 1).to(tl.int32)
    begin = (token * 0).to(tl.int32)  # the first bound behind the token is in begin .. + bounds
    while bounds > 1:
        half = bounds >> 1
        is_before = tl.load(cu_seqlens + begin + half - 1).to(tl.int64) <= token
        begin = tl.where(is_before, begin + half, begin)
        bounds -= half
    is_before = tl.load(cu_seqlens + begin).to(tl.int64) <= token
    return (tl.where(is_before, begin + 1, begin) - 1).to(tl.int64)


# ---- kernels

NOISY_ROWS_INTEGERS = (
    "num_embeddings",
    "rows",
    "columns",
    "num_samples",
    "ids_row",
    "ids_column",
    "source_row",
    "source_column",
    "lengths_stride",
    "alpha_bits",
    "replica",
    "sample_offset",
    "position_offset",
)


@triton.jit(
    do_not_specialize=[*NOISY_ROWS_INTEGERS, "step", "scale"],
    do_not_specialize_on_alignment=[
        "input_ids",
        "seed",
        "noise_alpha",
        "document",
        "position",
        "lengths",
        "cu_seqlens",
        "numbering",
    ],
)
def noisy_rows(
    out,  # [rows · columns, D] float32, bfloat16 or float16, contiguous
    source,  # [num_embeddings, D], without input_ids [rows · columns, D]; out's dtype
    input_ids,  # [rows, columns] int32 or int64, or None
    seed,  # [] int64
    noise_alpha,  # [] float64, or None: alpha_bits and step say it
    document,  # [rows · columns] int32 or int64, or None
    position,  # [rows · columns] int32 or int64, or None
    lengths,  # [num_samples] int32 or int64, or None
    cu_seqlens,  # [num_samples + 1] int32 or int64, or None
    numbering,  # [4 · rows + 3 · rows · columns] int32, or None
    num_embeddings: tl.int64,  # 0 without input_ids
    rows: tl.int32,
    columns: tl.int64,  # tokens of a row
    num_samples: tl.int64,  # that lengths or cu_seqlens hold
    ids_row: tl.int64,  # strides of input_ids, in elements
    ids_column: tl.int64,
    source_row: tl.int64,  # strides of source, in elements
    source_column: tl.int64,
    lengths_stride: tl.int64,
    step: tl.float32,  # noise_step of `columns` real tokens; read where no alpha is
    scale: tl.float32,  # embed_scale; read where SCALED
    alpha_bits: tl.int64,  # the float64 noise_alpha's; read where the layout tells lengths
    replica: tl.int64,  # mod 2**32, as the two offsets
    sample_offset: tl.int64,
    position_offset: tl.int64,
    D: tl.constexpr,  # embedding_dim
    ROW_STRIDE: tl.constexpr,  # source_row where rows are read by vectors, else 0
    BLOCKS: tl.constexpr,  # of 8 columns, in a piece
    PIECES: tl.constexpr,  # of a program
    SHARES: tl.constexpr,  # programs of a token
    TOKENS: tl.constexpr,  # of a program, neighbours of one row
    KIND: tl.constexpr,  # "columns", or vectors: "pairs" of 16-bit values, "quads" of float32
    SCALED: tl.constexpr,  # scale is not 1
    DEBUG: tl.constexpr,  # NEFTUNE_DEBUG=1
):
    """One token, one of SHARES shares of it, or a tile of TOKENS tokens: out[token] =
    source[input_ids[token]]·scale + noise. Grid (columns · SHARES / TOKENS, rows up to 65535, the
    rest of the rows).

    input_ids None: source holds the embeddings themselves. The five layout pointers are those of
    layout.Layout, None where not given; with none of them the launcher knows the one length and,
    unless noise_alpha is on the device, gives `step`. ROW_STRIDE 0: it is source_row.
    """
    column = tl.program_id(0)
    first_piece = 0
    if SHARES > 1:
        first_piece = column % SHARES * PIECES
        column = column // SHARES
    is_there = True
    if TOKENS > 1:  # beyond a row's end its last token is read again, and nothing stored
        own = column * TOKENS + tl.arange(0, TOKENS)[:, None]
        column = tl.minimum(own, columns - 1).to(tl.int32)
        is_there = own == column
    row = tl.program_id(1) + tl.program_id(2) * 65535
    if row < rows:
        token = row.to(tl.int64) * columns + column
        if cu_seqlens is not None:
            sample = document_of(token, cu_seqlens, num_samples)
            real = (sample >= 0) & (sample < num_samples)
            start = tl.load(cu_seqlens + sample, mask=real, other=0).to(tl.int64)
            length = tl.load(cu_seqlens + sample + 1, mask=real, other=0).to(tl.int64) - start
            place = (token - start + position_offset).to(tl.uint32)
            real = real & (length > 0)
            if DEBUG:
                tl.device_assert(
                    real, "cu_seqlens must run from 0 to the number of tokens and not decrease"
                )
        elif numbering is not None:
            sample, place, length, real = numbered_token(column, row, numbering, rows, columns)
            place = (place + position_offset).to(tl.uint32)
        else:
            place = column.to(tl.int64)
            if position is not None:
                place = tl.load(position + token).to(tl.int64)
            place = (place + position_offset).to(tl.uint32)
            sample = row.to(tl.int64)
            if document is not None:
                sample = tl.load(document + token).to(tl.int64)
                real = (sample >= 0) & (sample < num_samples)
                length = tl.load(lengths + sample * lengths_stride, mask=real, other=0).to(tl.int64)
                real = real & (length > 0)
            elif lengths is not None:
                length = tl.load(lengths + sample * lengths_stride).to(tl.int64)
                real = place.to(tl.int64) < length
                if DEBUG:
                    tl.device_assert(length >= 0, "lengths must not be negative")
            elif noise_alpha is not None:
                length = columns
                real = length > 0
        TOLD: tl.constexpr = lengths is not None or cu_seqlens is not None or numbering is not None
        token_step = step
        if TOLD or noise_alpha is not None:
            if noise_alpha is not None:
                alpha = tl.load(noise_alpha)
            else:
                alpha = alpha_bits.to(tl.float64, bitcast=True)
            if TOKENS > 1:
                token_step = tl.where(real, noise_step(tl.maximum(length, 1), alpha, D), 0.0)
            else:
                token_step = 0.0
                if real:
                    token_step = noise_step(length, alpha, D)
        index = token
        if input_ids is not None:
            index = tl.load(
                input_ids + row.to(tl.int64) * ids_row + column.to(tl.int64) * ids_column
            ).to(tl.int64)
            inside = (index >= 0) & (index < num_embeddings)
            if DEBUG:
                tl.device_assert(inside, "input_ids must lie in [0, num_embeddings)")
            index = tl.where(inside, index, 0)
            token_step = tl.where(
                inside, token_step, float("nan")
            )  # the noise of such a row is NaN, and so is the row
        if ROW_STRIDE == 0:
            token_source = source + index * source_row
        else:
            token_source = source + index * ROW_STRIDE
        target = out + token * D
        noisy, plain = True, True
        is_noisy = token_step != 0
        if TOKENS > 1:
            noisy, plain = is_noisy & is_there, (token_step == 0) & is_there
            is_noisy = tl.max(noisy.to(tl.int32)) != 0
        if is_noisy:
            key = tl.load(seed).to(tl.uint64)
            k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
            counter = (place, (sample + sample_offset).to(tl.uint32), replica.to(tl.uint32), k0, k1)
            row_pieces(
                token_source,
                target,
                source_column,
                noisy,
                plain,
                counter,
                token_step,
                scale,
                first_piece,
                D,
                BLOCKS,
                TOKENS,
                PIECES,
                KIND,
                True,
                SCALED,
            )
        else:
            row_pieces(
                token_source,
                target,
                source_column,
                noisy,
                plain,
                (0, 0, 0, 0, 0),
                token_step,
                scale,
                first_piece,
                D,
                BLOCKS,
                TOKENS,
                PIECES,
                KIND,
                False,
                SCALED,
            )


@triton.jit(do_not_specialize=["columns", "bounds", "steps", "ids_row", "ids_column", "token"])
def find_tails(
    mask,  # [rows, columns] bool as uint8, int64 where cu_seqlens is given; written
    input_ids,  # [rows, columns] integer
    position_ids,  # [rows, columns] integer, or None
    cu_seqlens,  # [bounds] integer, or None
    columns: tl.int64,
    bounds: tl.int64,
    steps: tl.int64,  # of a bisection of the bounds
    ids_row: tl.int64,  # strides, in elements
    ids_column: tl.int64,
    place_row: tl.int64,
    place_column: tl.int64,
    token: tl.int64,
    IS_NAMED: tl.constexpr,
    IS_END: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """layout.untailed in one launch. Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    input_ids += row * ids_row
    begin = row * 0 + 1  # of the run of tokens at the row's end, which never is all of the row
    for start in range(0, columns, BLOCK):
        column = start + lane
        value = tl.load(input_ids + column * ids_column, mask=column < columns, other=0)
        other = (value != token) & (column < columns)
        begin = tl.maximum(begin, tl.max(tl.where(other, column + 1, 1)))
    cut = columns
    if IS_NAMED:
        cut = begin
        if IS_END:
            is_whole = (begin == 1) & (tl.load(input_ids) == token)
            cut = tl.where(is_whole, begin, begin + 1)
    if not IS_NAMED or IS_END:  # the first document that opens in the run
        if cu_seqlens is not None:
            for start in range(0, bounds, BLOCK):
                bound = tl.load(cu_seqlens + start + lane, mask=start + lane < bounds, other=0)
                opens = bound.to(tl.int64) >= begin
                cut = tl.minimum(cut, tl.min(tl.where(opens, bound.to(tl.int64), columns)))
        else:
            for start in range(0, columns, BLOCK):
                column = start + lane
                in_run = (column >= begin) & (column < columns)
                at = position_ids + row * place_row + column * place_column
                jump = tl.load(at, mask=in_run, other=0).to(tl.int64)
                jump -= tl.load(at - place_column, mask=in_run, other=0).to(tl.int64)
                cut = tl.minimum(cut, tl.min(tl.where(in_run & (jump != 1), column, columns)))
    for start in range(0, columns, BLOCK):
        column = start + lane
        kept = column < cut
        at = mask + row * columns + column
        if cu_seqlens is None:
            tl.store(at, kept.to(tl.uint8), mask=column < columns)
        else:
            number = column * 0  # bounds at or before the column
            end = number + bounds
            for _ in range(steps):
                middle = (number + end) // 2
                bound = tl.load(cu_seqlens + middle, mask=number < end, other=0).to(tl.int64)
                is_before = bound <= column
                searching = number < end
                number = tl.where(searching & is_before, middle + 1, number)
                end = tl.where(searching & (bound > column), middle, end)
            number = tl.where(kept & (number < bounds), number, 0)
            tl.store(at, number, mask=column < columns)


# ---- launchers


REGISTERS = 64  # of an NVIDIA thread: 32 one-warp programs, a multiprocessor's most, have them
NUMBERING_REGISTERS = 128  # 16 warps, one program's most, have them
# A grid without a program, which Triton hands on and no device runs.
NO_PROGRAM = (2, 3, 0)


class Launcher:
    """Compiled kernels by a key of their own: `kernel[grid]` works out types anew at every call.

    The key must hold all that the compiled code depends on: dtypes, constexprs, which pointers are
    None, the alignment of `out` and `source` (no other argument is specialised).

    A launch past `kernel[grid]` rests on internals of Triton, and a misplaced argument writes
    anywhere. So each compiled kernel is tried once without a program: `kernel[grid]` must hand it
    what we would. Where it does not, all launches are Triton's own, and a warning says so once.
    """

    unexpected = ""  # of Triton's internals, in words

    def __init__(self, kernel: Any, registers: int = REGISTERS) -> None:
        self.kernel = kernel
        self.registers = registers  # of an NVIDIA thread, at most
        self.checked: set[Any] = set()
        # (num_warps and constexprs, for the caller; run, function, packed_metadata, current_device,
        # current_stream; the kernel, whose end would unload the function). No NamedTuple, which
        # takes longer to unpack.
        self.compiled: dict[Any, tuple[Any, ...]] = {}
        self.trying = threading.Lock()

    def __call__(
        self,
        key: Any,
        found: Any,
        index: int,
        grid: tuple[int, int, int],
        args: tuple[Any, ...],
        num_warps: int,
    ) -> None:
        """found: self.compiled.get(key), which the caller has looked up for the constexprs among
        its args; index: of the device.
        """
        # Profilers' hooks want the launch as Triton describes it.
        if found is None or ENTER_HOOKS or EXIT_HOOKS:
            with on_device(args[0].device):
                self._compile(key, grid, args, num_warps)
            return
        x, y, z = grid
        _, run, function, packed, current_device, current_stream, _ = found
        try:
            if current_device() == index:
                run(x, y, z, current_stream(index), function, packed, None, None, None, *args)
            else:
                with on_device(args[0].device):
                    run(x, y, z, current_stream(index), function, packed, None, None, None, *args)
        except TypeError as error:  # before anything was launched
            with on_device(args[0].device):
                # Where this raises as well, the mistake is the caller's.
                self.kernel[grid](*args, **launch_options(num_warps, self.registers))
            self._give_up(error)

    def to_be_checked(self, key: Any, device: torch.device) -> bool:
        """Whether a launch of this key is the first that can be compared with the reference."""
        return not INTERPRETED and key not in self.checked and self_check.wanted(device)

    def forget_unchecked(self, key: Any) -> None:
        """After a first launch that could not be compared (in a capture): the next one will be."""
        if self_check.ENABLED and key not in self.checked:
            self.compiled.pop(key, None)

    def _compile(
        self, key: Any, grid: tuple[int, int, int], args: tuple[Any, ...], num_warps: int
    ) -> None:
        options = launch_options(num_warps, self.registers)
        kernel = self.kernel[grid](*args, **options)  # launches, too
        # The interpreter has no kernel; with hooks every launch comes here.
        if kernel is None or key in self.compiled or Launcher.unexpected:
            return
        try:
            self.compiled[key] = self._verified(kernel, args, num_warps, options)
        except Exception as error:  # whatever a foreign Triton raises
            self._give_up(error)

    def _verified(
        self, kernel: Any, args: tuple[Any, ...], num_warps: int, options: dict[str, Any]
    ) -> tuple[Any, ...]:
        """The entry of a compiled kernel, whose launch by Triton is as ours will be."""
        if UNKNOWN_HOOKS:
            raise LookupError(UNKNOWN_HOOKS)
        active = triton.runtime.driver.active
        constexprs = sum(parameter.is_constexpr for parameter in self.kernel.params)
        constants = (num_warps, args[-constexprs:])
        devices = active.get_current_device, active.get_current_stream
        handed = []
        with self.trying:
            run = kernel.run
            if kernel._run is not run:
                raise LookupError("CompiledKernel.run does not return _run")

            def note(*given: Any, **named: Any) -> None:
                if given[:3] == NO_PROGRAM and not named:
                    handed.append(given)
                else:  # another thread's launch
                    run(*given, **named)

            kernel._run = note
            try:
                self.kernel[NO_PROGRAM](*args, **options)
            finally:
                kernel._run = run
        head = (*NO_PROGRAM, devices[1](devices[0]()), kernel.function, kernel.packed_metadata)
        for given in handed:
            hooks = [getattr(hook, "calls", None) for hook in given[7:9]]
            as_ours = given[:6] == head and hooks[0] is ENTER_HOOKS and hooks[1] is EXIT_HOOKS
            if as_ours and len(given) == 9 + len(args) and all(map(operator.is_, given[9:], args)):
                return constants, run, kernel.function, kernel.packed_metadata, *devices, kernel
        handed_types = [[type(value).__name__ for value in given] for given in handed]
        raise LookupError(f"kernel[grid] hands CompiledKernel.run other arguments: {handed_types}")

    def _give_up(self, error: Exception) -> None:
        self.compiled.clear()
        if not Launcher.unexpected:
            Launcher.unexpected = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"triton {triton.__version__} is not as neftune_kernels knows it, so it launches "
                "through Triton's slower kernel[grid]; the values are the same. "
                f"Please report this: {Launcher.unexpected}",
                stacklevel=2,
            )


# Triton's own lists, which fill when somebody adds a hook.
ENTER_HOOKS: list[Any] = []
EXIT_HOOKS: list[Any] = []
UNKNOWN_HOOKS = ""
try:
    from triton import knobs

    ENTER_HOOKS = knobs.runtime.launch_enter_hook.calls
    EXIT_HOOKS = knobs.runtime.launch_exit_hook.calls
except (ImportError, AttributeError) as error:
    UNKNOWN_HOOKS = f"triton.knobs.runtime.launch_enter_hook.calls: {error}"

INTERPRETED = not isinstance(noisy_rows, triton.JITFunction)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def compile_options(target_backend: str, registers: int = REGISTERS) -> dict[str, Any]:
    # Philox wraps, and with debug, ours or TRITON_DEBUG=1, Triton asserts that nothing overflows.
    options: dict[str, Any] = {"enable_fp_fusion": False, "sanitize_overflow": False}
    if target_backend == "cuda":
        options["maxnreg"] = registers
    if DEBUG:
        options["debug"] = True
    return options


def launch_options(num_warps: int, registers: int = REGISTERS) -> dict[str, Any]:
    if INTERPRETED:
        return {"num_warps": num_warps}
    target = triton.runtime.driver.active.get_current_target()
    return {"num_warps": num_warps, **compile_options(target.backend, registers)}


FLOAT32_MAX = torch.finfo(torch.float32).max
DEBUG = os.environ.get("NEFTUNE_DEBUG") == "1"
launch_rows = Launcher(noisy_rows)
launch_documents = Launcher(number_rows, NUMBERING_REGISTERS)
launch_summaries = Launcher(summarise_pieces, NUMBERING_REGISTERS)
launch_pieces = Launcher(number_pieces, NUMBERING_REGISTERS)
launch_tokens = Launcher(number_tokens)


def row_shape(embedding_dim: int, warp_size: int, tokens: int = 1) -> tuple[int, int, int]:
    """(blocks of a piece, pieces, warps) of one program: a thread takes one block of 8 columns of
    every piece, in which a tile's tokens have one part each.
    """
    blocks = max(1, (embedding_dim + 7) // 8)
    if tokens > 1:
        return warp_size // tokens, -(-blocks // (warp_size // tokens)), 1
    warps = 1
    while warps < 8 and blocks > 16 * warp_size * warps:
        warps *= 2
    piece = min(warp_size * warps, 1 << (blocks - 1).bit_length())
    return piece, (blocks + piece - 1) // piece, warps


PROGRAMS = 2048  # of a call, at most, that shares its rows out among programs


@lru_cache(maxsize=256)
def row_shares(tokens: int, embedding_dim: int, warp_size: int) -> int:
    """Programs of one token: 4 or 16 in calls so small that they leave most of the device idle."""
    _, pieces, _ = row_shape(embedding_dim, warp_size)
    shares = 1
    while 4 * shares <= pieces and 4 * shares * tokens <= PROGRAMS and shares < 16:
        shares *= 4
    return shares


TILED_FROM = 4097  # tokens; fewer fill the device better one by one
TILED_COLUMNS = 64  # at least, as a tile ends with its row


def has_tiles(rows: int, columns: int, embedding_dim: int) -> bool:
    """Whether a program may serve several tokens: it finds their rows at once, and narrow rows
    leave none of its lanes idle.
    """
    return rows * columns >= TILED_FROM and columns >= TILED_COLUMNS and embedding_dim <= 2048


def tile_of(embedding_dim: int, warp_size: int) -> int:
    """Tokens of a tile: on NVIDIA 4, each with 64 columns at a time, then 2 with 128."""
    return warp_size // (8 if embedding_dim <= 1024 else 16)


def row_kind(
    dtype: torch.dtype, embedding_dim: int, row_stride: int, column_stride: int, aligned: bool
) -> str:
    """Whether rows can be read and written 16 bytes at a time."""
    vectors = (
        aligned
        and column_stride == 1
        and embedding_dim % 8 == 0
        and row_stride % 8 == 0
        and 0 < embedding_dim <= 1 << 28
    )
    if not vectors:
        return "columns"
    return "quads" if dtype == torch.float32 else "pairs"


@lru_cache(maxsize=256)
def host_step(noise_alpha: float, length: int, embedding_dim: int) -> float:
    """noise_step on the host, where every sample has the same length."""
    step = (
        ctypes.c_float(noise_alpha / math.sqrt(float(length) * float(embedding_dim))).value
        * 2.0**-31
    )
    return 0.0 if abs(step) < 2.0**-121 else step


def is_on_host(noise_alpha: Tensor) -> bool:
    """Whether the launcher reads alpha; else the kernel does, and a graph records its address."""
    return noise_alpha.get_device() < 0


@lru_cache(maxsize=256)
def float_bits(value: float) -> int:
    return ctypes.c_int64.from_buffer(ctypes.c_double(value)).value


def rows_view(tensor: Tensor, rows: int, columns: int) -> tuple[Tensor, int, int]:
    """(..., T) as rows of T: the tensor (a copy where it has no such view) and its two strides."""
    strides = tensor.stride()
    if len(strides) == 2:
        return tensor, strides[0], strides[1]
    flat = tensor.reshape(rows, columns)
    return flat, flat.stride(0), flat.stride(1)


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
) -> Any:
    """The operator `noisy_embedding.out` on a GPU, for a contiguous `out`: one launch on the
    current stream, no synchronisation after the first of its kind.

    NotImplemented where it cannot serve: an alpha of the host's beyond float32, or a first launch
    with wrong bits.
    """
    alpha: float | Tensor = noise_alpha
    if is_on_host(noise_alpha) and abs(alpha := noise_alpha.item()) > FLOAT32_MAX:
        return NotImplemented
    shape = input_ids.shape
    if len(shape) == 2:
        rows, columns = shape
        ids_row, ids_column = input_ids.stride()
    else:
        rows, columns = rows_and_columns(shape)
        input_ids, ids_row, ids_column = rows_view(input_ids, rows, columns)
    num_embeddings = weight.shape[0]
    # Then every id is out of range and there is no row to read.
    if num_embeddings == 0 and rows * columns > 0:
        out.fill_(float("nan"))
        return None
    return _launch_rows(
        out,
        weight,
        input_ids,
        (rows, columns, num_embeddings, ids_row, ids_column),
        (document, position, lengths, cu_seqlens, numbering),
        seed,
        (replica, sample_offset, position_offset),
        alpha,
        embed_scale,
    )


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
) -> Any:
    """The operator `add_noise.out` on a GPU, for a contiguous `out`, which may be inputs_embeds
    itself. NotImplemented as noisy_embedding_out.
    """
    alpha: float | Tensor = noise_alpha
    if is_on_host(noise_alpha) and abs(alpha := noise_alpha.item()) > FLOAT32_MAX:
        return NotImplemented
    rows, columns = rows_and_columns(inputs_embeds.shape[:-1])
    embeddings = inputs_embeds.reshape(rows * columns, inputs_embeds.shape[-1])
    return _launch_rows(
        out,
        embeddings,
        None,
        (rows, columns, 0, 0, 0),
        (document, position, lengths, cu_seqlens, numbering),
        seed,
        (replica, sample_offset, position_offset),
        alpha,
        1.0,
    )


def _launch_rows(
    out: Tensor,
    source: Tensor,
    input_ids: Tensor | None,
    sizes: tuple[int, int, int, int, int],
    layout: tuple[Tensor | None, ...],
    seed: Tensor,
    offsets: tuple[int, int, int],
    alpha: float | Tensor,
    embed_scale: float,
) -> Any:
    """sizes: rows, columns, num_embeddings and the strides of input_ids; alpha: a tensor where the
    kernel reads it. Plain tuples, for host time.
    """
    rows, columns, num_embeddings, ids_row, ids_column = sizes
    embedding_dim = out.shape[-1]
    if rows == 0 or columns == 0 or embedding_dim == 0:
        return None
    document, position, lengths, cu_seqlens, numbering = layout
    source_strides = source.stride()
    step, num_samples, lengths_stride, alpha_bits = 0.0, rows, 0, 0
    # Read one after the other, and so beside their memory where they are strided.
    document = None if document is None else document.contiguous()
    position = None if position is None else position.contiguous()
    told = True
    if lengths is not None:
        num_samples, (lengths_stride,) = lengths.numel(), lengths.stride()
    elif cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
        num_samples = cu_seqlens.numel() - 1
    elif numbering is not None:
        numbering = numbering.contiguous()
        check_numbering(numbering, rows, rows * columns)
    else:
        told = False
    noise_alpha = None
    if isinstance(alpha, Tensor):
        noise_alpha = alpha
    elif told:
        alpha_bits = float_bits(alpha)
    else:
        step = host_step(alpha, columns, embedding_dim)
    dtype, device_index = source.dtype, out.get_device()
    shares = 1
    if rows * columns <= PROGRAMS // 4:
        shares = row_shares(rows * columns, embedding_dim, _warp_size(out.device))
    is_tiled = shares == 1 and has_tiles(rows, columns, embedding_dim)
    key = (
        device_index,
        dtype,
        embedding_dim,
        source_strides,
        out.data_ptr() & 15,
        source.data_ptr() & 15,
        embed_scale == 1,
        None if input_ids is None else input_ids.dtype,
        None if document is None else document.dtype,
        None if position is None else position.dtype,
        None if lengths is None else lengths.dtype,
        None if cu_seqlens is None else cu_seqlens.dtype,
        numbering is None,
        noise_alpha is None,
        shares,
        is_tiled,
    )
    found = launch_rows.compiled.get(key)
    source_row, source_column = source_strides
    if found is None:
        aligned = (out.data_ptr() | source.data_ptr()) % 16 == 0
        num_warps, constexprs = row_constants(
            dtype,
            embedding_dim,
            source_row,
            source_column,
            aligned,
            embed_scale != 1,
            _warp_size(out.device),
            shares,
            is_tiled,
        )
    else:
        num_warps, constexprs = found[0]
    args = (
        out,
        source,
        input_ids,
        seed,
        noise_alpha,
        document,
        position,
        lengths,
        cu_seqlens,
        numbering,
        num_embeddings,
        rows,
        columns,
        num_samples,
        ids_row,
        ids_column,
        source_row,
        source_column,
        lengths_stride,
        step,
        embed_scale,
        alpha_bits,
        *offsets,
        *constexprs,
    )
    expected = None
    # A step beyond float32 makes infinities of the reference, of the kernel's fma NaN as well.
    if (
        found is None
        and launch_rows.to_be_checked(key, out.device)
        and not abs(float(alpha)) > FLOAT32_MAX
    ):
        expected = self_check.expected_rows(
            source,
            torch.Size((rows, columns)),
            seed,
            alpha,
            Layout(*layout),
            offsets,
            input_ids,
            embed_scale,
        )
    programs = columns * shares
    if is_tiled:
        programs = -(-columns // constexprs[TOKENS_AT])
    launch_rows(
        key,
        found,
        device_index,
        (programs, rows, 1) if rows <= 65535 else (programs, 65535, (rows + 65534) // 65535),
        args,
        num_warps,
    )
    if expected is not None:
        launch_rows.checked.add(key)
        if not self_check.rows_agree("triton", out, expected):
            return NotImplemented
    elif found is None:
        launch_rows.forget_unchecked(key)
    return None


def row_constants(
    dtype: torch.dtype,
    embedding_dim: int,
    row_stride: int,
    column_stride: int,
    aligned: bool,
    has_scale: bool,
    warp_size: int,
    shares: int = 1,
    is_tiled: bool = False,
) -> tuple[int, tuple[Any, ...]]:
    """(num_warps, noisy_rows' constexprs in order): D, ROW_STRIDE, BLOCKS, PIECES, SHARES, TOKENS,
    KIND, SCALED, DEBUG.
    """
    kind = row_kind(dtype, embedding_dim, row_stride, column_stride, aligned)
    is_tiled = is_tiled and kind != "columns" and not has_scale  # which would spill
    tokens = tile_of(embedding_dim, warp_size) if is_tiled else 1
    blocks, pieces, num_warps = row_shape(embedding_dim, warp_size, tokens)
    return num_warps, (
        embedding_dim,
        0 if kind == "columns" else row_stride,
        blocks,
        -(-pieces // shares),
        shares,
        tokens,
        kind,
        has_scale,
        DEBUG,
    )


TOKENS_AT = 5  # in the above


@lru_cache(maxsize=16)
def _warp_size(device: torch.device) -> int:
    if INTERPRETED:
        return 32
    with on_device(device):
        return int(triton.runtime.driver.active.get_current_target().warp_size)


ROW_BLOCKS = (512, 2048, 4096)  # tokens of a program that has a whole row
PIECE = 2048  # of a program that has a piece of a longer row
PIECES_AT_ONCE = 32
TOKENS_BLOCK = 1024
TOKENS_WARPS = 4


def numbering_block(columns: int) -> int:
    """Tokens of a program for rows of so many."""
    return next((block for block in ROW_BLOCKS if block >= columns), PIECE)


def numbering_shape(block: int, warp_size: int) -> tuple[int, int]:
    """(tokens of a thread, warps) of a program with a block of tokens."""
    each = 4 if block <= 2048 else 8
    return each, max(1, block // (each * warp_size))


def _numbers_rightly(
    launcher: Launcher,
    key: Any,
    programs: int,
    args: tuple[Any, ...],
    num_warps: int,
    told: tuple[Tensor | None, Tensor | None, int | None],
    layout: Layout,
) -> bool:
    """Launches what numbers documents; whether the layout that it writes may be believed, which is
    compared the first time. told: number_documents' arguments.
    """
    found = launcher.compiled.get(key)
    attention_mask, position_ids, padding_value = told
    given = attention_mask if attention_mask is not None else position_ids
    assert given is not None
    check = found is None and launcher.to_be_checked(key, given.device)
    launcher(key, found, key[0], (programs, 1, 1), args, num_warps)
    if check:
        launcher.checked.add(key)
        mask = attention_mask if padding_value is None else given != padding_value
        return self_check.numbering_agrees("triton", mask, position_ids, layout)
    if found is None:
        launcher.forget_unchecked(key)
    return True


def number_documents(
    attention_mask: Tensor | None, position_ids: Tensor | None, padding_value: int | None = None
) -> Any:
    """The operator `number_documents` on a GPU, in one launch, in two where rows are longer than a
    program; NotImplemented as noisy_embedding_out.

    padding_value: attention_mask holds ids, padding where they equal it.
    """
    given = attention_mask if attention_mask is not None else position_ids
    assert given is not None
    rows, columns = rows_and_columns(given.shape)
    check_columns(columns)
    device, num_tokens = given.device, rows * columns
    numbering = torch.empty(ROW_WORDS * rows + 3 * num_tokens, dtype=torch.int32, device=device)
    if num_tokens == 0:
        return numbering.zero_()
    mask, mask_row, mask_column, ids_row, ids_column = None, 0, 1, 0, 1
    if attention_mask is not None:
        readable = (
            attention_mask.view(torch.uint8)
            if attention_mask.dtype == torch.bool
            else attention_mask
        )
        mask, mask_row, mask_column = rows_view(readable, rows, columns)
    places = position_ids
    if position_ids is not None:
        places, ids_row, ids_column = rows_view(position_ids, rows, columns)
    is_numbered = padding_value is None and attention_mask is not None and given.dtype != torch.bool
    is_long = columns > ROW_BLOCKS[-1]
    block = numbering_block(columns)
    each, num_warps = numbering_shape(block, _warp_size(device))
    is_dense = mask_column == ids_column == 1
    constexprs = (padding_value is not None, is_numbered, is_dense, block, each)
    strides = (mask_row, mask_column, ids_row, ids_column, padding_value or 0)
    key = (
        given.get_device(),
        None if mask is None else mask.dtype,
        None if places is None else places.dtype,
        *constexprs,
    )
    launcher, pieces = launch_documents, 1
    args: tuple[Any, ...] = (numbering, mask, places, rows, columns, *strides, *constexprs, DEBUG)
    if is_long:
        launcher, pieces = launch_pieces, -(-columns // PIECE)
        summary = torch.empty(4 * rows * pieces, dtype=torch.int32, device=device)
        launch_summaries(
            key,
            launch_summaries.compiled.get(key),
            key[0],
            (rows * pieces, 1, 1),
            (summary, mask, places, columns, pieces, *strides, *constexprs, DEBUG),
            num_warps,
        )
        args = (
            *(numbering, summary, mask, places, rows, columns, pieces),
            *(*strides, *constexprs, PIECES_AT_ONCE),
        )
    told = attention_mask, position_ids, padding_value
    layout = Layout(numbering=numbering)
    if not _numbers_rightly(launcher, key, rows * pieces, args, num_warps, told, layout):
        return NotImplemented
    return numbering


def number_padding(input_ids: Tensor, padding_idx: int) -> Any:
    """The operator `number_padding` on a GPU: number_documents of `input_ids != padding_idx`,
    compared inside its launch.
    """
    return number_documents(input_ids, None, padding_idx)


def mask_layout(
    attention_mask: Tensor | None, position_ids: Tensor | None, padding_value: int | None = None
) -> Any:
    """The operator `mask_layout` on a GPU, in one launch more than number_documents; NotImplemented
    as noisy_embedding_out.

    `lengths` beyond the documents and `position` on padding are not set.
    """
    numbering = number_documents(attention_mask, position_ids, padding_value)
    if numbering is NotImplemented:
        return NotImplemented
    given = attention_mask if attention_mask is not None else position_ids
    assert given is not None
    rows, columns = rows_and_columns(given.shape)
    device = given.device
    document, position, lengths = (
        torch.empty(rows * columns, dtype=torch.int64, device=device) for _ in range(3)
    )
    if document.numel() == 0:
        return document, position, lengths
    blocks = -(-columns // TOKENS_BLOCK)
    key = (given.get_device(), TOKENS_BLOCK)
    args = (document, position, lengths, numbering, rows, columns, blocks, TOKENS_BLOCK)
    told = attention_mask, position_ids, padding_value
    layout = Layout(document, position, lengths)
    if not _numbers_rightly(launch_tokens, key, rows * blocks, args, TOKENS_WARPS, told, layout):
        return NotImplemented
    return document, position, lengths


def padding_layout(input_ids: Tensor, padding_idx: int) -> Any:
    """The operator `padding_layout` on a GPU: mask_layout of `input_ids != padding_idx`, compared
    inside its launch.
    """
    return mask_layout(input_ids, None, padding_idx)


TAIL_BLOCK = 1024
TAIL_WARPS = 4


def untailed(
    input_ids: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    token: int | None,
    is_end: bool,
) -> Any:
    """The operator `untailed` on a GPU, in one launch; NotImplemented as noisy_embedding_out."""
    rows, columns = rows_and_columns(input_ids.shape)
    dtype = torch.bool if cu_seqlens is None else torch.int64
    mask = torch.empty(input_ids.shape, dtype=dtype, device=input_ids.device)
    if not mask.numel():
        return mask
    ids, ids_row, ids_column = rows_view(input_ids, rows, columns)
    places, place_row, place_column, bounds = None, 0, 0, 0
    if cu_seqlens is None:
        assert position_ids is not None
        places, place_row, place_column = rows_view(position_ids, rows, columns)
    else:
        cu_seqlens, columns, rows = cu_seqlens.contiguous(), rows * columns, 1
        bounds = cu_seqlens.numel()
    with on_device(input_ids.device):
        find_tails[(rows,)](
            mask.view(torch.uint8) if dtype == torch.bool else mask,
            ids,
            places,
            cu_seqlens,
            columns,
            bounds,
            bounds.bit_length(),
            ids_row,
            ids_column,
            place_row,
            place_column,
            0 if token is None else token,
            token is not None,
            is_end,
            TAIL_BLOCK,
            **launch_options(TAIL_WARPS),
        )
    key = ("untailed", input_ids.get_device(), ids.dtype, cu_seqlens is None, token is None, is_end)
    if not INTERPRETED and key not in TAILS_CHECKED and self_check.wanted(input_ids.device):
        TAILS_CHECKED.add(key)
        if not self_check.tails_agree(mask, input_ids, position_ids, cu_seqlens, token, is_end):
            return NotImplemented
    return mask


TAILS_CHECKED: set[Any] = set()
