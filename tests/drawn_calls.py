"""Calls of the public functions as hypothesis draws them, whole, and what the oracle says to them.

Every axis goes to its extremes: shapes from 0-D to 4-D and empty, dtypes, strides, expanded and
misaligned views, masks of every dtype, lengths, bounds with empty documents, position ids, noise
masks, scale, sign, distribution, seed, offsets, alpha, instruction set.
"""

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import oracle
import torch
from conftest import KERNELS
from hypothesis import strategies as st

WORDS = st.one_of(
    st.sampled_from([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]), st.integers(0, 2**32 - 1)
)
SEEDS = st.one_of(
    st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1, 2**32, 2**32 - 1]),
    st.integers(-(2**63), 2**64 - 1),
)
SMALLEST, LARGEST = 5e-324, 1.7e308
ALPHAS = st.one_of(
    st.sampled_from([SMALLEST, LARGEST, 2.0**-90, 3.4e38, 3.5e38, 5.0]),
    st.floats(SMALLEST, LARGEST),
    st.floats(-100, -80).map(lambda exponent: 2.0**exponent),  # about the smallest magnitude
    st.floats(-10, 30).map(lambda exponent: 2.0**exponent),
)
SCALES = st.one_of(
    st.just(1.0),
    st.sampled_from([0.0, -0.0, -1.0, 1 + 2.0**-30, 1e-300, 1e300, 3e38, 1e-45, math.sqrt(576)]),
    st.floats(-100, 100),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DISTRIBUTIONS = ("uniform", "uniform", "normal", "rademacher")
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MASKS = (torch.bool, *INTEGERS, torch.uint16, torch.uint32, torch.uint64, *FLOATS)
VIEWS = st.sampled_from(["dense", "dense", "reversed", "every second", "misaligned", "expanded"])
BACKENDS = st.sampled_from(["reference", *(name for name in KERNELS if name != "cpp")])


class Case(NamedTuple):
    shape: tuple[int, ...]
    embedding_dim: int
    dtype: torch.dtype
    input_ids: torch.Tensor
    weight: torch.Tensor
    alpha: float
    layout: dict[str, torch.Tensor]  # of the samples
    padding_idx: int | None
    noise_mask: torch.Tensor | None
    offsets: dict[str, int]  # replica, sample_offset, position_offset
    seed: int
    embed_scale: float
    variant: dict[str, Any]
    backend: str
    requires_grad: bool


def viewed(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same dtype and shape, laid out otherwise in memory; expanded: its first row's values."""
    bits = tensor.view(SIGNED[tensor.element_size()])
    if how == "reversed":
        axes = list(reversed(range(bits.dim())))
        bits = bits.permute(axes).contiguous().permute(axes)
    elif how == "every second":
        bits = torch.stack((bits, ~bits), dim=-1)[..., 0]
    elif how == "misaligned":
        bits = torch.cat((bits.new_zeros(1), bits.reshape(-1)))[1:].view(bits.shape)
    elif how == "expanded" and bits.dim() and bits.shape[0]:
        bits = bits[:1].expand(bits.shape)
    return bits.view(tensor.dtype)


def rng(draw: Any) -> random.Random:
    """Values of many tokens come from one drawn number: hypothesis takes a millisecond for each it
    draws itself, and shrinks shapes all the same.
    """
    return random.Random(draw(st.integers(0, 2**20)))


def tensor_of(values: list[Any], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).reshape(shape)


@st.composite
def masks(draw: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Integral values, the dtype's largest among them; a -0.0 is padding."""
    dtype = draw(st.sampled_from(MASKS))
    if dtype is torch.bool:
        numbers = [0, 1]
    elif dtype.is_floating_point:
        numbers = [0.0, -0.0, 1.0, 1.0, 2.0, 3.0, 2.0 ** round(-math.log2(torch.finfo(dtype).eps))]
    else:
        numbers = [0, 1, 1, 2, 3, torch.iinfo(dtype).max]
    values = rng(draw).choices(numbers, k=math.prod(shape))
    return viewed(tensor_of(values, shape, dtype), draw(VIEWS))


@st.composite
def positions(draw: Any, shape: tuple[int, ...], widest: int) -> torch.Tensor:
    """Runs that go on, stand, jump and restart."""
    dtype = draw(st.sampled_from(INTEGERS))
    limits = torch.iinfo(dtype)
    low, high = max(limits.min, -widest), min(limits.max, widest)
    chance, values = rng(draw), [0]
    for _ in range(math.prod(shape)):
        places = [chance.randint(0, 9), low, high, chance.randint(low, high)]
        jump = chance.choice([1, 1, 1, 1, 0, 2, 3, -1, 2**32 + 1, None, None])
        following = chance.choice(places) if jump is None else values[-1] + jump
        values.append(following if low <= following <= high else 0)
    return viewed(tensor_of(values[1:], shape, dtype), draw(VIEWS))


@st.composite
def layouts(draw: Any, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """What is said of the samples; {} for nothing."""
    kinds = ["nothing", "mask", "positions", "mask and positions", "lengths"]
    kinds += ["lengths and positions", "cu_seqlens"]
    kind, tokens = draw(st.sampled_from(kinds)), math.prod(shape)
    said = {}
    if "mask" in kind:
        said["attention_mask"] = draw(masks(shape))
    if "positions" in kind:
        one_row = len(shape) > 1 and draw(st.booleans())
        of = (1,) * (len(shape) - 1) + shape[-1:] if one_row else shape
        said["position_ids"] = draw(positions(of, 2**62))
    if "lengths" in kind:
        dtype = draw(st.sampled_from(INTEGERS))
        most = min(torch.iinfo(dtype).max, 2**40)
        some = [*range(13), most, min(2**32 + 3, most)]
        lengths = rng(draw).choices(some, k=math.prod(shape[:-1]))
        said["lengths"] = viewed(tensor_of(lengths, shape[:-1], dtype), draw(VIEWS))
    if kind == "cu_seqlens":
        inner = draw(st.lists(st.integers(0, tokens), max_size=5))
        least = [] if tokens == 0 and draw(st.booleans()) else [tokens]
        dtype = draw(st.sampled_from([torch.int32, torch.int64]))
        bounds = torch.tensor([0, *sorted(inner), *least], dtype=dtype)
        how = draw(st.sampled_from(["dense", "every second", "misaligned"]))
        said["cu_seqlens"] = viewed(bounds, how)
    return said


@st.composite
def weights(draw: Any, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    exponent = draw(st.sampled_from([0, 0, -20, 10, -130]))
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=generator) * 2.0**exponent
    weight = weight.to(dtype)
    if draw(st.booleans()) and weight.numel():
        info = torch.finfo(dtype)
        special = [0.0, -0.0, math.inf, -math.inf, math.nan, info.max, -info.max, info.tiny]
        special += [info.smallest_normal * info.eps, -info.smallest_normal * info.eps]
        places = torch.randint(weight.numel(), (weight.numel() // 2,), generator=generator)
        chosen = torch.randint(len(special), places.shape, generator=generator)
        weight.view(-1)[places] = torch.tensor(special, dtype=torch.float64)[chosen].to(dtype)
    return viewed(weight, draw(VIEWS))


@st.composite
def cases(
    draw: Any,
    dtypes: Sequence[torch.dtype] = DTYPES,
    distributions: Sequence[str] = DISTRIBUTIONS,
    alphas: st.SearchStrategy[float] = ALPHAS,
) -> Case:
    """Of what a backend serves: to draw all and leave most out fails hypothesis's health check."""
    leading = draw(st.lists(st.integers(0, 3), max_size=3))
    columns = draw(st.integers(0, 9))
    shape = () if draw(st.integers(0, 9)) == 0 else (*leading, columns)
    tokens = math.prod(shape)
    dtype = draw(st.sampled_from(dtypes))
    embedding_dim = draw(st.one_of(st.integers(0, 20), st.sampled_from([32, 33, 64, 72])))
    vocabulary = draw(st.integers(1 if tokens else 0, 7))
    ids = rng(draw).choices(range(max(vocabulary, 1)), k=tokens)
    ids_dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    distribution = draw(st.sampled_from(distributions))
    backend = draw(BACKENDS)
    if dtype is torch.float64:
        backend = "reference"
    pads = vocabulary > 0 and draw(st.booleans())
    return Case(
        shape,
        embedding_dim,
        dtype,
        viewed(tensor_of(ids, shape, ids_dtype), draw(VIEWS)),
        draw(weights(vocabulary, embedding_dim, dtype)),
        draw(alphas),
        draw(layouts(shape)),
        draw(st.integers(0, vocabulary - 1)) if pads else None,
        draw(masks(shape)) if draw(st.booleans()) else None,
        {name: draw(WORDS) for name in ("replica", "sample_offset", "position_offset")},
        draw(SEEDS),
        draw(SCALES),
        {
            "sign": draw(st.sampled_from([1, -1])),
            "distribution": distribution,
            "equal_variance": draw(st.booleans()),
        },
        backend,
        draw(st.booleans()),
    )


def places_of(case: Case, by_ids: bool) -> list[tuple[int, int, int] | None]:
    """The oracle's; by_ids: padding_idx counts."""
    said = {
        name: value.expand(case.shape) if name == "position_ids" else value
        for name, value in case.layout.items()
    }
    lists = {name: value.flatten().tolist() for name, value in said.items()}
    offsets = {name: case.offsets[name] for name in ("sample_offset", "position_offset")}
    if by_ids and case.padding_idx is not None:
        ids = case.input_ids.flatten().tolist()
        lists |= {"input_ids": ids, "padding_idx": case.padding_idx}
    found = oracle.places(case.shape, **lists, **offsets)
    if case.noise_mask is None:
        return found
    noisy = [value != 0 for value in case.noise_mask.flatten().tolist()]
    return [place if heard else None for place, heard in zip(found, noisy, strict=True)]


def noise_of(case: Case, by_ids: bool) -> np.ndarray:
    """(N, d) float32 by the oracle."""
    return oracle.noise_of_tokens(
        places_of(case, by_ids),
        case.embedding_dim,
        case.alpha,
        case.seed,
        case.offsets["replica"],
        **case.variant,
    )


def wide(tensor: torch.Tensor) -> np.ndarray:
    """Values in W, as the oracle takes them."""
    return (tensor.double() if tensor.dtype == torch.float64 else tensor.float()).numpy()
