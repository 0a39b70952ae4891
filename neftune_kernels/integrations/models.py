"""apply_neftune: noise in the input embeddings of a model that somebody else wrote, with the
samples its own forward is told.

The embedding keeps its object, Parameter, hooks and ties: only its class is swapped for a subclass
of its own class, and undo swaps it back. Pre-hooks on the models around it take the attention mask,
position ids or cumulative lengths as they arrive. Nothing here imports transformers.
"""

import dis
import inspect
import itertools
import re
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .. import layout as layouts
from ..backends import Backend, choose_backend
from ..distributed import (
    class_without_noise,
    data_parallel_index,
    is_tensor_parallel_forward,
    replicated,
    shared_seed,
)
from ..lookup import PLAIN_WEIGHTS, embeds_with_noise, noisy_lookup
from ..modules import HUGGING_FACE_MARK, TWO_NOISES, NEFTuneEmbedding
from ..noise import (
    UNIFORM,
    Noise,
    Offsets,
    check_alpha,
    check_variant,
    check_word,
    make_noise,
    refuse_unknown,
    seed_tensor,
)
from ..samples import UNSAID, Samples, make_layout, real_tokens
from ..torch_internals import asked_outside_the_graph, in_backward
from .arguments import (
    from_arguments,
    from_callable,
    parameter_names,
    tells_samples,
    trailing_padding,
)


class NoisyCall(NamedTuple):
    """What it takes to compute the last call's noise again, when somebody asks for statistics."""

    shape: torch.Size
    embedding_dim: int
    noise_alpha: float
    samples: Samples
    noise: Noise
    backend: Backend


class NEFTuneState:
    """Settings and counters of one apply_neftune; shared by its embeddings and hooks, copied with
    them by deepcopy and pickle.
    """

    def __init__(self) -> None:
        self.noise_alpha = 0.0
        self.alpha = torch.zeros((), dtype=torch.float64, device="cpu")
        self.has_noise = False
        self.replica: int | None = None
        self.noise_without_grad = False
        self.backend: str | None = None
        self.variant = UNIFORM
        self.read: Callable[[dict[str, Any]], Any] | None = (
            None  # the user's own reading of a forward's arguments
        )
        self.skipped_last: str | None = None
        self.calls = self.calls_before = 0
        self.running: list[
            Running
        ] = []  # forwards of hooked models that are running, one inside the other
        self.skipped: Counter[str] = Counter()
        self.warned: set[str] = set()
        self.handle: NEFTuneHandle | None = None
        self.handle_number = -1

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "handle": None,
            "handle_number": -1,
            "running": [],
        }  # a copy is not steered by our handle

    def set_alpha(self, noise_alpha: float | None) -> None:
        self.noise_alpha = check_alpha(noise_alpha)
        self.has_noise = self.noise_alpha > 0
        self.alpha = torch.full((), self.noise_alpha, dtype=torch.float64, device="cpu")

    def warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=3)

    def resolve_replica(self, embedding: nn.Module) -> int:
        if self.replica is not None:
            return self.replica
        return data_parallel_index(
            embedding.weight,  # type: ignore[arg-type]
            embedding,
            None if self.handle is None else self.handle.root(),
        )

    def skip_reason(self, embedding: nn.Module) -> str | None:
        if not embedding.training:
            return "eval mode"
        if not self.has_noise:
            return "noise_alpha is 0"
        if not self.noise_without_grad and not torch.is_grad_enabled():
            return "no grad"
        return None


class Running:
    """A running forward of a model around the embedding, and what it was told."""

    def __init__(
        self, model: nn.Module, samples: Samples, decoder: bool, pad_token_id: int | None
    ) -> None:
        self.model, self.samples, self.decoder, self.pad_token_id = (
            model,
            samples,
            decoder,
            pad_token_id,
        )
        self.used = False  # an embedding call has taken these samples
        self.scale = (
            1.0  # what this model would multiply embeddings by, taken over by the noisy embedding
        )


class Site:
    """One noisy embedding: the forwards around it that are running, the innermost last, and its
    last call.
    """

    def __init__(self, state: NEFTuneState) -> None:
        self.state = state
        self.hooked = False  # a model around the embedding tells us its samples
        self.running: list[Running] = []
        self.wrappers: list[weakref.ref[nn.Module]] = []  # PEFT's layers around the embedding
        self.scaling: tuple[weakref.ref[nn.Module], str] | None = (
            None  # who multiplies embeddings afterwards, and its factor's name
        )
        self.last: NoisyCall | None = None
        # the running call looks up something besides its forward's tokens: LED's padding of its
        # window
        self.follows = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "running": [], "wrappers": [], "scaling": None, "last": None}

    def marked(self) -> bool:
        return any(hasattr(wrapper(), HUGGING_FACE_MARK) for wrapper in self.wrappers)

    def check_recomputation(self) -> None:
        """Inside backward a checkpointed segment runs again: it must see what it saw first."""
        if not in_backward():
            return
        if self.state.skipped_last == "no grad":
            raise RuntimeError(
                "a reentrant checkpoint recomputes the embedding inside backward with noise, but "
                "ran it without grad, and so without "
                "noise, before: apply_neftune(..., noise_without_grad=True), use_reentrant=False, "
                "or keep the embedding out of the segment"
            )
        if self.hooked and not self.running:
            raise RuntimeError(
                "a checkpoint recomputes the embedding inside backward, outside the forward of "
                "the model that knows the samples' lengths, "
                "so its noise would change: keep the embedding out of the checkpointed segment"
            )

    def samples(self, input: Tensor, padding_idx: int) -> Samples:
        """Those of the innermost running forward, where they fit the ids."""
        self.follows = False
        if not self.running:
            if self.hooked:
                self.state.warn_once(
                    "the noisy embedding was called outside its model's forward, so the lengths "
                    "of the samples are unknown and every token "
                    "but padding_idx counts as real: use neftune_kernels.add_noise with an "
                    "attention_mask there, or, where PEFT has "
                    "wrapped the model (prompt tuning), call apply_neftune again after "
                    "get_peft_model"
                )
            return real_tokens(input, padding_idx, UNSAID)
        running = self.running[-1]
        # An outer model may be told what it does not pass on (Rwkv).
        if not running.decoder:
            outer = (one for one in reversed(self.running) if not one.samples.padding_unsaid)
            running = next(outer, running)
        told = running.samples
        if told.padding_unsaid:
            if (
                running.decoder
                and (samples := trailing_padding(input, running.pad_token_id)) is not UNSAID
            ):
                return samples._replace(noise_mask=told.noise_mask)
            return real_tokens(input, padding_idx, told)
        mask = told.attention_mask
        if mask is not None and mask.shape != input.shape:
            if mask.numel() == input.numel() and (
                mask.shape[-1] == input.shape[-1] or 1 in (mask.dim(), input.dim(), input.shape[0])
            ):
                mask = mask.reshape(input.shape)  # flattened or not, never transposed
            elif running.used:
                self.follows = True
                return real_tokens(input, padding_idx, UNSAID)
            else:
                self.state.warn_once(
                    f"an attention_mask of shape {tuple(mask.shape)} does not fit the embedding's "
                    f"input {tuple(input.shape)}: every token "
                    "but padding_idx counts as real. Tell NEFTune the samples with "
                    "apply_neftune(..., samples=...)"
                )
                return real_tokens(input, padding_idx, UNSAID)
            told = told._replace(attention_mask=mask)
        running.used = True
        return told

    def outer_scale(self) -> tuple[float, float]:
        """(factor of the embedding that this call takes over, divisor of its noise) where the model
        scales embeddings afterwards.
        """
        if self.running and self.running[-1].scale != 1:
            return self.running[-1].scale, 1.0
        if self.scaling is None or (model := self.scaling[0]()) is None:
            return 1.0, 1.0
        return 1.0, float(getattr(model, self.scaling[1]))


class _Noisy(nn.Module):
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
        base: Any = self if isinstance(self, nn.Embedding) else _open_wrapper(self)
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
            f"Noisy{base.__name__}", (_Noisy, base), {"_neftune_base": base, "__module__": __name__}
        )
    return _noisy_classes[base]


def _rebuild_noisy(base: type[nn.Module]) -> nn.Module:
    """Pickle and deepcopy: the class is made at run time, so it cannot be found by name."""
    made: Any = _noisy_class(base)
    rebuilt: nn.Module = made.__new__(made)
    return rebuilt


class _TakeSamples:
    """Forward pre-hook of a model around embeddings: what it is told of its samples."""

    def __init__(self, state: NEFTuneState, names: tuple[str, ...]) -> None:
        self.state, self.names = state, names
        self.sites: list[Site] = []
        self.decoder = False  # of an encoder-decoder
        self.pad_token_id: int | None = None
        self.factor: str | None = (
            None  # name of the number that this model multiplies embeddings by
        )
        self.true_factor = 1.0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.state
        if state.running and not torch.compiler.is_compiling():
            _forget_interrupted(state, module)
        steered = (
            not state.running and state.handle is not None and not torch.compiler.is_compiling()
        )
        # our hooks are new ones then
        if steered and state.handle.refresh():  # type: ignore[union-attr]
            fresh = (
                hook
                for hook in module._forward_pre_hooks.values()
                if isinstance(hook, _TakeSamples) and hook.state is state
            )
            return next(fresh)(module, args, kwargs)
        if torch.compiler.is_compiling() and not state.running and _has_moved(state.handle_number):
            raise RuntimeError(
                "something was put in the place of a noisy embedding since apply_neftune (PEFT's "
                "wrappers, another module), and the model "
                "is about to be traced without its noise: call apply_neftune again before compiling"
            )
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        has_embeds = (
            given.get("inputs_embeds") is not None or given.get("decoder_inputs_embeds") is not None
        )
        if not state.running:
            if has_embeds and module.training and state.has_noise and torch.is_grad_enabled():
                state.warn_once(
                    "the model was given inputs_embeds, so its embedding and its NEFTune noise "
                    "did not run: pass them through "
                    "neftune_kernels.add_noise(inputs_embeds, noise_alpha, attention_mask=...) "
                    "first"
                )
            if not torch.compiler.is_compiling():
                state.calls_before = -1 if has_embeds else state.calls
        read = state.read
        samples = (
            from_arguments(given, self.pad_token_id, state.warn_once)
            if read is None
            else from_callable(read, given)
        )
        running = Running(module, samples, self.decoder, self.pad_token_id)
        state.running.append(running)
        for site in self.sites:
            site.running.append(running)
        if self.factor is None:
            return
        if getattr(module, self.factor) != 1:
            self.true_factor = float(getattr(module, self.factor))
        noisy = not has_embeds and module.training and state.skip_reason(module) is None
        if noisy:
            running.scale = self.true_factor
        setattr(module, self.factor, 1.0 if noisy else self.true_factor)

    def end(self, module: nn.Module) -> None:
        """The forward is over: its samples are forgotten, and it multiplies embeddings by its own
        factor again.
        """
        for entered in (self.state.running, *(site.running for site in self.sites)):
            if entered and entered[-1].model is module:
                entered.pop()
        if self.factor is not None:
            setattr(module, self.factor, self.true_factor)


def _forget_interrupted(state: NEFTuneState, module: nn.Module) -> None:
    """KeyboardInterrupt runs no hook: what is entered as running, but lies on no call's path, is
    over. `module` is about to run.
    """
    calls: Counter[int] = Counter({id(module): -1})
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            calls[id(frame.f_locals["self"])] += 1
        frame = frame.f_back
    while (
        state.running
        and sum(running.model is state.running[-1].model for running in state.running)
        > calls[id(state.running[-1].model)]
    ):
        interrupted = state.running[-1].model
        for hook in interrupted._forward_pre_hooks.values():
            if isinstance(hook, _TakeSamples) and hook.state is state:
                hook.end(interrupted)
                break
        else:  # no hook of ours is left on it
            state.running.pop()


class _ForgetSamples:
    """Forward hook, called even when the forward raised."""

    def __init__(self, taken: _TakeSamples) -> None:
        self.taken = taken

    def __call__(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        state = self.taken.state
        self.taken.end(module)
        if (
            torch.compiler.is_compiling()
            or result is None
            or not (module.training and state.has_noise and torch.is_grad_enabled())
        ):
            return
        if state.calls == state.calls_before and not state.running and state.skipped_last is None:
            state.warn_once(
                "a training forward of the model ended without NEFTune noise: its noisy embedding "
                "was not called. Was it bypassed or "
                "wrapped after apply_neftune? Call apply_neftune again, or name the embedding "
                "that runs with embedding="
            )


class Found(NamedTuple):
    """An embedding to be made noisy: the module whose output gets the noise, and the wrappers
    around it.
    """

    noisy: nn.Module
    wrappers: list[nn.Module]


_numbers = itertools.count()
_handles: "weakref.WeakValueDictionary[int, NEFTuneHandle]" = (
    weakref.WeakValueDictionary()
)  # for questions asked outside the graph


@asked_outside_the_graph
def _has_moved(handle_number: int) -> bool:
    handle = _handles.get(handle_number)
    return handle is not None and handle.has_moved()


class NEFTuneHandle:
    """What apply_neftune returns: change alpha, read statistics, undo.

    Also a context manager that undoes on exit.
    """

    def __init__(self, state: NEFTuneState) -> None:
        state.handle_number = next(_numbers)
        _handles[state.handle_number] = self
        self._state: NEFTuneState | None = state
        self._roots: list[
            tuple[weakref.ref[nn.Module], str | None]
        ] = []  # weak: a handle keeps no model alive
        self._noisy: list[weakref.ref[nn.Module]] = []
        self._places: list[
            tuple[weakref.ref[nn.Module], str, weakref.ref[nn.Module]]
        ] = []  # (parent, name, child) when attached
        self._copies: list[
            tuple[weakref.ref[nn.Module], int]
        ] = []  # (PEFT's modules_to_save, how many copies it had when attached)
        self._hooks: list[tuple[weakref.ref[nn.Module], _TakeSamples, list[Any]]] = []

    def root(self) -> nn.Module | None:
        """The model applied to last, if it is alive."""
        return self._roots[-1][0]() if self._roots else None

    def add_root(self, model: nn.Module, path: str | None) -> None:
        self._roots = [(root, where) for root, where in self._roots if root() not in (None, model)]
        self._roots.append((weakref.ref(model), path))
        self.attach()

    def attach(self) -> None:
        """Find the embeddings in the models as they are now, make them noisy, and hook the models
        around them.
        """
        state = self._live_state()
        found: dict[nn.Module, Found] = {}
        listeners: dict[nn.Module, list[Site]] = {}
        places: list[tuple[weakref.ref[nn.Module], str, weakref.ref[nn.Module]]] = []
        live = [
            (root, path) for reference, path in self._roots if (root := reference()) is not None
        ]
        for root, path in live:
            found.update({one.noisy: one for one in find_embeddings(root, path)})
        for module in (reference() for reference in self._noisy):
            if isinstance(module, _Noisy) and module not in found:
                _make_plain(module)
        for module, one in found.items():
            _make_noisy(module, state).wrappers = [weakref.ref(wrapper) for wrapper in one.wrappers]
        self._noisy = [weakref.ref(module) for module in found]
        wrappers = [
            wrapper
            for one in found.values()
            for wrapper in one.wrappers
            if hasattr(wrapper, "modules_to_save")
        ]
        self._copies = [
            (weakref.ref(wrapper), len(wrapper.modules_to_save))  # type: ignore[arg-type]
            for wrapper in wrappers
        ]
        self._unhook()
        for root, _ in live:
            decoders = {id(module) for module in _decoder_of(root)}
            for name, module in list(root.named_modules(remove_duplicate=False)):
                if isinstance(module, _Noisy) and module in found:
                    ancestors = list(_ancestors(root, name))
                    places += [
                        (weakref.ref(parent), child, weakref.ref(parent._modules[child]))  # type: ignore[arg-type]
                        for parent, child in ancestors
                    ]
                    around = [parent for parent, _ in ancestors]
                    inside = [
                        parent for parent in around if id(parent) in decoders
                    ]  # what is around is told the encoder's mask
                    for parent in _speakers(inside or around, state.read is not None) or inside[:1]:
                        sites = listeners.setdefault(parent, [])
                        if module._neftune not in sites:
                            sites.append(module._neftune)
            for parent, sites in listeners.items():
                self._listen(parent, sites, id(parent) in decoders, _pad_token_id(root))
        self._places = places

    def _listen(
        self, model: nn.Module, sites: list[Site], decoder: bool, pad_token_id: int | None
    ) -> None:
        if any(
            isinstance(hook, _TakeSamples) and hook.state is self._state
            for hook in model._forward_pre_hooks.values()
        ):
            return
        _forget_hooks(model)  # of a deepcopied or unpickled model
        taken = _TakeSamples(self._live_state(), tuple(parameter_names(model)))
        taken.sites, taken.decoder, taken.pad_token_id = sites, decoder, pad_token_id
        taken.factor = _factor_of_embeddings(model)
        if taken.factor is not None:
            taken.true_factor = float(getattr(model, taken.factor))
        for site in sites:
            site.hooked = True
            if taken.factor is not None:
                site.scaling = (weakref.ref(model), taken.factor)
        hooks = [
            model.register_forward_pre_hook(taken, with_kwargs=True),
            model.register_forward_hook(_ForgetSamples(taken), always_call=True),
        ]
        self._hooks.append((weakref.ref(model), taken, hooks))

    def _unhook(self) -> None:
        for reference, taken, hooks in self._hooks:
            for hook in hooks:
                hook.remove()
            model = reference()
            if (
                model is not None and taken.factor is not None
            ):  # called inside a forward, or after one that was interrupted
                setattr(model, taken.factor, taken.true_factor)
        self._hooks = []

    def refresh(self) -> bool:
        """Attach again if something has been put in an embedding's place since: PEFT's wrappers, a
        resized or another embedding.
        """
        if not self.has_moved():
            return False
        attach = (
            torch.compiler.disable(self.attach) if "torch._dynamo" in sys.modules else self.attach
        )  # Dynamo fails inside inspect
        attach()
        return True

    def has_moved(self) -> bool:
        moved = any(
            (module := parent()) is not None and module._modules.get(name) is not child()
            for parent, name, child in self._places
        )
        return moved or any(
            (wrapper := copied()) is not None and len(wrapper.modules_to_save) != n  # type: ignore[arg-type]
            for copied, n in self._copies
        )

    def _live_state(self) -> NEFTuneState:
        if self._state is None:
            raise RuntimeError("this NEFTuneHandle was removed: call apply_neftune again")
        return self._state

    @property
    def noise_alpha(self) -> float:
        return self._live_state().noise_alpha

    @noise_alpha.setter
    def noise_alpha(self, value: float | None) -> None:
        self._live_state().set_alpha(value)
        self.refresh()

    @property
    def sign(self) -> int:
        """1 or -1: the noise as it is or negated, for antithetic pairs of forwards from one seed
        (SymNoise, arXiv 2312.01523).
        """
        return self._live_state().variant.sign

    @sign.setter
    def sign(self, value: int) -> None:
        state = self._live_state()
        state.variant = check_variant(
            state.variant.distribution, state.variant.equal_variance, value
        )

    @property
    def removed(self) -> bool:
        return self._state is None

    def settings(self) -> dict[str, Any]:
        """What apply_neftune was told, for :meth:`restore` by whoever borrows the handle."""
        state = self._live_state()
        return {
            name: getattr(state, name)
            for name in (
                "noise_alpha",
                "replica",
                "noise_without_grad",
                "backend",
                "read",
                "variant",
            )
        }

    def restore(self, settings: dict[str, Any]) -> None:
        state = self._live_state()
        state.set_alpha(settings["noise_alpha"])
        for name, value in settings.items():
            if name != "noise_alpha":
                setattr(state, name, value)

    def check_single_noise(self) -> None:
        """Raises RuntimeError where transformers' own NEFTune hook is active on an embedding of
        ours.
        """
        for module in (reference() for reference in self._noisy):
            if isinstance(module, _Noisy) and (
                HUGGING_FACE_MARK in module.__dict__ or module._neftune.marked()
            ):
                raise RuntimeError(TWO_NOISES)

    def remove(self) -> None:
        """Give the model back exactly as it was: class, forward, hooks. A second call does nothing.

        Raises:
            RuntimeError: something put on the embedding since then holds its noisy class; nothing
                is changed.
        """
        if self._state is None:
            return
        noisy = [
            module
            for module in (reference() for reference in self._noisy)
            if isinstance(module, _Noisy)
        ]
        for root in (
            reference() for reference, _ in self._roots
        ):  # copies that PEFT made of one (modules_to_save, a further adapter)
            noisy += (
                []
                if root is None
                else [module for module in root.modules() if isinstance(module, _Noisy)]
            )
        bases = {module: _class_to_restore(module) for module in noisy}
        if any(base is None for base in bases.values()):
            raise RuntimeError(
                "the embedding was parametrised or given a forward of its own (accelerate's "
                "device hooks do so) after apply_neftune: "
                "take that off first, then call remove()"
            )
        for module in bases:
            _make_plain(module)
        self._unhook()
        self._state.handle = None
        self._state = None

    def __enter__(self) -> "NEFTuneHandle":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def stats(self) -> dict[str, Any]:
        """What the noise was, computed now: nothing is counted or synchronised in forward but two
        Python integers.

        Returns:
            calls: noisy forwards of embeddings so far; skipped: those without noise by reason
                ("eval mode", "no grad", "noise_alpha is 0").
            Of the last noisy forward (of encoder and decoder together), None before one: samples
            (with a real token), length_min, length_mean, length_max (real tokens), magnitude_min,
            magnitude_mean, magnitude_max (alpha/√(L·d)), max_noise_ratio (largest
            |noise| over its sample's magnitude, below 1 if uniform) and backend. Forwards inside
            torch.compile are not counted.
        """
        state = self._live_state()
        names = (
            "length_min",
            "length_mean",
            "length_max",
            "magnitude_min",
            "magnitude_mean",
            "magnitude_max",
        )
        stats: dict[str, Any] = {
            "calls": state.calls,
            "samples": None,
            **dict.fromkeys(names),
            "max_noise_ratio": None,
            "backend": None,
        }
        stats["skipped"] = dict(state.skipped)
        modules = [
            module
            for module in (reference() for reference in self._noisy)
            if isinstance(module, _Noisy)
        ]
        lasts = [module._neftune.last for module in modules if module._neftune.last is not None]
        if not lasts:
            return stats
        measured = [_measure(last) for last in lasts]
        lengths, magnitudes = (
            torch.cat([found[0] for found in measured]),
            torch.cat([found[1] for found in measured]),
        )
        stats |= {"samples": lengths.numel(), "backend": lasts[-1].backend.name}
        if lengths.numel() == 0:
            return stats
        values = [
            float(how(tensor))
            for tensor in (lengths, magnitudes)
            for how in (torch.min, torch.mean, torch.max)
        ]
        stats |= dict(zip(names, values, strict=True))
        stats["max_noise_ratio"] = max(found[2] for found in measured)
        stats |= {"length_min": int(stats["length_min"]), "length_max": int(stats["length_max"])}
        return stats


def _measure(last: NoisyCall) -> tuple[Tensor, Tensor, float]:
    """float64 lengths and magnitudes of the call's samples with a real token, and the largest
    |noise| over its magnitude.
    """
    assert isinstance(last.noise.seed, Tensor)
    device = last.noise.seed.device
    layout = make_layout(last.shape, device, last.samples, last.backend)
    sample, _, length = layouts.per_token(layout, last.shape, device)
    real = length > 0
    # One for each sample with a real token.
    lengths = torch.stack((sample[real], length[real])).unique(dim=1)[1].double()
    if lengths.numel() == 0:
        return lengths.cpu(), lengths.cpu(), 0.0
    magnitudes = last.noise_alpha / (lengths * last.embedding_dim).sqrt()
    zeros = torch.zeros((), dtype=torch.float32, device=device)
    zeros = zeros.expand(*last.shape, last.embedding_dim)
    noise = embeds_with_noise(zeros, last.samples, last.noise._replace(backend=last.backend.name))
    bound = last.noise_alpha / (length[real].double() * last.embedding_dim).sqrt()
    largest = noise.view(-1, last.embedding_dim)[real].abs().amax(-1)
    return lengths.cpu(), magnitudes.cpu(), float((largest / bound).max())


def _make_noisy(module: nn.Module, state: NEFTuneState) -> Site:
    if not isinstance(module, _Noisy):
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


def _class_to_restore(module: _Noisy) -> type | None:
    """None where something else has put its hands on the module since."""
    if "forward" in module.__dict__ and not is_tensor_parallel_forward(module.__dict__["forward"]):
        return None
    if type(module) is _noisy_class(module._neftune_base):
        return module._neftune_base
    return class_without_noise(type(module), module._neftune_base)


def _make_plain(module: _Noisy) -> None:
    base = _class_to_restore(module) or module._neftune_base
    own_forward = module.__dict__.pop("_neftune_forward", None)
    module.__dict__.pop("_neftune", None)
    module.__class__ = base  # type: ignore[assignment]
    if own_forward is not None:
        module.__dict__["forward"] = own_forward


def _ancestors(root: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """(ancestor, name of its child on the path) from root to the module's parent."""
    module = root
    for name in path.split(".") if path else []:
        yield module, name
        module = module._modules[name]  # type: ignore[assignment]


def _speakers(ancestors: list[nn.Module], all_speak: bool) -> list[nn.Module]:
    """The ancestors to be hooked: the innermost that is told of samples, and those around it that
    may call the embedding themselves.

    transformers' outer models only pass arguments on, except those that merge images into
    embeddings; a hook on them would cost torch.compile a second graph.
    """
    telling = [model for model in ancestors if all_speak or tells_samples(model)]
    masked = [model for model in telling if all_speak or "attention_mask" in parameter_names(model)]
    telling = (
        masked or telling
    )  # BertEmbeddings is told of positions alone, the model around it of masks
    return [model for model in telling if model is telling[-1] or _may_call_embedding(model)]


def _may_call_embedding(model: nn.Module) -> bool:
    package = type(model).__module__.split(".")[0]
    if package == "transformers":
        return LOOKS_UP_INSIDE.search(
            _source_of_forward(model)
        ) is not None or not _passes_on_its_mask(model)
    return package != "peft" or bool(
        getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    )


LOOKS_UP_INSIDE = re.compile(
    r"get_input_embeddings\(\)\(|self\.\w+(\.\w+)*\.(embed_tokens|word_embeddings)\("
)


def _passes_on_its_mask(model: nn.Module) -> bool:
    forward = inspect.unwrap(type(model).forward)
    names = {
        step.argval for step in dis.get_instructions(forward) if step.opname.startswith("LOAD")
    }
    return "attention_mask" not in inspect.signature(forward).parameters or "attention_mask" in {
        n for name in names for n in _flat(name)
    }


def _flat(name: Any) -> tuple[Any, ...]:
    return (
        name if isinstance(name, tuple) else (name,)
    )  # Python 3.12 and later load two names at once


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _stack(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) and found is not model else None


def _decoder_of(model: nn.Module) -> Iterator[nn.Module]:
    """The decoder of an encoder-decoder, with all that is inside it."""
    decoder = _stack(model, "get_decoder") if _is_encoder_decoder(model) else None
    if decoder is not None:
        yield from decoder.modules()


def _pad_token_id(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    found = getattr(config, "pad_token_id", None)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


SCALED_BY_ATTRIBUTE = re.compile(
    r"(?:self\.\w+\(input_ids\)|\binputs_embeds)\s*\*=?\s*self\.(\w+)\b(?![.(\[])"
)
SCALED_BY_EXPRESSION = re.compile(
    r"self\.\w+\(input_ids\)\s*\*\s*(?!\s|self\.\w+\b(?![.(\[]))|\bhidden_states\s*\*=?\s*\(?self\.config\.|"
    r"\binputs_embeds\s*\*=?\s*(?!\s|\*|self\.\w+\b(?![.(\[]))|\bhidden_states\s*\*\s*normalizer\b"
)


TRANSPOSED = re.compile(r"\binput_ids\s*=\s*input_ids\.(transpose\(0, 1\)|t\(\))")


def _source_of_forward(model: nn.Module) -> str:
    try:
        return inspect.getsource(type(model).forward)
    except (OSError, TypeError):
        return ""


def _factor_of_embeddings(model: nn.Module) -> str | None:
    """The attribute by which a model multiplies embeddings after looking them up (Marian's
    embed_scale, Granite's embedding_multiplier).
    """
    match = SCALED_BY_ATTRIBUTE.search(_source_of_forward(model))
    if (
        match is None
        or not isinstance(getattr(model, match[1], None), (int, float))
        or getattr(model, match[1]) == 1
    ):
        return None
    return match[1]


def _unwrapped(module: Any) -> list[Any]:
    """The module and what it wraps, one inside the other: PEFT's tuner layers, its trainable
    tokens.
    """
    chain = [module]
    while True:
        inner = chain[-1].__dict__.get("_modules", {}) if isinstance(chain[-1], nn.Module) else {}
        following = inner.get("base_layer", inner.get("token_adapter"))
        if following is None:
            return chain
        chain.append(following)


def _open_wrapper(module: Any) -> Any:
    return _unwrapped(module)[-1]


def _computes_alone(module: Any) -> bool:
    """PEFT's trainable tokens look rows up in a weight of their own and never call the embedding
    that they wrap.
    """
    return "token_adapter" in module._modules or hasattr(module, "trainable_tokens_delta")


def _found(module: Any) -> Found:
    chain = _unwrapped(module)
    noisy = next((one for one in chain if _computes_alone(one)), chain[-1])
    embedding = chain[-1]
    if isinstance(embedding, NEFTuneEmbedding):
        raise ValueError(
            "the embedding is a NEFTuneEmbedding and adds noise itself: use it alone, or swap in "
            "module.to_embedding()"
        )
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"the input embedding must be an nn.Embedding, got "
            f"{type(embedding).__module__}.{type(embedding).__qualname__}: name the "
            "embedding with embedding=, or pass this one's output through "
            "neftune_kernels.add_noise(...)"
        )
    if "forward" in noisy.__dict__ and not is_tensor_parallel_forward(noisy.__dict__["forward"]):
        raise ValueError(
            "the embedding carries a forward of its own as an instance attribute (a monkey "
            "patch), which would hide the noise: apply "
            "NEFTune before it, or remove it"
        )
    return Found(noisy, chain[: chain.index(noisy)])


def _all_found(module: Any) -> list[Found]:
    """The embedding behind a module; of modules_to_save the original and every copy."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        return [
            Found(one.noisy, [module, *one.wrappers])
            for one in (
                _found(inner)
                for inner in (module.original_module, *module.modules_to_save.values())
            )
        ]
    return [_found(module)]


def find_embeddings(model: nn.Module, path: str | None) -> list[Found]:
    """The embeddings to be made noisy: at the path, else the model's input embeddings, of encoder
    and decoder where it has both.
    """
    if path is not None:
        return _all_found(model.get_submodule(path))
    try:
        module = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        module = None
    if module is None and not _is_encoder_decoder(model):
        raise ValueError(
            f"{type(model).__name__} has no get_input_embeddings(), or it returns None: name the "
            f"module with "
            'embedding="path.to.embed" or pass the module itself'
        )
    if not _is_encoder_decoder(model):
        return _with_tied(model, _all_found(module))
    found: dict[nn.Module, Found] = {}
    stacks = [_stack(model, "get_encoder"), _stack(model, "get_decoder")]
    for stack in (model, *stacks):
        try:
            module = None if stack is None else stack.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            module = getattr(stack, "embed_tokens", None)  # FSMT's decoder is a plain module
        if module is not None and isinstance(
            _open_wrapper(getattr(module, "original_module", module)), nn.Embedding
        ):
            found.update(
                {one.noisy: one for one in _all_found(module)}
            )  # an encoder of speech or images embeds no tokens
    if not found:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder without token embeddings: name the "
            f"module with embedding="
        )
    return list(found.values())


def _with_tied(model: nn.Module, found: list[Found]) -> list[Found]:
    """And the embeddings that share their weight: T5's encoder alone keeps a `shared` that never
    runs.
    """
    weights = {id(_open_wrapper(one.noisy).weight) for one in found}
    seen = {
        inner for one in found for outer in (one.noisy, *one.wrappers) for inner in outer.modules()
    }
    tied = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module not in seen and id(module.weight) in weights
    ]
    return [*found, *(one for module in tied for one in _all_found(module))]


def _path_of(model: nn.Module, embedding: str | nn.Module | None) -> str | None:
    """embedding= as a path in the model, so that it is found again when PEFT has put a wrapper
    there.
    """
    if embedding is None:
        return None
    if isinstance(embedding, str):
        try:
            model.get_submodule(embedding)
        except AttributeError as error:
            raise ValueError(
                f"embedding={embedding!r} names no module of {type(model).__name__}: {error}"
            ) from None
        return embedding
    path = next((name for name, module in model.named_modules() if module is embedding), None)
    if path is None:
        raise ValueError("the embedding is not a part of the model")
    return path


def _check_surroundings(model: nn.Module, found: list[Found]) -> None:
    """Models that multiply embeddings afterwards by something we cannot take over, or that look
    tokens up time first.
    """
    targets = {one.noisy for one in found}
    for name, module in model.named_modules():
        if module in targets:
            for parent, _ in _ancestors(model, name):
                if TRANSPOSED.search(_source_of_forward(parent)):
                    raise ValueError(
                        f"{type(parent).__name__} looks tokens up time first, (tokens, batch), so "
                        f"its masks do not tell which tokens are "
                        "real: pass it neftune_kernels.add_noise(embedding(input_ids), "
                        "noise_alpha, attention_mask=...) as inputs_embeds"
                    )
                if SCALED_BY_EXPRESSION.search(_source_of_forward(parent)):
                    warnings.warn(
                        f"{type(parent).__name__} may multiply embeddings after looking them up, "
                        f"and with them NEFTune's noise: divide "
                        "noise_alpha by the factor if so",
                        stacklevel=3,
                    )


def apply_neftune(
    model: nn.Module,
    noise_alpha: float | None = 5.0,
    *,
    embedding: str | nn.Module | None = None,
    samples: Callable[[dict[str, Any]], Any] | None = None,
    replica: int | None = None,
    noise_without_grad: bool = False,
    distribution: str = "uniform",
    equal_variance: bool = True,
    backend: str | None = None,
    **unknown: NoReturn,
) -> NEFTuneHandle:
    """Add NEFTune noise to a model's input embeddings while it trains, with the sample lengths its
    own forward is told.

    Noise is added in training mode with grad enabled; never in eval mode and never under
    `torch.no_grad()` (rollouts, reference models) unless `noise_without_grad`. Lengths come from
    the arguments of the models around the embedding, positional or by keyword, the first of:
    cu_seq_lens_q, seq_idx, position_ids with attention_mask, attention_mask. Without any, every
    token but padding_idx is real, in a decoder of an encoder-decoder every token up to the last
    that is not padding. What cannot be read warns once. Encoder and decoder of an encoder-decoder
    get noise each with its own mask. What takes the embedding's place later (PEFT's wrappers, a
    resized embedding) is found at the next forward. Factors that the model applies after its lookup
    do not multiply the noise.

    Args:
        model: a transformers PreTrainedModel, a PEFT model, or any module with
            get_input_embeddings().
        noise_alpha: the paper's alpha, finite and >= 0; applying twice updates it and returns the
            same handle.
        embedding: the embedding's path in the model or the module itself, where
            get_input_embeddings() does not tell.
        samples: reads a forward's arguments (a dictionary by name) where their names say nothing;
            returns an attention_mask, a dictionary with attention_mask, lengths, cu_seqlens,
            position_ids or noise_mask, or None for "every token is real".
        replica: number of this data-parallel replica; None: what
            `distributed.data_parallel_index` finds, at each call.
        noise_without_grad: noise also where grad is disabled.
        distribution, equal_variance, backend: as in :func:`noisy_embedding`.

    Returns:
        A handle with noise_alpha, sign, stats() and remove(); also a context manager.

    Raises:
        ValueError: no nn.Embedding can be found or noised; bad alpha, replica or backend.

    Example:
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = torch.nn.Embedding(10, 4)
        ...     def forward(self, input_ids, attention_mask=None):
        ...         return self.embed(input_ids)
        >>> model = Model()
        >>> with apply_neftune(model, 5.0, embedding="embed") as handle:
        ...     mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
        ...     _ = model(torch.tensor([[1, 2, 3], [4, 0, 0]]), attention_mask=mask)
        ...     handle.stats()["length_min"], handle.stats()["length_max"]
        (1, 3)
        >>> type(model.embed).__name__
        'Embedding'
    """
    if unknown:
        refuse_unknown("apply_neftune", unknown)
    alpha = check_alpha(noise_alpha)
    if replica is not None:
        check_word("replica", replica)
    variant = check_variant(distribution, equal_variance, 1)
    if samples is not None and not callable(samples):
        raise TypeError(f"samples must be callable with the forward's arguments, got {samples!r}")
    path = _path_of(model, embedding)
    found = find_embeddings(model, path)
    for one in found:
        weight = _open_wrapper(one.noisy).weight
        quantised = type(weight) not in PLAIN_WEIGHTS  # its forward decides the dtype
        choose_backend(backend, weight.device, torch.float32 if quantised else weight.dtype)
    handle = _live_handle(found)
    state = None if handle is None else handle._state
    if state is None or state.handle is None:
        _check_surroundings(model, found)
        state = NEFTuneState()
        state.handle = NEFTuneHandle(state)
    state.read = samples
    state.handle.add_root(model, path)
    state.set_alpha(alpha)
    state.replica, state.noise_without_grad, state.backend, state.variant = (
        replica,
        noise_without_grad,
        backend,
        variant,
    )
    if not any(one.noisy._neftune.hooked for one in found if isinstance(one.noisy, _Noisy)):
        state.warn_once(
            "no forward around the embedding takes an attention_mask, so every token but "
            "padding_idx counts as real: tell NEFTune the "
            "samples with apply_neftune(..., samples=...)"
        )
    return state.handle


def _live_handle(found: list[Found]) -> NEFTuneHandle | None:
    states = [
        inner._neftune.state
        for one in found
        for inner in _unwrapped(one.noisy)
        if isinstance(inner, _Noisy)
    ]
    return next((state.handle for state in states if state.handle is not None), None)


def applied_handle(
    model: nn.Module, embedding: str | nn.Module | None = None
) -> NEFTuneHandle | None:
    """The handle of an apply_neftune that is in force on the model, if there is one."""
    return _live_handle(find_embeddings(model, _path_of(model, embedding)))


def _forget_hooks(model: nn.Module) -> None:
    hooks: Callable[..., Any]
    for registered, extras in (
        (model._forward_pre_hooks, (model._forward_pre_hooks_with_kwargs,)),
        (
            model._forward_hooks,
            (model._forward_hooks_with_kwargs, model._forward_hooks_always_called),
        ),
    ):
        for key, hooks in list(registered.items()):
            if isinstance(hooks, (_TakeSamples, _ForgetSamples)):
                for where in (registered, *extras):
                    where.pop(key, None)  # type: ignore[attr-defined]
