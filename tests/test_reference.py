"""reference.py, the arbiter of every backend, against Random123's known answers and the naive
oracle.
"""

import ctypes
import fractions
import math

import numpy as np
import oracle
import pytest
import torch
from conftest import (
    FLOAT_DTYPES,
    KERNELS,
    MASK_KINDS,
    equals_oracle,
    make_batch,
    running,
    same_bits,
)
from philox_vectors import PHILOX_VECTORS

from neftune_kernels import (
    backends,
    neftune_noise,
    noisy_embedding,
    reference,
    reference_ops,
)

SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 0x0123456789ABCDEF)
DTYPES = (*FLOAT_DTYPES, torch.float64)


def reference_philox(counter, key, rounds):
    counter = tuple(torch.tensor(word) for word in counter)
    return tuple(
        int(word)
        for word in reference.philox4x32(counter, tuple(torch.tensor(word) for word in key), rounds)
    )


def cpp_philox(counter, key, rounds):
    out = (ctypes.c_uint32 * 4)()
    backends.native.handle.neftune_kernels_philox4x32(
        (ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), ctypes.c_int(rounds), out
    )
    return tuple(out)


@pytest.mark.parametrize("rounds, counter, key, words", PHILOX_VECTORS)
@pytest.mark.parametrize("implementation", ["oracle", "reference", *KERNELS])
def test_philox_known_answers(implementation, rounds, counter, key, words):
    """The oracle, the reference and the C++ code of every instruction set."""
    if implementation in ("oracle", "reference"):
        philox4x32 = {"oracle": oracle.philox4x32, "reference": reference_philox}[implementation]
        assert philox4x32(counter, key, rounds) == words
    else:
        with running(implementation):
            assert cpp_philox(counter, key, rounds) == words


def test_known_answer_reaches_the_noise(backend):
    """Counter 0 and key 0 are token 0 with seed 0: its 8 columns are the known words' halves, low
    half first.

    L = 1, d = 16, alpha = 4: magnitude 1 and step 2⁻³¹, so noise·2³¹ is the lattice value itself,
    exactly.
    """
    noise = neftune_noise((1, 1), 16, 4.0, seed=0, backend=backend)[0, 0, :8].double() * 2.0**31
    halves = [half for word in PHILOX_VECTORS[0][3] for half in (word & 0xFFFF, word >> 16)]
    assert noise.tolist() == [
        ((half - 65536 if half >= 32768 else half) + 0.5) * 65536 for half in halves
    ]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "replica, sample, position",
    [(0, 0, 0), (2**32 - 1, 2**32 - 1, 2**32 - 1), (1, 2**31, 7), (2**31, 5, 2**31)],
)
def test_every_counter_and_key_word_is_used(seed, replica, sample, position):
    """The noise of one token at the extremes of all six Philox words."""
    noise = neftune_noise(
        (1, 1),
        20,
        5.0,
        seed=seed,
        replica=replica,
        sample_offset=sample,
        position_offset=position,
        backend="reference",
    )
    assert equals_oracle(noise, oracle.noise([(sample, position, 1)], 20, 5.0, seed, replica))


def test_samples_and_positions_count_mod_2_32():
    """In the reference itself, whoever numbers the places."""
    sample, position = torch.tensor([7, 7 + 2**32, 7]), torch.tensor([2, 2, 2 + 2**32])
    places = (sample, position, torch.tensor([3, 3, 3]))
    rows = reference.neftune_noise(places, 20, 5.0, torch.tensor(3))
    assert torch.equal(rows[1], rows[0]) and torch.equal(rows[2], rows[0])


@pytest.mark.parametrize("embedding_dim", [1, 2, 7, 8, 9, 20, 64, 100, 576])
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_noise_equals_oracle(kind, embedding_dim):
    batch = make_batch(kind, rows=3, columns=9)
    noise = neftune_noise(
        (3, 9),
        embedding_dim,
        7.5,
        attention_mask=batch.attention_mask,
        seed=3,
        replica=2,
        sample_offset=5,
        backend="reference",
    )
    places = oracle.places(
        (3, 9), attention_mask=batch.attention_mask.flatten().tolist(), sample_offset=5
    )
    assert equals_oracle(noise, oracle.noise(places, embedding_dim, 7.5, 3, 2))


@pytest.mark.parametrize("embed_scale", [1.0, math.sqrt(576), 0.1, -3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise_alpha", [1e-6, 5.0, 1e4])
def test_noisy_embedding_equals_oracle(noise_alpha, dtype, embed_scale):
    """Rounding: the product to the dtype, then the sum in float32 (float64 for float64) and once
    more to the dtype.
    """
    weight = torch.randn(
        11, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(dtype)
    batch = make_batch("numbered", rows=2, columns=9)
    out = noisy_embedding(
        batch.input_ids,
        weight,
        noise_alpha,
        attention_mask=batch.attention_mask,
        embed_scale=embed_scale,
        seed=9,
        backend="reference",
    )
    places = oracle.places((2, 9), attention_mask=batch.attention_mask.flatten().tolist())
    wide = weight.numpy() if dtype == torch.float64 else weight.float().numpy()
    ids = batch.input_ids.flatten().tolist()
    expected = oracle.noisy_embedding(
        places,
        ids,
        wide,
        str(dtype).removeprefix("torch."),
        noise_alpha,
        9,
        embed_scale=embed_scale,
    )
    assert out.dtype == dtype and equals_oracle(out, expected)


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """(1, 16): zeros of both signs, subnormals, smallest normal, one, the largest, infinities."""
    limits = torch.finfo(dtype)
    values = [
        0.0,
        limits.smallest_normal * limits.eps,
        limits.smallest_normal * (1 - limits.eps),
        limits.smallest_normal,
        1.0,
    ]
    values += [1 + limits.eps, limits.max, math.inf]
    return torch.tensor(
        [[sign * value for value in values for sign in (1.0, -1.0)]], dtype=torch.float64
    ).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise_alpha", [2.0**-86, 1e-20, 1e-7, 5.0, 6e5, 3e38, 1e38 * 64])
@pytest.mark.parametrize("embed_scale", [1.0, 1.5])
def test_special_values_equal_oracle(embed_scale, noise_alpha, dtype):
    """Overflow to infinity, subnormal results and signs of zero, with noise far below and far above
    the weights.
    """
    weight = special_values(dtype)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    out = noisy_embedding(
        ids,
        weight,
        noise_alpha,
        lengths=torch.tensor([12]),
        embed_scale=embed_scale,
        seed=4,
        backend="reference",
    )
    places = oracle.places((1, 16), lengths=[12])
    wide = weight.numpy() if dtype == torch.float64 else weight.float().numpy()
    name = str(dtype).removeprefix("torch.")
    assert equals_oracle(
        out,
        oracle.noisy_embedding(
            places, [0] * 16, wide, name, noise_alpha, 4, embed_scale=embed_scale
        ),
    )


@pytest.mark.parametrize(
    "dtype, ulp",
    [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)],
    ids=["bfloat16", "float16"],
)
def test_ties_round_to_even(backend, dtype, ulp):
    """Noise on odd multiples of half an ulp of 1 puts every sum in [1, 2) exactly between two
    values of the dtype.

    L·d = 256·64 = 128², so alpha = 128·2¹⁵·ulp gives magnitude 2¹⁵·ulp and noise = (odd
    number)·ulp/2, exactly.
    """
    arguments = {"seed": 8, "backend": backend}
    noise = neftune_noise((1, 256), 64, 128 * 2.0**15 * ulp, **arguments)
    out = noisy_embedding(
        torch.zeros(1, 256, dtype=torch.int64),
        torch.ones(1, 64, dtype=dtype),
        128 * 2.0**15 * ulp,
        **arguments,
    )
    total = 1 + noise.double()
    ties = (total >= 1) & (total < 2)
    assert ties.sum() >= 10
    assert torch.equal(total[ties] / ulp % 1, torch.full_like(total[ties], 0.5))
    lower = torch.floor(total[ties] / ulp)
    assert torch.equal(out[ties].double(), torch.where(lower % 2 == 0, lower, lower + 1) * ulp)


def test_smallest_magnitude(backend):
    """At magnitude 2⁻⁹⁰ there is noise, at the next power of two below there is none and every bit
    stays, a -0.0's too.
    """
    weight = torch.zeros(1, 64)
    weight[:, ::2] = -0.0
    ids = torch.zeros(1, 4, dtype=torch.int64)  # √(L·d) = 16
    noisy = noisy_embedding(ids, weight, 16 * 2.0**-90, seed=0, backend=backend)
    assert equals_oracle(
        noisy, oracle.noise([(0, position, 4) for position in range(4)], 64, 16 * 2.0**-90, 0)
    )
    assert (noisy != 0).all()
    assert same_bits(
        noisy_embedding(ids, weight, 16 * 2.0**-91, seed=0, backend=backend), weight[ids]
    )
    assert same_bits(
        neftune_noise((1, 4), 64, 16 * 2.0**-91, seed=0, backend=backend), torch.zeros(1, 4, 64)
    )


@pytest.mark.parametrize(
    "length, embedding_dim",
    [(1, 1), (3, 7), (257, 4096), (2**31 - 1, 4096), (2**33 + 1, 576), (70000, 1)],
)
@pytest.mark.parametrize("noise_alpha", [0.1, 5.0, 1 / 3, 15.000000001])
def test_magnitude_is_rounded_once(backend, length, embedding_dim, noise_alpha):
    """alpha / √(L·d) in float64, then one rounding to float32: lengths beyond the batch and beyond
    2³² included.

    The column used has lattice value x = noise_row with magnitude 1, so the expected product has a
    single float32 rounding left.
    """
    lengths = torch.tensor([length])
    noise = neftune_noise(
        (1, 1), embedding_dim, noise_alpha, lengths=lengths, seed=6, backend=backend
    )[0, 0, 0].numpy()
    row = oracle.noise_row(6, 0, 0, 0, 1, 1, 1.0)  # d = 1: column 0 alone
    lattice = np.float64(row[0]) * 2.0**31
    step = np.float32(noise_alpha / math.sqrt(float(length) * float(embedding_dim))) * np.float32(
        2.0**-31
    )
    assert noise == np.float32(lattice) * step


def test_equal_variance_is_the_nearest_float64():
    """1/√3 to half an ulp, and magnitudes that its neighbours would round to another float32."""
    factor = reference.UNIFORM_DEVIATION
    exact, third = fractions.Fraction(factor), fractions.Fraction(1, 3)
    half = fractions.Fraction(math.ulp(factor)) / 2
    assert (exact - half) ** 2 < third < (exact + half) ** 2
    one = torch.ones(1, dtype=torch.int64)
    for neighbour in (math.nextafter(factor, 0), math.nextafter(factor, 1)):
        told_apart = 0
        for bits in range(0x3F800000, 0x3F800000 + 2000):
            boundary = float(np.uint32(bits).view(np.float32)) + 2.0**-24
            alpha = boundary / factor  # alpha·c lies at the middle of two float32
            truth = np.float32(alpha * factor)
            told_apart += truth != np.float32(alpha * neighbour)
            assert float(reference.noise_magnitude(one, 1, alpha, factor)) == truth
        assert told_apart > 500
    assert reference.scaled_draws(
        torch.ones(1, 1), one, 1, 3**0.5, "rademacher", True
    ).item() == np.float32(3**0.5 * oracle.DEVIATIONS[True])


def test_tensor_alpha_is_not_rounded_to_float32():
    """The operator's alpha is a float64 tensor; a float32 alpha of 0.1 would move the magnitude."""
    lengths = torch.arange(1, 400)
    step = reference.noise_step(lengths, 100, torch.tensor(0.1, dtype=torch.float64))
    expected = [
        np.float32(0.1 / math.sqrt(length * 100.0)) * np.float32(2.0**-31)
        for length in range(1, 400)
    ]
    assert step.tolist() == [float(value) for value in expected]
    assert step.tolist() != [
        float(np.float32(float(np.float32(0.1)) / math.sqrt(n * 100.0)) * np.float32(2.0**-31))
        for n in range(1, 400)
    ]


def test_chunks_of_the_reference_are_invisible(monkeypatch):
    """The reference works through a bounded number of rows at a time: one, three or all give the
    same bits.
    """
    batch = make_batch("ragged")
    arguments = {"attention_mask": batch.attention_mask, "seed": 2, "backend": "reference"}
    whole = neftune_noise((4, 13), 20, 5.0, **arguments)
    for chunk in (1, 60, 61):
        monkeypatch.setattr(reference_ops, "REFERENCE_CHUNK", chunk)
        assert torch.equal(neftune_noise((4, 13), 20, 5.0, **arguments), whole)


@pytest.mark.parametrize("distribution", ["uniform", "normal", "rademacher"])
@pytest.mark.parametrize("equal_variance", [True, False])
@pytest.mark.parametrize("embedding_dim", [1, 20])
def test_oracle_at_once_equals_its_loops(distribution, equal_variance, embedding_dim):
    """Drawn calls are judged by all tokens at once, which the plain loops hold."""
    places = [None, (0, 0, 1), (2**32 - 1, 2**32 - 1, 7), (2**32, 5, 2**33 + 1), (3, 2, 0)]
    for alpha in (5.0, 1e-26, 0.0, 1e38):
        for seed, replica, sign in ((0, 0, 1), (2**64 - 1, 2**32 - 1, -1)):
            given = (places, embedding_dim, alpha, seed, replica, sign)
            variant = (distribution, equal_variance)
            found = oracle.noise_of_tokens(*given, *variant).astype(np.float32)
            assert np.array_equal(found, oracle.noise(*given, *variant))
