"""Listener: the two hooks of a model around sites, which hear what its forward is told."""

import sys
import threading
import weakref
from typing import Any

import torch
from torch import nn

from .arguments import Padding, parameter_names, takes_any, tells_samples
from .multiples import Measured
from .multipliers import DTYPES
from .noisy import drop_hooks
from .probe import is_shared_out, keep_factors, kept_factors, measure
from .quirks import (
    NO_QUIRKS,
    QUIRKS,
    Quirks,
    hands_on,
    key_of,
    looks_up_inside,
    package_of,
    quirks_of,
    row_of,
)
from .running import (
    NOT_LOOKED_AT,
    RUNNING,
    Forward,
    Site,
    State,
    forget_interrupted,
    has_moved,
    probing,
)

CHANGES = (
    "what {} multiplies its embeddings by has changed since it was first looked at, and it is "
    "looked at again whenever a number in what leads to its embedding changes. Say it to spare "
    "those looks: apply_neftune(..., embedding_multiplier=lambda given: ...), which is given the "
    "forward's arguments by name"
)
# A look forks the generators and sets a function mode. A thread that never comes back (one started
# inside the forward that is looked at waits for it) must not hang the others.
LOOKING = threading.RLock()
PATIENCE = 60.0  # seconds
BUSY = (
    "another thread has been looking for a minute at what {} multiplies its embeddings by, or was "
    "interrupted there. Say it to spare the look: apply_neftune(..., embedding_multiplier=1.0)"
)
LOOKS = 3  # forwards that are looked at for a site that did not run, or looked too little up
# A look is a forward: where a rank alone looked once more, the others would wait for it.
SHARED = "its parameters are shared out among ranks, which look together and once"
MOVED = (
    "something was put in the place of a noisy embedding since apply_neftune (PEFT's "
    "wrappers, another module), and the model "
    "is about to be traced without its noise: call apply_neftune again before compiling"
)
EMBEDS = (
    "the model was given inputs_embeds, so its embedding and its NEFTune noise "
    "did not run: pass them through "
    "neftune_kernels.add_noise(inputs_embeds, noise_alpha, attention_mask=...) "
    "first"
)
NOT_RUN = (
    "a training forward of the model ended without NEFTune noise: its noisy embedding "
    "was not called. Was it bypassed, called by its forward() (which runs no hooks) or "
    "wrapped after apply_neftune? Call apply_neftune again, or name the embedding "
    "that runs with embedding="
)


class Listener:
    """Hooks of one model for one apply_neftune; `sites` is who it tells.

    It stays the same object while it is reconciled with a model that has changed, so that a call
    under way ends where it began.
    """

    def __init__(self, state: State, model: nn.Module) -> None:
        self.state = state
        self.model: Any = weakref.ref(model)
        self.name = type(model).__name__
        self.names = tuple(parameter_names(model))
        self.key = key_of(model) if quirks_of(model) is not NO_QUIRKS else None
        self.has_row = self.quirks.samples is not None
        self.tells = self.has_row or tells_samples(model) or hands_on(model)
        self.sites: list[Site] = []
        self.decoder = False  # of an encoder-decoder
        self.padding = Padding()

    @property
    def quirks(self) -> Quirks:
        """By its key, as the table's functions do not pickle."""
        return NO_QUIRKS if self.key is None else QUIRKS.get(self.key, NO_QUIRKS)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": _no_model}

    def hears(self, module: nn.Module) -> bool:
        """Whether a forward that begins would have noise."""
        return module.training and self.state.skip_reason(module) is None

    # ---- the hooks

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state, forwards = self.state, RUNNING.forwards
        if RUNNING.probing is not None and probing():
            return
        compiling = torch.compiler.is_compiling()
        call = 0
        if not compiling:
            if self.model() is not module:  # a copy's listener
                self.model = weakref.ref(module)
            frame = sys._getframe(1)
            call = id(frame)
            if forwards:  # of this call's, none is entered before the first of its listeners
                is_first = listeners_of(module)[0] is self
                forget_interrupted(frame.f_back if is_first else frame)
        outermost = not (forwards and self._is_entered())
        if outermost and compiling:
            if module.training and torch.is_grad_enabled() and has_moved(state.handle_key):
                raise RuntimeError(MOVED)
        elif outermost and state.handle is not None and state.handle.may_have_changed():
            self._follow_the_model(module)
        if outermost and state.unmeasured and state.embedding_multiplier is None:
            self._measure(module, args, kwargs)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs} if args else {**kwargs}
        forward = Forward(self, given, call)
        if outermost and forward.has_embeds and self.hears(module) and torch.is_grad_enabled():
            # embedded before this forward, with noise
            outside = [site for site in self.sites if site.outside]
            for site in outside:
                site.outside = False
            if not outside:
                state.warn_once(EMBEDS)
        forwards.append(forward)

    def post_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Called even when the forward raised."""
        if RUNNING.probing is not None and probing():
            return
        forward = self._leave(module)
        if forward is None or forward.ran or output is None or torch.compiler.is_compiling():
            return
        outermost = not self._is_entered()
        heard = self.hears(module) and torch.is_grad_enabled()
        if outermost and heard and not forward.has_embeds and forward.has_ids:
            self.state.warn_once(NOT_RUN)

    def _is_entered(self) -> bool:
        """Whether a forward of ours runs."""
        return any(forward.state is self.state for forward in RUNNING.forwards)

    def _follow_the_model(self, module: nn.Module) -> None:
        """Attach anew where the model has changed; a forward that has no noise never raises."""
        if self.hears(module):
            self.state.handle.refresh()
            return
        try:
            self.state.handle.refresh()
        except Exception:  # whatever a foreign model's own methods raise
            return  # the next noisy forward says so

    def _measure(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the unknown models of sites multiply by, before their first noisy forward: one
        thread looks, others wait for what it finds.
        """
        if not self.hears(module) or torch.compiler.is_compiling():
            return
        is_ours = False
        try:
            is_ours = LOOKING.acquire(timeout=PATIENCE)
            if not is_ours:
                raise RuntimeError(BUSY.format(self.name))
            if self.state.unmeasured:
                self._look(module, args, kwargs)
        finally:
            if is_ours:
                LOOKING.release()

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.state
        sites: dict[nn.Module, Site] = {
            one: site
            for one in module.modules()
            if (site := one.__dict__.get("_neftune")) is not None
            and site.state is state
            and not (site.multiplier_known and site.holder is None)
        }
        holders = {
            one: holder
            for one, site in sites.items()
            if site.holder is not None and (holder := site.holder()) is not None
        }
        alone = [one for one, site in sites.items() if site.lookups == 1]
        shared = is_shared_out(module)
        known = {} if shared else kept_factors(module, alone, (args, kwargs))
        rest = [one for one in sites if one not in known]
        if shared and state.has_looked:
            looked = {one: Measured(why=SHARED) for one in rest if one not in holders}
        else:
            looked = measure(module, args, kwargs, rest, holders, shared) if rest else {}
        state.has_looked = True
        keep_factors(module, looked, (args, kwargs))
        untold = [
            one for one in alone if one in looked and looked[one].why and not looked[one].high
        ]
        if untold and not shared:  # by these arguments: others may have told
            known |= kept_factors(module, untold)
        for one, found in {**looked, **known}.items():
            self._take(sites[one], found, one in known, type(module).__name__)
        state.looks += bool(rest)
        state.unmeasured = (
            not shared
            and state.looks < LOOKS
            and any(not site.multiplier_known or site.holder is not None for site in sites.values())
        )
        if state.handle is not None and any(one not in holders for one in sites):
            state.handle.follow()

    def _take(self, site: Site, found: Measured, kept: bool, name: str) -> None:
        """What a look has found; what it could not tell is looked at again."""
        state = self.state
        factor = None if found.factor is None else abs(found.factor)
        told = site.said
        site.said = told if factor is None else factor
        if site.said is not None:  # what cannot be told today is taken to be what it was
            site.factors = dict.fromkeys(DTYPES, site.said)
        if factor is None and not found.high:
            state.warned.add(NOT_LOOKED_AT)  # the same without the reason
        if not kept and (factor is None or factor != (told or 1)):
            changes = factor is not None and told is not None
            state.warn_once(CHANGES.format(name) if changes else _what_was_found(name, found, told))
        # last, as an interrupt may come between
        site.multiplier_known = not found.why
        if not found.why:
            site.holder = None

    def _leave(self, module: nn.Module) -> Forward | None:
        """Take this call's forward off the stack, and what an interrupt inside it left above."""
        forwards = RUNNING.forwards
        for place in range(len(forwards) - 1, -1, -1):
            forward = forwards[place]
            if forward.listener is self:
                del forwards[place:]
                return forward
        return None  # attached while the model ran

    # ---- putting them on a model and taking them off; each can be repeated after an interrupt

    def attach(self, model: nn.Module) -> bool:
        """Whether hooks were put on: they were not there, or not whole."""
        if self._is_whole(model):
            return False
        drop_hooks(model, lambda hook: getattr(hook, "__self__", None) is self)
        model.register_forward_pre_hook(self.pre_forward, with_kwargs=True)
        model.register_forward_hook(self.post_forward, always_call=True)
        return True

    def detach(self, model: nn.Module) -> bool:
        """Whether hooks were taken off."""
        return drop_hooks(model, lambda hook: getattr(hook, "__self__", None) is self)

    def _is_whole(self, model: nn.Module) -> bool:
        before = [key for key, hook in model._forward_pre_hooks.items() if hook == self.pre_forward]
        after = [key for key, hook in model._forward_hooks.items() if hook == self.post_forward]
        return (
            len(before) == len(after) == 1
            and before[0] in model._forward_pre_hooks_with_kwargs
            and after[0] in model._forward_hooks_always_called
        )


def _what_was_found(name: str, found: Measured, told: float | None) -> str:
    if found.factor is not None:
        return (
            f"{name} multiplies its embeddings by {found.factor:.7g} after looking them up, as a "
            "first look at it found, and NEFTune divides alpha by that. Say it to spare the look: "
            f"apply_neftune(..., embedding_multiplier={abs(found.factor)!r})"
        )
    if found.high > 0:
        return (
            f"{name} multiplies its embeddings by {found.low:.4g} to {found.high:.4g}, each token "
            "or sample by its own number, and NEFTune's noise with them. Say them, one for each "
            "row, with apply_neftune(..., embedding_multiplier=lambda given: ...), which is given "
            "the forward's arguments by name, or say the middle: "
            f"apply_neftune(..., embedding_multiplier={(found.low + found.high) / 2:.4g})"
        )
    return (
        f"it is not known whether {name} multiplies its embeddings after looking them up "
        f"({found.why}): NEFTune takes {told or 1:.7g}. Say it: "
        f"apply_neftune(..., embedding_multiplier={told or 1.0!r})"
    )


def _no_model() -> None:
    """In place of a reference to the model, in copies."""


def listeners_of(model: nn.Module) -> list[Listener]:
    found: dict[int, Listener] = {}
    for hook in (*model._forward_pre_hooks.values(), *model._forward_hooks.values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Listener):
            found[id(owner)] = owner
    return list(found.values())


def heard(inside: list[nn.Module], around: list[nn.Module]) -> list[nn.Module]:
    """Of the models around a site, the outermost first, those to be hooked; `inside` are those of
    them that are a decoder or in one.

    Beside the speakers the outermost, where it is nobody's that we know: it may be told of samples
    in a dictionary, or by names that a warning can read out.
    """
    speaking = speakers(inside or around)
    # FSMT's decoder is told its mask by another name than its model
    if inside and not any(map(is_told, inside)):
        speaking = [*speakers(around), *inside[:1]]
    outermost = around[:1]
    if outermost and outermost[0] not in speaking and (not speaking or is_foreign(outermost[0])):
        return [*outermost, *speaking]
    return speaking


def is_foreign(model: nn.Module) -> bool:
    return package_of(model) not in ("transformers", "peft")


def is_told(model: nn.Module) -> bool:
    """Of samples, by name or by its row."""
    return bool(row_of(model) or hands_on(model) or tells_samples(model))


def speakers(ancestors: list[nn.Module]) -> list[nn.Module]:
    """The ancestors to be hooked: the innermost that is told of samples, and those around it that
    may call the embedding themselves.

    transformers' outer models only pass arguments on, except those of several parts, which merge
    images into embeddings; a hook on the others would cost torch.compile a second graph.
    """
    phrases = [place for place, model in enumerate(ancestors) if quirks_of(model).phrases]
    ancestors = ancestors[: phrases[0] + 1] if phrases else ancestors
    free = {model for model in ancestors if row_of(model) or hands_on(model)}
    telling = [model for model in ancestors if is_told(model)]
    masked = [
        model for model in telling if model in free or "attention_mask" in parameter_names(model)
    ]
    if masked:  # BertEmbeddings is told of positions alone, the model around it of masks
        telling = masked
    found = {model for model in telling if model is telling[-1] or looks_up_inside(model)}
    if not masked:  # who is given one takes it under any name, and drops it (FNet)
        ours = [model for model in ancestors if package_of(model) == "transformers"]
        found |= {model for model in ours if takes_any(model)}
    return [model for model in ancestors if model in found]
