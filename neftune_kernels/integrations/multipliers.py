"""By what a model multiplies embeddings after their lookup, as far as the table knows it."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from .quirks import Each, Quirks, is_scanned, package_of, quirks_of

NO_FACTORS: Mapping[torch.dtype, float] = {}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Multiplier(NamedTuple):
    """Of one site."""

    known: bool = True  # else it is to be measured
    factors: Mapping[torch.dtype, float] = NO_FACTORS  # by the embeddings' dtype; empty: 1
    # only what is looked up while this model runs is multiplied; None: wherever it is looked up
    inside: nn.Module | None = None
    each: Each | None = None  # factors of each sample, asked of that model's arguments
    row: nn.Module | None = None  # whose row told; read_row says whether it still does
    # 1 is known of what is looked up while this model runs: one of nobody's around it may multiply
    holder: nn.Module | None = None


ONE = Multiplier()
UNKNOWN = Multiplier(known=False)


def known_multiplier(ancestors: list[nn.Module]) -> Multiplier:
    """By the table; the ancestors of a site, the outermost first.

    The innermost with a row counts. Without one it is 1 where the module that holds the embedding
    is of a class that the table has been held against, or where there is none.
    """
    for model in reversed(ancestors):
        quirks = quirks_of(model)
        if quirks.each is not None:
            return _each(model, quirks)
        if quirks.factor is not None:
            return _by_row(model, quirks)
    own = [model for model in reversed(ancestors) if not _is_container(model)]
    if own and not is_scanned(own[0]):
        return UNKNOWN
    if all(is_scanned(model) for model in own):
        return ONE
    holder = next((one for one in own if is_scanned(one) and hasattr(one, "config_class")), own[0])
    return Multiplier(holder=holder)


def _by_row(model: nn.Module, quirks: Quirks) -> Multiplier:
    assert quirks.factor is not None
    try:
        factors = {dtype: quirks.factor(model, dtype) for dtype in DTYPES}
    except AttributeError:  # another version of that class
        return UNKNOWN
    return Multiplier(factors=factors, inside=None if quirks.embeds_too else model, row=model)


def _each(model: nn.Module, quirks: Quirks) -> Multiplier:
    assert quirks.each is not None
    try:
        return Multiplier(each=quirks.each(model), inside=model)
    except AttributeError:
        return UNKNOWN


def read_row(model: nn.Module) -> float | None:
    """What a model's row says now; None: nothing any more."""
    factor = quirks_of(model).factor
    try:
        return None if factor is None else factor(model, torch.float64)
    except AttributeError:
        return None


def _is_container(model: nn.Module) -> bool:
    """What only holds others: torch's containers, PEFT's wrappers."""
    packages = package_of(model), type(model).__module__.split(".")[0]
    return all(one in ("torch", "peft") for one in packages)
