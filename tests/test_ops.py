"""The operators' contract: opcheck, torch.compile, torch.func."""

import pytest
import torch
from torch._dynamo.utils import counters

from neftune_kernels import NEFTuneEmbedding, add_noise, backends, noisy_embedding, self_check
from neftune_kernels.layout import Layout

OPS = torch.ops.neftune_kernels
ALPHA = torch.tensor(5.0, dtype=torch.float64)
SEED = torch.tensor(-3)
FAMILIES = ("", "reference_", "cuda_")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 20, generator=generator).to(dtype)
    ids = torch.randint(0, 40, (3, 6), generator=generator)
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    mask[1, :2] = 0
    return ids, weight, mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["nothing", "lengths", "cu_seqlens", "mask", "numbering"])
def test_opcheck(family, requires_grad, layout):
    ids, weight, mask = batch()
    fields = {
        "nothing": Layout(),
        "lengths": Layout(lengths=torch.tensor([4, 0, 6])),
        "cu_seqlens": Layout(cu_seqlens=torch.tensor([0, 5, 5, 18])),
        "mask": Layout(*OPS.mask_layout(mask, None)),
        "numbering": Layout(numbering=OPS.number_documents(mask, None)),
    }[layout]
    weight.requires_grad_(requires_grad)
    args = (ids, weight, SEED, ALPHA, *fields, 3, 2**32 - 1, 7, 5, 2.5)
    torch.library.opcheck(getattr(OPS, f"{family}noisy_embedding").default, args)
    embeds = torch.randn(3, 6, 20, requires_grad=requires_grad)
    torch.library.opcheck(
        getattr(OPS, f"{family}add_noise").default, (embeds, SEED, ALPHA, *fields, 3, 2**32 - 1, 7)
    )
    if not requires_grad:
        out = torch.empty(3, 6, 20)
        torch.library.opcheck(getattr(OPS, f"{family}noisy_embedding").out, args, {"out": out})
        torch.library.opcheck(
            getattr(OPS, f"{family}add_noise").out, (embeds, SEED, ALPHA, *fields), {"out": out}
        )


def test_opcheck_of_layout_and_seed():
    _, _, mask = batch()
    torch.library.opcheck(OPS.mask_layout.default, (mask, None))
    bounds = torch.tensor([0, 6])
    torch.library.opcheck(OPS.untailed.default, (mask[:1].long(), None, bounds, None, False))
    torch.library.opcheck(OPS.untailed.default, (mask.long(), mask.long(), None, 0, True))
    torch.library.opcheck(
        OPS.mask_layout.default, (None, torch.arange(6).expand(3, 6).contiguous())
    )
    # Not its values under AOTDispatcher: cells that nobody reads are not written.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    positions = torch.arange(6).expand(3, 6)
    torch.library.opcheck(OPS.number_documents.default, (mask, None), test_utils=checks)
    torch.library.opcheck(OPS.number_documents.default, (None, positions), test_utils=checks)
    torch.library.opcheck(OPS.number_padding.default, (mask, 0), test_utils=checks)
    torch.library.opcheck(OPS.draw_seed.default, (torch.empty((), dtype=torch.int64),))
    assert torch.Tag.nondeterministic_seeded in OPS.draw_seed.default.tags


def test_operator_is_pure():
    """opcheck passes operators that draw from the global generator, so ask it directly."""
    ids, weight, _ = batch()
    state = torch.get_rng_state()
    first = OPS.noisy_embedding(ids, weight, SEED, ALPHA)
    assert torch.equal(first, OPS.noisy_embedding(ids, weight, SEED, ALPHA))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compile_gives_eager_bits_and_one_graph_for_many_seeds(backend):
    ids, weight, mask = batch()
    weight.requires_grad_()

    def call(seed=None):
        return noisy_embedding(ids, weight, 5.0, attention_mask=mask, padding_idx=3, seed=seed)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = call()
        torch.manual_seed(seed)
        assert torch.equal(compiled(), expected)
    assert graphs() == 1
    counters.clear()
    for seed in range(5):
        assert torch.equal(compiled(torch.tensor(seed)), call(seed))
    assert graphs() == 1
    compiled(torch.tensor(1)).sum().backward()
    gradient, weight.grad = weight.grad, None
    call(1).sum().backward()
    assert torch.equal(gradient, weight.grad)


def test_compile_six_alphas_at_most_twice():
    ids, weight, mask = batch()
    compiled = torch.compile(
        lambda alpha: noisy_embedding(ids, weight, alpha, attention_mask=mask, seed=3),
        fullgraph=True,
        backend="aot_eager",
    )
    for alpha in (1.0, 2.5, 3.0, 5.0, 10.0, 15.0):
        assert torch.equal(
            compiled(alpha), noisy_embedding(ids, weight, alpha, attention_mask=mask, seed=3)
        )
    assert graphs() <= 2


def test_compiled_module_takes_six_alphas_in_one_graph_and_dynamic_lengths():
    module = NEFTuneEmbedding(40, 20)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def check(ids):
        mask = torch.ones_like(ids)
        mask[0, 1:] = 0
        torch.manual_seed(9)
        expected = module(ids, mask)
        torch.manual_seed(9)
        assert torch.equal(compiled(ids, mask), expected)

    ids, _, _ = batch()
    for alpha in (1.0, 2.5, 3.0, 5.0, 10.0, 15.0):
        module.noise_alpha = alpha
        check(ids)
    assert graphs() == 1
    for columns in (7, 9, 12, 30):
        check(torch.randint(0, 40, (3, columns)))
    assert graphs() == 2  # static, then dynamic


def test_compiled_add_noise():
    embeds = torch.randn(3, 6, 20, requires_grad=True)
    compiled = torch.compile(
        lambda x: add_noise(x, 5.0, lengths=torch.tensor([1, 6, 3]), seed=3),
        fullgraph=True,
        backend="aot_eager",
    )
    out = compiled(embeds)
    assert torch.equal(out, add_noise(embeds, 5.0, lengths=torch.tensor([1, 6, 3]), seed=3))
    out.sum().backward()
    assert torch.equal(embeds.grad, torch.ones_like(embeds))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented the batching rule"
)
def test_torch_func(backend):
    ids, weight, mask = batch()

    def loss(weight, ids=ids):
        return (
            noisy_embedding(
                ids, weight, 5.0, attention_mask=mask, embed_scale=1.5, seed=3, backend=backend
            )
            ** 2
        ).sum()

    leaf = weight.clone().requires_grad_()
    (again,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)  # torch's own, as there
    assert torch.equal(torch.func.grad(loss)(weight), again.detach())

    weights = torch.stack([weight, weight * 2, -weight])
    per_weight = torch.func.vmap(torch.func.grad(loss))(weights)
    assert torch.equal(per_weight, torch.stack([torch.func.grad(loss)(one) for one in weights]))

    many_ids = torch.stack([ids, ids.flip(0)])
    mapped = torch.func.vmap(
        lambda one: noisy_embedding(one, weight, 5.0, seed=3, backend=backend)
    )(many_ids)
    assert torch.equal(
        mapped,
        torch.stack(
            [noisy_embedding(one, weight, 5.0, seed=3, backend=backend) for one in many_ids]
        ),
    )

    embeds = torch.randn(2, 3, 6, 20)
    mapped = torch.func.vmap(
        lambda one: add_noise(one, 5.0, attention_mask=mask, seed=3, backend=backend)
    )(embeds)
    assert torch.equal(
        mapped,
        torch.stack(
            [add_noise(one, 5.0, attention_mask=mask, seed=3, backend=backend) for one in embeds]
        ),
    )


def test_forward_mode_raises_instead_of_zero_tangents():
    ids, weight, _ = batch()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(
            lambda weight: noisy_embedding(ids, weight, 5.0, seed=3),
            (weight,),
            (torch.ones_like(weight),),
        )
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises((NotImplementedError, RuntimeError), match="jvp"),
    ):
        noisy_embedding(
            ids, torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight)), 5.0, seed=3
        )
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises((NotImplementedError, RuntimeError), match="jvp"),
    ):
        add_noise(torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight)), 5.0, seed=3)


def test_export():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = NEFTuneEmbedding(40, 20, noise_alpha=5.0)

        def forward(self, ids, mask):
            return self.embed(ids, mask)

    ids, _, mask = batch()
    model = Model()
    exported = torch.export.export(model, (ids, mask)).module()
    torch.manual_seed(4)
    expected = model(ids, mask)
    torch.manual_seed(4)
    assert torch.equal(exported(ids, mask), expected)
    assert torch.equal(
        torch.export.export(model.eval(), (ids, mask)).module()(ids, mask),
        torch.nn.functional.embedding(ids, model.embed.weight),
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("frozen", [False, True])
def test_two_noisy_calls_of_one_graph_draw_twice(backend, frozen):
    module = NEFTuneEmbedding(40, 20)
    module.weight.requires_grad_(not frozen)
    ids, _, _ = batch()
    compiled = torch.compile(lambda: (module(ids), module(ids)), fullgraph=True, backend=backend)
    torch.manual_seed(2)
    expected, state = (module(ids), module(ids)), torch.get_rng_state()
    torch.manual_seed(2)
    first, second = compiled()
    assert (
        torch.equal(first, expected[0])
        and torch.equal(second, expected[1])
        and not torch.equal(first, second)
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fake_call_leaves_nothing_behind():
    ids, weight, _ = batch()
    with torch._subclasses.FakeTensorMode() as mode:
        fake = noisy_embedding(mode.from_tensor(ids), mode.from_tensor(weight), 7.25)
        assert fake.shape == (3, 6, 20)
    assert noisy_embedding(ids, weight, 7.25).shape == (3, 6, 20)


@pytest.mark.parametrize("device_type", ("cuda", "xpu", "cpu"))
def test_choice_of_backend_is_traced_whole(device_type):
    """Whether triton can be imported is asked outside the graph; with a GPU or without."""
    device = torch.device(device_type)

    def chosen(x):
        names = (
            backends.choose_backend(None, device, torch.bfloat16).name,
            str(backends.available_backends(device_type)),
        )
        return x + sum(map(len, names))

    backends.choose_backend(
        None, device, torch.bfloat16
    )  # where there is no kernel it warns, once, in eager mode
    torch.compiler.reset()
    assert torch.equal(
        torch.compile(chosen, fullgraph=True, backend="eager")(torch.zeros(1)),
        chosen(torch.zeros(1)),
    )


def test_triton_is_chosen_while_tracing(monkeypatch):
    """As on a GPU: nothing speaks against triton, and it is imported at the first choice, which is
    inside a graph.
    """
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "_triton_reason", lambda device_type: "")
    backends._import_for.cache_clear()
    backends.load_triton.cache_clear()
    try:
        torch.compiler.reset()
        gpu = torch.device("cuda")
        chosen = torch.compile(
            lambda x: x + len(backends.choose_backend(None, gpu, torch.bfloat16).name),
            fullgraph=True,
            backend="eager",
        )
        assert chosen(torch.zeros(())) == len("triton")
    finally:
        backends._import_for.cache_clear()


@pytest.mark.parametrize(
    "triton, cuda, expected",
    [
        ("", "", "triton"),
        ("", "not built", "triton"),
        ("none", "", "cuda"),
        ("none", "not built", "reference"),
    ],
)
def test_what_serves_a_gpu_by_itself(monkeypatch, triton, cuda, expected):
    monkeypatch.setattr(backends, "_triton_fails", lambda device_type: triton)
    monkeypatch.setattr(backends, "_cuda_reason", lambda device_type: cuda)
    monkeypatch.setattr(backends, "_warned_devices", set())
    device = torch.device("cuda")
    if expected == "reference":
        with pytest.warns(
            UserWarning, match="no fused kernel for cuda .* triton: none; cuda: not built"
        ):
            assert backends.choose_backend(None, device, torch.bfloat16).name == expected
    else:
        assert backends.choose_backend(None, device, torch.bfloat16).name == expected
    assert backends.choose_backend(None, device, torch.float64).name == "reference"
    if cuda:
        with pytest.raises(ValueError, match=f"backend 'cuda' is not available: {cuda}"):
            backends.choose_backend("cuda", device, torch.bfloat16)
    else:
        assert backends.choose_backend("cuda", device, torch.bfloat16).name == "cuda"


@pytest.mark.parametrize("served_by", ["triton", "cuda", "reference"])
def test_default_operators_of_a_gpu(monkeypatch, served_by):
    """The implementation behind the CUDA key: Triton's launcher, without triton the CUDA library's
    operator, else the reference.
    """

    class Triton:
        @staticmethod
        def mask_layout(*args):
            return "triton"

    monkeypatch.setattr(
        backends, "load_triton", lambda _: Triton if served_by == "triton" else backends.NO_TRITON
    )
    cuda = None if served_by == "reference" else lambda *args: "cuda"
    assert (
        backends.on_gpu("mask_layout", lambda *args: "reference", cuda)(torch.ones(1, 2), None)
        == served_by
    )


def test_gradients_of_a_gpu_without_triton(monkeypatch):
    """The CUDA library's, whatever out is; the reference's where they are wrong, and of float64."""
    served, answers = [], [None, None, NotImplemented]

    def noted(name, answer=lambda: None):
        def call(grad, ids, *how, out):
            assert how == (-1, 1.0, False) and (name == "reference" or out.is_contiguous())
            served.append(name)
            out.fill_(len(served))
            return answer()

        return call

    by_reference = noted("reference")
    monkeypatch.setattr(backends, "load_triton", lambda _: backends.NO_TRITON)
    monkeypatch.setattr(self_check, "_failures", {})
    launcher = noted("cuda", lambda: answers.pop(0))
    monkeypatch.setattr(backends.cuda_gradients, "embedding_gradient_out", launcher)
    monkeypatch.setattr(backends.reference_ops, "embedding_gradient_out", by_reference)
    name, cuda = "embedding_gradient_out", backends.cuda_gradient
    add = backends.on_gpu(name, by_reference, cuda, "triton_gradients")
    grad, ids = torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)

    def result(out):
        served.clear()
        add(grad, ids, -1, 1.0, False, out=out)
        assert (out == len(served)).all()
        return list(served)

    assert result(torch.zeros(5, 4)) == ["cuda"]
    assert result(torch.zeros(4, 5).t()) == ["cuda"]
    assert result(torch.zeros(5, 4, dtype=torch.float64)) == ["reference"]
    assert result(torch.zeros(5, 4)) == ["cuda", "reference"]
    self_check._failures["cuda", "cpu"] = "wrong"
    assert result(torch.zeros(5, 4)) == ["reference"]
    add = cuda  # by its own name
    assert result(torch.zeros(5, 4)) == ["reference"]


def test_overlap_is_refused_before_a_gpu_is_asked(monkeypatch):
    monkeypatch.setattr(backends, "load_triton", lambda _: backends.NO_TRITON)
    serve = backends.on_gpu("add_noise_out", lambda *args, out: "served", None)
    memory = torch.zeros(80)
    out, beside = memory[:64].view(1, 4, 16), memory[4:68].view(1, 4, 16)
    bounds = torch.zeros(40, dtype=torch.int64).view(torch.float32)
    assert serve(out, SEED, ALPHA, out=out) == "served"
    with pytest.raises(RuntimeError, match="out must not overlap inputs_embeds"):
        serve(beside, SEED, ALPHA, out=out)
    cu_seqlens, out = bounds[2:6].view(torch.int64), bounds[:64].view(1, 4, 16)
    with pytest.raises(RuntimeError, match="out must not overlap cu_seqlens"):
        serve(torch.zeros(1, 4, 16), SEED, ALPHA, None, None, None, cu_seqlens, out=out)
    look_up = backends.on_gpu("noisy_embedding_out", lambda *args, out: "served", None)
    weight = torch.zeros(4, 16)
    ids, inside = torch.zeros(1, 4, dtype=torch.int64), bounds[:8].view(torch.int64)
    arguments = [ids, weight, SEED, ALPHA, None, None, None, None]
    names = ("document", "position", "lengths", "cu_seqlens")
    for place, name in enumerate(("input_ids", "weight", "seed", "noise_alpha", *names)):
        read = out[0] if name == "weight" else inside[0] if place in (2, 3) else inside
        given = [*arguments[:place], read, *arguments[place + 1 :]]
        with pytest.raises(RuntimeError, match=f"out must not overlap {name}$"):
            look_up(*given, out=out)
    assert look_up(*arguments, out=out) == "served"
    with pytest.raises(RuntimeError, match="out must not overlap input_ids"):
        look_up(cu_seqlens.view(1, 2), weight, SEED, ALPHA, out=out[:, :2])
