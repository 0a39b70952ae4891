"""Where the seed comes from: one 64-bit draw from the default generator per noisy call, and none at
all otherwise.
"""

import pytest
import torch
from conftest import same_bits

from neftune_kernels import add_noise, neftune_noise, noise, noisy_embedding

IDS = torch.tensor([[1, 2, 3], [4, 0, 0]])
LARGE_IDS = torch.zeros(40, 32, dtype=torch.int64)
WEIGHT = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([3, 1])

# Every way a call can take: with and without gradient, small and large, scaled, another dtype, with
# a layout, empty.
CALLS = {
    "noisy_embedding": lambda **given: noisy_embedding(IDS, WEIGHT, 5.0, **given),
    "noisy_embedding of the reference": lambda **given: noisy_embedding(
        IDS, WEIGHT, 5.0, backend="reference", **given
    ),
    "noisy_embedding with lengths": lambda **given: noisy_embedding(
        IDS, WEIGHT, 5.0, lengths=LENGTHS, **given
    ),
    "noisy_embedding with a mask": lambda **given: noisy_embedding(
        IDS, WEIGHT, 5.0, attention_mask=(IDS != 0).long(), **given
    ),
    "noisy_embedding in float64": lambda **given: noisy_embedding(
        IDS, WEIGHT.double(), 5.0, **given
    ),
    "noisy_embedding in training": lambda **given: noisy_embedding(
        IDS, WEIGHT.clone().requires_grad_(), 5.0, **given
    ).detach(),
    "noisy_embedding in training, scaled": lambda **given: noisy_embedding(
        IDS, WEIGHT.clone().requires_grad_(), 5.0, embed_scale=2.0, **given
    ).detach(),
    "noisy_embedding in training, large": lambda **given: noisy_embedding(
        LARGE_IDS, WEIGHT.clone().requires_grad_(), 5.0, **given
    ).detach(),
    "add_noise": lambda **given: add_noise(WEIGHT[IDS], 5.0, **given),
    "add_noise in training": lambda **given: add_noise(
        WEIGHT[IDS].requires_grad_(), 5.0, **given
    ).detach(),
    "neftune_noise": lambda **given: neftune_noise((2, 3), 64, 5.0, **given),
}
EMPTY_CALLS = {
    "noisy_embedding": lambda **given: noisy_embedding(IDS[:0], WEIGHT, 5.0, **given),
    "noisy_embedding in training": lambda **given: noisy_embedding(
        IDS[:, :0], WEIGHT.clone().requires_grad_(), 5.0, **given
    ),
    "noisy_embedding in training, scaled": lambda **given: noisy_embedding(
        IDS[:0], WEIGHT.clone().requires_grad_(), 5.0, embed_scale=2.0, **given
    ),
    "add_noise": lambda **given: add_noise(WEIGHT[:0], 5.0, **given),
    "neftune_noise": lambda **given: neftune_noise((2, 0), 64, 5.0, **given),
    "all padding": lambda **given: noisy_embedding(
        IDS, WEIGHT, 5.0, attention_mask=torch.zeros(2, 3), **given
    ),
    "no lengths": lambda **given: add_noise(
        WEIGHT[IDS], 5.0, lengths=torch.zeros(2, dtype=torch.int64), **given
    ),
}
QUIET_CALLS = {
    "noisy_embedding": lambda alpha, **given: noisy_embedding(IDS, WEIGHT, alpha, **given),
    "noisy_embedding, scaled": lambda alpha, **given: noisy_embedding(
        IDS, WEIGHT, alpha, embed_scale=2.0, lengths=LENGTHS, **given
    ),
    "noisy_embedding in training": lambda alpha, **given: noisy_embedding(
        IDS, WEIGHT.clone().requires_grad_(), alpha, **given
    ),
    "add_noise": lambda alpha, **given: add_noise(WEIGHT[IDS], alpha, **given),
    "neftune_noise": lambda alpha, **given: neftune_noise((2, 3), 64, alpha, **given),
}


@pytest.fixture(autouse=True)
def own_random_state():
    """Tests here set the global generator; nobody else shall notice."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        yield


def one_draw(generator: torch.Generator | None = None) -> torch.Tensor:
    """The contract itself: one draw of all 64 bits."""
    return torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_manual_seed_reproduces(call):
    first, second = call(), call()
    assert not torch.equal(first, second), "every call draws anew"
    torch.manual_seed(1234)
    assert same_bits(call(), first) and same_bits(call(), second)
    torch.manual_seed(1235)
    assert not torch.equal(call(), first)


@pytest.mark.parametrize(
    "call", (CALLS | {f"empty: {name}": call for name, call in EMPTY_CALLS.items()}).values()
)
def test_exactly_one_draw(call):
    """The generator stands where one 64-bit draw leaves it, for an empty input and one of padding
    alone too.
    """
    one_draw()
    after_one = torch.get_rng_state()
    torch.manual_seed(1234)
    call()
    assert torch.equal(torch.get_rng_state(), after_one)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_draw_is_the_seed(call):
    """The noise is that of the drawn number passed as seed=, as a tensor, as an int and as its
    unsigned twin.
    """
    seed = one_draw()
    torch.manual_seed(1234)
    drawn = call()
    assert same_bits(drawn, call(seed=seed))
    assert same_bits(drawn, call(seed=int(seed)))
    assert same_bits(drawn, call(seed=int(seed) % 2**64))


@pytest.mark.parametrize(
    "call", (CALLS | {f"empty: {name}": call for name, call in EMPTY_CALLS.items()}).values()
)
@pytest.mark.parametrize("given", ["int", "tensor", "generator"])
def test_global_state_is_left_alone(call, given):
    generator = torch.Generator().manual_seed(5)
    arguments = {
        "int": {"seed": 7},
        "tensor": {"seed": torch.tensor(7)},
        "generator": {"generator": generator},
    }[given]
    before = torch.get_rng_state()
    call(**arguments)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_generator_is_drawn_from_once(call):
    generator, twin = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    first, second = call(generator=generator), call(generator=generator)
    assert same_bits(first, call(seed=one_draw(twin)))
    assert same_bits(second, call(seed=one_draw(twin)))
    assert torch.equal(generator.get_state(), twin.get_state())


@pytest.mark.parametrize("call", QUIET_CALLS.values(), ids=QUIET_CALLS)
@pytest.mark.parametrize("noise_alpha", [None, 0, 0.0])
def test_no_draw_without_noise(call, noise_alpha):
    generator = torch.Generator().manual_seed(5)
    before, before_own = torch.get_rng_state(), generator.get_state()
    call(noise_alpha)
    call(noise_alpha, generator=generator)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(
        generator.get_state(), before_own
    )


@pytest.mark.parametrize("call", (CALLS | EMPTY_CALLS).values())
def test_seed_and_generator_together(call):
    generator = torch.Generator().manual_seed(5)
    before, before_own = torch.get_rng_state(), generator.get_state()
    with pytest.raises(ValueError, match="seed and generator"):
        call(seed=1, generator=generator)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(
        generator.get_state(), before_own
    )


@pytest.mark.parametrize(
    "seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF0, -0x123456789ABCDEF]
)
def test_seed_as_int_tensor_and_twin(seed, backend):
    """-1 and 2⁶⁴ - 1 are one bit pattern, so one seed; a tensor of it is the same."""
    noise = neftune_noise((2, 3), 20, 5.0, seed=seed, backend=backend)
    assert same_bits(noise, neftune_noise((2, 3), 20, 5.0, seed=seed % 2**64, backend=backend))
    assert same_bits(
        noise, neftune_noise((2, 3), 20, 5.0, seed=torch.tensor(seed), backend=backend)
    )
    for other in (seed ^ 1, seed ^ 2**31, seed ^ 2**32, seed ^ -(2**63)):
        assert not torch.equal(noise, neftune_noise((2, 3), 20, 5.0, seed=other, backend=backend))


def test_draws_use_all_64_bits():
    """Of 64 draws a bit would be constant with probability 64·2⁻⁶³."""
    draws = [int(noise.draw_seed(torch.device("cpu"))) % 2**64 for _ in range(64)]
    ones, zeros = 0, 0
    for draw in draws:
        ones |= draw
        zeros |= ~draw % 2**64
    assert ones == zeros == 2**64 - 1


def test_the_operator_draws_the_same():
    """torch.ops.neftune_kernels.draw_seed, which compiled code calls, is the very draw."""
    expected = one_draw()
    after_one = torch.get_rng_state()
    torch.manual_seed(1234)
    drawn = torch.ops.neftune_kernels.draw_seed(torch.empty((), dtype=torch.int64))
    assert drawn.dtype == torch.int64 and drawn.dim() == 0 and torch.equal(drawn, expected)
    assert torch.equal(torch.get_rng_state(), after_one)
    assert torch.Tag.nondeterministic_seeded in torch.ops.neftune_kernels.draw_seed.default.tags


def test_dropout_after_a_seeded_call_is_unchanged():
    """What field users trip over: noise with its own seed must not shift the masks of later
    dropouts.
    """
    expected = torch.nn.functional.dropout(torch.ones(64))
    torch.manual_seed(1234)
    noisy_embedding(IDS, WEIGHT, 5.0, seed=1)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(64)), expected)


def test_checkpointing_recomputes_the_same_noise():
    """torch.utils.checkpoint restores the generator before it runs a function again."""
    from torch.utils.checkpoint import checkpoint

    seen = []

    def layer(scale):
        out = noisy_embedding(IDS, WEIGHT, 5.0)
        seen.append(out)
        return (out * scale).sum()

    scale = torch.ones((), requires_grad=True)
    checkpoint(layer, scale, use_reentrant=False).backward()
    assert len(seen) == 2 and same_bits(seen[0], seen[1])
    assert torch.equal(scale.grad, seen[0].sum())
