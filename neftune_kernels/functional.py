"""noisy_embedding, add_noise and neftune_noise: checks, layout, seed, choice of backend; the
arithmetic is in the operators.
"""

import math
import operator as operators
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .layout import ROWS, Layout, by_document, check_layout
from .reference import DISTRIBUTIONS

IN_PLACE_LIMIT = (
    1 << 16
    # elements: below it F.embedding and noise in its cache-warm output cost less than an
    # autograd.Function
)


class Offsets(NamedTuple):
    """The words of the counter that the call itself decides, each in [0, 2³²)."""

    replica: int = 0
    sample_offset: int = 0
    position_offset: int = 0


NO_OFFSETS = Offsets()


class Variant(NamedTuple):
    """What noise is added, made by :func:`check_variant`."""

    distribution: str = "uniform"
    equal_variance: bool = True
    sign: int = 1


UNIFORM = Variant()


def check_alpha(noise_alpha: float | None) -> float:
    """None means 0; else a finite number >= 0."""
    if noise_alpha is None:
        return 0.0
    if not isinstance(noise_alpha, (float, torch.SymFloat)):
        if isinstance(noise_alpha, (str, bytes, bool)) or not hasattr(noise_alpha, "__float__"):
            raise TypeError(f"noise_alpha must be a number or None, got {noise_alpha!r}")
        try:
            noise_alpha = float(noise_alpha)
        except OverflowError:
            raise ValueError(
                "noise_alpha must be finite and >= 0, got an integer beyond float64"
            ) from None
    if not 0.0 <= noise_alpha < math.inf:
        raise ValueError(f"noise_alpha must be finite and >= 0, got {noise_alpha!r}")
    return noise_alpha


def refuse_unknown(function: str, unknown: dict[str, Any]) -> None:
    """The TypeError of a keyword that does not exist, with the new name of the one that did."""
    if "stream" in unknown:
        raise TypeError(
            f"{function}() takes no stream=: the number of a data-parallel replica is replica="
        )
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {next(iter(unknown))!r}")


def check_scale(embed_scale: float) -> float:
    if not isinstance(
        embed_scale, (float, torch.SymFloat)
    ):  # a float argument is symbolic under torch.compile(dynamic=True)
        if isinstance(embed_scale, (str, bytes, bool)) or not hasattr(embed_scale, "__float__"):
            raise TypeError(f"embed_scale must be a number, got {embed_scale!r}")
        embed_scale = float(embed_scale)
    if not -math.inf < embed_scale < math.inf:
        raise ValueError(f"embed_scale must be finite, got {embed_scale!r}")
    return embed_scale


def check_integer(name: str, value: Any) -> int:
    """An int, a SymInt, or what has __index__ (numpy integers, 0-dim integer tensors); a bool is a
    mistake.
    """
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return operators.index(value)


def check_word(name: str, value: int) -> int:
    """replica, sample_offset and position_offset are words of the Philox counter."""
    value = check_integer(name, value)
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} must lie in [0, 2**32), got {value}")
    return value


def check_offsets(replica: int, sample_offset: int, position_offset: int) -> Offsets:
    given = (replica, sample_offset, position_offset)
    if given == NO_OFFSETS and type(replica) is type(sample_offset) is type(position_offset) is int:
        return NO_OFFSETS
    return Offsets(
        *(check_word(name, value) for name, value in zip(Offsets._fields, given, strict=True))
    )


def check_variant(distribution: str, equal_variance: bool, sign: int) -> Variant:
    """UNIFORM itself wherever the variant is what the fused operators do without being asked."""
    if type(sign) is int and sign == 1 and distribution == "uniform" and equal_variance is True:
        return UNIFORM
    if not isinstance(distribution, str) or distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution must be one of {', '.join(map(repr, DISTRIBUTIONS))}, got "
            f"{distribution!r}"
        )
    if not isinstance(equal_variance, bool):
        raise TypeError(f"equal_variance must be a bool, got {equal_variance!r}")
    try:
        number = check_integer("sign", sign)
    except TypeError:
        number = 0
    if number != 1 and number != -1:
        raise ValueError(f"sign must be the integer 1 or -1, got {sign!r}")
    number = 1 if number == 1 else -1
    return (
        UNIFORM
        if distribution == "uniform" and number == 1
        else Variant(distribution, equal_variance, number)
    )


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


@lru_cache(maxsize=64)
def _cached_alpha_tensor(noise_alpha: float) -> Tensor:
    return torch.full((), noise_alpha, dtype=torch.float64, device="cpu")


def alpha_tensor(noise_alpha: float) -> Tensor:
    """The operators take alpha as a 0-dim float64 CPU tensor: torch.compile then does not
    specialise on its value.
    """
    if torch.compiler.is_compiling():
        return (
            torch.ones((), dtype=torch.float64, device="cpu") * noise_alpha
        )  # a product keeps a traced float symbolic, torch.full does not
    if torch._C._len_torch_dispatch_stack():  # a fake tensor must not stay in the cache
        return torch.full((), noise_alpha, dtype=torch.float64, device="cpu")
    return _cached_alpha_tensor(noise_alpha)


def seed_tensor(
    seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """The call's seed as a 0-dim int64 tensor on the device; one draw from the device's generator
    when nothing is given.
    """
    if seed is None:
        if torch.compiler.is_compiling() and generator is None:
            return torch.ops.neftune_kernels.draw_seed(
                torch.empty((), dtype=torch.int64, device=device)
            )
        return ops.draw_seed(device, generator)
    if generator is not None:
        raise ValueError("seed and generator may not both be given: a generator draws the seed")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise ValueError(
                f"a seed tensor must be 0-dim int64, got {seed.dtype} of shape {tuple(seed.shape)}"
            )
        return seed if seed.device == device else seed.to(device)
    value = check_integer("seed", seed)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"seed must lie in [-2**63, 2**64), got {seed}")
    return torch.full(
        (), value - 2**64 if value >= 2**63 else value, dtype=torch.int64, device=device
    )


def check_embeds(inputs_embeds: Tensor) -> None:
    if not isinstance(inputs_embeds, Tensor):
        raise TypeError(f"inputs_embeds must be a tensor, got {type(inputs_embeds).__name__}")
    if inputs_embeds.dim() == 0:
        raise ValueError("inputs_embeds must have shape (..., embedding_dim), got ()")


def check_ids(input_ids: Tensor) -> None:
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids must be int32 or int64, got {input_ids.dtype}")


class Samples(NamedTuple):
    """What a caller says of the samples its tokens belong to."""

    attention_mask: Tensor | None = None
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    position_ids: Tensor | None = None
    padded_ids: Tensor | None = None  # nothing but this: tokens equal to padding_idx are padding
    padding_idx: int = -1
    noise_mask: Tensor | None = None  # tokens that get noise; the others count all the same

    @property
    def unknown(self) -> bool:
        return (
            self.attention_mask is None
            and self.lengths is None
            and self.cu_seqlens is None
            and self.position_ids is None
            and self.padded_ids is None
            and self.noise_mask is None
        )

    @property
    def untold(self) -> bool:
        """Whether nothing says which tokens are real."""
        return self.unknown or (
            self.noise_mask is not None and self._replace(noise_mask=None).unknown
        )


NOTHING = Samples()


def make_layout(
    shape: torch.Size,
    device: torch.device,
    samples: Samples,
    backend: str,
    position_offset: int = 0,
) -> Layout:
    """Check what the caller says and put it as the operators take it, which add the offset to
    positions themselves.
    """
    if samples.unknown:
        return ROWS
    noise_mask = samples.noise_mask
    position_ids = check_layout(shape, device, *samples[:4], noise_mask)
    if noise_mask is None:
        return _told_layout(samples, position_ids, backend)
    layout = ROWS if samples.untold else _told_layout(samples, position_ids, backend)
    document = torch.ops.neftune_kernels.noisy_documents(
        noise_mask.detach(), *layout, position_offset
    )
    return by_document(layout, document, shape)


def _told_layout(samples: Samples, position_ids: Tensor | None, backend: str) -> Layout:
    """make_layout but for the noise mask; GPU kernels read any strides and mask dtype."""
    attention_mask, lengths, cu_seqlens, _, padded_ids, padding_idx, _ = samples
    if padded_ids is not None:
        return Layout(*ops.numbering("padding_layout", backend)(padded_ids, padding_idx))
    if cu_seqlens is not None:
        return Layout(cu_seqlens=cu_seqlens.contiguous())
    if lengths is not None:
        position = None if position_ids is None else position_ids.reshape(-1)
        if backend != "triton":
            lengths = lengths.long() if lengths.dtype not in (torch.int32, torch.int64) else lengths
            position = None if position is None else position.long()
        return Layout(position=position, lengths=lengths.reshape(-1))
    mask = None if attention_mask is None else attention_mask.detach()
    if backend not in ("triton", "cuda"):
        mask = None if mask is None else mask.contiguous()
        position_ids = None if position_ids is None else position_ids.long().contiguous()
    return Layout(*ops.numbering("mask_layout", backend)(mask, position_ids))


def check_unused(
    shape: torch.Size,
    tensor: Tensor,
    samples: Samples,
    seed: Any,
    generator: torch.Generator | None,
    backend: str | None,
) -> None:
    """With alpha 0 nothing is drawn or counted, but what would be refused with noise is refused all
    the same.
    """
    ops.choose_backend(backend or "reference", tensor.device, tensor.dtype, noisy=False)
    if not samples.unknown:
        check_layout(shape, tensor.device, *samples[:4], samples.noise_mask)
    if seed is not None:
        seed_tensor(seed, generator, tensor.device)


def _transformed() -> bool:
    """Inside a torch.func transform or forward-mode AD: only an autograd.Function does right, or
    says that it cannot.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


_SEED = torch.empty(
    (), dtype=torch.int64, device="cpu"
)  # empty_like of it takes half the time of torch.empty


def _embed_quickly(
    input_ids: Tensor, weight: Tensor, alpha: Tensor, seed: Tensor | None
) -> Tensor | None:
    """embed_with_noise of ids and nothing else, in eager mode on a CPU: the same bits and draw,
    with the host time halved.

    None where any of that does not hold; nothing is drawn then.
    """
    if not (
        type(input_ids) is Tensor
        and input_ids.dtype is torch.int64
        and input_ids.is_cpu
        and weight.is_cpu
        and ops.CPP_SERVES.get(weight.dtype)
        and not torch._C._len_torch_dispatch_stack()
        and not _transformed()
    ):
        return None
    needs_graph = weight.requires_grad and torch.is_grad_enabled()
    if needs_graph and input_ids.numel() * weight.shape[1] > IN_PLACE_LIMIT:
        return None
    if seed is None:
        seed = torch.empty_like(_SEED).random_(-(2**63), None)
    elif seed.dtype is not torch.int64 or seed.dim() or not seed.is_cpu:
        return None
    if needs_graph:
        embedded = _lookup(input_ids, weight, -1)
        rows = embedded.detach()  # the noise is a constant: autograd need not see it arrive
        ops.ADD_OUT["cpp"](rows, seed, alpha, out=rows)
        return embedded
    out = weight.new_empty((*input_ids.shape, weight.shape[1]))
    ops.EMBEDDING_OUT["cpp"](input_ids, weight, seed, alpha, out=out)
    return out


def embed_with_noise(
    input_ids: Tensor,
    weight: Tensor,
    alpha: Tensor,
    samples: Samples,
    padding_idx: int,
    embed_scale: float,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    offsets: Offsets,
    backend: str | None,
) -> Tensor:
    """noisy_embedding for alpha > 0. Its ways give the same bits, gradients and generator state;
    they differ in host time alone.
    """
    plain = (
        samples.unknown and padding_idx < 0 and offsets is NO_OFFSETS
    )  # the operators' defaults: host time goes by arguments
    simple = plain and embed_scale == 1 and backend is None and generator is None
    if simple and (seed is None or isinstance(seed, Tensor)) and not torch.compiler.is_compiling():
        quick = _embed_quickly(input_ids, weight, alpha, seed)
        if quick is not None:
            return quick
    check_ids(input_ids)
    device = weight.device
    if device != input_ids.device:
        raise ValueError(
            f"input_ids is on {input_ids.device}, weight on {device}: they must be on one device"
        )
    chosen = ops.choose_backend(backend, device, weight.dtype)
    layout = ROWS
    if not plain:
        layout = make_layout(
            input_ids.shape,
            device,
            real_tokens(input_ids, padding_idx, samples),
            chosen,
            offsets.position_offset,
        )
    seed = seed_tensor(seed, generator, device)
    transformed, compiling = _transformed(), torch.compiler.is_compiling()
    if not transformed and not compiling:
        noise_args = (seed, alpha) if plain else (seed, alpha, *layout, *offsets)
        if not (weight.requires_grad and torch.is_grad_enabled()):
            out = weight.new_empty((*input_ids.shape, weight.shape[1]))
            if embed_scale == 1:
                ops.EMBEDDING_OUT[chosen](input_ids, weight, *noise_args, out=out)
            else:
                ops.EMBEDDING_OUT[chosen](
                    input_ids,
                    weight,
                    seed,
                    alpha,
                    *layout,
                    *offsets,
                    padding_idx,
                    embed_scale,
                    out=out,
                )
            return out
        if (
            embed_scale == 1
            and device.type == "cpu"
            and input_ids.numel() * weight.shape[1] <= IN_PLACE_LIMIT
        ):
            embedded = _lookup(input_ids, weight, padding_idx)
            rows = embedded.detach()  # the noise is a constant: autograd need not see it arrive
            ops.ADD_OUT[chosen](rows, *noise_args, out=rows)
            return embedded
    args = (input_ids, weight, seed, alpha, *layout, *offsets, padding_idx, embed_scale)
    name = ops.operator_name("noisy_embedding", chosen)
    if transformed or (weight.requires_grad and torch.is_grad_enabled()):
        return ops.NoisyEmbedding.apply(name, *args)
    return getattr(torch.ops.neftune_kernels, name)(*args)


def embed_with_variant(
    input_ids: Tensor,
    weight: Tensor,
    alpha: Tensor,
    samples: Samples,
    padding_idx: int,
    embed_scale: float,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    offsets: Offsets,
    backend: str | None,
    variant: Variant,
) -> Tensor:
    """embed_with_noise for any variant: fused for uniform noise of either sign, else a lookup and
    then noise.
    """
    if variant.distribution == "uniform":
        alpha = alpha if variant.sign > 0 else -alpha
        return embed_with_noise(
            input_ids,
            weight,
            alpha,
            samples,
            padding_idx,
            embed_scale,
            seed,
            generator,
            offsets,
            backend,
        )
    check_ids(input_ids)
    no_seed = torch.zeros((), dtype=torch.int64, device=weight.device)
    no_noise = alpha_tensor(0.0)
    embedded = embed_with_noise(
        input_ids,
        weight,
        no_noise,
        NOTHING,
        padding_idx,
        embed_scale,
        no_seed,
        None,
        NO_OFFSETS,
        backend,
    )
    samples = real_tokens(input_ids, padding_idx, samples)
    return embeds_with_noise(embedded, alpha, samples, seed, generator, offsets, backend, variant)


def _lookup(input_ids: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
    """F.embedding, its IndexError with the value and the rule."""
    try:
        return torch.embedding(weight, input_ids, padding_idx)
    except IndexError:
        bad = input_ids[(input_ids < 0) | (input_ids >= weight.shape[0])]
        raise IndexError(
            f"input_ids must lie in [0, num_embeddings = {weight.shape[0]}), got {int(bad[0])}"
        ) from None


def real_tokens(input_ids: Tensor, padding_idx: int, samples: Samples) -> Samples:
    """Where nothing else tells padding, tokens equal to padding_idx (-1: none) are padding."""
    if padding_idx < 0 or not samples.untold:
        return samples
    return Samples(padded_ids=input_ids, padding_idx=padding_idx, noise_mask=samples.noise_mask)


def embeds_with_noise(
    inputs_embeds: Tensor,
    alpha: Tensor,
    samples: Samples,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    offsets: Offsets,
    backend: str | None,
    variant: Variant = UNIFORM,
) -> Tensor:
    """add_noise for alpha > 0, in any variant."""
    check_embeds(inputs_embeds)
    device = inputs_embeds.device
    chosen = ops.choose_backend(backend, device, inputs_embeds.dtype)
    layout = make_layout(inputs_embeds.shape[:-1], device, samples, chosen, offsets.position_offset)
    fused = variant.distribution == "uniform"
    alpha = alpha if variant.sign > 0 else -alpha
    args: tuple[Any, ...] = (
        inputs_embeds,
        seed_tensor(seed, generator, device),
        alpha,
        *layout,
        *offsets,
    )
    if not fused:
        args = (*args, variant.distribution, variant.equal_variance)
    name = ops.operator_name("add_noise" if fused else "add_variant_noise", chosen)
    if _transformed() or (inputs_embeds.requires_grad and torch.is_grad_enabled()):
        return ops.AddNoise.apply(name, *args)
    if torch.compiler.is_compiling() or not fused:
        return getattr(torch.ops.neftune_kernels, name)(*args)
    out = torch.empty_like(inputs_embeds, memory_format=torch.contiguous_format)
    ops.ADD_OUT[chosen](*args, out=out)
    return out


def noisy_embedding(
    input_ids: Tensor,
    weight: Tensor,
    noise_alpha: float | None,
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
    **unknown: NoReturn,
) -> Tensor:
    """Embedding lookup with NEFTune noise in one pass.

    out[token] = weight[id]·embed_scale + noise_alpha/√(L·d) · u[token], with u uniform on (-1, 1)
    and L the real tokens of the token's own sample. Padding gets no noise. The noise is a constant
    for autograd: gradients are those of F.embedding(...)·embed_scale, bit for bit.

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

    Returns:
        (..., T, d) in weight's dtype.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype, device or value breaks a rule
            above; the message names both.
        IndexError: an id outside [0, V), on the CPU (an accelerator gives a NaN row without a
            sync).

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
    alpha, embed_scale = check_alpha(noise_alpha), check_scale(embed_scale)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(
            f"weight must have shape (num_embeddings, embedding_dim), got {tuple(weight.shape)}"
        )
    offsets = check_offsets(replica, sample_offset, position_offset)
    padding = check_padding_idx(padding_idx, weight.shape[0])
    samples = Samples(attention_mask, lengths, cu_seqlens, position_ids, None, -1, noise_mask)
    variant = check_variant(distribution, equal_variance, sign)
    if alpha == 0:
        check_ids(input_ids)
        check_unused(input_ids.shape, weight, samples, seed, generator, backend)
        embedded = F.embedding(input_ids, weight, padding_idx)
        return embedded if embed_scale == 1 else embedded * embed_scale
    if variant is not UNIFORM:
        args = (
            input_ids,
            weight,
            alpha_tensor(alpha),
            samples,
            padding,
            embed_scale,
            seed,
            generator,
            offsets,
            backend,
        )
        return embed_with_variant(*args, variant)
    return embed_with_noise(
        input_ids,
        weight,
        alpha_tensor(alpha),
        samples,
        padding,
        embed_scale,
        seed,
        generator,
        offsets,
        backend,
    )


def add_noise(
    inputs_embeds: Tensor,
    noise_alpha: float | None,
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
    alpha, offsets = (
        check_alpha(noise_alpha),
        check_offsets(replica, sample_offset, position_offset),
    )
    samples = Samples(attention_mask, lengths, cu_seqlens, position_ids, None, -1, noise_mask)
    variant = check_variant(distribution, equal_variance, sign)
    if alpha == 0:
        check_embeds(inputs_embeds)
        check_unused(inputs_embeds.shape[:-1], inputs_embeds, samples, seed, generator, backend)
        return inputs_embeds
    return embeds_with_noise(
        inputs_embeds, alpha_tensor(alpha), samples, seed, generator, offsets, backend, variant
    )


def neftune_noise(
    input_shape: torch.Size | tuple[int, ...],
    embedding_dim: int,
    noise_alpha: float | None,
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
    if any(check_integer("input_shape", size) < 0 for size in input_shape):
        raise ValueError(f"input_shape must not be negative, got {tuple(input_shape)}")
    given: list[Any] = [attention_mask, lengths, cu_seqlens, position_ids, noise_mask, seed]
    tensors = [value for value in given if isinstance(value, Tensor)]
    if device is None and tensors:
        device = tensors[0].device
    alpha, offsets = (
        check_alpha(noise_alpha),
        check_offsets(replica, sample_offset, position_offset),
    )
    samples = Samples(attention_mask, lengths, cu_seqlens, position_ids, None, -1, noise_mask)
    variant = check_variant(distribution, equal_variance, sign)
    zeros = torch.zeros((), dtype=torch.float32, device=device).expand(
        *input_shape, embedding_dim
    )  # no memory, no traffic
    if alpha == 0:
        check_unused(zeros.shape[:-1], zeros, samples, seed, generator, backend)
        return zeros.clone(memory_format=torch.contiguous_format)
    return embeds_with_noise(
        zeros, alpha_tensor(alpha), samples, seed, generator, offsets, backend, variant
    )
