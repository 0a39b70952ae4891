"""`pytest bench --benchmark-only`: every provider on every case, one at a time.

No assertion on time; ratios are compare.py's business.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .cases import (
    DTYPES,
    SHAPES,
    Case,
    Inputs,
    Provider,
    check,
    compiled_providers,
    hf_hook,
    make_case,
    make_inputs,
    make_providers,
)
from .machine import last_level_cache

PROVIDERS = [provider.name for provider in make_providers(compiled=False)]
COMPILED = ["HF hook, compiled", "official, compiled"]


@pytest.fixture(
    scope="module",
    params=[(key, dtype) for key in SHAPES for dtype in DTYPES.values()],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(*request.param)


@pytest.fixture(scope="module")
def inputs(case: Case) -> list[Inputs]:
    return make_inputs(case, last_level_cache())


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def find(name: str) -> Provider:
    providers = compiled_providers() if name in COMPILED else make_providers(compiled=False)
    return next(provider for provider in providers if provider.name == name)


@pytest.mark.parametrize("name", [*PROVIDERS, *COMPILED])
def test_provider(benchmark: Any, case: Case, inputs: list[Inputs], name: str) -> None:
    provider = find(name)
    assert check(case, provider, inputs[0]) == ""
    benchmark.group = f"{case.model} {case.shape} {case.dtype_name}"
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
    (one, *_) = make_inputs(make_case("smollm2-short", dtype))
    module = torch.nn.Embedding.from_pretrained(one.weight)
    module.neftune_noise_alpha = 5.0  # type: ignore[assignment]
    module.register_forward_hook(neftune.neftune_post_forward_hook)
    torch.manual_seed(0)
    expected = module(one.input_ids)
    torch.manual_seed(0)
    assert torch.equal(hf_hook(one), expected)
