"""Noise at a site. Fused: the embedding's class swapped for a subclass of it whose forward looks up
and adds noise in one pass. Behind: a forward hook adds the noise to the site's output.
"""

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..backends import choose_backend
from ..capturable import in_capture
from ..distributed import (
    class_without_noise,
    dtensor_with_noise,
    is_dtensor,
    is_tensor_parallel_forward,
    replicated,
    shared_seed,
)
from ..lookup import PLAIN_WEIGHTS, embeds_with_noise, noisy_lookup
from ..modules import HUGGING_FACE_MARK, TWO_NOISES, has_other_noise
from ..noise import NO_OFFSETS, Offsets, draw_seed, make_noise
from ..samples import UNSAID, Samples, real_tokens
from ..torch_internals import NO_BACKWARD, backward_task, vmapped
from .checkpoints import (
    CHANGED,
    NO_GRAD,
    Given,
    draw,
    draw_again,
    keep_without_noise,
    may_be_recomputed,
    save_one_more,
)
from .find import Found, base_class, is_compiled, is_own_method
from .running import RUNNING, Forward, NoisyCall, Site, State, count_compilation, probing
from .sequences import is_ids

DATA_PARALLEL = (
    "nn.DataParallel runs its replicas in threads that share one mask and one seed: "
    "use DistributedDataParallel, or NEFTuneEmbedding with another replica= in each"
)
COPIED = (
    "this model was copied or unpickled while it had NEFTune noise: the copy has it too, and no "
    "handle steers it. Take it over with handle = apply_neftune(copy), or off with "
    "apply_neftune(copy).remove()"
)
PER_SAMPLE = (
    "the noisy embedding is run again inside backward under torch.func (Opacus does so for classes "
    "that it does not know): apply_neftune(..., fused=False) leaves the embedding its exact class "
    "and adds the noise behind it"
)


def _without_noise(site: Site, module: nn.Module, reason: str) -> None:
    if not torch.compiler.is_compiling():
        site.state.skipped[reason] += 1
        site.state.skipped_last = reason


def _padding_idx(embedding: nn.Module) -> int:
    """As the operators take it: -1 for none."""
    found: int | None = getattr(embedding, "padding_idx", None)
    return -1 if found is None else found


def _given(
    site: Site,
    module: nn.Module,
    forwards: list[Forward],
    input: Tensor,
    weight: Any,
    output: Tensor | None,
    compiling: bool,
) -> Given | None:
    """The noise of this call and its samples; None: without noise.

    weight: the embedding's, where it is fused; output: the site's, where the noise is added behind
        it.
    """
    if RUNNING.probing is not None and probing():
        return None
    state = site.state
    device = weight.device if output is None else output.device
    reason = state.skip_reason(module)
    if not compiling and backward_task() != NO_BACKWARD:
        return _recomputed(site, module, forwards, input, device, reason)
    if reason is not None:
        if not compiling:
            keep_without_noise(site.firsts, device)
        _without_noise(site, module, reason)
        return None
    if state.handle is None and not compiling:
        state.warn_once(COPIED)
    marked = HUGGING_FACE_MARK in module.__dict__ and has_other_noise(module)
    if marked or (site.wrappers and site.marked()):
        raise RuntimeError(TWO_NOISES)
    if state.replica is None and "_is_replica" in module.__dict__:
        raise RuntimeError(DATA_PARALLEL)
    if site.reads_types(forwards, input):
        if not compiling:
            keep_without_noise(site.firsts, device)
        _without_noise(site, module, "token_type_ids")
        return None
    base: Any = module if site.base is None else site.base
    if output is not None:
        weight = getattr(base, "weight", None)
    shared: Any = weight if output is None or is_dtensor(weight) else output
    plain = type(weight) in PLAIN_WEIGHTS and (shared is weight or type(shared) is Tensor)
    if compiling or may_be_recomputed(device):
        seed, key = draw(device, not compiling, state.handle_key)
    else:
        seed, key = draw_seed(device), ()
    seed = seed if plain else shared_seed(seed, shared)
    ask = site.samples if state.batch_first else site.samples_in_columns
    samples, follows = ask(forwards, input, _padding_idx(base))
    dtype = weight.dtype if output is None else output.dtype
    divisor = site.divisor(forwards, dtype, compiling)
    factors = _of_tokens(divisor, input, samples, device) if isinstance(divisor, Tensor) else None
    whole = factors is not None or divisor == 1
    if not plain and (is_dtensor(shared) or type(weight) not in (*PLAIN_WEIGHTS, type(None))):
        samples = replicated(samples)
    if samples is not UNSAID:
        samples = _on(device, samples)
    replica = state.resolve_replica(base)
    offsets = Offsets(replica) if replica else NO_OFFSETS
    own = seed, None, offsets, state.variant, state.backend
    lasting = None
    if not state.capturable:
        noise = make_noise(state.alpha if whole else state.alpha / divisor, *own)
    else:
        alpha = state.alpha_on(device, compiling)
        noise = make_noise(alpha if whole else alpha / divisor, *own, capturable=True)
        if not compiling and not in_capture(device):
            lasting = make_noise(state.alpha if whole else state.alpha / divisor, *own)
    # Dynamo would compile anew for each value that it reads
    noise_alpha = 0.0 if compiling else state.noise_alpha
    return Given(samples, noise, noise_alpha, follows, key, factors, lasting)


def _of_tokens(factors: Tensor, input: Tensor, samples: Samples, device: torch.device) -> Tensor:
    """Factors of rows, or of tokens, so that they broadcast to the ids."""
    rows = input.shape[1] if samples.time_first else input.shape[0] if input.dim() else 1
    if input.dim() == 2 and factors.shape == (rows,):
        factors = factors[None] if samples.time_first else factors[:, None]
    elif factors.dim() and factors.shape != input.shape:
        raise ValueError(
            f"embedding_multiplier must make a number, or one for each of the {rows} rows or the "
            f"tokens {tuple(input.shape)}, got {tuple(factors.shape)}"
        )
    return factors.detach().to(device)


def _recomputed(
    site: Site,
    module: nn.Module,
    forwards: list[Forward],
    input: Tensor,
    device: torch.device,
    reason: str | None,
) -> Given | None:
    """What the first pass was given, which a checkpoint runs again inside backward."""
    if reason is None and vmapped():
        raise RuntimeError(PER_SAMPLE)
    if not site.reads_types(forwards, input):
        first = draw_again(site.firsts, device)
        if first is not None and first.given is not None:
            return first.given
        if first is None and reason is None:
            raise RuntimeError(NO_GRAD if site.state.skipped_last == "no grad" else CHANGED)
    _without_noise(site, module, reason or "recomputed without")
    return None


def _on(device: torch.device, samples: Samples) -> Samples:
    """Masks follow the embeddings: under accelerate's device maps they arrive elsewhere."""
    elsewhere: dict[str, Any] = {
        name: value.to(device)
        for name, value in samples._asdict().items()
        if isinstance(value, Tensor) and value.device != device
    }
    return samples._replace(**elsewhere) if elsewhere else samples


def _note(site: Site, input: Tensor, given: Given, noisy: Tensor) -> None:
    """What the call was, for stats() and for a checkpoint that recomputes it."""
    if given.lasting is not None:
        given = given._replace(noise=given.lasting, lasting=None)
    if given.key:
        if backward_task() == NO_BACKWARD:
            site.firsts.keep(given.key, given, noisy)
        save_one_more()
    if given.follows:
        return
    state = site.state
    state.calls += 1
    state.embedded = shape = noisy.shape
    site.outside = not RUNNING.forwards
    state.skipped_last = None
    samples, noise, noise_alpha, _, _, factors, _ = given
    made = shape, noisy.device, noisy.dtype
    site.last = NoisyCall(input, noise_alpha, samples, noise, *made, factors)


def _divided(embeds: Tensor, given: Given, samples: Samples) -> Tensor:
    """Embeddings with noise that each row, or token, has divided by a factor of its own: the noise
    as it is of zeros, its quotient and the sum in float32 at least, rounded once.
    """
    factors, shape = given.factors, embeds.shape
    assert factors is not None
    wide = torch.promote_types(embeds.dtype, torch.float32)
    zeros = torch.zeros((), dtype=wide, device=embeds.device).expand(shape)
    noise = embeds_with_noise(zeros, samples, given.noise)
    return (embeds.to(wide) + noise / factors.to(wide)[..., None]).to(embeds.dtype)


def describe(module: nn.Module) -> str:
    """What a site does, as repr() of a handle and of a fused site tells it; never raises."""
    site: Site = module.__dict__["_neftune"]
    state = site.state
    base: Any = module if site.base is None else site.base
    weight: Any = getattr(base, "weight", None)
    try:
        replica = str(state.resolve_replica(base))
    except RuntimeError:  # the next noisy forward says why
        replica = "unknown"
    try:
        backend = choose_backend(state.backend, weight.device, weight.dtype).name
    except (AttributeError, ValueError, RuntimeError):  # offloaded, or no plain weight
        backend = state.backend or "chosen at the call"
    on = "on" if module.training and state.has_noise else "off"
    how = "fused" if site.fused else "behind"
    return f"alpha {state.noise_alpha:g}, replica {replica}, backend {backend}, {how}, {on}"


# ---- fused


def noisy_forward(self: Any, input: Tensor) -> Tensor:
    """nn.Embedding's forward with noise in the same pass."""
    site: Site | None = self.__dict__.get("_neftune")
    if site is None or not site.fused:  # a bound method that somebody kept
        return nn.Embedding.forward(self, input)
    weight: Any = self.weight
    compiling = torch.compiler.is_compiling()
    given = _given(site, self, site.enter(compiling), input, weight, None, compiling)
    if given is None:
        return nn.Embedding.forward(self, input)
    if given.factors is None:
        noisy = noisy_lookup(self, input, given.samples, given.noise, weight=weight)
    else:
        samples = real_tokens(input, _padding_idx(self), given.samples)
        noisy = _divided(nn.Embedding.forward(self, input), given, samples)
    if compiling:
        count_compilation(site.state.handle_key)
    else:
        _note(site, input, given, noisy)
    return noisy


def _refuse_script(self: Any) -> NoReturn:
    """torch.jit.script asks every module for what it is to compile."""
    raise TypeError("TorchScript knows no NEFTune noise: call handle.remove() before")


def _extra_repr(self: Any) -> str:
    plain = type(self)._neftune_base.extra_repr(self)
    if self.__dict__.get("_neftune") is None:
        return plain  # type: ignore[no-any-return]
    return f"{plain}, noise: {describe(self)}"


class _BeforeInstance:
    """`forward` of a class whose instance carries a bound method of its own class as `forward`,
    which accelerate leaves behind and which would hide ours; anybody else's counts.
    """

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return noisy_forward
        put = module.__dict__.get("forward")
        if put is None or is_own_method(put, module):
            return types.MethodType(noisy_forward, module)
        return put

    def __set__(self, module: Any, value: Any) -> None:
        module.__dict__["forward"] = value

    def __delete__(self, module: Any) -> None:
        if "forward" not in module.__dict__:
            raise AttributeError("forward")
        del module.__dict__["forward"]


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle and deepcopy: the class is made at run time, so it cannot be found by name."""
    kind = type(self)
    if "_neftune_base" not in kind.__dict__:  # somebody's subclass of it, who copies it himself
        return object.__reduce_ex__(self, protocol)
    return _rebuild, (kind._neftune_base, kind._neftune_before), self.__getstate__()


_noisy_classes: dict[tuple[type, bool], Any] = {}


def _noisy_class(base: type[nn.Module], before: bool) -> Any:
    """The class of a fused site: a subclass under the same names, so that who asks for them gets
    the same answer.
    """
    key = (base, before)
    if key not in _noisy_classes:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        own = {
            "forward": _BeforeInstance() if before else noisy_forward,
            "__reduce_ex__": _reduce,
            "extra_repr": _extra_repr,
            "__prepare_scriptable__": _refuse_script,
            "_neftune_base": base,
            "_neftune_before": before,
        }
        _noisy_classes[key] = type(base.__name__, (base,), {**names, **own})
    return _noisy_classes[key]


def _rebuild(base: type[nn.Module], before: bool) -> nn.Module:
    made: Any = _noisy_class(base, before)
    rebuilt: nn.Module = made.__new__(made)
    return rebuilt


# ---- behind


def add_noise_behind(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Forward hook of a site, before all other hooks: its output with noise, where it looked ids
    up. None leaves the output as it is.
    """
    site: Site | None = module.__dict__.get("_neftune")
    if site is None or site.fused:
        return None
    input = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if input is None or not is_ids(input) or not isinstance(output, Tensor):
        if input is not None and is_ids(input) and site.state.skip_reason(module) is None:
            raise TypeError(
                f"{type(module).__name__} looks ids up, but returns {type(output).__name__} and no "
                "tensor: name the module inside it that returns the embeddings with embedding=, or "
                "pass neftune_kernels.add_noise(embeddings, noise_alpha) as inputs_embeds"
            )
        return None  # the same table as output head, or embeddings handed on
    compiling = torch.compiler.is_compiling()
    forwards = site.enter(compiling)
    if output.shape[:-1] != input.shape and site.state.skip_reason(module) is None:
        raise ValueError(
            f"{type(module).__name__} makes {tuple(output.shape)} of ids {tuple(input.shape)}, not "
            "one embedding for each id: name another module with embedding="
        )
    given = _given(site, module, forwards, input, None, output, compiling)
    if given is None:
        return None
    base = module if site.base is None else site.base
    samples = real_tokens(input, _padding_idx(base), given.samples)
    if is_dtensor(output):
        noisy = dtensor_with_noise(embeds_with_noise, output, samples, given.noise)
    elif given.factors is not None:
        noisy = _divided(output, given, samples)
    else:
        noisy = embeds_with_noise(output, samples, given.noise)
    if compiling:
        count_compilation(site.state.handle_key)
    else:
        _note(site, input, given, noisy)
    return noisy


# ---- putting it on and taking it off; each step can be repeated after an interrupt

Changed = tuple[bool, bool]  # (a class, hooks)
HOOKS = (
    ("_forward_pre_hooks", ("_forward_pre_hooks_with_kwargs",)),
    ("_forward_hooks", ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")),
)


def drop_hooks(module: nn.Module, ours: Callable[[Any], bool]) -> bool:
    """Take the hooks that are ours off, whether their registration was finished or not."""
    found = False
    for name, marks in HOOKS:
        hooks = getattr(module, name)
        for key in [key for key, hook in hooks.items() if ours(hook)]:
            for mark in marks:  # first, so that an interrupted removal is found again
                getattr(module, mark).pop(key, None)
            del hooks[key]
            found = True
    return found


def _is_behind(hook: Any) -> bool:
    return hook is add_noise_behind


def is_behind(module: nn.Module) -> bool:
    """Whether the hook is there, once and whole."""
    keys = [key for key, hook in module._forward_hooks.items() if _is_behind(hook)]
    return len(keys) == 1 and keys[0] in module._forward_hooks_with_kwargs


def make_noisy(one: Found, state: State) -> Changed:
    """Put a site where it was found, or make it what it is to be now."""
    module = one.site
    site: Site | None = module.__dict__.get("_neftune")
    # a copy that PEFT or deepcopy made of a noisy one comes with a state of its own
    if site is None or site.state is not state or site.fused != one.fused:
        site = Site(state)
        site.fused = one.fused
    site.base = None if one.embedding is module else one.embedding
    site.hooked = False
    # torch.compile's wrapper hands attributes through, and Dynamo knows a module by one name
    site.wrappers = [weakref.ref(one) for one in one.wrappers if not is_compiled(one)]
    module.__dict__["_neftune"] = site
    base = base_class(module)
    if one.fused:
        hooks = drop_hooks(module, _is_behind)
        if "_neftune_base" in vars(type(module)) or base is not type(module):
            return False, hooks
        before = "forward" in module.__dict__
        module.__class__ = _noisy_class(type(module), before)
        return True, hooks
    swapped = "_neftune_base" in vars(type(module))
    if swapped:
        module.__class__ = base  # type: ignore[assignment]
        _rebind(module, base)
    if is_behind(module):
        return swapped, False
    drop_hooks(module, _is_behind)
    module.register_forward_hook(add_noise_behind, with_kwargs=True, prepend=True)
    return swapped, True


def class_to_restore(module: nn.Module) -> type | None:
    """None where something else has put its hands on the module since."""
    kind: Any = type(module)
    base = base_class(module)
    if base is kind:
        return base
    forward = module.__dict__.get("forward")
    if forward is not None and not (
        is_tensor_parallel_forward(forward)
        or is_own_method(forward, module)
        or _is_ours(module.__dict__.get("_old_forward"))
    ):
        return None
    if "_neftune_base" in vars(kind):
        return base
    return class_without_noise(kind, base)


def make_plain(module: nn.Module) -> Changed:
    """Undo make_noisy; a module that is no site stays what it is."""
    site: Site | None = module.__dict__.get("_neftune")
    if site is None:
        return False, False
    site.firsts.removed = True
    hooks = drop_hooks(module, _is_behind)
    base = class_to_restore(module) or base_class(module)
    swapped = base is not type(module)
    if swapped:
        module.__class__ = base  # type: ignore[assignment]
    _rebind(module, base_class(module))
    module.__dict__.pop("_neftune", None)
    return swapped, hooks


def _is_ours(value: Any) -> bool:
    return isinstance(value, types.MethodType) and value.__func__ is noisy_forward


def _rebind(module: nn.Module, base: type[nn.Module]) -> None:
    """accelerate keeps a bound method of the class that it met: ours becomes the embedding's."""
    plain = types.MethodType(base.forward, module)
    for name in ("forward", "_old_forward"):
        value: Any = module.__dict__.get(name)
        if _is_ours(value):
            module.__dict__[name] = plain
        elif _is_ours(getattr(value, "__wrapped__", None)):
            functools.update_wrapper(value, plain)  # its name, too
