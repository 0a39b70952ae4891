"""Nothing is lost: the stack of running forwards, several applies, settings through the handle,
checkpoints, threads.
"""

import contextlib
import copy
import functools
import pickle
import re
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from neftune_kernels import add_noise, apply_neftune
from neftune_kernels.integrations.checkpoints import AT_HOOKS
from neftune_kernels.integrations.running import RUNNING

VOCAB, HIDDEN = 32, 16
IDS = torch.randint(1, VOCAB, (3, 8), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 5 + [0] * 3, [0] * 6 + [1] * 2, [1] * 8])


class Scaled(nn.Embedding):
    """Its noise is added behind it."""

    def forward(self, input):
        return super().forward(input) * 1.0


KINDS = (nn.Embedding, Scaled)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Tiny models: threads would only wait for each other."""
    threads(1)


class Model(nn.Module):
    def __init__(self, kind=nn.Embedding):
        super().__init__()
        self.embed = kind(VOCAB, HIDDEN)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        return self.embed(input_ids)


def build(kind=nn.Embedding):
    torch.manual_seed(0)
    return Model(kind).train()


def expected(model, alpha=5.0, mask=MASK, seed=7, **options):
    clean = F.embedding(IDS, model.embed.weight)
    if alpha == 0:
        return clean
    torch.manual_seed(seed)
    return add_noise(clean, alpha, attention_mask=mask, **options)


def called(model, seed=7, mask=MASK):
    torch.manual_seed(seed)
    return model(IDS, mask)


def everything(model):
    hooks = [key for key in vars(model) if "hooks" in key]
    return {
        name: (type(module), [len(vars(module)[key]) for key in hooks], sorted(vars(module)))
        for name, module in model.named_modules()
    }


# ---- the handle


def test_one_setting_is_changed_through_the_handle():
    model = build()
    handle = apply_neftune(model, 5.0)
    handle.noise_alpha = 2.0
    handle.sign = -1
    handle.replica = 3
    handle.noise_without_grad = True
    assert torch.equal(called(model), expected(model, 2.0, sign=-1, replica=3))
    handle.distribution = "normal"
    handle.equal_variance = False
    options = {"distribution": "normal", "equal_variance": False, "sign": -1, "replica": 3}
    with torch.no_grad():
        assert torch.equal(called(model), expected(model, 2.0, **options))
    handle.backend = "reference"
    handle.samples = lambda given: {"lengths": torch.tensor([5, 2, 8])}
    called(model)
    assert handle.stats()["backend"] == "reference" and handle.stats()["length_min"] == 2
    settings = handle.settings
    assert settings.noise_alpha == 2.0 and settings.variant.sign == -1


@pytest.mark.parametrize("how", ["apply", "handle"])
def test_equal_variance_waits_for_a_distribution(how):
    model = build()
    said = {"equal_variance": False} if how == "apply" else {}
    handle = apply_neftune(model, 5.0, **said)
    if how == "handle":
        handle.equal_variance = False
    assert handle.equal_variance is False
    assert torch.equal(called(model), expected(model))
    handle.sign = -1
    handle.distribution = "normal"
    wanted = {"distribution": "normal", "equal_variance": False, "sign": -1}
    assert torch.equal(called(model), expected(model, **wanted))


@pytest.mark.parametrize(
    "name", ["noise_alfa", "alpha", "nosie_alpha", "embedding", "state", "handle"]
)
def test_typos_are_refused(name):
    handle = apply_neftune(build(), 5.0)
    with pytest.raises(AttributeError, match=f"no setting '{name}': it has noise_alpha, replica"):
        setattr(handle, name, 2.0)
    assert not hasattr(handle, name)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("noise_alpha", -1.0, ValueError),
        ("replica", 2**32, ValueError),
        ("backend", "tpu", ValueError),
        ("distribution", "cauchy", ValueError),
        ("equal_variance", 1, TypeError),
        ("samples", MASK, TypeError),
        ("fused", "yes", TypeError),
        ("sign", 0, ValueError),
    ],
)
def test_bad_settings_leave_the_old_ones(name, value, error):
    model = build()
    handle = apply_neftune(model, 5.0)
    before = handle.settings
    with pytest.raises(error):
        setattr(handle, name, value)
    assert handle.settings == before
    assert torch.equal(called(model), expected(model))


def test_fused_true_through_the_handle_is_refused_whole():
    model = build(Scaled)
    handle = apply_neftune(model, 5.0)
    with pytest.raises(ValueError, match="fused=True"):
        handle.fused = True
    assert handle.fused is None and torch.equal(called(model), expected(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_nested_with_restores(kind):
    model = build(kind)
    before = everything(model)
    with apply_neftune(model, 5.0, replica=1) as outer:
        with apply_neftune(model, 7.0, fused=False, distribution="normal") as inner:
            assert inner is outer
            assert torch.equal(called(model), expected(model, 7.0, distribution="normal"))
            with pytest.raises(KeyError), apply_neftune(model, 0.0):
                assert torch.equal(called(model), expected(model, 0))
                raise KeyError
            assert torch.equal(called(model), expected(model, 7.0, distribution="normal"))
        assert torch.equal(called(model), expected(model, replica=1))
        assert outer.fused is None
    assert everything(model) == before
    handle = apply_neftune(model, 5.0)
    with apply_neftune(model, 7.0):
        pass
    assert handle.noise_alpha == 5.0, "what was there without a with, too"
    assert apply_neftune(model, 3.0, replica=2) is handle
    assert apply_neftune(model, 4.0) is handle
    assert torch.equal(called(model), expected(model, 4.0)), "the last call's settings, all of them"


def test_an_apply_that_is_refused_changes_nothing():
    model = build(Scaled)
    handle = apply_neftune(model, 5.0)
    for bad in ({"fused": True}, {"backend": "tpu"}, {"noise_alpha": -1.0}):
        with pytest.raises(ValueError):
            apply_neftune(model, **bad)
        assert torch.equal(called(model), expected(model))
    handle.remove()
    assert everything(model) == everything(build(Scaled))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [False, True])
def test_applying_after_the_embedding_was_replaced_is_the_same_apply(kind, whole):
    """No forward has come between, which would have found it."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build(kind)

        def get_input_embeddings(self):
            return self.inner.embed

        def forward(self, input_ids, attention_mask=None):
            return self.inner(input_ids, attention_mask)

    model = Outer().train()
    before = everything(model)
    handle = apply_neftune(model, 5.0, embedding_multiplier=1.0)
    old = model.inner
    if whole:
        model.inner = build(kind)
    else:
        model.inner.embed = kind(VOCAB, HIDDEN)
    with apply_neftune(model, 2.0, embedding_multiplier=1.0) as again:
        assert again is handle
        torch.manual_seed(7)
        assert torch.equal(model(IDS, MASK), expected(model.inner, 2.0))
        assert handle.stats()["calls"] == 1
    torch.manual_seed(7)
    assert torch.equal(model(IDS, MASK), expected(model.inner)), "what was before is again"
    handle.remove()
    assert everything(model) == before and everything(old) == everything(build(kind))


# ---- several applies


class Two(nn.Module):
    """Two embeddings and a child that has one of its own."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second, self.child = kind(VOCAB, HIDDEN), kind(VOCAB, HIDDEN), Model(kind)

    def forward(self, input_ids, attention_mask=None, other_mask=None):
        return (
            self.first(input_ids),
            self.second(input_ids),
            self.child(input_ids, attention_mask=other_mask),
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_applies_on_several_embeddings_are_independent(order, kind):
    torch.manual_seed(0)
    model = Two(kind).train()
    before = everything(model)
    other = MASK.flip(0)

    def apply(which):
        if which == 2:
            return apply_neftune(model.child, 3.0)
        return apply_neftune(model, (5.0, 4.0)[which], embedding=("first", "second")[which])

    handles = {which: apply(which) for which in order}
    assert len(set(map(id, handles.values()))) == 3

    def check(applied):
        torch.manual_seed(7)
        outputs = model(IDS, MASK, other)
        torch.manual_seed(7)
        modules = (model.first, model.second, model.child.embed)
        for which, (output, module) in enumerate(zip(outputs, modules, strict=True)):
            clean = F.embedding(IDS, module.weight)
            if which in applied:
                mask = (MASK, MASK, other)[which]
                clean = add_noise(clean, (5.0, 4.0, 3.0)[which], attention_mask=mask)
            assert torch.equal(output, clean), which

    check({0, 1, 2})
    twin = copy.deepcopy(model)
    apply_neftune(twin, 5.0, embedding="first").remove()
    model, twin = twin, model
    check({1, 2})
    model, twin = twin, model
    left = {0, 1, 2}
    for which in order:
        handles[which].remove()
        left.discard(which)
        check(left)
    assert everything(model) == before


# ---- the stack


def test_an_interrupt_inside_a_forward_that_goes_on():
    """The inner model's entry is taken off with the outer's."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Model()

        def get_input_embeddings(self):
            return self.inner.embed

        def forward(self, input_ids, attention_mask=None):
            try:
                self.inner(input_ids, attention_mask[:, :0])
            except KeyboardInterrupt:
                return self.inner.embed(input_ids)

    model = Outer().train()
    apply_neftune(model, 5.0, embedding_multiplier=1.0)
    interrupted = []

    def interrupt(module, args):
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    model.inner.embed.register_forward_pre_hook(interrupt)
    torch.manual_seed(7)
    out = model(IDS, MASK)
    assert torch.equal(out, expected(model.inner)) and not RUNNING.forwards


def interrupted(model):
    """A forward that ends at its embedding, so that no hook of ours hears its end."""

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.embed.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS, MASK)
    hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_forward_tells_a_direct_call_nothing(kind):
    model = build(kind)
    apply_neftune(model, 5.0)

    interrupted(model)
    torch.manual_seed(7)
    with pytest.warns(UserWarning, match="outside its model's forward"):
        out = model.embed(IDS)
    assert torch.equal(out, expected(model, mask=None))


def test_an_interrupted_forward_whose_frame_left_its_id_to_the_next_call():
    model = build()
    apply_neftune(model, 5.0, embedding_multiplier=1.0)

    interrupted(model)

    def alike(*_):
        RUNNING.forwards[-1].frame = id(sys._getframe(1))

    model.register_forward_pre_hook(alike, prepend=True)
    assert torch.equal(called(model), expected(model)) and not RUNNING.forwards


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_changed_under_way_is_reconciled_inside_its_own_call(kind):
    """The hook that notices stays the one that ends the call."""
    model = build(kind)
    handle = apply_neftune(model, 5.0)
    before = everything(model)
    model.embed = kind(VOCAB, HIDDEN)
    assert torch.equal(called(model), expected(model))
    assert everything(model) == before or kind is nn.Embedding
    assert not RUNNING.forwards
    handle.remove()
    assert everything(model) == everything(build(kind))


def test_forwards_without_noise_never_raise():
    """A mask that is refused, a place that cannot be noised any more: eval and no-grad go on."""

    def read(given):
        raise KeyError("attention")

    model = build()
    handle = apply_neftune(model, 5.0, samples=read)
    clean = F.embedding(IDS, model.embed.weight)
    assert torch.equal(model.eval()(IDS, MASK), clean)
    with torch.no_grad():
        assert torch.equal(model.train()(IDS, MASK), clean)
    with pytest.raises(KeyError):
        model(IDS, MASK)
    handle.samples = None
    model.embed = nn.Linear(2, 2)
    model.embed.forward = lambda ids: clean
    assert torch.equal(model.eval()(IDS, MASK), clean)
    with pytest.raises(ValueError, match=r"must be an nn.Embedding, got torch\.nn"):
        model.train()(IDS, MASK)
    assert not RUNNING.forwards


class Around(nn.Module):
    """Somebody's own, put around an embedding."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, ids):
        return self.inner(ids) * 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))
def test_what_is_wrapped_in_a_copy_is_noisy_once(kind, copied):
    """The copy's embedding has noise that no handle steers, below the place that gets some now."""
    model = build(kind)
    apply_neftune(model, 5.0)
    other = copied(model)
    other.embed = Around(other.embed)
    clean = {name: type(one) for name, one in build(kind).named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = apply_neftune(other, 5.0)
        assert torch.equal(called(other), expected(other))
    assert "_neftune" not in vars(other.embed.inner)
    handle.remove()
    assert torch.equal(called(other), F.embedding(IDS, other.embed.weight))
    assert type(other.embed.inner) is clean["embed"]


def test_a_copy_compiles_for_itself():
    """What `embedding.compile()` left belongs to the original."""
    model = build()
    apply_neftune(model, 5.0)
    model.embed.compile(backend="eager")
    model.eval()(IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.embed.weight.zero_()
        assert not other(IDS).any()


class Unchanged(nn.Module):
    def forward(self, weight):
        return weight


def test_what_was_parametrised_since_is_not_lost():
    """A wrapper around it has the noise moved; the class that torch gave it stays."""
    model = build()
    handle = apply_neftune(model, 5.0)
    embed = model.embed
    parametrize.register_parametrization(embed, "weight", Unchanged())
    model.embed = checkpoint_wrapper(embed)
    kind = type(embed)
    with pytest.raises(RuntimeError, match="was parametrised or given a forward of its own after"):
        model(IDS, MASK)
    assert type(embed) is kind and torch.equal(model.eval()(IDS), F.embedding(IDS, embed.weight))
    model.embed = embed
    parametrize.remove_parametrizations(embed, "weight")
    assert torch.equal(called(model.train()), expected(model))
    handle.remove()
    assert type(embed) is nn.Embedding


class Keyed(Model):
    """Where its embedding is asked for, it may raise what it likes."""

    broken = False

    def get_input_embeddings(self):
        if self.broken:
            raise KeyError("tables")
        return self.embed


def test_whatever_a_models_own_method_raises_is_for_noisy_forwards():
    model = Keyed().train()
    apply_neftune(model, 5.0)
    model.embed, model.broken = nn.Embedding(VOCAB, HIDDEN), True
    clean = F.embedding(IDS, model.embed.weight)
    assert torch.equal(model.eval()(IDS, MASK), clean)
    with pytest.raises(KeyError, match="tables"):
        model.train()(IDS, MASK)


# ---- threads


@pytest.mark.parametrize("kind", KINDS)
def test_threads_have_stacks_of_their_own(kind):
    """An evaluation beside training, in the middle of its forward: each has its own mask."""
    model = build(kind)
    apply_neftune(model, 5.0)
    inside, done = threading.Event(), threading.Event()
    evaluated = []

    def evaluate():
        inside.wait(10)
        with torch.no_grad():
            evaluated.append(model(IDS[:1, :3], MASK[:1, :3]))
        other = RUNNING.forwards
        evaluated.append(len(other))
        done.set()

    def pause(module, args):
        if threading.current_thread() is threading.main_thread():
            inside.set()
            assert done.wait(10)

    model.embed.register_forward_pre_hook(pause)
    thread = threading.Thread(target=evaluate)
    thread.start()
    out = called(model)
    thread.join()
    assert torch.equal(out, expected(model))
    assert torch.equal(evaluated[0], F.embedding(IDS[:1, :3], model.embed.weight))
    assert evaluated[1] == 0 and not RUNNING.forwards


# ---- checkpoints


class Checkpointed(Model):
    def __init__(self, kind=nn.Embedding, inside=False):
        super().__init__(kind)
        self.inside = inside

    def forward(self, input_ids, attention_mask=None):
        def segment():
            return self.embed(input_ids).square()

        return checkpoint(segment, use_reentrant=False) if self.inside else segment()


def forward(model, inside):
    torch.manual_seed(7)
    if inside or inside is None:
        return model(IDS, MASK)
    return checkpoint(model, IDS, MASK, use_reentrant=False)


CHANGES = {
    "alpha": lambda model, handle: setattr(handle, "noise_alpha", 9.0),
    "off": lambda model, handle: setattr(handle, "noise_alpha", 0.0),
    "sign": lambda model, handle: setattr(handle, "sign", -1),
    "replica": lambda model, handle: setattr(handle, "replica", 5),
    "samples": lambda model, handle: setattr(handle, "samples", lambda given: None),
    "mode": lambda model, handle: model.eval(),
    "nothing": lambda model, handle: None,
    "another forward": lambda model, handle: model(IDS, MASK.flip(0)),
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_before_the_backward_changes_nothing_of_it(change, kind, inside):
    """The second pass takes what the first was given."""
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = Checkpointed(kind, inside and checkpointed).train()
        handle = apply_neftune(model, 5.0)
        out = forward(model, inside if checkpointed else None)
        if checkpointed:
            CHANGES[change](model, handle)
        state = torch.get_rng_state()
        out.sum().backward()
        assert torch.equal(torch.get_rng_state(), state)
        gradients.append(model.embed.weight.grad)
    assert torch.equal(*gradients)


class Segment(nn.Module):
    """Its lookup in a checkpoint that has something else to train."""

    def __init__(self, kind, frozen, way):
        super().__init__()
        self.embed = kind(VOCAB, HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.way = way
        self.embed.requires_grad_(not frozen)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        def segment(scale):
            drawn = torch.rand(HIDDEN)  # as dropout would draw behind the lookup
            return self.mix(self.embed(input_ids) * drawn * scale).square()

        return self.way(segment, torch.ones((), requires_grad=True))


SAVED = {torch.ops.aten.embedding.default, torch.ops.aten.addmm.default}


def save_some(context, operator, *args, **kwargs):
    policy = CheckpointPolicy
    return policy.MUST_SAVE if operator in SAVED else policy.PREFER_RECOMPUTE


WAYS = {
    "none": lambda segment, scale: segment(scale),
    "non-reentrant": functools.partial(checkpoint, use_reentrant=False),
    "to its end": functools.partial(checkpoint, use_reentrant=False, early_stop=False),
    "unchecked": functools.partial(checkpoint, use_reentrant=False, determinism_check="none"),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "reentrant twice": lambda segment, scale: checkpoint(
        functools.partial(checkpoint, segment, use_reentrant=True), scale, use_reentrant=True
    ),
    "reentrant in the other": lambda segment, scale: checkpoint(
        functools.partial(checkpoint, segment, use_reentrant=True), scale, use_reentrant=False
    ),
    "selective": functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, save_some),
    ),
}
NOT_REENTRANT = ("non-reentrant", "to its end", "unchecked", "selective")


def apply_anew(model, handle, alpha=5.0):
    handle.remove()
    apply_neftune(model, alpha, noise_without_grad=True)


BETWEEN = CHANGES | {
    "remove": lambda model, handle: handle.remove(),
    "remove and apply": apply_anew,
    "remove and apply 0": lambda model, handle: apply_anew(model, handle, 0.0),
    "behind": lambda model, handle: setattr(handle, "fused", False),
    "no noise without grad": lambda model, handle: setattr(handle, "noise_without_grad", False),
}
RAISE = {"remove", "remove and apply", "remove and apply 0", "behind"}


def gradients_of(way, kind, frozen, change, alone=False):
    torch.manual_seed(0)
    model = Segment(kind, frozen, way).train()
    handle = apply_neftune(model, 5.0, noise_without_grad=True, embedding_multiplier=1.0)
    torch.manual_seed(7)
    out = model(IDS, MASK)
    change(model, handle)
    wanted = [model.mix.weight] + ([] if frozen or alone else [model.embed.weight])
    if alone:
        return torch.autograd.grad(out.sum(), wanted)
    out.sum().backward()
    return [one.grad for one in wanted]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("change", BETWEEN)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_recomputes_its_first_pass_or_raises(kind, change, frozen):
    """Never silently another noise, where nothing but the checkpoint knows of a first pass too."""
    raises = change in RAISE and (change != "behind" or kind is nn.Embedding)
    expected = gradients_of(WAYS["none"], kind, frozen, CHANGES["nothing"])
    for way in sorted(set(WAYS) - {"none"}):
        # torch.autograd.grad reaches no node of the embedding, and no reentrant checkpoint
        for alone in (False, True) if way in NOT_REENTRANT else (False,):
            try:
                found = gradients_of(WAYS[way], kind, frozen, BETWEEN[change], alone)
            except RuntimeError as error:
                said = "NEFTune was taken off|number of tensors|found in storage|first pass had no"
                assert raises and re.search(said, str(error)), way
                continue
            assert not raises and all(map(torch.equal, found, expected)), way


@pytest.mark.parametrize("way", sorted(set(WAYS) - {"none"}))
@pytest.mark.parametrize("kind", KINDS)
def test_noise_that_comes_before_the_backward(kind, way):
    """Where a site knows that its first pass had none, the second has none; else it raises."""

    def gradient(handle_of, come):
        torch.manual_seed(0)
        model = Segment(kind, True, WAYS[way]).train()
        handle = handle_of(model)
        torch.manual_seed(7)
        out = model(IDS, MASK)
        come(model, handle)
        out.sum().backward()
        return model.mix.weight.grad

    clean = gradient(lambda model: None, CHANGES["nothing"])
    try:
        found = gradient(
            lambda model: apply_neftune(model, 0.0, embedding_multiplier=1.0),
            CHANGES["alpha"],
        )
        assert way in NOT_REENTRANT and torch.equal(found, clean)
    except RuntimeError as error:
        assert way not in NOT_REENTRANT
        assert "recomputes the embedding inside backward" in str(error)
    with pytest.raises(RuntimeError, match="recomputes the embedding inside backward"):
        gradient(
            lambda model: None,
            lambda model, handle: apply_neftune(model, 5.0, embedding_multiplier=1.0),
        )


def test_a_first_pass_without_noise_and_one_with_it_of_one_seed():
    """Which one is recomputed cannot be known."""
    model = Segment(nn.Embedding, True, WAYS["non-reentrant"]).train()
    handle = apply_neftune(model, 5.0, embedding_multiplier=1.0)
    for first, second in ((5.0, 0.0), (0.0, 5.0)):
        outputs = []
        for alpha in (first, second):
            handle.noise_alpha = alpha
            torch.manual_seed(7)
            outputs.append(model(IDS, MASK))
        with pytest.raises(RuntimeError, match="drew the same seed.*seed them differently"):
            sum(outputs).sum().backward()


def eager_and_compiled():
    """A segment with frozen embeddings and its handle, each alike, and what to call."""
    torch._dynamo.reset()
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Segment(nn.Embedding, True, WAYS["none"]).train()
        handle = apply_neftune(model, 5.0, embedding_multiplier=1.0)
        torch.manual_seed(7)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        yield model, handle, run, compiled


@pytest.mark.parametrize("change", ["nothing", "alpha", "sign", "off", "mode", "remove"])
def test_compiled_code_in_a_checkpoint_is_right_or_raises(change):
    """It runs again with the settings of then; only its draw and the checkpoint can tell."""
    gradients = []
    for model, handle, run, compiled in eager_and_compiled():
        out = checkpoint(run, IDS, MASK, use_reentrant=False)
        if compiled:
            BETWEEN[change](model, handle)
            if change != "nothing":
                with pytest.raises(RuntimeError, match="has other settings than|number of tensors"):
                    out.sum().backward()
                return
        out.sum().backward()
        gradients.append(model.mix.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("then", ["inside", "told again", "outside", "told otherwise"])
def test_compiled_code_in_a_checkpoint_that_was_told_is_right_or_raises(then):
    """The same tensors, in whichever `with`."""
    gradients = []
    for model, handle, run, compiled in eager_and_compiled():
        with handle.told(attention_mask=MASK):
            out = checkpoint(run, IDS, use_reentrant=False)
            if then == "inside":
                out.sum().backward()
        if then == "told again":
            with handle.told(attention_mask=MASK):
                out.sum().backward()
        if then in ("outside", "told otherwise"):
            told = handle.told(attention_mask=MASK.flip(0))
            with told if then == "told otherwise" else contextlib.nullcontext():
                if compiled:
                    with pytest.raises(RuntimeError, match=r"is told\(\) of other samples"):
                        out.sum().backward()
                    return
                out.sum().backward()
        gradients.append(model.mix.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("frozen", [True, False])
def test_what_was_told_is_told_again(frozen):
    """Though nobody tells it any more."""
    gradients = []
    for way in ("none", "non-reentrant", "reentrant"):
        torch.manual_seed(0)
        model = Segment(nn.Embedding, frozen, WAYS[way]).train()
        handle = apply_neftune(model, 5.0, noise_without_grad=True, embedding_multiplier=1.0)
        torch.manual_seed(7)
        with handle.told(attention_mask=MASK):
            out = model.forward(IDS)
        with handle.told(attention_mask=MASK.flip(0)):
            out.sum().backward()
        gradients.append(model.mix.weight.grad)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("way", ("non-reentrant", "reentrant"))
def test_first_passes_of_a_frozen_embedding_go_with_their_graph(way):
    model = Segment(nn.Embedding, True, WAYS[way]).train()
    handle = apply_neftune(model, 5.0, noise_without_grad=True, embedding_multiplier=1.0)
    firsts = model.embed._neftune.firsts
    outputs = [model(IDS, MASK) for _ in range(100)]
    assert len(firsts) == 100
    handle.noise_alpha = 1.0
    outputs[0].sum().backward()
    del outputs
    assert len(firsts) == 0
    with torch.no_grad():
        model(IDS, MASK)
    model.way = WAYS["none"]
    hooks = torch.autograd.graph.save_on_cpu()  # as an offloader keeps his
    with hooks:
        for _ in range(100):
            model(IDS, MASK)
    assert len(firsts) == AT_HOOKS


def test_two_first_passes_of_one_seed_and_another_alpha_raise():
    model = Checkpointed(inside=True).train()
    handle = apply_neftune(model, 5.0)
    first = forward(model, True)
    again = forward(model, True)
    first.sum().backward()  # the same noise: either is right
    handle.noise_alpha = 6.0
    other = forward(model, True)
    with pytest.raises(RuntimeError, match="drew the same seed.*seed them differently"):
        (again.sum() + other.sum()).backward()


def test_first_passes_go_with_their_graph():
    model = Checkpointed(inside=True).train()
    apply_neftune(model, 5.0)
    out = forward(model, True)
    firsts = model.embed._neftune.firsts
    assert len(firsts) == 1
    del out
    assert len(firsts) == 0
    called(model)
    model.inside = False
    out = called(model)
    assert len(firsts) == 0 and out.requires_grad, "nothing is kept without a checkpoint"


def test_warnings_of_a_clean_step_are_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in KINDS:
            model = Checkpointed(kind, True).train()
            with apply_neftune(model, 5.0, embedding_multiplier=1.0):
                forward(model, True).sum().backward()
