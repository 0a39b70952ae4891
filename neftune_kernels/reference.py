"""The NEFTune noise in plain PyTorch: the arbiter of every backend. Slow, exact, short.

NEFTune (Jain et al. 2023, arXiv 2310.05914, Algorithm 1) adds to every real token of a sample of L
real tokens, hidden size d,

    noise = alpha / √(L·d) · u,    u uniform on (-1, 1), one draw per column.

Here u is a pure function of (seed, replica, sample, position, column): Philox-4x32 with 7 rounds
(Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"; 7 is their Crush-resistant count), so a token's noise does not depend
    on padding, packing, batching, sharding
or backend. One block serves 8 columns:

    key     = (seed mod 2³², seed ≫ 32)
    counter = (column // 8, position, sample, replica)
    word k of block j → columns 8j+2k (low 16 bits) and 8j+2k+1 (high 16 bits)
    x       = float32(int32((half << 16) | 0x8000))          exact: (int16(half) + ½)·65536
    step    = float32(alpha / √(L·d)) · 2⁻³¹                  the quotient in float64, rounded once
    noise   = x · step                                        one float32 rounding
    e       = cast(W(weight)·W(scale))                        W = float32, float64 for float64
    out     = cast(W(e) + W(noise))                           never an FMA

u takes 65 536 equally likely values, symmetric about 0, with mean 0 and variance (1 - 2⁻³²)/3.

Other distributions make their draw z from the same u = x·2⁻³¹, so they share its counters:

    rademacher  z = sign(u)
    normal      z = float32(√2·erfinv(u))           the quantile at the middle of u's 65 536th part
    magnitude   = float32(alpha·c / √(L·d))         in float64, rounded once; c = 1, or 1/√3,
                                                    which gives z the variance of u
    noise       = z · magnitude                     one float32 rounding

A negative alpha negates the noise exactly: SymNoise (Yadav and Singh 2023, arXiv 2312.01523) and
antithetic pairs need no more.
"""

from functools import cache

import torch
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # ⌊2³²·(φ-1)⌋, ⌊2³²·(√3-1)⌋
UINT32 = 0xFFFFFFFF
SMALLEST_MAGNITUDE = 2.0**-90  # below it noise could be subnormal, so there is none
DISTRIBUTIONS = ("uniform", "normal", "rademacher")
UNIFORM_DEVIATION = 0.5773502691896257645  # 1/√3 to the nearest float64
NOT_FOR_COMPILERS = (
    "neftune_kernels.reference is not for compilers: call neftune_kernels.neftune_noise, whose "
    'operators stay whole, with backend="reference" if need be'
)


def philox4x32(
    counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = 7
) -> tuple[Tensor, ...]:
    """Philox-4x32: four uint32 counter words and two uint32 key words to four uint32 words, all
    held in int64 and broadcast together.

    Raises:
        RuntimeError: a compiler traces it. Products that wrap are signed overflow in the C++ that
            Inductor would make of them, and wrong for many seeds.
    """
    if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        raise RuntimeError(NOT_FOR_COMPILERS)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = (
            c0 * PHILOX_MULTIPLIERS[0],
            c2 * PHILOX_MULTIPLIERS[1],
        )  # wrap mod 2⁶⁴: every bit below is right
        c0, c1, c2, c3 = (
            ((product1 >> 32) & UINT32) ^ c1 ^ k0,
            product1 & UINT32,
            ((product0 >> 32) & UINT32) ^ c3 ^ k1,
            product0 & UINT32,
        )
        k0, k1 = (k0 + PHILOX_KEY_STEPS[0]) & UINT32, (k1 + PHILOX_KEY_STEPS[1]) & UINT32
    return c0, c1, c2, c3


def noise_magnitude(
    length: Tensor, embedding_dim: int, noise_alpha: float | Tensor, factor: float = 1.0
) -> Tensor:
    """float32(alpha·factor / √(L·d)) for lengths L of any shape; 0 where L is 0 or its absolute
    value is below 2⁻⁹⁰.
    """
    alpha = torch.as_tensor(
        noise_alpha, dtype=torch.float64
    )  # stays on the CPU, whose 0-dim tensors go with any device's
    magnitude = (
        alpha * factor / (length.clamp(min=1).double() * float(embedding_dim)).sqrt()
    ).float()
    no_noise = (length <= 0) | (magnitude.abs() < SMALLEST_MAGNITUDE)
    return torch.where(no_noise, 0.0, magnitude)


def uniform_lattice(
    seed: Tensor, replica: int, sample: Tensor, position: Tensor, embedding_dim: int
) -> Tensor:
    """x for every column: (N,) samples and positions, seed a 0-dim int64 tensor → (N, d) float32
    odd multiples of 2¹⁵ in (-2³¹, 2³¹).
    """
    block = torch.arange((embedding_dim + 7) // 8, device=sample.device)  # (d/8,)
    zero = torch.zeros_like(block)
    counter = (
        block,
        position[:, None] & UINT32,
        sample[:, None] & UINT32,
        zero + (replica & UINT32),
    )
    words = torch.stack(
        philox4x32(counter, (seed & UINT32, (seed >> 32) & UINT32)), dim=-1
    )  # (N, d/8, 4)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)[
        :, :embedding_dim
    ]  # (N, d)
    return ((halves << 16) | 0x8000).int().float()


def noise_step(length: Tensor, embedding_dim: int, noise_alpha: float | Tensor) -> Tensor:
    """magnitude · 2⁻³¹: what a lattice value x is multiplied with."""
    return noise_magnitude(length, embedding_dim, noise_alpha) * 2.0**-31


@cache
def normal_quantiles(device: torch.device) -> Tensor:
    """(32768,) float32 on the device: √2·erfinv((k + ½)/32768), the standard normal's quantiles at
    the middles of 65536ths above ½.

    No value comes nearer to a float32 rounding boundary than 10⁻¹² of itself: any float64 erfinv
    gives these bits.
    """
    u = (torch.arange(32768, dtype=torch.float64, device="cpu") + 0.5) / 32768
    return (torch.erfinv(u) * 2**0.5).float().to(device)


def scaled_draws(
    lattice: Tensor,
    length: Tensor,
    embedding_dim: int,
    noise_alpha: float | Tensor,
    distribution: str,
    equal_variance: bool,
) -> Tensor:
    """z · magnitude for the (N, d) lattice values x of :func:`uniform_lattice`: normal or
    rademacher noise, 0 where L is 0.
    """
    factor = UNIFORM_DEVIATION if equal_variance else 1.0
    magnitude = noise_magnitude(length, embedding_dim, noise_alpha, factor)[:, None]
    draws = lattice.sign()
    if distribution == "normal":
        draws = (
            draws * normal_quantiles(lattice.device)[(lattice.abs() * 2.0**-16).long()]
        )  # |x|·2⁻¹⁶ = k + ½
    return torch.where(magnitude != 0, draws * magnitude, 0.0)


def neftune_noise(
    places: tuple[Tensor, Tensor, Tensor],
    embedding_dim: int,
    noise_alpha: float | Tensor,
    seed: Tensor,
    replica: int = 0,
    distribution: str = "uniform",
    equal_variance: bool = True,
) -> Tensor:
    """The noise itself.

    Args:
        places: sample, position, length of each token, (N,) int64. Sample and position count mod
            2³²; length is the sample's number of real tokens, 0 for padding, which gets zeros.
        noise_alpha: negative: exactly the negated noise of its absolute value.
        seed: 0-dim int64 tensor on their device, any 64-bit pattern.
        distribution: "uniform", "normal" or "rademacher"; equal_variance is for the latter two.

    Returns:
        (N, embedding_dim) float32.
    """
    sample, position, length = places
    lattice = uniform_lattice(seed, replica, sample, position, embedding_dim)
    if distribution != "uniform":
        return scaled_draws(
            lattice, length, embedding_dim, noise_alpha, distribution, equal_variance
        )
    step = noise_step(length, embedding_dim, noise_alpha)[:, None]
    return torch.where(step != 0, lattice * step, 0.0)


def add_noise(embeddings: Tensor, noise: Tensor) -> Tensor:
    """cast(W(e) + W(noise)) for (N, d) embeddings; where there is no noise the bits stay, a -0.0
    included (x·step itself is never 0).
    """
    wide = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    noisy = (embeddings.to(wide) + noise.to(wide)).to(embeddings.dtype)
    return torch.where(noise != 0, noisy, embeddings)


def embed(input_ids: Tensor, weight: Tensor, embed_scale: float = 1.0) -> Tensor:
    """e: rows of the (V, d) weight for (N,) ids, times embed_scale in W and rounded back to the
    weight's dtype.
    """
    rows = weight[input_ids]
    if embed_scale == 1:
        return rows
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return (rows.to(wide) * torch.tensor(embed_scale, dtype=wide, device=weight.device)).to(
        weight.dtype
    )


def rounded_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values in the dtype. Tensor.to rounds them to float32 first, and then again; a
    float32 with an odd last bit where that first rounding is not exact makes the second one right.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    nearest = values.float()
    away, short = nearest.abs() > values.abs(), nearest.abs() < values.abs()
    odd = (nearest.view(torch.int32) - away.int()) | (away | short).int()
    return odd.view(torch.float32).to(dtype)


def embedding_gradient(
    grad: Tensor, input_ids: Tensor, embed_scale: float = 1.0, scale_grad_by_freq: bool = False
) -> tuple[Tensor, Tensor]:
    """The weight's gradient, (U, d), and the (U,) ids of its rows: for each id the float64 sum of
    its rows of grad (N, d) in the order of their tokens, times embed_scale, divided by their number
    where scale_grad_by_freq, rounded once.
    """
    ids, group, count = input_ids.unique(return_inverse=True, return_counts=True)
    sums = grad.new_zeros((ids.numel(), grad.shape[1]), dtype=torch.float64)
    sums = sums.index_add_(0, group, grad.double()) * embed_scale
    if scale_grad_by_freq:
        sums = sums / count[:, None]
    return rounded_once(sums, grad.dtype), ids


SUM_CHUNK = 32  # tokens, and chunks, that are added one after the other


def chunked_gradient(
    grad: Tensor,
    input_ids: Tensor,
    num_embeddings: int,
    padding_idx: int = -1,
    embed_scale: float = 1.0,
    scale_grad_by_freq: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same as on a GPU, for grad (N, d) and ids (N,) on the CPU: tokens sorted by id, ids out
    of range first or last; of each id a sum in W for each 32 places that it has tokens in, of these
    one for each 1024 places, and of these one. Every sum starts at 0 and goes by place.
    """
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    ids, order = input_ids.long().clamp(-1, num_embeddings).sort(stable=True)
    occurring, counts = ids.unique_consecutive(return_counts=True)
    sums, place = grad[order].to(wide), torch.arange(ids.numel())
    for size in (SUM_CHUNK, SUM_CHUNK**2, ids.numel() + 1):
        parts, part = torch.stack((ids, place // size)).unique_consecutive(
            dim=1, return_inverse=True
        )
        added = sums.new_zeros((parts.shape[1], grad.shape[1]))
        ids, place, sums = parts[0], parts[1] * size, added.index_add_(0, part, sums)
    sums = sums * embed_scale
    if scale_grad_by_freq:
        sums = sums / counts[:, None].to(wide)
    kept = (occurring >= 0) & (occurring < num_embeddings) & (occurring != padding_idx)
    return sums[kept].to(grad.dtype), occurring[kept]
