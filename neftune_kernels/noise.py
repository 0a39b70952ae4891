"""Which noise: alpha, seed, counter words, variant and backend of a call as one value.

And the checks of what callers pass for them.
"""

import math
import operator as operators
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import DISTRIBUTIONS
from .torch_internals import dispatch_modes


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


class Noise(NamedTuple):
    """All of a call but its tokens and samples; made by :func:`make_noise`."""

    alpha: Tensor  # 0-dim float64 on the CPU, unless capturable; the variant's sign is in it
    seed: int | Tensor | None = None
    generator: torch.Generator | None = None
    offsets: Offsets = NO_OFFSETS
    variant: Variant = UNIFORM
    backend: str | None = None
    plain: bool = False  # all of these but alpha and seed are the operators' defaults
    capturable: bool = False  # alpha is on the embeddings' device, where kernels read it


def make_noise(
    alpha: Tensor,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    offsets: Offsets = NO_OFFSETS,
    variant: Variant = UNIFORM,
    backend: str | None = None,
    capturable: bool = False,
) -> Noise:
    """The value; `plain` is decided here, once."""
    if variant.sign < 0:
        alpha = -alpha
    plain = (
        generator is None
        and backend is None
        and offsets == NO_OFFSETS
        and variant.distribution == "uniform"
    )
    return Noise(alpha, seed, generator, offsets, variant, backend, plain, capturable)


def check_alpha(noise_alpha: float | Tensor | None) -> float:
    """None means 0; else a finite number >= 0."""
    if noise_alpha is None:
        return 0.0
    if not isinstance(noise_alpha, (float, torch.SymFloat)):
        if isinstance(noise_alpha, (str, bytes, bool)) or not hasattr(noise_alpha, "__float__"):
            raise TypeError(f"noise_alpha must be a number or None, got {noise_alpha!r}")
        if isinstance(noise_alpha, Tensor) and noise_alpha.numel() != 1:
            raise ValueError(
                f"noise_alpha must be one number, got a tensor of shape {tuple(noise_alpha.shape)}"
            )
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
    name = next(iter(unknown), None)
    if name is not None:
        remedy = ": its name is noise_alpha" if name in ("alpha", "neftune_noise_alpha") else ""
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{remedy}")


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


def said_variant(distribution: str, equal_variance: bool, sign: int) -> Variant:
    """The same for who keeps it and changes one of them later: equal_variance stays as it was said,
    though uniform noise does not ask for it.
    """
    return Variant(
        distribution, equal_variance, check_variant(distribution, equal_variance, sign).sign
    )


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
    if dispatch_modes():  # a fake tensor must not stay in the cache
        return torch.full((), noise_alpha, dtype=torch.float64, device="cpu")
    return _cached_alpha_tensor(noise_alpha)


@lru_cache(maxsize=64)
def _cached_noise(noise_alpha: float) -> Noise:
    return make_noise(_cached_alpha_tensor(noise_alpha))


def function_noise(
    noise_alpha: float,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    offsets: Offsets,
    variant: Variant,
    backend: str | None,
) -> Noise:
    """make_noise for a number; one value serves all calls that say nothing else, for host time."""
    if (
        seed is None
        and generator is None
        and offsets is NO_OFFSETS
        and variant is UNIFORM
        and backend is None
        and not torch.compiler.is_compiling()
        and not dispatch_modes()
    ):
        return _cached_noise(noise_alpha)
    return make_noise(alpha_tensor(noise_alpha), seed, generator, offsets, variant, backend)


_ON_CPU = torch.empty((), dtype=torch.int64, device="cpu")  # empty_like of it is twice as fast


def draw_on_cpu() -> Tensor:
    """:func:`draw_seed` of the CPU's default generator, where no dispatch mode listens."""
    return torch.empty_like(_ON_CPU).random_(-(2**63), None)


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """One 64-bit draw from the device's default (or the given) generator: a 0-dim int64 tensor on
    the device.
    """
    if generator is None and device.type == "cpu" and not dispatch_modes():
        return draw_on_cpu()
    seed = torch.empty((), dtype=torch.int64, device=device)
    return seed.random_(-(2**63), None, generator=generator)


def seed_tensor(
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    device: torch.device,
    owner: str = "",
) -> Tensor:
    """The call's seed as a 0-dim int64 tensor on the device; one draw from the device's generator
    when nothing is given.

    owner: who is told of a draw in compiled code.
    """
    if seed is None:
        if torch.compiler.is_compiling() and generator is None:
            return torch.ops.neftune_kernels.draw_seed(
                torch.empty((), dtype=torch.int64, device=device), owner
            )
        return draw_seed(device, generator)
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
