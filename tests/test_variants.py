"""sign, noise_mask and the distributions: against the oracle over layouts, dtypes and backends, and
what each promises of itself.
"""

import copy
import functools
import itertools
import math
import pickle

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import FLOAT_DTYPES, equals_oracle, make_batch, same_bits
from scipy.special import ndtri
from test_backends import LAYOUTS
from test_layout import MASK_DTYPES, expected

from neftune_kernels import NEFTuneEmbedding, add_noise, neftune_noise, noisy_embedding, reference
from neftune_kernels.lookup import embeds_with_noise
from neftune_kernels.noise import UNIFORM, Variant, alpha_tensor, check_variant, make_noise
from neftune_kernels.samples import UNSAID, Samples

OPS = torch.ops.neftune_kernels
SHAPE, WIDTH = (4, 13), 20
VARIANTS = {
    "uniform": {},
    "negated": {"sign": -1},
    "normal": {"distribution": "normal"},
    "unit normal": {"distribution": "normal", "equal_variance": False},
    "rademacher": {"distribution": "rademacher"},
    "negated unit rademacher": {"distribution": "rademacher", "equal_variance": False, "sign": -1},
}
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
EVERY_LAYOUT = {
    **LAYOUTS,
    **{
        f"{kind} mask": {"attention_mask": make_batch(kind).attention_mask}
        for kind in ("left", "holes", "ragged")
    },
}
EACH_LAYOUT = pytest.mark.parametrize("layout", EVERY_LAYOUT.values(), ids=EVERY_LAYOUT)
OFFSETS = {"replica": 3, "sample_offset": 2**32 - 2, "position_offset": 5}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def some_tokens(shape=SHAPE):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0], mask[1] = False, True  # a row without noise, a row that has all
    return mask


def places(layout, noise_mask, **offsets):
    found = expected(SHAPE, **layout, **offsets)
    return [
        place if noisy else None
        for place, noisy in zip(found, noise_mask.flatten().tolist(), strict=True)
    ]


def weight_of(dtype):
    weight = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(4)).to(dtype)
    weight[:, ::3] = -0.0
    return weight


# ---- against the oracle


@EACH_VARIANT
@EACH_LAYOUT
def test_noise_of_every_layout(backend, layout, variant):
    """Masked or not, with offsets that wrap: every offset counts once."""
    offsets = {name: value for name, value in OFFSETS.items() if name != "replica"}
    for noise_mask in (some_tokens(), None):
        kept = torch.ones(SHAPE) if noise_mask is None else noise_mask
        found = neftune_noise(
            SHAPE,
            WIDTH,
            5.0,
            **layout,
            noise_mask=noise_mask,
            **variant,
            seed=-9,
            **OFFSETS,
            backend=backend,
        )
        assert equals_oracle(
            found,
            oracle.noise(
                places(layout, kept, **offsets), WIDTH, 5.0, -9, OFFSETS["replica"], **variant
            ),
        )


@EACH_VARIANT
@pytest.mark.parametrize("embed_scale", [1.0, 4.5])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_embedding_of_every_dtype(backend, dtype, embed_scale, variant):
    assert_embedding(backend, dtype, embed_scale, variant)


@EACH_VARIANT
@pytest.mark.parametrize("embed_scale", [1.0, 4.5])
def test_embedding_of_float64(embed_scale, variant):
    assert_embedding(None, torch.float64, embed_scale, variant)


def assert_embedding(backend, dtype, embed_scale, variant):
    """Every way to build it gives the oracle's bits; tokens without noise keep theirs, -0.0
    included.
    """
    weight, batch, noise_mask = weight_of(dtype), make_batch("holes"), some_tokens()
    given = {
        "attention_mask": batch.attention_mask,
        "noise_mask": noise_mask,
        **variant,
        "seed": 6,
        "backend": backend,
    }
    token_places = places({"attention_mask": batch.attention_mask}, noise_mask)
    wide = weight.double().numpy() if dtype == torch.float64 else weight.float().numpy()
    name = str(dtype).removeprefix("torch.")
    truth = oracle.noisy_embedding(
        token_places,
        batch.input_ids.flatten().tolist(),
        wide,
        name,
        5.0,
        6,
        0,
        embed_scale,
        **variant,
    )
    out = noisy_embedding(batch.input_ids, weight, 5.0, embed_scale=embed_scale, **given)
    assert equals_oracle(out, truth)
    embedded = F.embedding(batch.input_ids, weight) * embed_scale
    assert same_bits(add_noise(embedded, 5.0, **given), out)
    untouched = (batch.attention_mask == 0) | ~noise_mask
    assert same_bits(out[untouched], embedded[untouched]) and not torch.equal(out, embedded)


@EACH_VARIANT
def test_padding_idx_tells_padding_under_a_noise_mask(backend, variant):
    batch, weight, noise_mask = make_batch("full"), weight_of(torch.float32), some_tokens()
    found = oracle.places(SHAPE, input_ids=batch.input_ids.flatten().tolist(), padding_idx=3)
    assert None in found
    kept = [
        place if noisy else None
        for place, noisy in zip(found, noise_mask.flatten().tolist(), strict=True)
    ]
    out = noisy_embedding(
        batch.input_ids,
        weight,
        5.0,
        padding_idx=3,
        noise_mask=noise_mask,
        **variant,
        seed=2,
        backend=backend,
    )
    truth = oracle.noisy_embedding(
        kept, batch.input_ids.flatten().tolist(), weight.numpy(), "float32", 5.0, 2, **variant
    )
    assert equals_oracle(out, truth)


# ---- noise_mask


def test_noise_mask_only_takes_noise_away(backend):
    """Small masks exhaustively under each kind of layout: what is left is the very noise, so L and
    positions count every real token.
    """
    shape = (2, 3)
    layouts = (
        {},
        {"attention_mask": torch.tensor([[0, 1, 1], [2, 0, 3]])},
        {"position_ids": torch.tensor([[0, 1, 0], [0, 1, 2]])},
        {"lengths": torch.tensor([9, 1])},
        {"lengths": torch.tensor([9, 4]), "position_ids": torch.tensor([[4, 0, 8], [3, 4, 1]])},
        {"cu_seqlens": torch.tensor([0, 0, 4, 6, 6])},
    )
    for layout in layouts:
        for position_offset in (0, 2):
            given = {**layout, "position_offset": position_offset, "seed": 3, "backend": backend}
            noise = neftune_noise(shape, 8, 5.0, **given)
            for cells in itertools.product((False, True), repeat=6):
                mask = torch.tensor(cells).reshape(shape)
                assert same_bits(
                    neftune_noise(shape, 8, 5.0, noise_mask=mask, **given),
                    torch.where(mask[..., None], noise, 0.0),
                )


@EACH_VARIANT
def test_masked_shard_of_longer_samples(backend, variant):
    """Two halves of a row, each told the whole's lengths: the whole's noise, L included."""
    lengths, mask = torch.tensor([13, 9, 4, 1]), some_tokens()
    whole = neftune_noise(
        SHAPE, WIDTH, 5.0, lengths=lengths, noise_mask=mask, seed=1, **variant, backend=backend
    )
    for begin, end in ((0, 6), (6, 13)):
        part = neftune_noise(
            (4, end - begin),
            WIDTH,
            5.0,
            lengths=lengths,
            noise_mask=mask[:, begin:end],
            position_offset=begin,
            seed=1,
            **variant,
            backend=backend,
        )
        assert same_bits(part, whole[:, begin:end].contiguous())


@EACH_VARIANT
@pytest.mark.parametrize("embed_scale", [1.0, 4.5])
def test_offset_decides_which_tokens_lengths_hold(backend, embed_scale, variant):
    """Of lengths 9 and 4 a shard at position 6 sees three tokens and none, with a noise_mask or
    without: by every function and the module.
    """
    lengths, mask = torch.tensor([9, 4]), torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = oracle.places((2, 5), lengths=[9, 4], position_offset=6)
    assert found[3:] == [None] * 7
    ids, weight = torch.arange(10).view(2, 5), weight_of(torch.float32)
    given = {"lengths": lengths, "position_offset": 6, "seed": 3}
    for noise_mask in (None, mask):
        kept = [
            place if noise_mask is None or noisy else None
            for place, noisy in zip(found, mask.flatten().tolist(), strict=True)
        ]
        truth = oracle.noisy_embedding(
            kept, range(10), weight.numpy(), "float32", 5.0, 3, 0, embed_scale, **variant
        )
        call = {**given, "noise_mask": noise_mask, **variant, "backend": backend}
        assert equals_oracle(
            noisy_embedding(ids, weight, 5.0, embed_scale=embed_scale, **call), truth
        )
        assert equals_oracle(add_noise(weight[ids] * embed_scale, 5.0, **call), truth)
        assert equals_oracle(
            neftune_noise((2, 5), WIDTH, 5.0, **call), oracle.noise(kept, WIDTH, 5.0, 3, **variant)
        )
        kind = {name: value for name, value in variant.items() if name != "sign"}
        module = NEFTuneEmbedding.from_pretrained(
            weight, embed_scale=embed_scale, backend=backend, **kind
        )
        sign = variant.get("sign", 1)
        assert equals_oracle(module(ids, **given, noise_mask=noise_mask, sign=sign), truth)


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_every_noise_mask_dtype(backend, dtype):
    """Any value but 0 means noise; unlike an attention mask's, values do not number documents."""
    mask = make_batch("numbered").attention_mask
    given = {"seed": 3, "backend": backend}
    truth = neftune_noise(SHAPE, WIDTH, 5.0, noise_mask=mask != 0, **given)
    assert same_bits(neftune_noise(SHAPE, WIDTH, 5.0, noise_mask=mask.to(dtype), **given), truth)
    assert same_bits(
        neftune_noise(SHAPE, WIDTH, 5.0, noise_mask=mask.to(dtype).t().contiguous().t(), **given),
        truth,
    )


@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (3, 0), (2, 1, 3)])
@EACH_VARIANT
def test_every_shape(backend, shape, variant):
    mask = torch.ones(shape, dtype=torch.bool)
    noise = neftune_noise(shape, WIDTH, 5.0, **variant, seed=1, backend=backend)
    assert noise.shape == (*shape, WIDTH) and (noise != 0).all()
    assert same_bits(
        neftune_noise(shape, WIDTH, 5.0, noise_mask=mask, **variant, seed=1, backend=backend), noise
    )
    assert same_bits(
        neftune_noise(shape, 0, 5.0, noise_mask=mask, **variant, seed=1, backend=backend),
        torch.zeros(*shape, 0),
    )


# ---- sign


@pytest.mark.parametrize("distribution", reference.DISTRIBUTIONS)
@EACH_LAYOUT
def test_antithesis_is_exact(backend, layout, distribution):
    given = {**layout, "distribution": distribution, "seed": 8, "backend": backend}
    noise = neftune_noise(SHAPE, WIDTH, 5.0, **given)
    assert torch.equal(neftune_noise(SHAPE, WIDTH, 5.0, sign=-1, **given), -noise) and noise.any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("exponent", [-91, -90, -80, -70, -69, -68, -40, 0, 100, 127, 140])
def test_negative_noise_of_every_magnitude(kernel, exponent, dtype):
    """Where kernels change their ways by the step: no noise, subnormal bfloat16 sums, infinity.

    L = 1, d = 64: alpha = 8·magnitude.
    """
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[:3] *= 2.0**exponent if exponent < 0 else 1
    weight[3] = 0.0
    ids = torch.arange(7)[:, None]
    for distribution in reference.DISTRIBUTIONS:
        given = {"sign": -1, "distribution": distribution, "equal_variance": False, "seed": 5}
        out = noisy_embedding(ids, weight, 8 * 2.0**exponent, **given, backend=kernel)
        assert same_bits(
            out, noisy_embedding(ids, weight, 8 * 2.0**exponent, **given, backend="reference")
        )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("distribution", reference.DISTRIBUTIONS)
def test_threshold_asks_the_absolute_value(backend, distribution, sign):
    """A magnitude of 2⁻⁹⁰ is noise, the next smaller float32 is none, of either sign. d = 1: alpha
    is the magnitude.
    """
    given = {
        "sign": sign,
        "distribution": distribution,
        "equal_variance": False,
        "seed": 5,
        "backend": backend,
    }
    just_below = float(np.nextafter(np.float32(2.0**-90), np.float32(0)))
    assert (neftune_noise((3, 1), 1, 2.0**-90, **given) != 0).all()
    assert not neftune_noise((3, 1), 1, just_below, **given).any()


# ---- distributions


@functools.cache
def all_draws(distribution):
    """z of all 65 536 halves, each once, in the order of u: (65536,) float32. alpha = L = d = 1:
    the magnitude is 1.
    """
    lattice = ((torch.arange(-32768, 32768) << 16) | 0x8000).float()[:, None]
    one = torch.ones(65536, dtype=torch.int64)
    return reference.scaled_draws(lattice, one, 1, 1.0, distribution, False)[:, 0]


def test_draws_are_those_of_the_oracle():
    for distribution in ("normal", "rademacher"):
        assert all_draws(distribution).tolist() == [
            float(oracle.draw(half, distribution)) for half in range(-32768, 32768)
        ]


def test_normal_table_is_everybodys():
    """float32 of scipy's quantiles; they keep 1e-12 of themselves away from every rounding
    boundary, and float64 erfinv errs by 1e-15.
    """
    exact = ndtri(0.5 + (np.arange(32768) + 0.5) / 65536)
    table = reference.normal_quantiles(torch.device("cpu")).numpy()
    assert np.array_equal(table, exact.astype(np.float32))
    for neighbour in (np.float32(np.inf), np.float32(-np.inf)):
        boundary = (table.astype(np.float64) + np.nextafter(table, neighbour)) / 2
        assert (np.abs(exact - boundary) > 1e-12 * exact).all()


def test_moments_over_all_draws():
    """Means are 0 exactly, by symmetry; rademacher's variance is 1 exactly. The normal's is the
    midpoint rule for ∫Q(p)²dp = 1.

    Q² is convex, so the rule falls short: by at most h/2 times its rise over a cell, which
    telescopes to h/2·Q(1 - h)² on one side for all cells but the last (h = 2⁻¹⁶). The last cell
    holds a tail of zφ(z) + h with z = Q(1 - h). Float32 rounding moves z² by 2⁻²³ of itself.
    """
    for distribution in ("normal", "rademacher"):
        draws = all_draws(distribution).double()
        assert torch.equal(draws, -draws.flip(0)) and math.fsum(draws.tolist()) == 0
        assert (draws[1:] >= draws[:-1]).all()
    assert (all_draws("rademacher").double() ** 2).mean() == 1
    variance = math.fsum((all_draws("normal").double() ** 2).tolist()) / 65536
    h, z = 2.0**-16, float(ndtri(1 - 2.0**-16))
    tail = z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi) + h
    short = 2 * (h / 2 * z * z + tail - h * float(ndtri(1 - h / 2)) ** 2) + 2.0**-23
    assert short < 3e-4
    assert 1 - short <= variance < 1 + 2.0**-23


@pytest.mark.parametrize("equal_variance", [True, False])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_strength_of_the_noise(backend, distribution, equal_variance):
    """Mean square over n = 2²⁰ draws: alpha²/(L·d) times 1/3 or 1. Var z² is 2 (normal) or 0.

    Six standard deviations, and for the normal's table the 3e-4 of test_moments_over_all_draws;
    else the magnitude's rounding, squared.
    """
    noise = neftune_noise(
        (16, 64),
        1024,
        5.0,
        distribution=distribution,
        equal_variance=equal_variance,
        seed=4,
        backend=backend,
    )
    strength = float((noise.double() ** 2).mean()) * 64 * 1024 / 25 * (3 if equal_variance else 1)
    spread = 6 * math.sqrt(2 / 2**20) + 3e-4 if distribution == "normal" else 2.0**-22
    assert abs(strength - 1) <= spread


def test_equal_variance_is_the_uniforms():
    """The three distributions' equal strengths, against the uniform's exact (1 - 2⁻³²)/3; 0.58 in
    place of 1/√3 would be off by 4e-3.
    """
    for distribution in ("normal", "rademacher"):
        one = torch.ones(1, dtype=torch.int64)
        scaled = reference.scaled_draws(torch.tensor([[32768.0]]), one, 1, 1.0, distribution, True)
        unit = reference.scaled_draws(torch.tensor([[32768.0]]), one, 1, 1.0, distribution, False)
        assert float(scaled / unit) ** 2 == pytest.approx(
            1 / 3, rel=4 * 2.0**-23
        )  # two roundings of 2⁻²⁴ each, squared


def test_uniform_ignores_equal_variance(backend):
    given = {"seed": 1, "backend": backend}
    assert same_bits(
        neftune_noise(SHAPE, 8, 5.0, equal_variance=False, **given),
        neftune_noise(SHAPE, 8, 5.0, **given),
    )


# ---- refusals


@pytest.mark.parametrize(
    "sign", [0, 2, -2, 1.0, -1.0, True, False, None, "1", "-1", torch.tensor(1.0), 10**30], ids=repr
)
@pytest.mark.parametrize("noise_alpha", [5.0, 0])
def test_bad_sign(sign, noise_alpha):
    module = NEFTuneEmbedding(5, 4, noise_alpha=noise_alpha)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    for call in (
        lambda: noisy_embedding(ids, torch.zeros(5, 4), noise_alpha, sign=sign),
        lambda: add_noise(torch.zeros(1, 2, 4), noise_alpha, sign=sign),
        lambda: neftune_noise((1, 2), 4, noise_alpha, sign=sign),
        lambda: module(ids, sign=sign),
        lambda: module.eval()(ids, sign=sign),
    ):
        with pytest.raises(ValueError, match="sign must be the integer 1 or -1, got "):
            call()


def test_integers_of_other_types_are_signs():
    assert (
        check_variant("uniform", True, np.int64(-1))
        == check_variant("uniform", True, torch.tensor(-1))
        == Variant(sign=-1)
    )
    assert (
        check_variant("uniform", False, np.int8(1)) is check_variant("uniform", True, 1) is UNIFORM
    )


@pytest.mark.parametrize(
    "distribution", ["gaussian", "Normal", "", None, 1, b"normal", ["normal"]], ids=repr
)
@pytest.mark.parametrize("noise_alpha", [5.0, None])
def test_bad_distribution(distribution, noise_alpha):
    for call in (
        lambda: noisy_embedding(
            torch.zeros(2).long(), torch.zeros(5, 4), noise_alpha, distribution=distribution
        ),
        lambda: add_noise(torch.zeros(2, 4), noise_alpha, distribution=distribution),
        lambda: neftune_noise((2,), 4, noise_alpha, distribution=distribution),
        lambda: NEFTuneEmbedding(5, 4, noise_alpha=noise_alpha, distribution=distribution),
        lambda: NEFTuneEmbedding.from_pretrained(
            torch.zeros(5, 4), noise_alpha=noise_alpha, distribution=distribution
        ),
    ):
        with pytest.raises(
            ValueError, match="distribution must be one of 'uniform', 'normal', 'rademacher', got "
        ):
            call()


def test_bad_equal_variance():
    for value in (1, None, "yes"):
        with pytest.raises(TypeError, match="equal_variance must be a bool, got "):
            noisy_embedding(torch.zeros(2).long(), torch.zeros(5, 4), 5.0, equal_variance=value)


BAD_MASKS = [
    (
        torch.ones(4, 12),
        ValueError,
        r"noise_mask must have the tokens' shape \(4, 13\), got \(4, 12\)",
    ),
    (
        torch.ones(1, 13),
        ValueError,
        r"noise_mask must have the tokens' shape \(4, 13\), got \(1, 13\)",
    ),
    (
        torch.ones(SHAPE, dtype=torch.complex64),
        TypeError,
        "noise_mask must be bool, integer or float, got torch.complex64",
    ),
    (torch.ones(SHAPE, device="meta"), ValueError, "noise_mask is on meta, the tokens are on cpu"),
    ([[1] * 13] * 4, TypeError, "noise_mask must be a tensor, got list"),
]


@pytest.mark.parametrize("noise_alpha", [5.0, 0])
@pytest.mark.parametrize("mask, error, message", BAD_MASKS)
def test_bad_noise_mask(mask, error, message, noise_alpha):
    ids, module = (
        torch.zeros(SHAPE, dtype=torch.int64),
        NEFTuneEmbedding(5, 4, noise_alpha=noise_alpha),
    )
    for call in (
        lambda: noisy_embedding(ids, torch.zeros(5, 4), noise_alpha, noise_mask=mask),
        lambda: add_noise(torch.zeros(*SHAPE, 4), noise_alpha, noise_mask=mask),
        lambda: neftune_noise(SHAPE, 4, noise_alpha, noise_mask=mask, device="cpu"),
        lambda: module(ids, noise_mask=mask),
        lambda: module.eval()(ids, noise_mask=mask),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("value", [-1.0, math.nan, -math.inf, 0.5, math.inf])
def test_bad_noise_mask_values(backend, value):
    mask = torch.ones(SHAPE)
    mask[2, 3] = value
    kind = "values that are no whole numbers" if value > 0 else "negative or NaN values"
    message = (
        f"noise_mask has {kind}, such as {value:g}: a token gets noise "
        "where it is not 0, none where it is 0$"
    )
    for layout in (
        {},
        {"lengths": torch.tensor([13, 1, 5, 2])},
        {"cu_seqlens": torch.tensor([0, 13, 52])},
    ):
        with pytest.raises(ValueError, match=message):
            neftune_noise(SHAPE, 4, 5.0, noise_mask=mask, **layout, backend=backend)


@EACH_VARIANT
def test_values_are_checked_under_a_noise_mask(backend, variant):
    """What the kernels themselves would refuse is refused where the mask's own operator reads it
    first.
    """
    given = {"noise_mask": some_tokens(), "backend": backend, **variant}
    with pytest.raises(ValueError, match="lengths must not be negative, got -1"):
        neftune_noise(SHAPE, 4, 5.0, lengths=torch.tensor([3, -1, 4, 4]), **given)
    with pytest.raises(
        ValueError, match="cu_seqlens must run from 0 to the number of tokens 52, got 0 to 51"
    ):
        neftune_noise(SHAPE, 4, 5.0, cu_seqlens=torch.tensor([0, 51]), **given)
    with pytest.raises(IndexError, match=r"input_ids must lie in \[0, num_embeddings = 5\), got 7"):
        noisy_embedding(torch.full(SHAPE, 7), torch.zeros(5, 4), 5.0, **given)


# ---- seeds, gradients, compilers


@EACH_VARIANT
def test_one_draw_per_call(variant):
    ids, weight = make_batch("full").input_ids, weight_of(torch.float32)
    noisy_embedding(ids, weight, 5.0, seed=1, noise_mask=some_tokens(), **variant)
    torch.manual_seed(3)
    first = noisy_embedding(ids, weight, 5.0, **variant)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    seed = torch.empty((), dtype=torch.int64).random_(-(2**63), None)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(noisy_embedding(ids, weight, 5.0, seed=seed, **variant), first)
    assert torch.equal(torch.get_rng_state(), state)


@EACH_VARIANT
@pytest.mark.parametrize("embed_scale", [1.0, 4.5])
@pytest.mark.parametrize("rows", [4, 300])
def test_gradients_are_those_of_a_lookup(backend, rows, embed_scale, variant):
    """In place on small outputs, through the Function on large ones (IN_PLACE_LIMIT); -0.0
    gradients keep their sign.
    """
    ids = torch.randint(11, (rows, 13), generator=torch.Generator().manual_seed(2))
    grad = torch.randn(rows, 13, WIDTH, generator=torch.Generator().manual_seed(3))
    grad[0] = -0.0
    for dtype in FLOAT_DTYPES:
        weight = weight_of(dtype).requires_grad_()
        given = {"noise_mask": some_tokens((rows, 13)), "seed": 2, "backend": backend, **variant}
        noisy_embedding(ids, weight, 5.0, padding_idx=3, embed_scale=embed_scale, **given).backward(
            grad.to(dtype)
        )
        truth = oracle.embedding_gradient(
            grad.to(dtype).double().flatten(0, 1).numpy(),
            ids.flatten().tolist(),
            len(weight),
            str(dtype).removeprefix("torch."),
            3,
            embed_scale,
        )
        assert np.array_equal(weight.grad.double().numpy(), truth)
        embeds = torch.ones(rows, 13, WIDTH, dtype=dtype, requires_grad=True)
        add_noise(embeds, 5.0, **given).backward(grad.to(dtype))
        assert same_bits(embeds.grad, grad.to(dtype))


@EACH_VARIANT
@pytest.mark.parametrize("layout", ["nothing", "lengths", "cu_seqlens", "mask"])
def test_compiled_equals_eager(layout, variant):
    given = {
        "nothing": {},
        "lengths": {"lengths": torch.tensor([13, 0, 5, 40])},
        "cu_seqlens": {"cu_seqlens": torch.tensor([0, 7, 7, 52])},
        "mask": {"attention_mask": make_batch("holes").attention_mask},
    }[layout]
    ids, mask, seed = make_batch("full").input_ids, some_tokens(), torch.tensor(7)

    def step(ids, weight, mask, seed, given):
        out = noisy_embedding(
            ids,
            weight,
            5.0,
            padding_idx=2,
            embed_scale=1.5,
            noise_mask=mask,
            seed=seed,
            **given,
            **variant,
        )
        return out + neftune_noise(SHAPE, WIDTH, 5.0, seed=seed, **given, **variant)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    eager_weight, weight = (weight_of(torch.float32).requires_grad_() for _ in range(2))
    eager, out = (
        step(ids, eager_weight, mask, seed, given),
        compiled(ids, weight, mask, seed, given),
    )
    assert same_bits(out, eager)
    grad = torch.randint(-8, 9, out.shape).float()  # whose sums are exact in any order
    for result in (eager, out):
        result.backward(grad)
    assert same_bits(weight.grad, eager_weight.grad) and weight.grad.any()


@EACH_VARIANT
def test_compiled_module_equals_eager(variant):
    ids, mask, seed = make_batch("full").input_ids, some_tokens(), torch.tensor(7)
    kind = {name: value for name, value in variant.items() if name != "sign"}
    module = NEFTuneEmbedding.from_pretrained(weight_of(torch.float32), freeze=False, **kind)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for sign in (1, -1, 1):
        assert same_bits(
            compiled(ids, noise_mask=mask, seed=seed, sign=sign),
            module(ids, noise_mask=mask, seed=seed, sign=sign),
        )


@EACH_VARIANT
def test_functional_transforms(variant):
    ids, weight, mask = make_batch("full").input_ids, weight_of(torch.float32), some_tokens()

    def loss(weight):
        return noisy_embedding(ids, weight, 5.0, seed=3, noise_mask=mask, **variant).square().sum()

    leaf = weight.clone().requires_grad_()
    (again,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)  # torch's own, as there
    assert same_bits(torch.func.grad(loss)(weight), again.detach())

    def embed(weight):
        return noisy_embedding(ids, weight, 5.0, seed=3, noise_mask=mask, **variant)

    both = torch.func.vmap(embed)(torch.stack((weight, 2 * weight)))
    assert same_bits(both[0], embed(weight)) and same_bits(both[1], embed(2 * weight))


@pytest.mark.parametrize("family", ["", "reference_"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(family, requires_grad):
    embeds = torch.randn(*SHAPE, WIDTH, requires_grad=requires_grad)
    alpha, seed, fields = (
        alpha_tensor(5.0),
        torch.tensor(-3),
        (None, None, torch.tensor([13, 0, 5, 40]), None, None),
    )
    for distribution in ("normal", "rademacher"):
        args = (embeds, seed, alpha, *fields, 3, 2**32 - 1, 7, distribution, False)
        torch.library.opcheck(getattr(OPS, f"{family}add_variant_noise").default, args)
    torch.library.opcheck(OPS.noisy_documents.default, (some_tokens(), *fields, 3))
    bounds = (None, None, None, torch.tensor([0, 52]), None)
    torch.library.opcheck(OPS.noisy_documents.default, (some_tokens(), *bounds, 3))


# ---- the module and the inner entry


@EACH_VARIANT
@pytest.mark.parametrize(
    "settings",
    [{}, {"padding_idx": 3}, {"max_norm": 100.0}, {"sparse": True}, {"embed_scale": 2.5}],
    ids=str,
)
def test_module_is_the_function(settings, variant):
    ids, mask = make_batch("full").input_ids, some_tokens()
    kind = {name: value for name, value in variant.items() if name != "sign"}
    module = NEFTuneEmbedding(11, WIDTH, noise_alpha=5.0, **kind, **settings)
    out = module(ids, noise_mask=mask, sign=variant.get("sign", 1), seed=4)
    names = ("padding_idx", "embed_scale")
    given = {name: settings[name] for name in names if name in settings}
    assert same_bits(
        out.detach(),
        noisy_embedding(
            ids, module.weight.detach(), 5.0, **given, noise_mask=mask, seed=4, **variant
        ),
    )
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert same_bits(twin(ids, noise_mask=mask, sign=variant.get("sign", 1), seed=4), out)
    plain = torch.nn.Embedding(11, WIDTH, _weight=module.weight.detach())
    converted = NEFTuneEmbedding.from_embedding(plain, **kind)
    assert (converted.distribution, converted.equal_variance) == (
        module.distribution,
        module.equal_variance,
    )


def test_module_shows_its_distribution():
    assert (
        repr(NEFTuneEmbedding(5, 4, distribution="normal"))
        == "NEFTuneEmbedding(5, 4, noise_alpha=5.0, distribution='normal')"
    )
    unit = NEFTuneEmbedding(5, 4, distribution="rademacher", equal_variance=False)
    assert (
        repr(unit) == "NEFTuneEmbedding(5, 4, noise_alpha=5.0, distribution='rademacher', "
        "equal_variance=False)"
    )
    assert repr(NEFTuneEmbedding(5, 4)) == "NEFTuneEmbedding(5, 4, noise_alpha=5.0)"


@EACH_VARIANT
def test_inner_entry(backend, variant):
    embeds, mask, alpha = torch.randn(*SHAPE, WIDTH), some_tokens(), alpha_tensor(5.0)
    chosen = check_variant(
        variant.get("distribution", "uniform"),
        variant.get("equal_variance", True),
        variant.get("sign", 1),
    )
    noise = make_noise(alpha, 3, variant=chosen, backend=backend)
    out = embeds_with_noise(embeds, Samples(noise_mask=mask), noise)
    assert same_bits(out, add_noise(embeds, 5.0, noise_mask=mask, seed=3, **variant))
    assert same_bits(
        embeds_with_noise(embeds, UNSAID, make_noise(alpha, 3, backend=backend)),
        add_noise(embeds, 5.0, seed=3),
    )
