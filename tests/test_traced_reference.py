"""No compiler sees the arithmetic of reference.py: what Inductor's C++ makes of its int64 products,
which wrap, is wrong for many seeds. Operators stay whole; who traces the reference itself is
refused, or gets eager bits after a graph break.
"""

import re

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code

from neftune_kernels import (
    NEFTuneEmbedding,
    add_noise,
    apply_neftune,
    neftune_noise,
    noisy_embedding,
    reference,
)

PHILOX = (*reference.PHILOX_MULTIPLIERS, *reference.PHILOX_KEY_STEPS)
SHAPE, WIDTH = (2, 6), 16
VARIANTS = {
    "uniform": {},
    "negated": {"sign": -1},
    "normal": {"distribution": "normal"},
    "unit rademacher": {"distribution": "rademacher", "equal_variance": False},
}
LAYOUTS = {
    "nothing": {},
    "mask": {"attention_mask": torch.tensor([[0, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]])},
    "lengths": {"lengths": torch.tensor([4, 9])},
    "positions in lengths": {
        "lengths": torch.tensor([4, 9]),
        "position_ids": torch.arange(12).view(SHAPE),
    },
    "position_ids": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 5, 5, 12])},
}
NOISE_MASK = torch.tensor([[1, 0, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1]])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def holds_philox(text: str) -> bool:
    """Whether code or a printed graph names one of its constants, in decimal or in hex."""
    numbers = (int(number, 0) for number in re.findall(r"\b0[xX][0-9a-fA-F]+|\b\d{9,10}\b", text))
    return any(number in PHILOX for number in numbers)


def graphs_of(function, *args):
    """The graphs that Inductor would be given of a call and its backward, printed."""
    printed = []

    def keep(graph, inputs):
        printed.append(graph.print_readable(print_output=False))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table())
    out = torch.compile(function, backend=backend, fullgraph=True)(*args)
    out.sum().backward()
    assert len(printed) == 2
    return printed


def calls(ids, weight, layouts, variants, seed):
    """The sum of what every function gives for every layout in every variant."""
    total = torch.zeros((), dtype=weight.dtype)
    for layout in layouts:
        for variant in variants:
            given = {**layout, **variant, "seed": seed}
            embedded = noisy_embedding(ids, weight, 5.0, padding_idx=3, embed_scale=2.5, **given)
            total = total + add_noise(embedded, 5.0, noise_mask=NOISE_MASK, **given)
            total = total + neftune_noise(SHAPE, WIDTH, 5.0, **given)
    return total


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_graph_holds_it(layout):
    ids = torch.arange(12).view(SHAPE)
    weight = torch.randn(12, WIDTH, requires_grad=True)

    def functions(ids, weight, seed):
        return calls(ids, weight, [layout], VARIANTS.values(), seed)

    forward, backward = graphs_of(functions, ids, weight, torch.tensor(7))
    assert "neftune_kernels" in forward
    assert not holds_philox(forward) and not holds_philox(backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_no_graph_of_a_module_holds_it(variant, dtype):
    """float64 is served by the reference, whose operators are as opaque."""
    kind = {name: value for name, value in variant.items() if name != "sign"}
    module = NEFTuneEmbedding(12, WIDTH, padding_idx=3, embed_scale=2.5, dtype=dtype, **kind)

    def call(ids, seed):
        first = module(ids, sign=variant.get("sign", 1), seed=seed)
        return first + module(ids, attention_mask=ids != 5, noise_mask=NOISE_MASK)

    forward, backward = graphs_of(call, torch.arange(12).view(SHAPE), torch.tensor(7))
    assert "neftune_kernels" in forward
    assert not holds_philox(forward) and not holds_philox(backward)


def test_no_graph_of_a_model_holds_it():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).train()
    apply_neftune(model, 5.0)

    def loss(ids, mask):
        return model(input_ids=ids, attention_mask=mask, labels=ids).loss

    ids = torch.arange(12).view(SHAPE)
    forward, backward = graphs_of(loss, ids, (ids != 5).long())
    assert "neftune_kernels" in forward
    assert not holds_philox(forward) and not holds_philox(backward)


def test_no_code_of_inductor_holds_it():
    """Nor does the code made of these graphs; that of the arithmetic itself, traced, shows that it
    would be seen.
    """
    ids, weight = torch.arange(12).view(SHAPE), torch.randn(12, WIDTH, dtype=torch.float64)
    layouts = [LAYOUTS["mask"], LAYOUTS["cu_seqlens"]]
    variants = [VARIANTS["negated"], VARIANTS["normal"]]

    def program(ids, weight, seed):
        return calls(ids, weight, layouts, variants, seed)

    def philox(words):
        return words * reference.PHILOX_MULTIPLIERS[0] >> 32

    compiled = torch.compile(program, fullgraph=True)
    seed = torch.tensor(-7)
    out, codes = run_and_get_code(compiled, ids, weight, seed)
    torch.testing.assert_close(out, program(ids, weight, seed), rtol=1e-6, atol=0)
    assert codes and all("neftune_kernels" in code for code in codes)
    assert not any(holds_philox(code) for code in codes)
    _, codes = run_and_get_code(torch.compile(philox, fullgraph=True), torch.arange(4))
    assert any(holds_philox(code) for code in codes)


# ---- the reference itself, traced


def of_the_reference(seed):
    token = torch.arange(12)
    length = torch.full((12,), 6)
    return reference.neftune_noise((token // 6, token % 6, length), WIDTH, 5.0, seed)


MESSAGE = "neftune_kernels.reference is not for compilers: call neftune_kernels.neftune_noise"


def test_whole_graphs_refuse_it():
    with pytest.raises(torch._dynamo.exc.Unsupported, match=MESSAGE):
        torch.compile(of_the_reference, backend="eager", fullgraph=True)(torch.tensor(7))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=MESSAGE):
        torch.compile(reference.philox4x32, backend="eager", fullgraph=True)(
            (torch.arange(4),) * 4, (torch.tensor(1), torch.tensor(2))
        )


@pytest.mark.parametrize("strict", [True, False])
def test_export_refuses_it(strict):
    class Model(torch.nn.Module):
        def forward(self, seed):
            return of_the_reference(seed)

    with pytest.raises((torch._dynamo.exc.Unsupported, RuntimeError), match=MESSAGE):
        torch.export.export(Model(), (torch.tensor(7),), strict=strict)


def test_graph_breaks_leave_it_to_eager_mode():
    """By Inductor, for seeds whose traced products would overflow."""
    compiled = torch.compile(lambda seed: of_the_reference(seed * 2) * 3)
    for seed in (0, 1, -1, 2**62, 0x123456789ABCDEF):
        expected = of_the_reference(torch.tensor(seed) * 2) * 3
        assert torch.equal(compiled(torch.tensor(seed)), expected)


def test_operators_are_served_while_a_compiler_is_at_work():
    """Constants are folded by running operators while others are traced: real tensors, eager
    bits.
    """
    expected = neftune_noise(SHAPE, WIDTH, 5.0, seed=7, backend="reference")
    seen = []

    def keep(graph, inputs):
        assert torch.compiler.is_compiling()
        seen.append(neftune_noise(SHAPE, WIDTH, 5.0, seed=7, backend="reference"))
        return graph.forward

    torch.compile(lambda x: x + 1, backend=keep)(torch.ones(2))
    assert torch.equal(seen[0], expected)
