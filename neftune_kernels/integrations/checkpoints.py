"""The first pass of a checkpointed lookup, kept for the pass that recomputes it in backward.

Recomputing restores the generator, so both passes draw one seed: that is how they know each other.
The second pass takes alpha, sign and samples of the first, whatever has changed since.
"""

import weakref
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..noise import Noise, seed_tensor
from ..samples import Samples
from ..torch_internals import in_backward, saved_tensors_hooked

Key = tuple[Any, ...]
WITHOUT_GRADIENT = 64  # first passes kept that no node of a graph keeps alive

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


class _FirstPass:
    def __init__(self, given: Given, owner: "FirstPasses") -> None:
        self.given = given
        self.owner = owner
        self.ambiguous = False

    def check(self, _: Any) -> None:
        """Hook of the lookup's node in the graph."""
        if self.owner.removed:
            raise RuntimeError(REMOVED)


class FirstPasses:
    """Of one site, by the place in the generator's sequence where their seeds were drawn."""

    def __init__(self) -> None:
        self.removed = False  # the site is none any more
        self._alive: weakref.WeakValueDictionary[Key, _FirstPass] = weakref.WeakValueDictionary()
        self._others: deque[_FirstPass] = deque(maxlen=WITHOUT_GRADIENT)

    def __reduce__(self) -> tuple[Any, ...]:
        return FirstPasses, ()  # a copy has no graphs

    def __len__(self) -> int:
        return len(self._alive)

    def find(self, key: Key) -> Given | None:
        first = self._alive.get(key)
        if first is None:
            return None
        if first.ambiguous:
            raise RuntimeError(TWO_WITH_ONE_SEED)
        return first.given

    def keep(self, key: Key, given: Given, output: Tensor) -> None:
        first, before = _FirstPass(given, self), self._alive.get(key)
        first.ambiguous = before is not None and not (
            _same(before.given, given) and not before.ambiguous
        )
        self._alive[key] = first
        node = output.grad_fn
        if node is None:
            self._others.append(first)
        else:
            node.register_prehook(first.check)  # which keeps it while the graph is there


def _same(one: Given, other: Given) -> bool:
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


def may_be_recomputed() -> bool:
    """Whether this lookup may be a checkpoint's first pass: non-reentrant ones hook saved tensors,
    reentrant ones run without grad.
    """
    return saved_tensors_hooked() or not torch.is_grad_enabled()


def draw(device: torch.device, keyed: bool) -> tuple[Tensor, Key]:
    """The seed of a lookup, and if `keyed` the place where it was drawn, without a synchronisation
    on CUDA.
    """
    place: Key = ()
    if keyed and device.type == "cuda":
        generator = torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ]
        place = (device.index, generator.initial_seed(), generator.get_offset())
    seed = seed_tensor(None, None, device)
    return seed, (place or (int(seed),)) if keyed else ()


def draw_again(passes: FirstPasses, device: torch.device) -> tuple[Tensor, Given] | None:
    """Seed and noise of the first pass that a pass without noise recomputes, if there is one; else
    the generator is left as it was.
    """
    if not in_backward() or not len(passes):
        return None
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    state = module.get_rng_state()
    seed, key = draw(device, True)
    given = passes.find(key)
    if given is None:
        module.set_rng_state(state)
        return None
    return seed, given
