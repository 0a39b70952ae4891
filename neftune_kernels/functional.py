"""noisy_embedding, add_noise and neftune_noise: the public functions. Their arithmetic is in the
operators, the ways to call them in lookup.py.
"""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import choose_backend
from .capturable import check_alpha_tensor, check_capturable
from .gradients import Lookup, asks_for_ours, check_deterministic_grad
from .lookup import check_embeds, check_ids, embed_with_noise, embeds_with_noise
from .noise import (
    Noise,
    Offsets,
    Variant,
    check_alpha,
    check_integer,
    check_offsets,
    check_scale,
    check_variant,
    function_noise,
    make_noise,
    refuse_unknown,
    seed_tensor,
)
from .samples import Samples, said, says_nothing

Alpha = float | Tensor | None


def check_padding_idx(padding_idx: int | None, num_embeddings: int) -> int:
    """As F.embedding reads it: negative counts from the end.

    None becomes -1, the operators' word for none.
    """
    if padding_idx is None:
        return -1
    padding_idx = check_integer("padding_idx", padding_idx)
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"padding_idx must lie in [-num_embeddings, num_embeddings = {num_embeddings}), got "
            f"{padding_idx}"
        )
    return padding_idx + num_embeddings if padding_idx < 0 else padding_idx


def check_unused(
    shape: torch.Size, tensor: Tensor, samples: Samples, noise: tuple[Any, Any, str | None]
) -> None:
    """With alpha 0 nothing is drawn or counted, but what would be refused with noise is refused all
    the same. noise: (seed, generator, backend).
    """
    seed, generator, backend = noise
    choose_backend(backend or "reference", tensor.device, tensor.dtype, with_noise=False)
    if not says_nothing(samples):
        samples.check(shape, tensor.device)
    if seed is not None:
        seed_tensor(seed, generator, tensor.device)


def noise_of(
    noise_alpha: Any,
    capturable: bool,
    embeddings: Tensor,  # or their table: of their device alpha is where capturable
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    offsets: Offsets,
    variant: Variant,
    backend: str | None,
) -> Noise:
    if not capturable:
        return function_noise(noise_alpha, seed, generator, offsets, variant, backend)
    alpha = check_alpha_tensor(noise_alpha, embeddings.device)
    return make_noise(alpha, seed, generator, offsets, variant, backend, capturable)


def noisy_embedding(
    input_ids: Tensor,
    weight: Tensor,
    noise_alpha: Alpha,
    *,
    attention_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    noise_mask: Tensor | None = None,
    padding_idx: int | None = None,
    embed_scale: float = 1.0,
    sign: int = 1,
    distribution: str = "uniform",
    equal_variance: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    replica: int = 0,
    sample_offset: int = 0,
    position_offset: int = 0,
    backend: str | None = None,
    capturable: bool = False,
    deterministic_grad: bool = False,
    **unknown: NoReturn,
) -> Tensor:
    """Embedding lookup with NEFTune noise in one pass.

    out[token] = weight[id]·embed_scale + noise_alpha/√(L·d) · u[token], with u uniform on (-1, 1)
    and L the real tokens of the token's own sample. Padding gets no noise. The noise is a constant
    for autograd. The weight's gradient on the CPU is of each id the float64 sum of its tokens'
    rows, times embed_scale, rounded once; elsewhere it is F.embedding's.

    Args:
        input_ids: (..., T) int32 or int64, any strides; the last axis is one row. (N,) is one row,
            0-D one token.
        weight: (V, d) float32, bfloat16, float16, or float64 (reference backend).
        noise_alpha: the paper's alpha, finite and >= 0 (5, 10 and 15 are used there); None or 0:
            exactly F.embedding.
        attention_mask: (..., T) bool, integer or float; real where not 0, holes and left padding
            included. Values that differ number documents packed in a row.
        lengths: (...) integers, real tokens of each row, right-padded; may exceed T for a shard of
            longer samples (`position_offset`).
        cu_seqlens: (documents + 1,) int32 or int64, bounds of documents over the flattened tokens,
            from 0 to their number.
        position_ids: (..., T) or one row of it, integers, alone or with attention_mask: a document
            opens where they do not go on; with lengths: each token's place in its sample. At most
            one of attention_mask, lengths and cu_seqlens.
        noise_mask: (..., T) bool, integer or float beside any of these: tokens where it is 0 (the
            answer's, say) get no noise, but count in L and in positions; the others' noise does not
            change.
        padding_idx: as in F.embedding; where nothing else tells padding, tokens equal to it are
            padding.
        embed_scale: factor of the embedding, not of the noise (Gemma, BART); the product is rounded
            to weight's dtype first.
        sign: 1, or -1 for exactly the negated noise of the same seed (SymNoise's antithetic pairs,
            arXiv 2312.01523).
        distribution: "uniform" u as above; "normal" or "rademacher" (-1 or 1) draws from the same
            random bits. Only uniform noise is fused: the others cost a lookup and several more
            passes over the output, whatever the backend.
        equal_variance: True: these two have uniform noise's variance, noise_alpha means the same
            strength; False: unit deviation.
        seed: int in [-2⁶³, 2⁶⁴) or 0-dim int64 tensor; None: one draw from the device's default
            generator (`torch.manual_seed`) or from `generator`.
        replica: number of this data-parallel replica, in [0, 2³²): replicas with the same seed
            then draw other noise. The functions never ask for the rank.
        sample_offset, position_offset: added to the sample index and position, in [0, 2³²):
            micro-batches and shards of a batch then get the very noise of the whole.
        backend: None (best for the device), "reference", "cpp", "triton" or "cuda".
        capturable: True: noise_alpha is a 0-dim float64 tensor on weight's device and the kernel
            reads it, so that a CUDA graph replays with what `noise_alpha.fill_()` has put there,
            and `torch.compile(mode="reduce-overhead")` has the noise inside its graphs. 0 is an
            alpha like any other then: a seed is drawn. On an accelerator nobody looks at the value:
            a negative one negates the noise, NaN makes rows of NaN. The default is the host's
            alpha, which small calls are faster with.
        deterministic_grad: True: on a GPU, and in compiled code, the weight's gradient is ours, of
            float32 sums in a fixed order (docs/specification.md); False leaves torch's there.
            Eager code on the CPU it does not change: noisy lookups have ours there. Refused for a
            weight that is a DTensor, under torch.func and in a backward with create_graph=True.

    Returns:
        (..., T, d) in weight's dtype.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype, device or value breaks a rule
            above; the message names both.
        IndexError: an id outside [0, V), on the CPU (an accelerator gives a NaN row without a
            sync).
        NotImplementedError: forward-mode differentiation; with deterministic_grad also torch.func,
            and a backward with create_graph=True.

    Source: Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", arXiv
        2310.05914.

    Example:
        >>> weight = torch.zeros(10, 4)
        >>> ids = torch.tensor([[1, 2, 3], [4, 0, 0]])
        >>> out = noisy_embedding(ids, weight, 5.0, lengths=torch.tensor([3, 1]), seed=0)
        >>> bool((out[0].abs() <= 5 / (3 * 4) ** 0.5).all()), out[1, 1:].abs().max().item()
        (True, 0.0)
        >>> prompt = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> lengths = torch.tensor([3, 1])
        >>> masked = noisy_embedding(ids, weight, 5.0, lengths=lengths, noise_mask=prompt, seed=0)
        >>> torch.equal(masked[0, :2], out[0, :2]), masked[0, 2].tolist()
        (True, [0.0, 0.0, 0.0, 0.0])
        >>> options = {"distribution": "rademacher", "equal_variance": False}
        >>> signs = noisy_embedding(ids, weight, 6.0, seed=0, **options)
        >>> (signs.abs() == torch.tensor(6 / 12**0.5)).all().item()
        True
    """
    if unknown:
        refuse_unknown("noisy_embedding", unknown)
    if not check_capturable(capturable):
        noise_alpha = check_alpha(noise_alpha)
    check_deterministic_grad(deterministic_grad)
    embed_scale = check_scale(embed_scale)
    if not isinstance(weight, Tensor):
        remedy = ": pass its .weight" if isinstance(weight, torch.nn.Embedding) else ""
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}{remedy}")
    if weight.dim() != 2:
        raise ValueError(
            f"weight must have shape (num_embeddings, embedding_dim), got {tuple(weight.shape)}"
        )
    offsets = check_offsets(replica, sample_offset, position_offset)
    padding = check_padding_idx(padding_idx, weight.shape[0])
    samples = said(attention_mask, lengths, cu_seqlens, position_ids, noise_mask)
    variant = check_variant(distribution, equal_variance, sign)
    if not capturable and noise_alpha == 0:
        check_ids(input_ids)
        check_unused(input_ids.shape, weight, samples, (seed, generator, backend))
        if deterministic_grad and asks_for_ours(weight):
            embedded = Lookup.apply(input_ids, weight, padding, False, False, True)
        else:
            embedded = F.embedding(input_ids, weight, padding_idx)
        return embedded if embed_scale == 1 else embedded * embed_scale
    noise = noise_of(noise_alpha, capturable, weight, seed, generator, offsets, variant, backend)
    how = padding, embed_scale, deterministic_grad
    return embed_with_noise(input_ids, weight, samples, noise, *how)


def add_noise(
    inputs_embeds: Tensor,
    noise_alpha: Alpha,
    *,
    attention_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    noise_mask: Tensor | None = None,
    sign: int = 1,
    distribution: str = "uniform",
    equal_variance: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    replica: int = 0,
    sample_offset: int = 0,
    position_offset: int = 0,
    backend: str | None = None,
    capturable: bool = False,
    **unknown: NoReturn,
) -> Tensor:
    """NEFTune noise on embeddings built elsewhere, out of place; the very noise of
    :func:`noisy_embedding` for the same seed.

    Args:
        inputs_embeds: (..., T, d) float32, bfloat16, float16 or float64, any strides; its gradient
            passes through. (d,) is one token.
        others: as in :func:`noisy_embedding`; masks and position ids have shape (..., T). Normal
            and rademacher noise are not fused.

    Returns:
        (..., T, d) in its dtype; inputs_embeds itself when noise_alpha is None or 0.

    Raises:
        TypeError, ValueError: as :func:`noisy_embedding`.

    Example:
        >>> embeds = torch.zeros(1, 3, 4)
        >>> add_noise(embeds, 0) is embeds
        True
        >>> looked_up = noisy_embedding(torch.zeros(1, 3).long(), torch.zeros(2, 4), 5.0, seed=1)
        >>> torch.equal(add_noise(embeds, 5.0, seed=1), looked_up)
        True
        >>> normal = {"seed": 1, "distribution": "normal"}
        >>> pair = [add_noise(embeds, 5.0, sign=sign, **normal) for sign in (1, -1)]
        >>> torch.equal(pair[0], -pair[1])
        True
    """
    if unknown:
        refuse_unknown("add_noise", unknown)
    if not check_capturable(capturable):
        noise_alpha = check_alpha(noise_alpha)
    offsets = check_offsets(replica, sample_offset, position_offset)
    samples = said(attention_mask, lengths, cu_seqlens, position_ids, noise_mask)
    variant = check_variant(distribution, equal_variance, sign)
    if capturable:
        check_embeds(inputs_embeds)  # its device is asked before embeds_with_noise does so
    elif noise_alpha == 0:
        check_embeds(inputs_embeds)
        shape = inputs_embeds.shape[:-1]
        check_unused(shape, inputs_embeds, samples, (seed, generator, backend))
        return inputs_embeds
    own = seed, generator, offsets, variant, backend
    noise = noise_of(noise_alpha, capturable, inputs_embeds, *own)
    return embeds_with_noise(inputs_embeds, samples, noise)


def neftune_noise(
    input_shape: torch.Size | tuple[int, ...],
    embedding_dim: int,
    noise_alpha: Alpha,
    *,
    attention_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    noise_mask: Tensor | None = None,
    sign: int = 1,
    distribution: str = "uniform",
    equal_variance: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    replica: int = 0,
    sample_offset: int = 0,
    position_offset: int = 0,
    backend: str | None = None,
    capturable: bool = False,
    device: torch.device | str | None = None,
    **unknown: NoReturn,
) -> Tensor:
    """The noise itself, in float32; zeros on padding, and everywhere when noise_alpha is None or 0.

    Args:
        input_shape: the tokens' shape (..., T).
        embedding_dim: d, in [0, 2³¹).
        device: None: that of the layout tensors given, else the default device.
        others: as in :func:`noisy_embedding`. Normal and rademacher noise are not fused.

    Returns:
        (..., T, d) float32.

    Raises:
        TypeError, ValueError: as :func:`noisy_embedding`.

    Example:
        >>> noise = neftune_noise((2, 8), 64, 5.0, lengths=torch.tensor([8, 2]), seed=0)
        >>> bool(noise[1, :2].abs().max() <= 5 / (2 * 64) ** 0.5), noise[1, 2:].abs().max().item()
        (True, 0.0)
        >>> lengths = torch.tensor([8, 2])
        >>> torch.equal(neftune_noise((2, 8), 64, 5.0, lengths=lengths, seed=0, sign=-1), -noise)
        True
    """
    if unknown:
        refuse_unknown("neftune_noise", unknown)
    embedding_dim = check_integer("embedding_dim", embedding_dim)
    if not 0 <= embedding_dim < 2**31:
        raise ValueError(f"embedding_dim must lie in [0, 2**31), got {embedding_dim}")
    if not isinstance(input_shape, (tuple, list)):
        raise TypeError(
            f"input_shape must be the tokens' shape, a tuple of integers, got {input_shape!r}"
        )
    if any(check_integer("input_shape", size) < 0 for size in input_shape):
        raise ValueError(f"input_shape must not be negative, got {tuple(input_shape)}")
    given: list[Any] = [attention_mask, lengths, cu_seqlens, position_ids, noise_mask, seed]
    if check_capturable(capturable):
        given.append(noise_alpha)
    else:
        noise_alpha = check_alpha(noise_alpha)
    tensors = [value for value in given if isinstance(value, Tensor)]
    if device is None and tensors:
        device = tensors[0].device
    offsets = check_offsets(replica, sample_offset, position_offset)
    samples = said(attention_mask, lengths, cu_seqlens, position_ids, noise_mask)
    variant = check_variant(distribution, equal_variance, sign)
    # No memory, no traffic.
    zeros = torch.zeros((), dtype=torch.float32, device=device)
    zeros = zeros.expand(*input_shape, embedding_dim)
    if not capturable and noise_alpha == 0:
        check_unused(zeros.shape[:-1], zeros, samples, (seed, generator, backend))
        return zeros.clone(memory_format=torch.contiguous_format)
    noise = noise_of(noise_alpha, capturable, zeros, seed, generator, offsets, variant, backend)
    return embeds_with_noise(zeros, samples, noise)
