"""One noise everywhere: every backend equals the reference bit for bit, and every way to say the
same samples gives the same bits.
"""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    FLOAT_DTYPES,
    KERNELS,
    MASK_KINDS,
    make_batch,
    require_native,
    running,
    same_bits,
    set_simd_level,
)
from test_layout import MASK_DTYPES
from test_reference import SEEDS, special_values

from neftune_kernels import add_noise, backends, neftune_noise, noisy_embedding

EMBEDDING_DIMS = (1, 7, 8, 20, 64, 100, 576, 896, 4096)
WORD = 2**32


def make_weight(embedding_dim: int, dtype: torch.dtype, vocabulary: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(embedding_dim)
    return torch.randn(vocabulary, embedding_dim, generator=generator).to(dtype)


def assert_equals_reference(kernel: str, input_ids, weight, noise_alpha, **arguments) -> None:
    expected = noisy_embedding(input_ids, weight, noise_alpha, **arguments, backend="reference")
    assert not torch.equal(expected, F.embedding(input_ids, weight)) or expected.numel() == 0, (
        "a case without noise proves nothing"
    )
    assert same_bits(
        noisy_embedding(input_ids, weight, noise_alpha, **arguments, backend=kernel), expected
    )


# ---- the native library


def test_native_library_knows_its_instruction_sets():
    """Scalar always, and whatever the CPU says it has; an unknown name is refused and changes
    nothing.
    """
    require_native()
    levels = {name.removeprefix("cpp-") for name in KERNELS}
    assert "scalar" in levels
    chosen = backends.simd_level()
    assert not set_simd_level("sse9") and not set_simd_level("") and backends.simd_level() == chosen
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        with open("/proc/cpuinfo") as cpuinfo:
            flags = set(next(line for line in cpuinfo if line.startswith("flags")).split())
        assert ("avx2" in levels) == ("avx2" in flags) and "neon" not in levels
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            assert "avx512" in levels and chosen == (
                "avx512bf16" if "avx512_bf16" in flags else "avx512"
            )
    for level in levels:
        with running(f"cpp-{level}"):
            assert backends.simd_level() == level


def test_switched_off_native_library_says_so():
    program = (
        "import torch, neftune_kernels as n; print(n.available_backends('cpu')['cpp']);"
        "n.noisy_embedding(torch.zeros(1, 2).long(), torch.zeros(3, 4), 5.0, backend='cpp')"
    )
    environment = os.environ | {"NEFTUNE_DISABLE_CPP": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=os.getcwd(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "switched off by NEFTUNE_DISABLE_CPP=1"
    assert (
        run.returncode != 0
        and "ValueError: backend 'cpp' is not available: switched off by NEFTUNE_DISABLE_CPP=1"
        in run.stderr
    )


# ---- bits against the reference


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("embedding_dim", EMBEDDING_DIMS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_dtype_and_width(kernel, dtype, embedding_dim, ids_dtype):
    weight = make_weight(embedding_dim, dtype)
    batch = make_batch("ragged", rows=3, columns=7)
    arguments = {"seed": 1, "replica": 2, "sample_offset": 3, "position_offset": 4}
    assert_equals_reference(
        kernel,
        batch.input_ids.to(ids_dtype),
        weight,
        5.0,
        lengths=batch.lengths + 4,
        embed_scale=1.0,
        **arguments,
    )
    scale = math.sqrt(embedding_dim) + 0.1
    assert_equals_reference(
        kernel,
        batch.input_ids.to(ids_dtype),
        weight,
        5.0,
        attention_mask=batch.attention_mask,
        embed_scale=scale,
        seed=2,
    )


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("embedding_dim", [7, 64])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_mask_kind(kernel, dtype, embedding_dim, kind):
    weight, batch = make_weight(embedding_dim, dtype), make_batch(kind)
    weight[:, ::3] = -0.0
    for scale in (1.0, 1.7):
        arguments = {"attention_mask": batch.attention_mask, "embed_scale": scale, "seed": 5}
        out = noisy_embedding(batch.input_ids, weight, 5.0, **arguments, backend=kernel)
        assert same_bits(
            out, noisy_embedding(batch.input_ids, weight, 5.0, **arguments, backend="reference")
        )
        padding = batch.attention_mask == 0
        plain = (
            F.embedding(batch.input_ids, weight) * scale
            if scale != 1
            else F.embedding(batch.input_ids, weight)
        )
        assert same_bits(out[padding], plain[padding])


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_every_mask_dtype(kernel, mask_dtype):
    batch = make_batch("numbered")
    mask = batch.attention_mask.to(mask_dtype)
    assert_equals_reference(
        kernel, batch.input_ids, make_weight(20, torch.float32), 5.0, attention_mask=mask, seed=5
    )
    same = noisy_embedding(
        batch.input_ids,
        make_weight(20, torch.float32),
        5.0,
        attention_mask=mask.long(),
        seed=5,
        backend=kernel,
    )
    assert same_bits(
        noisy_embedding(
            batch.input_ids,
            make_weight(20, torch.float32),
            5.0,
            attention_mask=mask,
            seed=5,
            backend=kernel,
        ),
        same,
    )


LAYOUTS = {
    "nothing": {},
    "lengths int32": {"lengths": torch.tensor([13, 0, 5, 40], dtype=torch.int32)},
    "lengths int64": {"lengths": torch.tensor([13, 1, 5, 2**40])},
    "lengths uint8": {"lengths": torch.tensor([13, 1, 5, 200], dtype=torch.uint8)},
    "strided lengths": {"lengths": torch.tensor([[13, 9], [0, 9], [5, 9], [6, 9]])[:, 0]},
    "cu_seqlens int32": {
        "cu_seqlens": torch.tensor([0, 0, 7, 7, 20, 51, 52, 52], dtype=torch.int32)
    },
    "cu_seqlens int64": {"cu_seqlens": torch.tensor([0, 13, 26, 52])},
    "strided cu_seqlens": {"cu_seqlens": torch.tensor([0, 9, 13, 9, 52, 9])[::2]},
    "position_ids": {"position_ids": torch.arange(52).reshape(4, 13) % 5},
    "one row of position_ids": {"position_ids": torch.arange(13, dtype=torch.int32)[None] % 4},
    "positions in lengths": {
        "position_ids": torch.arange(52).reshape(4, 13).flip(1),
        "lengths": torch.tensor([13, 26, 30, 60]),
    },
    "one row of positions in lengths": {
        "position_ids": torch.arange(13)[None].flip(1),
        "lengths": torch.tensor([13, 6, 0, 60]),
    },
    "positions in int32 lengths": {
        "position_ids": torch.arange(52).reshape(4, 13) % 17,
        "lengths": torch.tensor([13, 2, 0, 9], dtype=torch.int32),
    },
    "mask and positions": {
        "attention_mask": make_batch("holes").attention_mask,
        "position_ids": torch.arange(52, dtype=torch.int32).reshape(4, 13) % 5,
    },
    "strided mask": {
        "attention_mask": make_batch("numbered", rows=13, columns=4).attention_mask.t()
    },
}
OFFSETS = (
    (0, 0, 0),
    (1, 2, 3),
    (WORD - 1, WORD - 1, WORD - 1),
    (2**31, WORD - 3, WORD - 5),
    (7, 2**31 - 1, 2**31 - 2),
)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("offsets", OFFSETS)
def test_every_layout_and_offset(kernel, offsets, layout):
    """Counters at and across 2³² too; add_noise and neftune_noise as well as noisy_embedding."""
    batch, weight = make_batch("full"), make_weight(20, torch.float32)
    replica, sample_offset, position_offset = offsets
    arguments = dict(
        **layout,
        replica=replica,
        sample_offset=sample_offset,
        position_offset=position_offset,
        seed=-7,
    )
    expected = noisy_embedding(batch.input_ids, weight, 5.0, **arguments, backend="reference")
    assert same_bits(
        noisy_embedding(batch.input_ids, weight, 5.0, **arguments, backend=kernel), expected
    )
    assert same_bits(
        add_noise(F.embedding(batch.input_ids, weight), 5.0, **arguments, backend=kernel), expected
    )
    noise = neftune_noise((4, 13), 20, 5.0, **arguments, backend="reference")
    assert same_bits(neftune_noise((4, 13), 20, 5.0, **arguments, backend=kernel), noise)


def test_every_small_layout(kernel):
    """All cu_seqlens of up to 4 documents over 4 tokens, all lengths 0 to 5 of 2 rows of 3, all
    positions 0 to 3 of a row in length 2.
    """
    cases = [
        ((4,), {"cu_seqlens": torch.tensor([0, *inner, 4])})
        for documents in range(1, 5)
        for inner in itertools.combinations_with_replacement(range(5), documents - 1)
    ]
    cases += [
        ((2, 3), {"lengths": torch.tensor(lengths)})
        for lengths in itertools.product(range(6), repeat=2)
    ]
    cases += [
        ((1, 4), {"lengths": torch.tensor([2]), "position_ids": torch.tensor([positions])})
        for positions in itertools.product(range(4), repeat=4)
    ]
    for shape, layout in cases:
        for position_offset in (0, 1):
            arguments = dict(**layout, position_offset=position_offset, seed=5)
            noise = neftune_noise(shape, 9, 5.0, **arguments, backend=kernel)
            assert same_bits(noise, neftune_noise(shape, 9, 5.0, **arguments, backend="reference"))


def test_positions_wrap_past_zero_within_a_row(kernel):
    """Position 2³² - 2 is followed by 2³² - 1, 0, 1: with no lengths every token stays real."""
    arguments = {"seed": 1, "backend": kernel}
    across = neftune_noise((1, 6), 20, 5.0, position_offset=WORD - 2, **arguments)
    assert same_bits(across[:, 2:], neftune_noise((1, 6), 20, 5.0, **arguments)[:, :4])
    rows = neftune_noise((4, 6), 20, 5.0, sample_offset=WORD - 2, **arguments)
    assert same_bits(rows[2:], neftune_noise((2, 6), 20, 5.0, **arguments))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed(kernel, seed):
    batch = make_batch("ragged")
    for embedding_dim in (7, 576):
        weight = make_weight(embedding_dim, torch.float32)
        assert_equals_reference(
            kernel, batch.input_ids, weight, 5.0, attention_mask=batch.attention_mask, seed=seed
        )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("noise_alpha", [2.0**-86, 1e-20, 1e-7, 5.0, 6e5, 3e38, 1e38 * 64, 1e300])
def test_special_values(kernel, noise_alpha, dtype):
    """Signed zeros, subnormals, the largest, infinities, against noise far below, near and far
    above; overflow to infinity included.
    """
    weight = torch.cat([special_values(dtype).roll(shift, 1) for shift in range(5)])
    weight = torch.cat(
        (weight, weight[:, :13], weight.flip(1)), dim=1
    )  # d = 45: full vectors and a tail
    ids = torch.arange(5).repeat(2, 3)
    for scale in (1.0, 1.5, -0.0, 1e-30):
        arguments = {"lengths": torch.tensor([15, 9]), "embed_scale": scale, "seed": 4}
        expected = noisy_embedding(ids, weight, noise_alpha, **arguments, backend="reference")
        assert same_bits(
            noisy_embedding(ids, weight, noise_alpha, **arguments, backend=kernel), expected
        )


@pytest.mark.parametrize("noise_alpha", [1.3 * 2.0**-85, 2.0**-64, 1e-6, 5.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_value(kernel, dtype, noise_alpha):
    """All 65 536 bit patterns as weights, NaNs included, with noise below, among and above them:
    widening, product, sum, rounding.
    """
    weight = torch.arange(65536).to(torch.int16).view(dtype).view(1024, 64)
    ids = torch.arange(1024).view(64, 16)
    for scale in (1.0, 0.37, 1e3):
        expected = noisy_embedding(
            ids, weight, noise_alpha, embed_scale=scale, seed=6, backend="reference"
        )
        assert same_bits(
            noisy_embedding(ids, weight, noise_alpha, embed_scale=scale, seed=6, backend=kernel),
            expected,
        )


@pytest.mark.parametrize(
    "magnitude",
    [
        2.0**-90,
        2.0**-90 * (1 + 2.0**-23),
        2.0**-69 * (1 - 2.0**-24),
        2.0**-69,
        2.0**-69 * (1 + 2.0**-23),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_that_cancel(kernel, sign, magnitude):
    """bfloat16 rows that undo their own noise: sums of zero and, from the smallest noise, subnormal
    ones. Magnitude 2⁻⁶⁹ is step 2⁻¹⁰⁰.
    """
    arguments = {
        "lengths": torch.tensor([256]),
        "seed": 12,
        "sign": sign,
    }  # √(L·d) = 256: the magnitude is alpha / 256, exactly
    noise = neftune_noise((1, 256), 256, 256 * magnitude, **arguments, backend="reference")
    embeddings = -noise.bfloat16()
    expected = add_noise(embeddings, 256 * magnitude, **arguments, backend="reference")
    subnormal = (expected != 0) & (expected.abs() < torch.finfo(torch.bfloat16).smallest_normal)
    assert bool(subnormal.any()) == (magnitude == 2.0**-90 * (1 + 2.0**-23))
    assert bool(((expected == 0) & (noise != 0)).any()) == (
        magnitude in (2.0**-90, 2.0**-69)
    )  # powers of two leave nothing of x·step
    assert same_bits(add_noise(embeddings, 256 * magnitude, **arguments, backend=kernel), expected)


def strided_weights(dtype):
    weight = make_weight(44, dtype, vocabulary=22)
    return {
        "transposed": weight.t().contiguous().t(),
        "every second row": weight[::2],
        "every second column": weight[:, ::2],
        "a slice of columns": weight[:, 3:24],
        "a slice of rows": weight[5:19],
        "one row, expanded": weight[:1].expand(11, 44),
        "one column, expanded": weight[:, :1].expand(22, 37),
        "one value, expanded": weight[:1, :1].expand(11, 19),
        "unaligned": weight.flatten()[1 : 1 + 11 * 44].view(11, 44),
    }


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", strided_weights(torch.float32))
def test_strided_weights(kernel, name, dtype):
    weight, batch = strided_weights(dtype)[name], make_batch("ragged")
    arguments = {"attention_mask": batch.attention_mask, "seed": 3}
    contiguous = noisy_embedding(
        batch.input_ids, weight.contiguous(), 5.0, **arguments, backend="reference"
    )
    assert same_bits(
        noisy_embedding(batch.input_ids, weight, 5.0, **arguments, backend=kernel), contiguous
    )
    assert same_bits(
        noisy_embedding(batch.input_ids, weight, 5.0, **arguments, backend="reference"), contiguous
    )
    embeds = weight[:11].unsqueeze(0)
    expected = add_noise(embeds.contiguous(), 5.0, seed=3, backend="reference")
    assert same_bits(add_noise(embeds, 5.0, seed=3, backend=kernel), expected)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_strided_ids(kernel, ids_dtype):
    ids, weight = (
        make_batch("full", rows=8, columns=10).input_ids.to(ids_dtype),
        make_weight(20, torch.float32),
    )
    for strided in (
        ids.t(),
        ids[::2],
        ids[:, 1::3],
        ids[:1].expand(5, 10),
        ids[:, :1].expand(8, 6),
        ids.view(2, 4, 10).transpose(0, 1),
        ids[3],
    ):
        assert_equals_reference(kernel, strided, weight, 5.0, seed=3)
        expected = noisy_embedding(strided.contiguous(), weight, 5.0, seed=3, backend="reference")
        assert same_bits(noisy_embedding(strided, weight, 5.0, seed=3, backend=kernel), expected)


def test_strided_embeddings(kernel):
    embeds = torch.randn(4, 6, 20, generator=torch.Generator().manual_seed(0))
    for strided in (
        embeds.transpose(0, 1),
        embeds[..., ::2],
        embeds[:, ::2],
        embeds[:1].expand(3, 6, 20),
        embeds.permute(2, 0, 1),
        embeds[0, 0],
    ):
        before = strided.clone()
        expected = add_noise(strided.contiguous(), 5.0, seed=3, backend="reference")
        assert same_bits(add_noise(strided, 5.0, seed=3, backend=kernel), expected)
        assert torch.equal(strided, before), "add_noise is out of place"


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 3)])
@pytest.mark.parametrize("embedding_dim", [0, 5, 64])
def test_empty_inputs(backend, shape, embedding_dim):
    ids, weight = torch.zeros(shape, dtype=torch.int64), torch.zeros(3, embedding_dim)
    nothing = torch.zeros(*shape, embedding_dim)
    for layout in (
        {},
        {"attention_mask": ids},
        {"lengths": ids.sum(-1)},
        {"cu_seqlens": torch.tensor([0, 0])},
        {"position_ids": ids},
    ):
        assert same_bits(
            noisy_embedding(ids, weight, 5.0, seed=0, **layout, backend=backend), nothing
        )
        assert same_bits(add_noise(nothing, 5.0, seed=0, **layout, backend=backend), nothing)
        assert same_bits(
            neftune_noise(shape, embedding_dim, 5.0, seed=0, **layout, backend=backend), nothing
        )
    assert same_bits(
        noisy_embedding(ids, torch.zeros(0, embedding_dim), 5.0, seed=0, backend=backend), nothing
    )


@pytest.mark.parametrize("embed_scale", (1.0, 2.0))
def test_no_columns(backend, embed_scale):
    """Rows without elements, noisy and padding; tests/test_cpu_sanitizers.py watches them."""
    weight, given = torch.zeros(3, 0), {"seed": 0, "backend": backend}
    for lengths in (None, torch.tensor([1])):
        rows = noisy_embedding(
            torch.tensor([[1, 2]]), weight, 5.0, lengths=lengths, embed_scale=embed_scale, **given
        )
        assert rows.shape == (1, 2, 0)
        assert add_noise(rows, 5.0, lengths=lengths, **given).shape == (1, 2, 0)
    with pytest.raises(IndexError, match="3"):
        noisy_embedding(torch.tensor([[1, 3]]), weight, 5.0, embed_scale=embed_scale, **given)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_one_token(backend, dtype):
    """A 0-D id is a row of one token: its noise is that of (1, 1)."""
    weight = make_weight(100, dtype)
    row = noisy_embedding(torch.tensor([[3]]), weight, 5.0, seed=3, backend=backend)[0, 0]
    assert not torch.equal(row, weight[3])
    for ids_dtype in (torch.int32, torch.int64):
        assert same_bits(
            noisy_embedding(torch.tensor(3, dtype=ids_dtype), weight, 5.0, seed=3, backend=backend),
            row,
        )
    assert same_bits(add_noise(weight[3], 5.0, seed=3, backend=backend), row)
    assert same_bits(
        noisy_embedding(
            torch.tensor(3), weight, 5.0, attention_mask=torch.tensor(0), seed=3, backend=backend
        ),
        weight[3],
    )


def test_default_backend_is_the_best_one():
    """None means the C++ kernel where it is built and knows the dtype, the reference otherwise: the
    same bits in any case.
    """
    ids, weight = torch.tensor([[1, 2, 0]]), make_weight(20, torch.float32)
    assert backends.choose_backend(None, torch.device("cpu"), torch.float32).name == (
        "cpp" if backends.native.handle else "reference"
    )
    assert backends.choose_backend(None, torch.device("cpu"), torch.float64).name == "reference"
    expected = noisy_embedding(ids, weight, 5.0, seed=0, backend="reference")
    assert same_bits(noisy_embedding(ids, weight, 5.0, seed=0), expected)
    wide = noisy_embedding(ids, weight.double(), 5.0, seed=0)
    assert same_bits(wide, weight.double()[ids] + neftune_noise((1, 3), 20, 5.0, seed=0).double())


# ---- one sample, said in many ways


SAMPLE_LENGTHS = (9, 1, 4, 13, 1, 6)


@pytest.mark.parametrize("embedding_dim", [20, 64])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_way_to_lay_out_samples(backend, dtype, embedding_dim):
    """Right-padded == left-padded == packed (cu_seqlens, position_ids, numbered mask) == one at a
    time, token by token.
    """
    weight = make_weight(embedding_dim, dtype)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(11, (length,), generator=generator) for length in SAMPLE_LENGTHS]
    lengths, longest = torch.tensor(SAMPLE_LENGTHS), max(SAMPLE_LENGTHS) + 2

    def embed(input_ids, **arguments):
        return noisy_embedding(
            input_ids, weight, 5.0, seed=11, replica=3, backend=backend, **arguments
        )

    alone = torch.cat([embed(sample, sample_offset=index) for index, sample in enumerate(samples)])
    assert not torch.equal(alone, weight[torch.cat(samples)])

    right = torch.stack([F.pad(sample, (0, longest - len(sample))) for sample in samples])
    right_mask = (torch.arange(longest) < lengths[:, None]).long()
    assert same_bits(embed(right, attention_mask=right_mask)[right_mask.bool()], alone)
    assert same_bits(embed(right, lengths=lengths)[right_mask.bool()], alone)

    left = torch.stack([F.pad(sample, (longest - len(sample), 0)) for sample in samples])
    left_mask = right_mask.flip(1)
    assert same_bits(embed(left, attention_mask=left_mask)[left_mask.bool()], alone)
    counted = (left_mask.cumsum(1) - 1).clamp(min=0)
    assert same_bits(
        embed(left, attention_mask=left_mask, position_ids=counted)[left_mask.bool()], alone
    )

    packed = torch.cat(samples)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    assert same_bits(embed(packed, cu_seqlens=cu_seqlens.int()), alone)
    assert same_bits(embed(packed[None], cu_seqlens=cu_seqlens)[0], alone)
    assert same_bits(embed(packed.view(2, -1), cu_seqlens=cu_seqlens).flatten(0, 1), alone)
    position_ids = torch.cat([torch.arange(length) for length in SAMPLE_LENGTHS])[None]
    assert same_bits(embed(packed[None], position_ids=position_ids)[0], alone)
    numbers = torch.repeat_interleave(torch.arange(1, len(samples) + 1), lengths)[None]
    assert same_bits(embed(packed[None], attention_mask=numbers)[0], alone)
    assert same_bits(embed(packed[None], attention_mask=numbers % 2 + 1)[0], alone)

    alternating = [
        embed(right[start : start + 2], lengths=lengths[start : start + 2], sample_offset=start)
        for start in (0, 2, 4)
    ]
    assert same_bits(torch.cat(alternating)[right_mask.bool()], alone)


def test_empty_documents_keep_their_numbers(backend):
    """cu_seqlens with empty documents, first and last included, is lengths with zeros."""
    lengths = torch.tensor([0, 5, 0, 0, 3, 0])
    ids, weight = make_batch("full", rows=6, columns=5).input_ids, make_weight(20, torch.float32)
    real = torch.arange(5) < lengths[:, None]
    padded = noisy_embedding(ids, weight, 5.0, lengths=lengths, seed=1, backend=backend)
    packed = noisy_embedding(
        ids[real], weight, 5.0, cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)), seed=1, backend=backend
    )
    assert same_bits(packed, padded[real])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_shards_equal_the_whole(backend, dtype):
    """Sequence shards at position_offset, zigzag shards by position_ids, and micro-batches: each
    gets the whole's very noise.
    """
    weight, batch = make_weight(64, dtype), make_batch("ragged", rows=4, columns=16)
    ids, lengths = batch.input_ids, batch.lengths

    def embed(input_ids, **arguments):
        return noisy_embedding(input_ids, weight, 5.0, seed=2, backend=backend, **arguments)

    whole = embed(ids, lengths=lengths)
    shards = [
        embed(ids[:, start:end], lengths=lengths, position_offset=start)
        for start, end in ((0, 5), (5, 12), (12, 16))
    ]
    assert same_bits(torch.cat(shards, dim=1), whole)
    for columns in ([0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11], [15, 3, 9]):
        positions = torch.tensor(columns)
        assert same_bits(
            embed(ids[:, columns], lengths=lengths, position_ids=positions[None]), whole[:, columns]
        )
        assert same_bits(
            embed(ids[:, columns], lengths=lengths, position_ids=positions.expand(4, -1)),
            whole[:, columns],
        )
    halves = [
        embed(ids[start : start + 2], lengths=lengths[start : start + 2], sample_offset=start)
        for start in (0, 2)
    ]
    assert same_bits(torch.cat(halves), whole)
    corner = embed(ids[2:, 7:], lengths=lengths[2:], sample_offset=2, position_offset=7)
    assert same_bits(corner, whole[2:, 7:])


@pytest.mark.parametrize("embed_scale", [1.0, math.sqrt(576), 0.3])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_three_functions_one_result(backend, dtype, embed_scale):
    """noisy_embedding == add_noise(F.embedding·scale) == (F.embedding·scale in float32 +
    neftune_noise) rounded.
    """
    weight, batch = make_weight(100, dtype), make_batch("numbered")
    arguments = {
        "attention_mask": batch.attention_mask,
        "seed": 5,
        "replica": 1,
        "sample_offset": 2,
        "backend": backend,
    }
    fused = noisy_embedding(batch.input_ids, weight, 5.0, embed_scale=embed_scale, **arguments)
    scaled = F.embedding(batch.input_ids, weight) * embed_scale
    assert torch.equal(fused, add_noise(scaled, 5.0, **arguments))
    assert torch.equal(
        fused, (scaled.float() + neftune_noise((4, 13), 100, 5.0, **arguments)).to(dtype)
    )
    assert torch.equal(
        noisy_embedding(batch.input_ids, weight, 0.0, embed_scale=embed_scale, **arguments), scaled
    )


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("embed_scale", [1.0, 24.0, 0.3])
def test_training_paths_give_the_same_bits(dtype, embed_scale):
    """A weight that requires grad, small or large, takes other ways through the package: same bits,
    on the default backend.
    """
    for rows in (2, 40):
        batch = make_batch("holes", rows=rows, columns=32)
        weight = make_weight(64, dtype)
        arguments = {"attention_mask": batch.attention_mask, "embed_scale": embed_scale, "seed": 5}
        expected = noisy_embedding(batch.input_ids, weight, 5.0, **arguments, backend="reference")
        trained = noisy_embedding(
            batch.input_ids, weight.clone().requires_grad_(), 5.0, **arguments
        )
        assert trained.requires_grad and same_bits(trained.detach(), expected)
        embeds = (F.embedding(batch.input_ids, weight) * embed_scale).requires_grad_()
        added = add_noise(embeds, 5.0, attention_mask=batch.attention_mask, seed=5)
        assert added.requires_grad and same_bits(added.detach(), expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_padding_idx_without_a_mask(backend, dtype):
    """Tokens equal to padding_idx are padding where nothing else says so; negative ones wrap;
    anything else given overrules it.
    """
    weight, ids = make_weight(20, dtype), torch.tensor([[10, 3, 4, 10], [5, 10, 10, 6]])
    for padding_idx in (10, -1):
        out = noisy_embedding(ids, weight, 5.0, padding_idx=padding_idx, seed=1, backend=backend)
        assert same_bits(
            out,
            noisy_embedding(
                ids, weight, 5.0, attention_mask=(ids != 10).long(), seed=1, backend="reference"
            ),
        )
        assert same_bits(out[ids == 10], weight[ids[ids == 10]]) and not torch.equal(
            out[ids != 10], weight[ids[ids != 10]]
        )
        for layout in (
            {"lengths": torch.tensor([4, 3])},
            {"attention_mask": torch.ones(2, 4)},
            {"position_ids": torch.arange(4)[None]},
        ):
            ruled = noisy_embedding(
                ids, weight, 5.0, padding_idx=padding_idx, seed=1, **layout, backend=backend
            )
            assert same_bits(
                ruled, noisy_embedding(ids, weight, 5.0, seed=1, **layout, backend="reference")
            )


@pytest.mark.parametrize("noise_alpha", [None, 0, 0.0, -0.0])
@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.float64], ids=str)
def test_switched_off(noise_alpha, dtype):
    """No alpha: F.embedding's bits, the input itself, zeros."""
    weight, ids = make_weight(20, dtype), make_batch("full").input_ids
    weight[:, 0] = -0.0
    assert same_bits(noisy_embedding(ids, weight, noise_alpha), F.embedding(ids, weight))
    assert same_bits(
        noisy_embedding(ids, weight, noise_alpha, embed_scale=0.3), F.embedding(ids, weight) * 0.3
    )
    embeds = weight[ids]
    assert add_noise(embeds, noise_alpha) is embeds
    assert same_bits(neftune_noise(ids.shape, 20, noise_alpha), torch.zeros(4, 13, 20))


@pytest.mark.parametrize(
    "layout",
    [
        "nothing",
        "lengths",
        "cu_seqlens",
        "numbered",
        "positions",
        "positions in lengths",
        "strided ids",
    ],
)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_threads_do_not_matter(backend, threads, dtype, layout):
    """Enough tokens to be shared out among threads; shares begin within rows and documents."""
    rows, columns = 37, 61
    generator = torch.Generator().manual_seed(0)
    weight, batch = make_weight(100, dtype), make_batch("ragged", rows=rows, columns=columns)
    ids, tokens = batch.input_ids, rows * columns
    bounds = torch.randint(0, tokens + 1, (200,), generator=generator)
    bounds[:60] = bounds[60:120]  # empty documents
    restarts = torch.arange(tokens).view(rows, columns) % 17
    arguments = {
        "nothing": {},
        "lengths": {"lengths": batch.lengths},
        "cu_seqlens": {
            "cu_seqlens": torch.cat(
                (torch.tensor([0]), bounds.sort().values, torch.tensor([tokens]))
            )
        },
        "numbered": {
            "attention_mask": make_batch("numbered", rows=rows, columns=columns).attention_mask
        },
        "positions": {"position_ids": restarts},
        "positions in lengths": {"position_ids": restarts, "lengths": batch.lengths},
        "strided ids": {},
    }[layout]
    if layout == "strided ids":
        ids = make_batch("full", rows=2 * columns, columns=rows).input_ids[::2].t()
    expected = noisy_embedding(ids, weight, 5.0, **arguments, seed=2, backend="reference")
    for count in (1, 2, 3):
        threads(count)
        assert same_bits(
            noisy_embedding(ids, weight, 5.0, **arguments, seed=2, backend=backend), expected
        )
        assert same_bits(
            add_noise(weight[ids], 5.0, **arguments, seed=2, backend=backend), expected
        )


def test_thread_of_the_caller_does_not_matter(backend):
    """Two Python threads at once get what one gets."""
    from concurrent.futures import ThreadPoolExecutor

    weight, batch = make_weight(64, torch.float32), make_batch("ragged", rows=16, columns=64)

    def call(seed):
        return noisy_embedding(
            batch.input_ids, weight, 5.0, lengths=batch.lengths, seed=seed, backend=backend
        )

    expected = [call(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert all(
            same_bits(left, right)
            for left, right in zip(pool.map(call, range(8)), expected, strict=True)
        )


# ---- nothing read or written where it should not be


def run_into_guarded_buffer(backend, name, arguments, shape, dtype, guard=5):
    """The `out` overload on a view with `guard` rows before and after it; returns the view and
    whether the guards are intact.
    """
    rows, embedding_dim = math.prod(shape[:-1]), shape[-1]
    buffer = torch.full(((rows + 2 * guard) * embedding_dim,), -12345.0, dtype=dtype)
    untouched = buffer[0].clone()
    out = buffer[guard * embedding_dim : (guard + rows) * embedding_dim].view(shape)
    error = None
    try:
        getattr(backends.BACKENDS[backend], f"{name}_out")(*arguments, out=out)
    except IndexError as caught:
        error = caught
    before, after = buffer[: guard * embedding_dim], buffer[(guard + rows) * embedding_dim :]
    return out, bool((before == untouched).all() and (after == untouched).all()), error


@pytest.mark.parametrize("embedding_dim", [1, 3, 7, 8, 9, 15, 17, 33, 64, 65])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_writes_its_output_and_nothing_else(backend, dtype, embedding_dim):
    """The last row, whose neighbour is no row of ours, once with noise and once padding; scaled and
    strided weights too.
    """
    wide = make_weight(2 * embedding_dim, dtype)
    seed, alpha, ids = (
        torch.tensor(3),
        torch.tensor(5.0, dtype=torch.float64),
        make_batch("full").input_ids,
    )
    shape = (*ids.shape, embedding_dim)
    for lengths in (torch.tensor([13, 0, 5, 13]), torch.tensor([13, 0, 13, 12])):
        for weight in (wide[:, :embedding_dim].contiguous(), wide[:, ::2]):
            for scale in (1.0, 1.7):
                expected = noisy_embedding(
                    ids,
                    weight,
                    5.0,
                    lengths=lengths,
                    embed_scale=scale,
                    seed=3,
                    backend="reference",
                )
                arguments = (
                    ids,
                    weight,
                    seed,
                    alpha,
                    None,
                    None,
                    lengths,
                    None,
                    None,
                    0,
                    0,
                    0,
                    -1,
                    scale,
                )
                out, intact, error = run_into_guarded_buffer(
                    backend, "noisy_embedding", arguments, shape, dtype
                )
                assert intact and error is None and same_bits(out, expected)
            expected = add_noise(weight[ids], 5.0, lengths=lengths, seed=3, backend="reference")
            arguments = (weight[ids], seed, alpha, None, None, lengths, None)
            out, intact, error = run_into_guarded_buffer(
                backend, "add_noise", arguments, shape, dtype
            )
            assert intact and error is None and same_bits(out, expected)


@pytest.mark.parametrize("embedding_dim", [7, 64])
def test_add_noise_in_place(backend, embedding_dim):
    """The operators' out may be their own input."""
    weight, batch = make_weight(embedding_dim, torch.bfloat16), make_batch("ragged")
    rows = weight[batch.input_ids]
    arguments = (
        torch.tensor(3),
        torch.tensor(5.0, dtype=torch.float64),
        None,
        None,
        batch.lengths,
        None,
    )
    backends.BACKENDS[backend].add_noise_out(rows, *arguments, out=rows)
    assert same_bits(
        rows,
        noisy_embedding(
            batch.input_ids, weight, 5.0, lengths=batch.lengths, seed=3, backend="reference"
        ),
    )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("operator", ["noisy_embedding", "add_noise"])
def test_out_beside_its_source(kernel, operator, dtype):
    """Three rows of 8 right before and right behind their source are free; one element nearer is
    refused, and nothing is written.
    """
    call = getattr(backends.BACKENDS[kernel], f"{operator}_out")
    name = "weight" if operator == "noisy_embedding" else "inputs_embeds"
    for begin in (16, 17, 39, 41, 63, 64):
        buffer = torch.arange(104).to(dtype)
        source, out = buffer[40:64].view(3, 8), buffer[begin : begin + 24].view(3, 8)
        ids = [torch.tensor([2, 0, 1])] if operator == "noisy_embedding" else []
        arguments = (*ids, source, torch.tensor(3), torch.tensor(5.0, dtype=torch.float64))
        before = buffer.clone()
        if begin in (16, 64):
            rows = source[ids[0]] if ids else source.clone()
            call(*arguments, out=out)
            assert same_bits(out, add_noise(rows, 5.0, seed=3, backend="reference"))
            continue
        with pytest.raises(RuntimeError, match=f"out must not overlap {name}"):
            call(*arguments, out=out)
        assert same_bits(buffer, before)


BAD_IDS = {
    torch.int64: (-1, 11, 12, 2**31, -(2**31), 2**32, 2**32 + 1, 2**63 - 1, -(2**63), 2**61),
    torch.int32: (-1, 11, 12, 2**31 - 1, -(2**31)),
}


@pytest.mark.parametrize("where", [0, 25, 51], ids=["first", "middle", "last"])
@pytest.mark.parametrize(
    "ids_dtype, bad", [(dtype, bad) for dtype, values in BAD_IDS.items() for bad in values], ids=str
)
def test_ids_out_of_range(backend, ids_dtype, bad, where):
    """IndexError with the id and the rule, real token or padding, and nothing written outside the
    output.
    """
    weight, ids = make_weight(20, torch.float32), make_batch("full").input_ids.to(ids_dtype)
    ids.view(-1)[where] = bad
    for layout in (
        {},
        {"lengths": torch.zeros(4, dtype=torch.int64)},
        {"cu_seqlens": torch.tensor([0, 26, 52])},
    ):
        with pytest.raises(IndexError, match=rf"input_ids .*\[0, .*11.*{bad}\b"):
            noisy_embedding(ids, weight, 5.0, seed=0, **layout, backend=backend)
    arguments = (ids, weight, torch.tensor(3), torch.tensor(5.0, dtype=torch.float64))
    _, intact, error = run_into_guarded_buffer(
        backend, "noisy_embedding", arguments, (4, 13, 20), torch.float32
    )
    assert intact and error is not None


def test_id_out_of_range_among_many(backend, threads):
    """The one bad id lies in another thread's share."""
    threads(2)
    weight, batch = make_weight(64, torch.float32), make_batch("full", rows=64, columns=128)
    batch.input_ids[-1, -1] = 11
    with pytest.raises(IndexError, match="11"):
        noisy_embedding(batch.input_ids, weight, 5.0, seed=0, backend=backend)
    batch.input_ids[-1, -1] = 10
    assert torch.isfinite(
        noisy_embedding(batch.input_ids, weight, 5.0, seed=0, backend=backend)
    ).all(), "the next call is not harmed"


@pytest.mark.parametrize("count", [1, 2])
def test_first_of_several_ids_out_of_range_is_named(backend, threads, count):
    threads(count)
    weight, batch = make_weight(64, torch.float32), make_batch("full", rows=64, columns=128)
    batch.input_ids[1, 3], batch.input_ids[1, 4], batch.input_ids[-1, -1] = 12, 13, -14
    with pytest.raises(IndexError, match=r"\b12\b"):
        noisy_embedding(batch.input_ids, weight, 5.0, seed=0, backend=backend)


@pytest.mark.parametrize("embed_scale", [1.0, 2.0])
@pytest.mark.parametrize("rows", [2, 100])
def test_id_out_of_range_in_training(rows, embed_scale):
    """The ways a trainable weight takes refuse it too."""
    batch = make_batch("full", rows=rows, columns=16)
    batch.input_ids[-1, -1] = 11
    with pytest.raises(IndexError):
        noisy_embedding(
            batch.input_ids,
            make_weight(64, torch.float32).requires_grad_(),
            5.0,
            seed=0,
            embed_scale=embed_scale,
        )


def test_empty_table_has_no_rows(backend):
    with pytest.raises(IndexError, match=r"input_ids .*\[0, .*0"):
        noisy_embedding(
            torch.zeros(1, 2, dtype=torch.int64), torch.zeros(0, 8), 5.0, seed=0, backend=backend
        )


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_beyond_two_to_the_31_elements(backend, dtype):
    """Row offsets need 64 bits; the 4 GiB table is never touched but for two rows, so the system
    need not find memory for it.
    """
    import numpy

    weight = torch.from_numpy(numpy.zeros((2**20 + 5, 2048), dtype=numpy.int16)).view(dtype)
    weight[-1], weight[3] = torch.linspace(-2, 2, 2048).to(dtype), 1.0
    ids = torch.tensor([[2**20 + 4, 3, 2**20 + 4]])
    small = torch.stack((weight[3], weight[-1]))
    expected = noisy_embedding(torch.tensor([[1, 0, 1]]), small, 5.0, seed=0, backend="reference")
    assert same_bits(noisy_embedding(ids, weight, 5.0, seed=0, backend=backend), expected)


@pytest.mark.long
def test_wide_rows_and_many_tokens(kernel):
    """Every width from 1 to 130 and a batch of odd sizes with every layout at once: tails of all
    vector widths.
    """
    for embedding_dim in range(1, 131):
        for dtype in FLOAT_DTYPES:
            weight, batch = (
                make_weight(embedding_dim, dtype),
                make_batch("numbered", rows=3, columns=5),
            )
            assert_equals_reference(
                kernel,
                batch.input_ids,
                weight,
                5.0,
                attention_mask=batch.attention_mask,
                embed_scale=1.1,
                seed=1,
            )
            assert_equals_reference(
                kernel, batch.input_ids, weight, 5.0, attention_mask=batch.attention_mask, seed=1
            )
