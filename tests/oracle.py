"""The specification a second time: plain loops over Python integers and numpy, written from its
text alone and shared with nothing.

NEFTune noise of one token, in a sample of L real tokens and a model of hidden size d (Philox-4x32,
7 rounds):

    counter   = (column // 8, position, sample, replica),  key = (seed mod 2³², seed ≫ 32)
    word k of the block of columns 8j..8j+7 serves column 8j+2k with its low 16 bits and column
    8j+2k+1 with its high 16 bits
    x         = (int16(half) + ½)·65536
    step      = float32(alpha / √(L·d)) · 2⁻³¹
    noise     = float32(x · step)
    e         = weight[id] or cast(W(weight[id])·W(scale)),  W = float64 for float64, else float32
    out       = cast(W(e) + W(noise))

No noise where L is 0 or alpha / √(L·d) is below 2⁻⁹⁰. Sample and position count mod 2³².

Variants: a sign of -1 negates the noise. The other distributions draw z from the half in place of u
    = (int16(half) + ½)/2¹⁵: rademacher
its sign, normal float32(Φ⁻¹((int16(half) + 32768½)/65536)); noise = float32(z · float32(alpha·c /
√(L·d))), c = 1/√3 or 1.
"""

import decimal
import functools
import math
import statistics

import numpy as np

WORD = 2**32
DEVIATIONS = {True: float(1 / decimal.Decimal(3).sqrt()), False: 1.0}  # by equal_variance


def philox4x32(counter, key, rounds=7):
    """Salmon et al. 2011: each round multiplies words 0 and 2, swaps the pairs and xors the keys
    in; the keys step by Weyl constants.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = divmod(c0 * 0xD2511F53, WORD)
        high1, low1 = divmod(c2 * 0xCD9E8D57, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3


def halves_row(seed, replica, sample, position, embedding_dim):
    """The signed halves of one token's columns."""
    seed %= 2**64
    words, halves = (), []
    for column in range(embedding_dim):
        if column % 8 == 0:
            words = philox4x32(
                (column // 8, position % WORD, sample % WORD, replica), (seed % WORD, seed // WORD)
            )
        word = words[column % 8 // 2]
        half = word // 65536 if column % 2 else word % 65536
        halves.append(half - 65536 if half >= 32768 else half)
    return halves


def draw(signed, distribution):
    """z of a signed half, float32."""
    if distribution == "rademacher":
        return np.float32(-1 if signed < 0 else 1)
    return np.float32(statistics.NormalDist().inv_cdf((signed + 32768.5) / 65536))


def variant_row(
    seed,
    replica,
    sample,
    position,
    length,
    embedding_dim,
    alpha,
    sign,
    distribution,
    equal_variance,
):
    """(d,) float32: one token's noise in any variant; `sign` and the distributions know nothing of
    each other.
    """
    if distribution == "uniform":
        row = noise_row(seed, replica, sample, position, length, embedding_dim, alpha)
    else:
        row = np.zeros(embedding_dim, dtype=np.float32)
        if length and embedding_dim:
            with np.errstate(over="ignore"):
                magnitude = np.float32(
                    alpha
                    * DEVIATIONS[equal_variance]
                    / math.sqrt(float(length) * float(embedding_dim))
                )
                if magnitude >= 2.0**-90:
                    for column, signed in enumerate(
                        halves_row(seed, replica, sample, position, embedding_dim)
                    ):
                        row[column] = draw(signed, distribution) * magnitude
    return -row if sign == -1 else row


def noise_row(seed, replica, sample, position, length, embedding_dim, alpha):
    """(d,) float32: one token's noise."""
    row = np.zeros(embedding_dim, dtype=np.float32)
    if length == 0 or embedding_dim == 0:
        return row
    with np.errstate(over="ignore"):
        magnitude = np.float32(alpha / math.sqrt(float(length) * float(embedding_dim)))
    if magnitude < 2.0**-90:
        return row
    step = magnitude * np.float32(2.0**-31)
    for column, signed in enumerate(halves_row(seed, replica, sample, position, embedding_dim)):
        with np.errstate(over="ignore"):
            row[column] = np.float32((signed + 0.5) * 65536) * step
    return row


def places(
    shape,
    attention_mask=None,
    lengths=None,
    cu_seqlens=None,
    position_ids=None,
    input_ids=None,
    padding_idx=None,
    sample_offset=0,
    position_offset=0,
):
    """(sample, position, length) of every token of (..., T) in row-major order; None for padding.

    Masks, ids and position ids come as flat lists of all tokens, lengths as a flat list of all
    rows, cu_seqlens as a list.
    """
    columns = shape[-1] if len(shape) else 1
    rows = math.prod(shape[:-1])
    found = [None] * (rows * columns)
    if cu_seqlens is not None:
        for document in range(len(cu_seqlens) - 1):
            start, end = cu_seqlens[document], cu_seqlens[document + 1]
            for token in range(start, end):
                found[token] = (document, token - start, end - start)
    elif lengths is not None:
        for row in range(rows):
            for column in range(columns):
                token = row * columns + column
                position = column if position_ids is None else position_ids[token]
                if (position + position_offset) % WORD < lengths[row]:
                    found[token] = (row, position, lengths[row])
    else:
        if attention_mask is None:
            attention_mask = [1] * (rows * columns)
            if padding_idx is not None and position_ids is None:
                attention_mask = [int(token != padding_idx) for token in input_ids]
        document, members = -1, {}
        for row in range(rows):
            document += 1
            members[document] = []
            before = None
            for token in range(row * columns, (row + 1) * columns):
                if attention_mask[token] == 0:
                    continue
                if before is not None:
                    other_number = attention_mask[token] != attention_mask[before]
                    jump = 1 if position_ids is None else position_ids[token] - position_ids[before]
                    if other_number or jump % 2**64 not in (1, token - before):
                        document += 1
                        members[document] = []
                members[document].append(token)
                before = token
        for document, tokens in members.items():
            for token in tokens:
                found[token] = (document, token - tokens[0], len(tokens))
    return [
        None
        if place is None
        else ((place[0] + sample_offset) % WORD, (place[1] + position_offset) % WORD, place[2])
        for place in found
    ]


def noise(
    token_places,
    embedding_dim,
    alpha,
    seed,
    replica=0,
    sign=1,
    distribution="uniform",
    equal_variance=True,
):
    """(N, d) float32."""
    rows = [
        np.zeros(embedding_dim, dtype=np.float32)
        if place is None
        else variant_row(
            seed, replica, *place, embedding_dim, alpha, sign, distribution, equal_variance
        )
        for place in token_places
    ]
    return np.stack(rows) if rows else np.zeros((0, embedding_dim), dtype=np.float32)


def halves_of_tokens(seed, replica, samples, positions, embedding_dim):
    """halves_row of many tokens at once, (N, d): 32-bit words in uint64, whose products are exact.
    For cases by the hundred thousand; the loops above are what it is held against.
    """
    seed %= 2**64
    low, shift = np.uint64(WORD - 1), np.uint64(32)
    blocks = -(-embedding_dim // 8)
    c0 = np.broadcast_to(np.arange(blocks, dtype=np.uint64), (len(samples), blocks))
    c1 = np.array([position % WORD for position in positions], dtype=np.uint64)[:, None]
    c2 = np.array([sample % WORD for sample in samples], dtype=np.uint64)[:, None]
    c3 = np.uint64(replica)
    k0, k1 = seed % WORD, seed // WORD
    for _ in range(7):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            product1 >> shift ^ c1 ^ np.uint64(k0),
            product1 & low,
            product0 >> shift ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    words = np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1)
    pairs = np.stack((words & np.uint64(0xFFFF), words >> np.uint64(16)), axis=-1)
    return (
        pairs.reshape(len(samples), 8 * blocks)[:, :embedding_dim].astype(np.uint16).view(np.int16)
    )


@functools.cache
def all_draws(distribution):
    """(65536,) float32: z of every signed half, by its 16 bits."""
    signed = [half - 65536 if half >= 32768 else half for half in range(65536)]
    return np.array([draw(half, distribution) for half in signed])


def noise_of_tokens(
    token_places,
    embedding_dim,
    alpha,
    seed,
    replica=0,
    sign=1,
    distribution="uniform",
    equal_variance=True,
):
    """What :func:`noise` gives, all tokens at once."""
    real = [place or (0, 0, 0) for place in token_places]
    out = np.zeros((len(real), embedding_dim), dtype=np.float32)
    if out.size == 0:
        return out
    factor = 1.0 if distribution == "uniform" else DEVIATIONS[equal_variance]
    with np.errstate(over="ignore"):
        magnitudes = np.array(
            [
                alpha * factor / math.sqrt(float(length) * float(embedding_dim)) if length else 0.0
                for _, _, length in real
            ]
        ).astype(np.float32)[:, None]
        samples, positions = [place[0] for place in real], [place[1] for place in real]
        signed = halves_of_tokens(seed, replica, samples, positions, embedding_dim)
        if distribution == "uniform":
            lattice = ((signed.astype(np.float64) + 0.5) * 65536).astype(np.float32)
            drawn = lattice * (magnitudes * np.float32(2.0**-31))
        else:
            drawn = all_draws(distribution)[signed.view(np.uint16)] * magnitudes
    return np.where(magnitudes >= 2.0**-90, sign * drawn, np.float32(0))


def cast(values, dtype):
    """Round to the dtype's values, nearest-even, and give them back in `values`' own type."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
        finite = (bits & 0x7F800000) != 0x7F800000
        rounded = np.where(finite, (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000, bits)
        return rounded.astype(np.uint32).view(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(dtype).astype(values.dtype)


def embedded_with_noise(rows, noise_rows, dtype, embed_scale=1.0):
    """(N, d) in W: rows given in W whose values all belong to `dtype`, and their float32 noise;
    where that is 0 the bits stay.
    """
    wide = rows.dtype.type
    with np.errstate(over="ignore", invalid="ignore"):
        if embed_scale != 1:
            rows = cast(rows * wide(embed_scale), dtype)
        return np.where(noise_rows != 0, cast(rows + noise_rows.astype(wide), dtype), rows)


def noisy_embedding(
    token_places,
    ids,
    weight,
    dtype,
    alpha,
    seed,
    replica=0,
    embed_scale=1.0,
    sign=1,
    distribution="uniform",
    equal_variance=True,
):
    """(N, d) in W, from a (V, d) weight given in W whose values all belong to `dtype`; -0.0 and
    infinities included.
    """
    wide = np.float64 if dtype == "float64" else np.float32
    assert weight.dtype == wide
    embedding_dim = weight.shape[1]
    out = np.zeros((len(ids), embedding_dim), dtype=wide)
    for token, place in enumerate(token_places):
        row = weight[ids[token]]
        with np.errstate(over="ignore", invalid="ignore"):
            if embed_scale != 1:
                row = cast(row * wide(embed_scale), dtype)
            if place is not None:
                added = variant_row(
                    seed, replica, *place, embedding_dim, alpha, sign, distribution, equal_variance
                )
                if added.any():
                    row = cast(row + added.astype(wide), dtype)
        out[token] = row
    return out


DIGITS = {"float32": 24, "float16": 11, "bfloat16": 8}
SMALLEST_EXPONENT = {"float32": -149, "float16": -24, "bfloat16": -133}
LARGEST = {"float32": 2.0**128, "float16": 2.0**16, "bfloat16": 2.0**128}  # rounded up to: infinity


def rounded_once(values, dtype):
    """float64 values as the dtype's, nearest-even, by the distance between its neighbours."""
    if dtype == "float64":
        return values
    _, exponent = np.frexp(values)
    step = np.ldexp(1.0, np.maximum(exponent - DIGITS[dtype], SMALLEST_EXPONENT[dtype]))
    with np.errstate(invalid="ignore"):
        rounded = np.where(np.isfinite(values), np.rint(values / step) * step, values)
    return np.where(np.abs(rounded) >= LARGEST[dtype], np.copysign(np.inf, rounded), rounded)


def embedding_gradient(
    grad,
    ids,
    num_embeddings,
    dtype,
    padding_idx=None,
    embed_scale=1.0,
    scale_grad_by_freq=False,
):
    """(V, d) float64 values of the dtype; grad (N, d) float64, ids (N,) ints."""
    sums, counts = np.zeros((num_embeddings, grad.shape[1])), np.zeros((num_embeddings, 1))
    with np.errstate(invalid="ignore", over="ignore"):
        for token, row in zip(ids, grad, strict=True):
            if token != padding_idx:
                sums[token] = sums[token] + row
                counts[token] += 1
        sums = sums * embed_scale
        if scale_grad_by_freq:
            sums = sums / np.maximum(counts, 1)
    return rounded_once(np.where(counts > 0, sums, 0.0), dtype)


def chunked_gradient(
    grad,
    ids,
    num_embeddings,
    dtype,
    padding_idx=None,
    embed_scale=1.0,
    scale_grad_by_freq=False,
    chunk=32,
):
    """A GPU's (V, d) float64 values of the dtype; as embedding_gradient, but tokens are sorted by
    id, and float32 sums go over chunks of their places, chunks of chunks, and all. Ids out of range
    have no row, and stand before and behind all others.
    """
    order = sorted(range(len(ids)), key=lambda token: min(max(ids[token], -1), num_embeddings))
    parts = {}  # id -> group of chunks -> chunk -> sum
    counts = {}
    with np.errstate(invalid="ignore", over="ignore"):
        for place, token in enumerate(order):
            group = parts.setdefault(ids[token], {}).setdefault(place // chunk**2, {})
            before = group.get(place // chunk, np.zeros(grad.shape[1], dtype=np.float32))
            group[place // chunk] = before + grad[token].astype(np.float32)
            counts[ids[token]] = counts.get(ids[token], 0) + 1
        out = np.zeros((num_embeddings, grad.shape[1]), dtype=np.float32)
        for token, groups in parts.items():
            if not 0 <= token < num_embeddings or token == padding_idx:
                continue
            total = np.float32(0)
            for group in groups.values():
                of_group = np.float32(0)
                for part in group.values():
                    of_group = of_group + part
                total = total + of_group
            total = total * np.float32(embed_scale)
            if scale_grad_by_freq:
                total = total / np.float32(counts[token])
            out[token] = total
    return rounded_once(out.astype(np.float64), dtype)
