"""`pytest bench --benchmark-only`: the second way to bench.compare's cases, one provider at a time.

No assertion on time. A group is a shape and dtype, ragged with a mask; its last table gives each
median over that of F.embedding.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .cases import (
    BASE,
    COMPILED_HOOK,
    COMPILED_OFFICIAL,
    DTYPES,
    HOOK,
    OFFICIAL,
    OURS,
    RAGGED,
    SHAPES,
    UNTOLD,
    Case,
    Inputs,
    Provider,
    check,
    hf_hook,
    make_case,
    make_inputs,
    make_providers,
)
from .machine import last_level_cache

PROVIDERS = {  # by the short name of a case
    "plain": BASE,
    "ours": OURS,
    "hook": HOOK,
    "official": OFFICIAL,
    "hook-compiled": COMPILED_HOOK,
    "official-compiled": COMPILED_OFFICIAL,
}


@pytest.fixture(
    scope="module",
    params=[(key, name) for key in SHAPES for name in DTYPES],
    ids=lambda param: f"{param[0]}-{'bf16' if param[1] == 'bfloat16' else 'fp32'}",
)
def case(request: pytest.FixtureRequest) -> Case:
    key, dtype = request.param
    return make_case(key, DTYPES[dtype], RAGGED)


@pytest.fixture(scope="module")
def inputs(case: Case) -> list[Inputs]:
    return make_inputs(case, last_level_cache())


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def find(case: Case, name: str) -> Provider:
    return next(one for one in make_providers(case, "compiled" in name) if one.name == name)


@pytest.mark.parametrize("short", PROVIDERS)
def test_lookup(benchmark: Any, case: Case, inputs: list[Inputs], short: str) -> None:
    provider = find(case, PROVIDERS[short])
    assert check(case, provider, inputs[0]) == ""
    benchmark.group = f"{case.model} {case.shape} {case.dtype_name}"
    benchmark.name = short
    cursor = 0

    def following() -> tuple[tuple[Inputs], dict[str, Any]]:
        nonlocal cursor
        cursor += 1
        return (inputs[cursor % len(inputs)],), {}

    benchmark.pedantic(provider.run, setup=following, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_hf_hook_is_transformers_own(dtype: torch.dtype) -> None:
    """The rival in cases.py gives the very numbers of the hook it stands for."""
    neftune = pytest.importorskip("transformers.integrations.neftune")
    (one, *_) = make_inputs(make_case("smollm2-short", dtype, UNTOLD))
    module = torch.nn.Embedding.from_pretrained(one.weight)
    module.neftune_noise_alpha = 5.0  # type: ignore[assignment]
    module.register_forward_hook(neftune.neftune_post_forward_hook)
    torch.manual_seed(0)
    expected = module(one.input_ids)
    torch.manual_seed(0)
    assert torch.equal(hf_hook(one), expected)
