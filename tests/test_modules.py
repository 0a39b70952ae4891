"""NEFTuneEmbedding is nn.Embedding in every respect but the noise of its training forward."""

import copy
import io
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neftune_kernels import (
    NEFTuneEmbedding,
    add_noise,
    backends,
    distributed,
    lookup,
    modules,
    neftune_noise,
    noisy_embedding,
)


@pytest.fixture(scope="module")
def pytorch_module():
    """PyTorch's own description of nn.Embedding; the tests it comes from need expecttest."""
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_modules import module_db

    return next(info for info in module_db if info.module_cls is nn.Embedding)


@pytest.fixture(scope="module")
def pytorch_op():
    """PyTorch's own description of F.embedding."""
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    return next(info for info in op_db if info.name == "nn.functional.embedding")


def with_mask():
    ids = torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0], [0, 0, 0, 0]])
    return ids, (ids != 0).long()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("off", ["eval", "alpha 0", "alpha None"])
def test_pytorch_module_samples(pytorch_module, dtype, off):
    """PyTorch's own samples of nn.Embedding (module_db): outputs, gradients and repr of the
    arguments.
    """
    samples = pytorch_module.module_inputs_func(
        pytorch_module, "cpu", dtype, requires_grad=False, training=True
    )
    assert len(samples) >= 2
    for sample in samples:
        construct, call = sample.constructor_input, sample.forward_input
        torch.manual_seed(0)
        expected = nn.Embedding(*construct.args, **construct.kwargs, dtype=dtype)
        torch.manual_seed(0)
        alpha = {"eval": 5.0, "alpha 0": 0, "alpha None": None}[off]
        ours = NEFTuneEmbedding(*construct.args, **construct.kwargs, dtype=dtype, noise_alpha=alpha)
        assert torch.equal(ours.weight, expected.weight)
        ours.train(off != "eval")
        state = torch.get_rng_state()
        out, reference = ours(*call.args, **call.kwargs), expected(*call.args, **call.kwargs)
        assert torch.equal(out, reference) and torch.equal(torch.get_rng_state(), state)
        out.sum().backward()
        reference.sum().backward()
        assert torch.equal(ours.weight.grad, expected.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_pytorch_op_samples(pytorch_op, dtype):
    """PyTorch's own samples of F.embedding (op_db), max_norm, sparse and scale_grad_by_freq among
    them, through the module in eval mode.
    """
    options_seen = set()
    for sample in pytorch_op.sample_inputs("cpu", dtype, requires_grad=False):
        weight, (ids,), options = sample.input, sample.args, sample.kwargs
        module = NEFTuneEmbedding(*weight.shape, _weight=weight.clone(), **options).eval()
        plain = nn.Embedding(*weight.shape, _weight=weight.clone(), **options)
        out, expected = module(ids), plain(ids)
        assert torch.equal(out, expected)
        if not (
            options.get("sparse") and options.get("scale_grad_by_freq")
        ):  # PyTorch itself has no such backward
            out.sum().backward()
            expected.sum().backward()
            assert torch.equal(module.weight.grad.to_dense(), plain.weight.grad.to_dense())
        options_seen |= set(options)
    assert options_seen >= {"padding_idx", "max_norm", "sparse", "scale_grad_by_freq"}


def test_training_noise_is_the_functional_one():
    ids, mask = with_mask()
    module = NEFTuneEmbedding(10, 24, noise_alpha=7.0, embed_scale=3.0, replica=2)
    expected = noisy_embedding(
        ids,
        module.weight,
        7.0,
        attention_mask=mask,
        embed_scale=3.0,
        replica=2,
        seed=11,
        sample_offset=4,
        position_offset=1,
    )
    assert torch.equal(module(ids, mask, seed=11, sample_offset=4, position_offset=1), expected)
    assert torch.equal(
        module(ids, mask, seed=11, replica=9),
        noisy_embedding(
            ids, module.weight, 7.0, attention_mask=mask, embed_scale=3.0, replica=9, seed=11
        ),
    )
    generator = torch.Generator().manual_seed(5)
    drawn = torch.empty((), dtype=torch.int64).random_(
        -(2**63), None, generator=torch.Generator().manual_seed(5)
    )
    assert torch.equal(module(ids, mask, generator=generator), module(ids, mask, seed=drawn))
    lengths, cu_seqlens = torch.tensor([4, 2, 0]), torch.tensor([0, 5, 12])
    assert torch.equal(module(ids, lengths=lengths, seed=1), module(ids, mask, seed=1))
    assert torch.equal(
        module(ids, cu_seqlens=cu_seqlens, seed=1),
        noisy_embedding(
            ids, module.weight, 7.0, cu_seqlens=cu_seqlens, embed_scale=3.0, replica=2, seed=1
        ),
    )
    positions = torch.tensor([[0, 1, 0, 1]])
    assert torch.equal(
        module(ids, position_ids=positions, seed=1),
        noisy_embedding(
            ids, module.weight, 7.0, position_ids=positions, embed_scale=3.0, replica=2, seed=1
        ),
    )


@pytest.mark.parametrize("own", [None, 0, 3])
@pytest.mark.parametrize("said", [None, 0, 5])
def test_every_offset_of_a_call_counts(own, said):
    """Whatever the module's replica is, 0 and none included; a call's 0 is before the module's."""
    ids, _ = with_mask()
    module = NEFTuneEmbedding(10, 24, replica=own)
    replica = (own or 0) if said is None else said
    for sample_offset, position_offset in ((0, 0), (1, 0), (0, 1), (2**32 - 1, 2**32 - 1)):
        offsets = {"sample_offset": sample_offset, "position_offset": position_offset}
        expected = noisy_embedding(ids, module.weight, 5.0, replica=replica, seed=11, **offsets)
        assert torch.equal(module(ids, replica=said, seed=11, **offsets), expected)
        torch.manual_seed(4)  # without a seed the module has its noise ready
        unseeded = noisy_embedding(ids, module.weight, 5.0, replica=replica, **offsets)
        torch.manual_seed(4)
        assert torch.equal(module(ids, replica=said, **offsets), unseeded)


def test_replica_0_of_a_call_is_before_the_rank(monkeypatch):
    monkeypatch.setattr(modules, "has_group", lambda: True)
    monkeypatch.setattr(modules, "module_replica", lambda module: 3)
    ids, _ = with_mask()
    module = NEFTuneEmbedding(10, 24)
    for said, replica in ((None, 3), (0, 0), (2, 2)):
        expected = noisy_embedding(ids, module.weight, 5.0, replica=replica, seed=11)
        assert torch.equal(module(ids, replica=said, seed=11), expected)


def test_padding_idx_marks_padding_when_nothing_else_does():
    ids, mask = with_mask()
    module = NEFTuneEmbedding(10, 24, padding_idx=0)
    out = module(ids, seed=3)
    assert torch.equal(out, module(ids, mask, seed=3))
    assert torch.equal(out[1, 2:], F.embedding(ids, module.weight)[1, 2:])
    assert not torch.equal(module(ids, torch.ones_like(mask), seed=3), out)  # a mask decides alone
    negative = NEFTuneEmbedding(10, 24, padding_idx=-10, _weight=module.weight.detach())
    assert torch.equal(negative(ids, seed=3), out)


def test_alpha_is_a_float_validated_on_assignment():
    module = NEFTuneEmbedding(10, 24, noise_alpha=5)
    assert module.noise_alpha == 5.0 and type(module.noise_alpha) is float
    for bad in (-1.0, float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="noise_alpha must be finite and >= 0, got"):
            module.noise_alpha = bad
        with pytest.raises(ValueError, match="noise_alpha must be finite and >= 0, got"):
            NEFTuneEmbedding(10, 24, noise_alpha=bad)
    assert module.noise_alpha == 5.0
    module.noise_alpha = 10.0
    ids, _ = with_mask()
    assert torch.equal(module(ids, seed=1), noisy_embedding(ids, module.weight, 10.0, seed=1))
    module.noise_alpha = None
    assert module.noise_alpha == 0.0 and torch.equal(module(ids), F.embedding(ids, module.weight))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"embed_scale": float("inf")}, ValueError, "embed_scale must be finite, got inf"),
        ({"replica": -1}, ValueError, r"replica must lie in \[0, 2\*\*32\), got -1"),
        ({"replica": 1.5}, TypeError, "replica must be an integer, got 1.5"),
        ({"backend": "tpu"}, ValueError, "got 'tpu'"),
    ],
)
def test_bad_construction(bad, error, message):
    with pytest.raises(error, match=message):
        NEFTuneEmbedding(10, 24, **bad)


def test_copies_pickles_and_state():
    module = NEFTuneEmbedding(10, 24, padding_idx=1, noise_alpha=3.0, embed_scale=2.0, replica=4)
    ids, _ = with_mask()
    expected = module(ids, seed=8)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ):
        assert (
            type(twin) is NEFTuneEmbedding
            and twin.weight is not module.weight
            and twin.noise_alpha == 3.0
        )
        assert torch.equal(twin(ids, seed=8), expected)
        twin.noise_alpha = 0
        assert module.noise_alpha == 3.0
    assert list(module.state_dict()) == ["weight"]
    plain = nn.Embedding(10, 24)
    plain.load_state_dict(module.state_dict())
    module.load_state_dict(nn.Embedding(10, 24).state_dict())


@pytest.mark.parametrize("replica", [None, 0, 4])
def test_replica_is_kept(replica):
    """None, which is worked out at each call, stays None and is never what it came to."""
    module = NEFTuneEmbedding(10, 24, replica=replica)
    ids, _ = with_mask()
    expected = noisy_embedding(ids, module.weight, 5.0, seed=8, replica=replica or 0)
    assert torch.equal(module(ids, seed=8), expected)
    plain = module.to_embedding()
    assert "replica" not in vars(plain)
    for twin in (
        module,
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        NEFTuneEmbedding.from_embedding(plain, replica=replica),
        NEFTuneEmbedding.from_pretrained(module.weight.detach(), replica=replica),
    ):
        assert twin.replica == replica and type(twin.replica) is type(replica)
        assert torch.equal(twin(ids, seed=8), expected)
    shown = "" if replica is None else f", replica={replica}"
    assert repr(module) == f"NEFTuneEmbedding(10, 24, noise_alpha=5.0{shown})"
    assert NEFTuneEmbedding.from_embedding(plain).replica is None
    assert NEFTuneEmbedding.from_pretrained(torch.ones(4, 3)).replica is None


def test_nothing_is_asked_without_a_process_group(monkeypatch):
    """No table of ranks, groups or FSDP states, and no import of the DTensors' modules."""

    def asked(*args):
        raise AssertionError("asked")

    for name in ("get_rank", "get_world_size"):
        monkeypatch.setattr(torch.distributed, name, asked)
    for name in ("is_dtensor", "_fsdp_mesh_info", "_partial_group"):
        monkeypatch.setattr(distributed, name, asked)
    ids, _ = with_mask()
    NEFTuneEmbedding(10, 24)(ids)
    code = (
        "import sys, torch; from neftune_kernels import NEFTuneEmbedding as E; "
        "before = set(sys.modules); E(10, 24)(torch.arange(3)); "
        "print(sorted(name for name in set(sys.modules) - before if 'distributed' in name), "
        "'torch.distributed.tensor' in before)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["[]", "False"]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("NEFTuneEmbedding", lambda: NEFTuneEmbedding(10, 24, stream=0)),
        ("forward", lambda: NEFTuneEmbedding(10, 24)(torch.arange(3), stream=0)),
        ("forward", lambda: NEFTuneEmbedding(10, 24).eval()(torch.arange(3), stream=0)),
        (
            "from_embedding",
            lambda: NEFTuneEmbedding.from_embedding(nn.Embedding(10, 24), stream=0),
        ),
        (
            "NEFTuneEmbedding",
            lambda: NEFTuneEmbedding.from_pretrained(torch.ones(4, 3), stream=0),
        ),
    ],
)
def test_stream_is_refused_with_its_new_name(name, call):
    with pytest.raises(TypeError, match=rf"{name}\(\) takes no stream=: .* is replica="):
        call()


def test_is_an_embedding_and_ties():
    module = NEFTuneEmbedding(10, 24)
    assert isinstance(module, nn.Embedding)
    head = nn.Linear(24, 10, bias=False)
    head.weight = module.weight
    ids, _ = with_mask()
    head(module(ids)).sum().backward()
    assert module.weight.grad is head.weight.grad and module.weight.grad.abs().sum() > 0
    module.to(torch.bfloat16)
    assert module(ids).dtype == torch.bfloat16 and module.half()(ids).dtype == torch.float16
    assert NEFTuneEmbedding(10, 24, device="meta").weight.device.type == "meta"
    frozen = NEFTuneEmbedding(10, 24, _weight=torch.zeros(10, 24), _freeze=True)
    assert not frozen.weight.requires_grad and not frozen(ids).requires_grad


def test_conversions_share_the_parameter():
    plain = nn.Embedding(
        10, 24, padding_idx=2, max_norm=3.0, norm_type=1.5, scale_grad_by_freq=True, sparse=True
    ).eval()
    module = NEFTuneEmbedding.from_embedding(
        plain, 4.0, embed_scale=2.0, replica=3, backend="reference"
    )
    assert module.weight is plain.weight and not module.training
    assert (module.noise_alpha, module.embed_scale, module.replica, module.backend) == (
        4.0,
        2.0,
        3,
        "reference",
    )
    with pytest.warns(UserWarning, match="no embed_scale: multiply its output by 2.0"):
        back = module.to_embedding()
    assert (
        type(back) is nn.Embedding
        and back.weight is plain.weight
        and repr(back) == repr(plain)
        and not back.training
    )
    pretrained = NEFTuneEmbedding.from_pretrained(torch.ones(4, 3), padding_idx=1, noise_alpha=2.0)
    assert (
        not pretrained.weight.requires_grad
        and pretrained.padding_idx == 1
        and pretrained.noise_alpha == 2.0
    )
    with pytest.raises(ValueError, match=r"shape \(num_embeddings, embedding_dim\), got \(3,\)"):
        NEFTuneEmbedding.from_pretrained(torch.ones(3))

    class Scaled(nn.Embedding):
        def forward(self, input):
            return super().forward(input) * 2

    with pytest.raises(TypeError, match="Scaled has a forward of its own"):
        NEFTuneEmbedding.from_embedding(Scaled(3, 3))
    with pytest.raises(TypeError, match="must be an nn.Embedding, got Linear"):
        NEFTuneEmbedding.from_embedding(nn.Linear(3, 3))


def test_extra_repr():
    assert (
        repr(NEFTuneEmbedding(10, 24, padding_idx=1))
        == "NEFTuneEmbedding(10, 24, padding_idx=1, noise_alpha=5.0)"
    )
    shown = repr(
        NEFTuneEmbedding(10, 24, noise_alpha=1, embed_scale=2.0, replica=3, backend="reference")
    )
    assert (
        shown == "NEFTuneEmbedding(10, 24, noise_alpha=1.0, embed_scale=2.0, replica=3, "
        "backend='reference')"
    )


def test_unknown_weights_take_the_slow_path():
    """A tensor subclass the operators do not know: the embedding's own forward, then add_noise."""

    class Tagged(torch.Tensor):
        pass

    module = NEFTuneEmbedding(10, 24)
    tagged = NEFTuneEmbedding(10, 24)
    tagged.weight = nn.Parameter(module.weight.detach().clone().as_subclass(Tagged))
    ids, mask = with_mask()
    out = tagged(ids, mask, seed=2)
    assert torch.equal(out.as_subclass(torch.Tensor), module(ids, mask, seed=2))


def test_one_draw_per_training_call_and_none_otherwise():
    module = NEFTuneEmbedding(10, 24)
    ids, mask = with_mask()
    torch.manual_seed(3)
    module(ids, mask)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    torch.empty((), dtype=torch.int64).random_(-(2**63), None)
    assert torch.equal(after, torch.get_rng_state())
    for quiet in (lambda: module.eval()(ids, mask), lambda: module.train()(ids, mask, seed=4)):
        quiet()
        assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("rows", [(2, 5), (40, 200)])
def test_short_and_long_eager_paths_have_the_same_bits(rows):
    """Below IN_PLACE_LIMIT elements eager training goes another way than above; both are add_noise
    of the embedding.
    """
    module = NEFTuneEmbedding(10, 100)
    ids = torch.randint(0, 10, rows)
    lengths = torch.arange(rows[0])
    out = module(ids, lengths=lengths, seed=6)
    assert out.requires_grad
    assert torch.equal(
        out, add_noise(F.embedding(ids, module.weight), 5.0, lengths=lengths, seed=6)
    )
    assert torch.equal(
        out,
        F.embedding(ids, module.weight) + neftune_noise(rows, 100, 5.0, lengths=lengths, seed=6),
    )
    clean = F.embedding(ids, module.weight)
    assert torch.equal(out[0], clean[0]) and not torch.equal(out[1], clean[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
def test_quick_path_is_the_long_one(dtype, frozen, monkeypatch):
    """Ids and nothing else take _embed_quickly: the same bits, gradient and generator state as the
    whole of embed_with_noise.
    """
    module = NEFTuneEmbedding(
        10, 24, dtype=dtype, _weight=torch.randn(10, 24, dtype=dtype), _freeze=frozen
    )
    ids = torch.randint(0, 10, (2, 5))
    results = []
    quick = lookup._embed_quickly
    answers = []
    monkeypatch.setattr(
        lookup, "_embed_quickly", lambda *args: answers.append(quick(*args)) or answers[-1]
    )
    for _ in range(2):
        torch.manual_seed(4)
        results.append(
            (
                module(ids),
                torch.get_rng_state(),
                module(ids, seed=torch.tensor(5)),
                noisy_embedding(ids, module.weight, 5.0, seed=5),
            )
        )
        monkeypatch.setattr(lookup, "_embed_quickly", lambda *args: None)
    assert len(answers) == 2 and all(
        (answer is None) == bool(backends.native.reason) for answer in answers
    )
    (short, state, seeded, other), (long, long_state, long_seeded, long_other) = results
    assert torch.equal(short, long) and torch.equal(state, long_state)
    assert (
        torch.equal(seeded, long_seeded)
        and torch.equal(other, long_other)
        and torch.equal(seeded, other)
    )
    assert short.requires_grad == long.requires_grad == (not frozen)
    if not frozen:
        grad = torch.randn(2, 5, 24).to(dtype)
        assert torch.equal(
            torch.autograd.grad(short, module.weight, grad)[0],
            torch.autograd.grad(long, module.weight, grad)[0],
        )
    monkeypatch.undo()
    with pytest.raises(IndexError, match=r"\[0, num_embeddings = 10\), got 1[0-9]"):
        module(ids + 10)
    with pytest.raises(TypeError, match="input_ids must be int32 or int64, got torch.int16"):
        module(ids.short())
    with pytest.raises(ValueError, match="a seed tensor must be 0-dim int64"):
        module(ids, seed=torch.tensor([5]))


@pytest.mark.parametrize("quiet", ("eval", "alpha"))
def test_layout_is_checked_without_noise_too(quiet):
    module = NEFTuneEmbedding(10, 4, noise_alpha=0 if quiet == "alpha" else 5.0).train(
        quiet == "alpha"
    )
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="attention_mask must have the tokens' shape"):
        module(ids, torch.ones(2, 4))
    with pytest.raises(ValueError, match="at most one of"):
        module(ids, torch.ones(2, 3), lengths=torch.tensor([3, 1]))


@pytest.mark.parametrize(
    "name, value", [("distribution", "normal"), ("equal_variance", False), ("replica", 3)]
)
def test_settings_assigned_later_are_those_of_the_next_call(name, value):
    rest = {"distribution": "normal"} if name == "equal_variance" else {}
    module = NEFTuneEmbedding(10, 24, noise_alpha=5.0, **rest)
    given = NEFTuneEmbedding.from_pretrained(
        module.weight, freeze=False, noise_alpha=5.0, **rest, **{name: value}
    )
    ids, outputs = torch.arange(10)[None], []
    before = module(ids, seed=torch.tensor(3))
    setattr(module, name, value)
    for one in (module, given):
        torch.manual_seed(5)
        outputs += [one(ids), one(ids, seed=torch.tensor(3))]
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[1], before)


def test_scale_of_a_table_that_cannot_be_fused():
    module = NEFTuneEmbedding(10, 24, max_norm=0.5, embed_scale=3.0, noise_alpha=5.0)
    ids, seed, before = torch.arange(10)[None], torch.tensor(3), module.weight.detach().clone()
    out = module(ids, seed=seed)
    assert not torch.equal(module.weight, before), "renormalised by its own lookup"
    assert torch.equal(out, add_noise(F.embedding(ids, module.weight) * 3.0, 5.0, seed=seed))


def test_negative_padding_idx_counts_from_the_end():
    weight, ids = torch.ones(10, 24), torch.tensor([[3, 9, 9]])
    out = noisy_embedding(ids, weight, 5.0, padding_idx=-1, seed=3)
    assert torch.equal(out, noisy_embedding(ids, weight, 5.0, padding_idx=9, seed=3))
    assert torch.equal(out[0, 1:], weight[:2]) and not torch.equal(out[0, 0], weight[0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: NEFTuneEmbedding(100, 16, 5.0), "NEFTuneEmbedding(100, 16, noise_alpha=...)"),
        (
            lambda: NEFTuneEmbedding.from_embedding(torch.ones(4, 3)),
            "from_pretrained takes a weight",
        ),
        (
            lambda: NEFTuneEmbedding.from_pretrained(nn.Embedding(4, 3)),
            "from_embedding takes a module",
        ),
        (
            lambda: torch.jit.script(NEFTuneEmbedding(4, 3)),
            "script module.to_embedding() in its place",
        ),
    ],
)
def test_errors_name_the_remedy(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


def test_a_script_of_the_plain_embedding():
    module = NEFTuneEmbedding(4, 3)
    scripted = torch.jit.script(module.to_embedding())
    assert torch.equal(scripted(torch.arange(4)), module.weight)
