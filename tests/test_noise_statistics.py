"""The noise is NEFTune's: its bound, its lattice, its distribution, and no dependence between
neighbours of any kind.

Every seed is fixed, so every statistic here is one number; the bounds say how far it may lie from
its expectation. Five standard deviations or p in [1e-6, 1 - 1e-6] would reject a perfect generator
about once in a million seeds.
"""

import math

import numpy as np
import pytest
import torch
from conftest import make_batch
from scipy import stats

from neftune_kernels import neftune_noise, noisy_embedding

SIGMAS = 5.0
SMALLEST_P = 1e-6


def lattice(shape, embedding_dim, seed=0, **arguments) -> np.ndarray:
    """u·2¹⁶, the odd integers in (-2¹⁶, 2¹⁶), as (..., T, d) int64: alpha = √(T·d) gives magnitude
    1, and √(T·d) must be a power of two.
    """
    root = math.isqrt(shape[-1] * embedding_dim)
    assert root * root == shape[-1] * embedding_dim and root & (root - 1) == 0
    scaled = (
        neftune_noise(
            shape, embedding_dim, float(root), seed=seed, backend="reference", **arguments
        ).double()
        * 2.0**16
    )
    assert torch.equal(scaled, scaled.round())
    return scaled.long().numpy()


@pytest.mark.parametrize("noise_alpha", [0.1, 5.0, 15.0])
@pytest.mark.parametrize("embedding_dim", [576, 4096])
def test_bound_is_kept_and_attained(backend, embedding_dim, noise_alpha):
    """|noise| <= alpha/√(L·d), L the real tokens of the sample, in every sample.

    The largest comes within 1% of it.

    Kept exactly: |u| <= 1 - 2⁻¹⁶, and the two float32 roundings add less than 2·2⁻²⁴. Attained: n
    draws all miss the outer 1% with probability 0.99ⁿ, below 1e-15 for the n >= 3 500 draws of
    every sample asked.
    """
    lengths = torch.tensor([40, 7, 1, 0, 23])
    noise = neftune_noise(
        (5, 40), embedding_dim, noise_alpha, lengths=lengths, seed=1, backend=backend
    ).double()
    for row, length in enumerate(lengths.tolist()):
        real, padding = noise[row, :length], noise[row, length:]
        assert torch.equal(padding, torch.zeros_like(padding))
        if length:
            bound = noise_alpha / math.sqrt(length * embedding_dim)
            assert real.abs().max() <= bound
            assert (real != 0).all()
            if length * embedding_dim >= 3500:
                assert real.abs().max() >= 0.99 * bound


@pytest.mark.parametrize("kind", ["ragged", "left", "holes", "numbered"])
def test_bound_per_document(backend, kind):
    """The bound of each document's own real length, documents numbered in a row included: never the
    padded or the packed length.
    """
    batch = make_batch(kind, rows=3, columns=24, seed=3)
    noise = neftune_noise(
        (3, 24), 4096, 5.0, attention_mask=batch.attention_mask, seed=2, backend=backend
    ).double()
    for row, mask in enumerate(batch.attention_mask.tolist()):
        documents, before = [], None
        for column, number in enumerate(mask):
            if number:
                if number != before:
                    documents.append([])
                documents[-1].append(column)
                before = number
        for columns in documents:
            bound = 5.0 / math.sqrt(len(columns) * 4096)
            largest = noise[row, columns].abs().max()
            assert 0.99 * bound <= largest <= bound
        padding = [column for column, number in enumerate(mask) if not number]
        assert torch.equal(
            noise[row, padding], torch.zeros(len(padding), 4096, dtype=torch.float64)
        )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_padding_stays_untouched(dtype):
    weight = torch.randn(11, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    batch = make_batch("holes")
    out = noisy_embedding(batch.input_ids, weight, 1e6, attention_mask=batch.attention_mask, seed=0)
    padding = batch.attention_mask == 0
    assert padding.any() and torch.equal(out[padding], weight[batch.input_ids[padding]])
    assert (out[~padding] != weight[batch.input_ids[~padding]]).all()


def test_length_of_a_padded_batch_does_not_quieten_it():
    """Today's hook divides by the padded length: 16 real tokens padded to 256 would get a quarter
    of the noise they should.
    """
    short = neftune_noise((1, 16), 64, 5.0, seed=0)
    padded = neftune_noise((1, 256), 64, 5.0, lengths=torch.tensor([16]), seed=0)
    assert torch.equal(padded[:, :16], short)


def test_long_rows_in_half_precision():
    """float16 has no L·d above 65 504 and bfloat16 no L of 257: neither may reach the magnitude."""
    for dtype, length in ((torch.float16, 513), (torch.bfloat16, 257)):
        out = noisy_embedding(
            torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, 576, dtype=dtype), 5.0, seed=0
        )
        assert (
            torch.equal(out, neftune_noise((1, length), 576, 5.0, seed=0).to(dtype))
            and (out != 0).all()
        )


def test_values_are_the_lattice():
    """All 65 536 odd multiples of 2⁻¹⁶ occur and nothing else; of n = 64·65 536 draws one would be
    missing with probability 1e-23.
    """
    values = lattice((4, 1024), 1024)
    counts = np.bincount((values.ravel() + 65535) // 2, minlength=65536)
    assert np.array_equal(values % 2, np.ones_like(values))
    assert len(counts) == 65536 and counts.min() > 0


def test_uniform():
    """Chi-square over all 65 536 values at 64 expected draws each, and Kolmogorov-Smirnov against
    the continuous uniform.

    The lattice's own distance to the uniform, 2⁻¹⁷, lies far below the 1/√n = 2⁻¹¹ that
    Kolmogorov-Smirnov resolves here.
    """
    values = lattice((4, 1024), 1024, seed=2).ravel()
    counts = np.bincount((values + 65535) // 2, minlength=65536)
    assert SMALLEST_P < stats.chisquare(counts).pvalue < 1 - SMALLEST_P
    assert (
        SMALLEST_P < stats.kstest(values / 65536, "uniform", args=(-1, 2)).pvalue < 1 - SMALLEST_P
    )


@pytest.mark.parametrize("seed", [0, 1, -1, 123456789, 2**63])
def test_moments(seed):
    """Mean 0 and variance (1 - 2⁻³²)/3; their standard errors are √(1/3n) and √((1/5 - 1/9)/n)."""
    u = lattice((1, 1024), 1024, seed=seed).ravel() / 65536
    assert abs(u.mean()) < SIGMAS * math.sqrt(1 / 3 / u.size)
    assert abs((u**2).mean() - (1 - 2.0**-32) / 3) < SIGMAS * math.sqrt((1 / 5 - 1 / 9) / u.size)


@pytest.mark.parametrize("axis, name", [(0, "sample"), (1, "position"), (2, "column")])
def test_every_column_position_and_sample_is_uniform(axis, name):
    """Each slice by itself: its mean within six standard errors of 0; of 256 slices one would pass
    five by chance in 1 of 7 000 seeds.
    """
    u = lattice((64, 64), 256, seed=3) / 65536
    others = tuple(other for other in range(3) if other != axis)
    means = u.mean(axis=others)
    assert np.abs(means).max() < 6 * math.sqrt(1 / 3 / (u.size / u.shape[axis])), name


def assert_independent(left: np.ndarray, right: np.ndarray) -> None:
    """Correlation, correlation of sizes, and a 16 by 16 chi-square of two arrays of lattice values
    that are paired element by element.

    Under independence the sample correlation of n pairs has standard deviation 1/√n; the 256 cells
    of the top four bits are equally likely.
    """
    left, right = left.ravel(), right.ravel()
    u, v = left / 65536, right / 65536
    limit = SIGMAS / math.sqrt(left.size)
    assert abs(np.corrcoef(u, v)[0, 1]) < limit
    assert abs(np.corrcoef(u**2, v**2)[0, 1]) < limit
    cells = np.bincount((left + 65536) // 8192 * 16 + (right + 65536) // 8192, minlength=256)
    assert cells.size == 256 and SMALLEST_P < stats.chisquare(cells).pvalue < 1 - SMALLEST_P
    low = np.bincount(
        ((left + 65535) // 2 % 16) * 16 + (right + 65535) // 2 % 16, minlength=256
    )  # the low four bits of both halves
    assert SMALLEST_P < stats.chisquare(low).pvalue < 1 - SMALLEST_P


@pytest.fixture(scope="module")
def cube():
    """(samples, positions, columns) lattice values, 1M of them."""
    return lattice((64, 64), 256, seed=4)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 16])
def test_neighbouring_columns(cube, lag):
    """Halves of a word, words of a block, neighbouring blocks."""
    assert_independent(cube[..., :-lag], cube[..., lag:])


@pytest.mark.parametrize("lag", [1, 2, 8])
def test_neighbouring_positions_and_samples(cube, lag):
    assert_independent(cube[:, :-lag], cube[:, lag:])
    assert_independent(cube[:-lag], cube[lag:])


def test_sample_and_position_are_not_exchangeable(cube):
    """Token (sample 3, position 5) is not token (sample 5, position 3)."""
    off_diagonal = ~np.eye(64, dtype=bool)
    assert_independent(cube[off_diagonal], cube.transpose(1, 0, 2)[off_diagonal])


@pytest.mark.parametrize("replica", [1, 2, 2**31, 2**32 - 1])
def test_replicas(cube, replica):
    assert_independent(cube, lattice((64, 64), 256, seed=4, replica=replica))


@pytest.mark.parametrize("seed", [5, 6, 4 + 2**32, 4 + 2**63, -4, -5])
def test_seeds(cube, seed):
    """The next seeds, and seeds that differ in the high word alone."""
    assert_independent(cube, lattice((64, 64), 256, seed=seed))


def test_every_token_has_its_own_noise(cube):
    """No two of 4 096 tokens share their first 8 columns (128 bits): sharing by chance has
    probability 2·10⁻³².
    """
    assert len(np.unique(cube[..., :8].reshape(-1, 8), axis=0)) == 64 * 64
    blocks = cube.reshape(-1, 8)
    assert len(np.unique(blocks, axis=0)) == len(blocks)
