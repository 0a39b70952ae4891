"""capturable=True: alpha on the device. The bits of capturable=False, graphs that record the noise,
an alpha that is written in place, and what would make a graph replay with another day's alpha.
"""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import neftune_kernels
from neftune_kernels import (
    NEFTuneEmbedding,
    add_noise,
    apply_neftune,
    neftune_noise,
    noisy_embedding,
    ops,
)
from neftune_kernels import capturable as capturables
from neftune_kernels.schedules import linear_schedule

VOCAB, WIDTH = 11, 24
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
MASK = (IDS != 0).long()
OPS = torch.ops.neftune_kernels
TOLD = (
    {},
    {"attention_mask": MASK},
    {"lengths": torch.tensor([4, 2]), "sign": -1},
    {"cu_seqlens": torch.tensor([0, 3, 8]), "distribution": "normal"},
    {"distribution": "rademacher", "sign": -1, "attention_mask": MASK},
    {"backend": "reference", "replica": 3, "noise_mask": MASK},
)


def weight():
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))


def alpha_of(value):
    return torch.tensor(value, dtype=torch.float64)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embed(input_ids))


def applied(**options):
    model = Model()
    options = {"embedding": "embed", "embedding_multiplier": 1.0, **options}
    return model, apply_neftune(model, 5.0, **options)


@pytest.fixture
def in_capture(monkeypatch):
    """As inside torch.cuda.graph."""
    from neftune_kernels.integrations import checkpoints, noisy

    for module in (capturables, checkpoints, noisy):
        monkeypatch.setattr(module, "in_capture", lambda device: True)


# ---- the same bits


@pytest.mark.parametrize("said", TOLD)
@pytest.mark.parametrize("alpha", [0.0, 5.0, 1e-28])
def test_functions_give_the_hosts_bits(alpha, said):
    rows, said = weight().requires_grad_(), {"seed": 3, **said}
    expected = noisy_embedding(IDS, rows, alpha, **said)
    found = noisy_embedding(IDS, rows, alpha_of(alpha), capturable=True, **said)
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(out.square().sum(), rows)[0] for out in (expected, found)]
    assert torch.equal(*grads)
    embeds = F.embedding(IDS, weight())
    assert torch.equal(add_noise(embeds, alpha_of(alpha), capturable=True, **said), expected)
    noise = neftune_noise(IDS.shape, WIDTH, alpha_of(alpha), capturable=True, **said)
    assert torch.equal(noise, neftune_noise(IDS.shape, WIDTH, alpha, **said))


def test_a_module_gives_the_hosts_bits():
    ours, host = (NEFTuneEmbedding(VOCAB, WIDTH, capturable=one) for one in (True, False))
    host.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == ["weight"] and not list(ours.buffers())
    tensor = ours._alpha
    for alpha in (5, 0, 7.5):
        ours.noise_alpha = host.noise_alpha = alpha
        for said in ({}, {"attention_mask": MASK}, {"sign": -1, "replica": 2}):
            assert torch.equal(ours(IDS, seed=1, **said), host(IDS, seed=1, **said))
    assert ours._alpha is tensor and ours._noise.alpha is tensor
    assert torch.equal(ours.eval()(IDS), F.embedding(IDS, ours.weight))


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"embedding_multiplier": 3.0}])
@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_apply_gives_the_hosts_bits(options, distribution):
    options = {**options, "distribution": distribution}
    (ours, handle), (host, other) = applied(capturable=True, **options), applied(**options)
    for alpha, sign in ((5, 1), (0, 1), (2.5, -1)):
        for one in (handle, other):
            one.noise_alpha, one.sign = alpha, sign
        found = []
        for model in (ours, host):
            torch.manual_seed(4)
            found.append(model(IDS, attention_mask=MASK))
        assert torch.equal(*found)
        measured = [one.stats() for one in (handle, other)]
        if alpha:
            assert measured[0].pop("calls") and measured[1].pop("calls")
            assert {**measured[0], "skipped": {}} == {**measured[1], "skipped": {}}
    handle.noise_alpha = 0
    ours(IDS)
    stats = handle.stats()
    assert stats["magnitude_max"] == stats["max_noise_ratio"] == 0
    checked = handle.check(input_ids=IDS, attention_mask=MASK)
    assert not checked["ok"] and "noise_alpha is 0" in str(checked)


def test_zero_is_an_alpha_like_any_other():
    """A graph that was captured while alpha was 0 is to replay with another, so a seed is drawn."""
    module = NEFTuneEmbedding(VOCAB, WIDTH, noise_alpha=0, capturable=True)
    model, handle = applied(capturable=True)
    handle.noise_alpha = 0
    for call in (
        lambda: module(IDS),
        lambda: model(IDS),
        lambda: noisy_embedding(IDS, weight(), alpha_of(0.0), capturable=True),
    ):
        before = torch.get_rng_state()
        call()
        assert not torch.equal(torch.get_rng_state(), before)
    assert handle.stats()["calls"] == 1 and "on" in repr(handle)


# ---- alpha where it is


def test_bad_alphas_are_refused():
    rows = weight()
    for bad, error, message in (
        (5.0, TypeError, r"torch\.tensor\(5\.0, dtype=torch\.float64, device='cpu'\)"),
        (None, TypeError, "0-dim float64 tensor"),
        (torch.tensor(5.0), ValueError, "got torch.float32"),
        (alpha_of([5.0]), ValueError, r"shape \(1,\)"),
        (alpha_of(5.0).requires_grad_(), ValueError, "detach"),
        (alpha_of(5.0).to("meta"), ValueError, "on meta, the embeddings are on cpu"),
        *((alpha_of(value), ValueError, "finite and >= 0") for value in (-1, math.nan, math.inf)),
    ):
        for call in (
            lambda alpha=bad: noisy_embedding(IDS, rows, alpha, capturable=True),
            lambda alpha=bad: add_noise(rows, alpha, capturable=True),
            lambda alpha=bad: neftune_noise((2, 3), 4, alpha, capturable=True, device="cpu"),
        ):
            with pytest.raises(error, match=message):
                call()
    with pytest.raises(TypeError, match="capturable must be True or False"):
        noisy_embedding(IDS, rows, 5.0, capturable=1)
    for make in (
        lambda alpha: NEFTuneEmbedding(3, 2, noise_alpha=alpha, capturable=True),
        lambda alpha: apply_neftune(Model(), alpha, embedding="embed", capturable=True),
        lambda alpha: setattr(NEFTuneEmbedding(3, 2, capturable=True), "noise_alpha", alpha),
        lambda alpha: setattr(applied(capturable=True)[1], "noise_alpha", alpha),
        lambda alpha: setattr(NEFTuneEmbedding(3, 2, noise_alpha=alpha), "capturable", True),
    ):
        with pytest.raises(ValueError, match="at most 3.40282e"):
            make(1e39)
    module = NEFTuneEmbedding(3, 2, capturable=True)
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite and >= 0"):
            module.noise_alpha = bad
    assert module.noise_alpha == 5 and module._alpha == 5


def test_nan_is_loud_in_every_backend(backend):
    """What the operators are given on a device, nobody has looked at."""
    nan, seed = alpha_of(math.nan), torch.tensor(1)
    table = {"reference": OPS.reference_noisy_embedding, "cuda": OPS.cuda_noisy_embedding}
    operator = table.get(backend, OPS.noisy_embedding)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = operator(IDS, weight().to(dtype), seed, nan, None, None, torch.tensor([4, 2]))
        assert out[MASK.bool()].isnan().all() and out[~MASK.bool()].isfinite().all()


def test_copies_have_an_alpha_of_their_own():
    module = NEFTuneEmbedding(VOCAB, WIDTH, capturable=True)
    for one in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert one.capturable and one._noise.alpha is one._alpha
        one.noise_alpha = 9
        assert module.noise_alpha == module._alpha == 5 and one._alpha == 9
        assert torch.equal(module(IDS, seed=1), noisy_embedding(IDS, module.weight, 5.0, seed=1))
    model, handle = applied(capturable=True)
    model(IDS)
    twin = copy.deepcopy(model)
    handle.noise_alpha = 0.5
    with pytest.warns(UserWarning, match="apply_neftune"):
        twin(IDS)
    states = [one.embed._neftune.state for one in (model, twin)]
    assert [float(one.alphas[torch.device("cpu")]) for one in states] == [0.5, 5.0]


def test_alpha_goes_where_the_weight_goes():
    """And keeps its dtype."""
    module = NEFTuneEmbedding(VOCAB, WIDTH, capturable=True).to(torch.bfloat16)
    assert module._alpha.dtype == torch.float64 and module(IDS).dtype == torch.bfloat16
    module.to("meta")
    assert module._alpha.is_meta and module(IDS.to("meta")).is_meta
    module.to_empty(device="cpu")
    assert module._alpha == 5 and module._noise.alpha is module._alpha
    module.weight = nn.Parameter(module.weight.detach().to("meta"))  # as accelerate moves it
    assert module(IDS.to("meta")).is_meta and module._alpha.is_meta
    old = NEFTuneEmbedding(VOCAB, WIDTH)
    del old.__dict__["_capturable"]  # of a pickle from before
    assert not old.capturable and old(IDS).shape == (2, 4, WIDTH)
    old.capturable = True
    assert old._alpha.device == old.weight.device and old._noise.capturable
    assert "capturable=True" in repr(old)
    made = NEFTuneEmbedding.from_embedding(nn.Embedding(3, 2), capturable=True)
    assert made.capturable and made._alpha == 5


def test_alpha_made_in_inference_mode_can_be_set_outside():
    module, (model, handle) = NEFTuneEmbedding(VOCAB, WIDTH), applied(noise_without_grad=True)
    with torch.inference_mode():
        module.capturable = handle.capturable = True
        module(IDS), model(IDS)
    module.noise_alpha = handle.noise_alpha = 2
    assert module._alpha == 2
    assert handle._state.alphas[torch.device("cpu")] == 2


def test_settings_go_round_the_tensor():
    """Another setting does not replace it, and one that is lent and given back neither."""
    model, handle = applied(capturable=True)
    model(IDS)
    (tensor,) = handle._state.alphas.values()
    handle.sign = -1
    handle.distribution = "normal"
    with apply_neftune(model, 2.0, embedding="embed", capturable=True):
        assert tensor == 2
    assert tensor == 5 and handle.capturable
    handle.capturable = False
    handle.noise_alpha = 3
    assert tensor == 3, "a graph that was captured before reads it all the same"
    with pytest.raises(TypeError, match="capturable must be True or False"):
        handle.capturable = None


def test_a_schedule_writes_it():
    transformers = pytest.importorskip("transformers")
    from neftune_kernels.integrations.transformers import NEFTuneCallback

    callback = NEFTuneCallback(
        linear_schedule(10.0, 0.0, 4),
        capturable=True,
        embedding="embed",
        embedding_multiplier=1.0,
    )
    model, state = Model(), transformers.TrainerState()
    callback.on_train_begin(None, state, None, model=model)
    model(IDS)
    (tensor,) = callback.handle._state.alphas.values()
    seen = []
    for state.global_step in range(5):
        callback.on_step_begin(None, state, None)
        seen.append(float(tensor))
    assert seen == [10.0, 7.5, 5.0, 2.5, 0.0]
    callback.detach()


# ---- in a capture


def test_alpha_set_in_a_capture_is_refused(in_capture, monkeypatch):
    """It would be set at every replay. Nothing changes then."""
    with monkeypatch.context() as before:
        before.setattr(capturables, "in_capture", lambda device: False)
        module, (model, handle) = NEFTuneEmbedding(3, 2, capturable=True), applied(capturable=True)
        model(IDS)
    for one, tensor in ((module, module._alpha), (handle, handle._state.alphas[IDS.device])):
        with pytest.raises(RuntimeError, match="set while a CUDA graph is captured"):
            one.noise_alpha = 7
        assert one.noise_alpha == tensor == 5
    handle.sign = -1  # which a graph keeps from its capture


def test_an_alpha_that_is_not_there_is_not_made_in_a_capture(in_capture):
    """It would be made anew, with the same value, at every replay."""
    model, _ = applied(capturable=True)
    with pytest.raises(RuntimeError, match="not on cpu yet.*run one training step before"):
        model(IDS)
    module = NEFTuneEmbedding(3, 2)
    with pytest.raises(RuntimeError, match="not on cpu yet"):
        module.capturable = True


def test_what_a_capture_keeps_of_a_call(in_capture, monkeypatch):
    """stats() of a graph that is replayed tell of today's alpha."""
    model, handle = applied(capturable=True)
    with monkeypatch.context() as before:
        before.setattr(capturables, "in_capture", lambda device: False)
        model(IDS)
    model(IDS, attention_mask=MASK)
    assert model.embed._neftune.last.noise.capturable
    monkeypatch.setattr(capturables, "in_capture", lambda device: False)
    handle.noise_alpha = 10
    stats = handle.stats()
    assert stats["magnitude_max"] == 10 / (2 * WIDTH) ** 0.5
    assert 0.5 < stats["max_noise_ratio"] < 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_second_pass_takes_the_first_ones_alpha(use_reentrant):
    """Though the tensor that the first one read has been written to."""
    grads = []
    for changed in (False, True):
        model, handle = applied(capturable=True, noise_without_grad=True)
        torch.manual_seed(1)
        start = torch.zeros((), requires_grad=True)
        out = checkpoint(
            lambda zero, model=model: model(IDS, attention_mask=MASK).square() + zero,
            start,
            use_reentrant=use_reentrant,
        )
        if changed:
            handle.noise_alpha = 50
        out.sum().backward()
        grads.append(model.head.weight.grad)
    assert torch.equal(*grads)


def test_a_checkpoint_in_a_capture_raises(in_capture, monkeypatch):
    """Where the generator stands cannot be asked there."""
    model, _ = applied(capturable=True)
    with monkeypatch.context() as before:
        before.setattr(capturables, "in_capture", lambda device: False)
        model(IDS)
    out = checkpoint(model, IDS, use_reentrant=False)
    with pytest.raises(RuntimeError, match="keep the embedding out of the checkpointed segment"):
        out.sum().backward()


# ---- compilers


def compiled_graphs(call, *alphas):
    """How many graphs were compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for alpha in alphas:
        call(alpha)
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def operators_of(model, *inputs, **named):
    """Names of our operators in the graph that is compiled, and of its float64 inputs."""
    from functorch.compile import make_boxed_compiler
    from torch._dynamo.backends.common import aot_autograd

    found, doubles = [], []

    def keep(graph, given):
        targets = [str(node.target) for node in graph.graph.nodes]
        found.extend(one.split(".")[1] for one in targets if one.startswith("neftune_kernels"))
        doubles.extend(one for one in given if one.dtype == torch.float64)
        return graph

    keep = make_boxed_compiler(keep)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(*inputs, **named).sum().backward()
    return found, doubles


@pytest.mark.parametrize(
    ("kind", "multiplier"),
    [("module", 1.0), ("function", 1.0), ("fused", 1.0), ("fused", 2.0), ("behind", 2.0)],
)
def test_no_recompilation_for_any_alpha(kind, multiplier):
    """0 among them; bit for bit what eager mode gives."""
    options = {"capturable": True, "embedding_multiplier": multiplier}
    alpha = alpha_of(5.0)
    if kind == "module":
        model = steered = NEFTuneEmbedding(VOCAB, WIDTH, capturable=True)
    elif kind == "function":
        model = NEFTuneEmbedding(VOCAB, WIDTH)
        model.forward = lambda ids, attention_mask: noisy_embedding(
            ids, model.weight, alpha, attention_mask=attention_mask, capturable=True
        )
        steered = None
    else:
        model, steered = applied(**options, fused=kind == "fused")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def call(value):
        if steered is None:
            alpha.fill_(value)
        else:
            steered.noise_alpha = value
        torch.manual_seed(2)
        found = compiled(IDS, attention_mask=MASK)
        torch.manual_seed(2)
        assert torch.equal(found, model(IDS, attention_mask=MASK)), value

    assert compiled_graphs(call, 0.0, 5.0, 7.0, 0.25, 0.0) == 1


def test_a_model_that_has_not_run_is_compiled_with_its_alpha():
    """The tensor is made while tracing, and is the graph's input."""
    model, handle = applied(capturable=True, embedding_multiplier=2.0)
    assert not handle._state.alphas
    found, doubles = operators_of(model, IDS, attention_mask=MASK)
    (tensor,) = handle._state.alphas.values()
    assert type(tensor) is torch.Tensor and tensor == 5
    assert len(doubles) == 1 and "capturable_noisy_embedding" in found
    twin = copy.deepcopy(model)
    twin.embed._neftune.state.warned.clear()
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"a copy that no handle steers cannot be compiled"):
        torch.compile(twin, backend="eager", fullgraph=True)(IDS)


@pytest.mark.parametrize(
    ("kind", "distribution"),
    [("module", "uniform"), ("module", "normal"), ("fused", "normal"), ("behind", "uniform")],
)
def test_no_operator_stays_outside_cuda_graphs(kind, distribution):
    """By the tags that Inductor asks for; with the host's alpha one does."""
    for capturable in (True, False):
        if kind == "module":
            model = NEFTuneEmbedding(VOCAB, WIDTH, distribution=distribution, capturable=capturable)
        else:
            options = {"distribution": distribution, "fused": kind == "fused"}
            model, _ = applied(capturable=capturable, **options)
        found, _ = operators_of(model, IDS, attention_mask=MASK)
        tags = [getattr(OPS, name).default.tags for name in found]
        unsafe = [one for one in tags if torch.Tag.cudagraph_unsafe in one]
        assert len(found) >= 3 and bool(unsafe) != capturable, found


def test_every_noise_operator_has_a_twin():
    names = {one.name: one for one in ops.OPERATORS}
    noisy = [one for one in ops.BY_DEVICE if one.autograd is not None]
    assert len(noisy) == 9
    for one in noisy:
        twin = names[f"capturable_{one.name}"]
        assert (twin.schema, twin.fake, twin.autograd) == (one.schema, one.fake, one.autograd)
        assert torch.Tag.cudagraph_unsafe in one.tags
        assert torch.Tag.cudagraph_unsafe not in twin.tags
    backend = neftune_kernels.backends.CAPTURABLE["cuda"]
    assert backend.add_variant_noise is OPS.capturable_cuda_add_variant_noise
    assert backend.noisy_embedding_out is neftune_kernels.backends.CUDA.noisy_embedding_out


@pytest.mark.parametrize("name", ["noisy_embedding", "add_noise", "add_variant_noise"])
def test_twins_are_good_operators(name):
    rows = weight().requires_grad_()
    first = (IDS, rows) if name == "noisy_embedding" else (rows[:4],)
    for prefix in ("capturable_", "capturable_reference_"):
        operator = getattr(OPS, prefix + name)
        torch.library.opcheck(operator, (*first, torch.tensor(1), alpha_of(5.0)))


def test_inductor_captures_the_noise():
    """In the partitions that it makes for a GPU: one, which is a CUDA graph."""
    pytest.importorskip("triton")
    if torch.__version__ < "2.13":
        pytest.skip("the partitions are taken out of Inductor 2.13, whose internals the tool knows")
    from bench.inductor_code import Case, partitions

    inputs = IDS, weight(), MASK, alpha_of(5.0)

    def call(ids, rows, mask, alpha, capturable):
        alpha = alpha if capturable else 5.0
        return 2 * noisy_embedding(ids, rows, alpha, attention_mask=mask, capturable=capturable)

    assert partitions(Case(lambda *given: call(*given, True), WIDTH, inputs)) == (1, set())
    count, reasons = partitions(Case(lambda *given: call(*given, False), WIDTH, inputs))
    assert count == 2 and reasons == {"CUDAGraph-unsafe custom ops"}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["module", "applied"])
def test_export(kind, strict):
    """A fresh model, too; no fake of the trace stays behind."""
    model = NEFTuneEmbedding(VOCAB, WIDTH, capturable=True)
    if kind == "applied":
        model, handle = applied(capturable=True, embedding_multiplier=2.0)
    exported = torch.export.export(model, (IDS, MASK), strict=strict)
    assert "neftune_kernels.capturable_" in exported.graph_module.print_readable(False)
    torch.manual_seed(1)
    expected = model(IDS, MASK)
    torch.manual_seed(1)
    assert torch.equal(exported.module()(IDS, MASK), expected)
    if kind == "applied":
        assert [type(one) for one in handle._state.alphas.values()] == [torch.Tensor]


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        module = NEFTuneEmbedding(VOCAB, WIDTH, capturable=True)
        assert module(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, WIDTH)
        alpha = torch.tensor(5.0, dtype=torch.float64)
        assert add_noise(torch.zeros(2, WIDTH), alpha, capturable=True).shape == (2, WIDTH)


def test_torch_func():
    rows, alpha = weight(), alpha_of(5.0)

    def loss(rows, ids, mask):
        said = {"attention_mask": mask, "seed": 3}
        return noisy_embedding(ids, rows, alpha, capturable=True, **said).square().sum()

    def host(rows, ids, mask):
        return noisy_embedding(ids, rows, 5.0, attention_mask=mask, seed=3).square().sum()

    for one in (
        lambda f: torch.func.grad(f)(rows, IDS, MASK),
        lambda f: torch.func.vmap(torch.func.grad(f), (None, 0, 0))(rows, IDS, MASK),
    ):
        assert torch.equal(one(loss), one(host))
