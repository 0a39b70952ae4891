"""KeyboardInterrupt at any line of apply, forward, backward or remove: what comes next makes the
model exactly the clean one.
"""

import copy
import functools
import io
import pickle
import random
import sys
import warnings

import pytest
import torch
from torch import nn

import neftune_kernels
from neftune_kernels import apply_neftune, neftune_noise
from neftune_kernels.integrations import probe
from neftune_kernels.integrations.running import RUNNING

VOCAB, HIDDEN, FACTOR = 16, 8, 4.0
IDS = torch.tensor([[1, 2, 3], [4, 5, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
OURS = neftune_kernels.__path__[0]
SAMPLE = 200
SLACK = 8  # lines more or less by what Python has cached


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Tiny models: threads would only wait for each other."""
    threads(1)


class Embedding(nn.Embedding):
    """A forward of its own: its noise is added behind it."""

    def forward(self, input):
        return super().forward(input) * 2.0


class Inner(nn.Module):
    """Multiplies by its `factor`, which apply_neftune finds by a look at it."""

    def __init__(self, kind):
        super().__init__()
        self.embed = kind(VOCAB, HIDDEN)
        self.factor = FACTOR
        self.norm = nn.BatchNorm1d(HIDDEN)  # a buffer that a look moves and puts back
        self.head = nn.Identity()

    def forward(self, input_ids, attention_mask=None):
        inputs_embeds = self.embed(input_ids)
        inputs_embeds = inputs_embeds * self.factor
        self.norm(inputs_embeds.transpose(1, 2))
        return self.head(inputs_embeds)


class Outer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner = Inner(kind)

    def get_input_embeddings(self):
        return self.inner.embed

    def forward(self, input_ids, attention_mask=None):
        return torch.utils.checkpoint.checkpoint(
            self.inner, input_ids, attention_mask, use_reentrant=False
        ).square()


def build(kind):
    probe.KEPT.clear()  # so that each is looked at
    torch.manual_seed(0)
    return Outer(kind).train()


def life(model, kept):
    """Everything in which an interrupt may fall."""
    kept.append(apply_neftune(model, 5.0))
    model(IDS, MASK).sum().backward()
    kept[0].noise_alpha = 2.0
    kept[0].remove()


def everything(model):
    """Class, hooks and attributes of every module."""
    hooks = [key for key in vars(model) if "hooks" in key]
    return {
        name: (type(module), [list(vars(module)[key]) for key in hooks], sorted(vars(module)))
        for name, module in model.named_modules()
    }


class Interrupt:
    """Trace function: KeyboardInterrupt before the n-th line that runs in our package, or in torch
    where a line of ours registers hooks; counts them all without an n.
    """

    FILES = (OURS, nn.Module.register_forward_hook.__code__.co_filename)

    def __init__(self, n=None):
        self.n = n
        self.lines = 0

    def __call__(self, frame, event, arg):
        name = frame.f_code.co_filename
        ours = name.startswith(OURS) or frame.f_code.co_name.startswith("register_forward_")
        return self.line if ours and name.startswith(self.FILES) else None

    def line(self, frame, event, arg):
        if event == "line":
            self.lines += 1
            if self.lines == self.n:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.line

    def run(self, function):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


@functools.cache
def lines(kind):
    counter = Interrupt()
    life(build(kind), [])  # imports and caches are no lines of ours
    model = build(kind)
    assert not counter.run(lambda: life(model, []))
    return counter.lines


def noise_is_exact(model):
    """One noisy forward of an applied model, against the formula."""
    out = []
    hook = model.inner.register_forward_hook(lambda module, args, output: out.append(output))
    model(IDS, MASK)
    hook.remove()
    seed = model.inner.embed._neftune.last.noise.seed
    noise = neftune_noise(IDS.shape, HIDDEN, 5.0, attention_mask=MASK, seed=seed)
    model.eval()
    clean = model.inner(IDS, MASK)
    model.train()
    return torch.equal(out[-1], clean + noise)  # the first may be of a look at the model


def check(kind, n, then):
    model, kept = build(kind), []
    clean, filters = everything(model), list(warnings.filters)
    interrupted = Interrupt(n).run(lambda: life(model, kept))
    assert interrupted or n > lines(kind) - SLACK
    assert torch.is_grad_enabled() and not torch._C._len_torch_function_stack()
    assert warnings.filters == filters, "what a look sets is put back"
    if then == "deepcopy":
        model = copy.deepcopy(model)
    elif then == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    if then == "remove" and kept:
        kept[0].remove()
    else:
        handle = apply_neftune(model, 5.0)
        assert noise_is_exact(model), "the next apply_neftune is as on a clean model"
        handle.remove()
    assert everything(model) == clean
    assert model.inner.factor == FACTOR
    fresh = build(kind)
    assert torch.equal(model(IDS, MASK), fresh(IDS, MASK))
    assert torch.equal(model.eval()(IDS, MASK), fresh.eval()(IDS, MASK))
    assert not RUNNING.forwards


def test_an_apply_that_was_interrupted_is_not_put_back():
    """By the exit of the next, wherever it was before its handle was complete."""

    class InApply(Interrupt):
        def line(self, frame, event, arg):
            self.function = frame.f_code.co_name
            return super().line(frame, event, arg)

    n = 1
    while True:
        model = build(nn.Embedding)
        clean, interrupt = everything(model), InApply(n)
        if not interrupt.run(lambda model=model: apply_neftune(model, 5.0)):
            break
        if interrupt.function != "apply_neftune":  # else it may have come to its end
            with apply_neftune(model, 2.0):
                pass
            assert everything(model) == clean, n
        n += 17


ENDS = ("apply", "remove", "deepcopy", "pickle")
KINDS = (nn.Embedding, Embedding)


def points():
    drawn = random.Random(22)
    for _ in range(SAMPLE):
        yield drawn.choice(KINDS), drawn.random(), drawn.choice(ENDS)


def test_an_interrupt_at_a_sample_of_lines():
    for kind, where, then in points():
        check(kind, 1 + int(where * lines(kind)), then)


def test_a_look_that_an_interrupt_left_is_pickled():
    model = build(nn.Embedding)
    clean = everything(model)
    watch = probe._Watch([model.inner.embed], {})
    watch.lookups.append(probe._Lookup(model.inner.embed, torch.ones(1, 2, HIDDEN)))
    model.inner.register_forward_pre_hook(watch.entered, with_kwargs=True)
    model = pickle.loads(pickle.dumps(model))
    apply_neftune(model, 5.0).remove()
    assert everything(model) == clean


@pytest.mark.long
@pytest.mark.parametrize("then", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_at_every_line(kind, then):
    for n in range(1, lines(kind) + 1):
        check(kind, n, then)
