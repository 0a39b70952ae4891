"""The first pass of a checkpointed lookup, kept for the pass that recomputes it in backward.

Recomputing restores the generator, so both passes draw one seed: that is how they know each other.
The second pass takes alpha, sign and samples of the first, whatever has changed since, and where we
are no longer asked, what autograd keeps of the first pass makes the backward raise.
"""

import inspect
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..capturable import in_capture
from ..noise import Noise, seed_tensor
from ..samples import Samples
from ..torch_internals import NO_BACKWARD, backward_task, saved_tensors_hooks, transformed

Key = tuple[Any, ...]
AT_HOOKS = 64  # first passes kept by one pair of hooks: who offloads tensors keeps his for ever

CHANGED = (
    "a checkpoint recomputes the embedding inside backward, but its first pass had no noise that "
    "could be found again: the noise was off then, apply_neftune came after it, or the checkpoint "
    "does not restore the generator (preserve_rng_state=False). Change noise between steps, not "
    "between a forward and its backward, or keep the embedding out of the checkpointed segment"
)
NO_GRAD = (
    "a reentrant checkpoint recomputes the embedding inside backward with noise, but "
    "ran it without grad, and so without "
    "noise, before: apply_neftune(..., noise_without_grad=True), use_reentrant=False, "
    "or keep the embedding out of the segment"
)
TWO_WITH_ONE_SEED = (
    "a checkpoint recomputes the embedding inside backward, but two of its forwards drew the same "
    "seed and had other samples or another alpha, so which one is recomputed cannot be known: seed "
    "them differently"
)
OTHER_SETTINGS = (
    "a checkpoint recomputes compiled code inside backward, and NEFTune has other settings than in "
    "its first pass, or is told() of other samples: change them between steps, not between a "
    "forward and its backward, and call backward() inside `with handle.told(...)`"
)
REMOVED = (
    "NEFTune was taken off the model between a checkpointed forward and its backward, which would "
    "recompute the forward without its noise: call remove() after the backward"
)


class Given(NamedTuple):
    """What one lookup is given of noise."""

    samples: Samples
    noise: Noise
    noise_alpha: float  # of the samples' magnitudes, as stats() tells it
    follows: bool  # it looks up something besides its forward's tokens: LED's padding of its window
    key: Key = ()  # of a first pass, where its seed was drawn
    factors: Tensor | None = None  # that divide the noise of each row, or token, where no one does
    lasting: Noise | None = None  # of an alpha that may be written to: the same with the host's


class FirstPass:
    """One lookup; given None: it had no noise; anything else: the settings of compiled code."""

    def __init__(self, given: Any, owner: "FirstPasses") -> None:
        self.given = given
        self.owner = owner
        self.ambiguous = False

    def check(self, _: Any) -> None:
        """Hook of a node in the graph."""
        if self.owner.removed:
            raise RuntimeError(REMOVED)


# By the hooks of saved tensors, which a checkpoint's graph keeps.
_by_hooks: "weakref.WeakKeyDictionary[Any, deque[FirstPass]]" = weakref.WeakKeyDictionary()


class FirstPasses:
    """Of one site, by the place in the generator's sequence where their seeds were drawn. They go
    with the graph that would recompute them.
    """

    def __init__(self) -> None:
        self.removed = False  # the site is none any more
        self._alive: weakref.WeakValueDictionary[Key, FirstPass] = weakref.WeakValueDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return FirstPasses, ()  # a copy has no graphs

    def __len__(self) -> int:
        return len(self._alive)

    def find(self, key: Key) -> FirstPass | None:
        first = self._alive.get(key)
        if first is not None and first.ambiguous:
            raise RuntimeError(TWO_WITH_ONE_SEED)
        return first

    def keep(self, key: Key, given: Any, output: Tensor | None = None) -> None:
        first, before = FirstPass(given, self), self._alive.get(key)
        first.ambiguous = before is not None and not (
            _same(before.given, given) and not before.ambiguous
        )
        self._alive[key] = first
        if output is not None and output.grad_fn is not None:
            output.grad_fn.register_prehook(first.check)  # which keeps it while the graph is there
        elif torch.is_grad_enabled():
            hooks = saved_tensors_hooks()
            if hooks is not None:
                _by_hooks.setdefault(hooks[1], deque(maxlen=AT_HOOKS)).append(first)
        else:
            _keep_by_reentrant(first)


def _keep_by_reentrant(first: FirstPass) -> None:
    """A reentrant checkpoint is an autograd.Function whose forward runs without grad: the node that
    it is going to be stands in its frame.
    """
    frame = inspect.currentframe()
    frame = None if frame is None else frame.f_back
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            node = frame.f_locals.get(code.co_varnames[0])
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                node.register_prehook(first.check)
        frame = frame.f_back


def save_one_more() -> None:
    """Saves a tensor where autograd counts them: a non-reentrant checkpoint whose second pass no
    longer comes to us then finds one less than its first saved, and raises.
    """
    if torch.is_grad_enabled() and not transformed() and saved_tensors_hooks() is not None:
        torch.ones((), requires_grad=True, device="cpu").exp()


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Given) or not isinstance(other, Given):
        return bool(one == other)
    if (one.noise.variant, one.noise.offsets, one.noise.backend) != (
        other.noise.variant,
        other.noise.offsets,
        other.noise.backend,
    ) or not torch.equal(one.noise.alpha, other.noise.alpha):
        return False
    return all(
        a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
        for a, b in zip(one.samples[:6], other.samples[:6], strict=True)
    )


def may_be_recomputed(device: torch.device) -> bool:
    """Whether this lookup may be a checkpoint's first pass: non-reentrant ones hook saved tensors,
    reentrant ones run without grad. In a capture nobody may ask where the generator stands, so a
    second pass there finds no first and raises.
    """
    hooked = not torch.is_grad_enabled() or saved_tensors_hooks() is not None
    return hooked and not in_capture(device)


def _place(device: torch.device) -> Key:
    """Of the generator, where it can be known without a synchronisation; else empty."""
    if device.type != "cuda":
        return ()
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    return device.index, generator.initial_seed(), generator.get_offset()


def draw(device: torch.device, keyed: bool, owner: str = "") -> tuple[Tensor, Key]:
    """The seed of a lookup, and if `keyed` the place where it was drawn."""
    place = _place(device) if keyed else ()
    seed = seed_tensor(None, None, device, owner)
    return seed, (place or (int(seed),)) if keyed else ()


def drawn_in_compiled_code(passes: FirstPasses, settings: Any, seed: Tensor) -> None:
    """Compiled code takes the settings of when it runs: where a checkpoint runs it again after they
    have changed, this raises.
    """
    hooks = saved_tensors_hooks()
    recomputing = backward_task() != NO_BACKWARD
    if (not recomputing and hooks is None) or in_capture(seed.device):
        return
    key = _place(seed.device) or (int(seed),)
    if recomputing:
        first = passes.find(key)
        if first is not None and first.given != settings:
            raise RuntimeError(OTHER_SETTINGS)
    else:
        with torch.enable_grad():  # an operator runs without
            passes.keep(key, settings)
    if hooks is not None:  # and below autograd
        hooks[0](torch.ones((), device="cpu"))


def at_place(device: torch.device) -> tuple[Key, Callable[[], None]]:
    """The place at which the generator stands, having drawn there, and how to put it back."""
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    state = module.get_rng_state()
    return draw(device, True)[1], lambda: module.set_rng_state(state)


def draw_again(passes: FirstPasses, device: torch.device) -> FirstPass | None:
    """The first pass that this one inside backward recomputes, if it is known. The generator is
    left where that pass left it.
    """
    if not len(passes):
        return None
    key, put_back = at_place(device)
    try:
        first = passes.find(key)
    except RuntimeError:
        put_back()
        raise
    if first is None or first.given is None:
        put_back()
    return first


def keep_without_noise(passes: FirstPasses, device: torch.device) -> None:
    """A first pass that has no noise, so that its second has none."""
    if torch.is_grad_enabled() and may_be_recomputed(device):
        key, put_back = at_place(device)
        put_back()
        passes.keep(key, None)
