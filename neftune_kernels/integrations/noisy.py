"""A noisy embedding: its class swapped for a subclass of its own, and back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import choose_backend
from ..distributed import (
    class_without_noise,
    is_tensor_parallel_forward,
    replicated,
    shared_seed,
)
from ..lookup import PLAIN_WEIGHTS, noisy_lookup
from ..modules import HUGGING_FACE_MARK, TWO_NOISES
from ..noise import Offsets, make_noise, seed_tensor
from .find import open_wrapper
from .running import NEFTuneState, NoisyCall, Site


class NoisyEmbedding(nn.Module):
    """Mixed in before the embedding's own class, whose forward stays what it was."""

    _neftune: Site
    _neftune_base: type[nn.Module]
    _neftune_forward: Callable[..., Tensor] | None = (
        None  # the tensor-parallel plan's, which sat on the instance
    )

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        site = self.__dict__.get("_neftune")
        if site is None:  # a tensor-parallel plan keeps calling this method after remove()
            return type(self).forward(self, input, *args, **kwargs)
        state = site.state
        look_up = self._neftune_forward or super().forward
        reason = state.skip_reason(self)
        if reason is not None:
            if not torch.compiler.is_compiling():
                state.skipped[reason] += 1
                state.skipped_last = reason
            plain = look_up(input, *args, **kwargs)
            return (
                plain
                if not site.running or site.running[-1].scale == 1
                else plain * site.running[-1].scale
            )
        if HUGGING_FACE_MARK in self.__dict__ or site.marked():
            raise RuntimeError(TWO_NOISES)
        if getattr(self, "_is_replica", False) and state.replica is None:
            raise RuntimeError(
                "nn.DataParallel runs its replicas in threads that share one mask and one seed: "
                "use DistributedDataParallel, or NEFTuneEmbedding with another replica= in each"
            )
        if not torch.compiler.is_compiling():
            site.check_recomputation()
        base: Any = self if isinstance(self, nn.Embedding) else open_wrapper(self)
        weight, padding_idx = base.weight, -1 if base.padding_idx is None else base.padding_idx
        samples = site.samples(input, padding_idx)
        scale, divisor = site.outer_scale()
        alpha = state.alpha if divisor == 1 else state.alpha / divisor
        if type(weight) not in PLAIN_WEIGHTS:
            samples = replicated(samples)
        replica = state.resolve_replica(base)
        seed = shared_seed(seed_tensor(None, None, weight.device), weight)
        noise = make_noise(alpha, seed, None, Offsets(replica), state.variant, state.backend)
        plain = self._neftune_base.forward is nn.Embedding.forward and not self._neftune_forward
        own = None if plain else partial(look_up, input, *args, **kwargs)
        noisy = noisy_lookup(base, input, samples, noise, scale, own)
        if not torch.compiler.is_compiling() and not site.follows:
            state.calls += 1
            state.skipped_last = None
            # A quantised weight's own dtype says nothing.
            chosen = choose_backend(state.backend, weight.device, noisy.dtype)
            alpha_of_call = state.noise_alpha / divisor
            site.last = NoisyCall(
                input.shape, base.embedding_dim, alpha_of_call, samples, noise, chosen
            )
        return noisy

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild_noisy, (self._neftune_base,), self.__dict__


_noisy_classes: dict[type, Any] = {}


def _noisy_class(base: type[nn.Module]) -> Any:
    if base not in _noisy_classes:
        _noisy_classes[base] = type(
            f"Noisy{base.__name__}",
            (NoisyEmbedding, base),
            {"_neftune_base": base, "__module__": __name__},
        )
    return _noisy_classes[base]


def _rebuild_noisy(base: type[nn.Module]) -> nn.Module:
    """Pickle and deepcopy: the class is made at run time, so it cannot be found by name."""
    made: Any = _noisy_class(base)
    rebuilt: nn.Module = made.__new__(made)
    return rebuilt


def make_noisy(module: nn.Module, state: NEFTuneState) -> Site:
    if not isinstance(module, NoisyEmbedding):
        module.__class__ = _noisy_class(type(module))
        if "forward" in module.__dict__:
            module.__dict__["_neftune_forward"] = module.__dict__.pop("forward")
    site: Site | None = module.__dict__.get("_neftune")
    if (
        site is None or site.state is not state
    ):  # a copy that PEFT or deepcopy made of a noisy one comes with a state of its own
        site = Site(state)
        module.__dict__["_neftune"] = site
    return site


def class_to_restore(module: NoisyEmbedding) -> type | None:
    """None where something else has put its hands on the module since."""
    if "forward" in module.__dict__ and not is_tensor_parallel_forward(module.__dict__["forward"]):
        return None
    if type(module) is _noisy_class(module._neftune_base):
        return module._neftune_base
    return class_without_noise(type(module), module._neftune_base)


def make_plain(module: NoisyEmbedding) -> None:
    base = class_to_restore(module) or module._neftune_base
    own_forward = module.__dict__.pop("_neftune_forward", None)
    module.__dict__.pop("_neftune", None)
    module.__class__ = base  # type: ignore[assignment]
    if own_forward is not None:
        module.__dict__["forward"] = own_forward
