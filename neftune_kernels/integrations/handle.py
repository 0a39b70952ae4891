"""NEFTuneHandle: the settings of an apply_neftune while it is in force, statistics, undo."""

import contextlib
import math
import sys
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..backends import BACKENDS, choose_backend
from ..capturable import check_capturable
from ..lookup import PLAIN_WEIGHTS, embeds_with_noise
from ..modules import TWO_NOISES, check_batch_first, has_other_noise
from ..noise import check_alpha, check_word, said_variant
from .arguments import Padding
from .axes import Axes, reads_time_first, watch, watches
from .check import Check, check, clean_lookup, ratio_of_rms
from .find import (
    Found,
    ancestors_of,
    decoder_of,
    find_embeddings,
    is_wrapper,
    padding_of,
    snapshot,
    ways_to,
)
from .listening import Listener, heard, is_foreign, listeners_of
from .multipliers import known_multiplier, read_row
from .noisy import class_to_restore, describe, drop_hooks, make_noisy, make_plain
from .numbers import Numbers, numbers_of
from .probe import is_left
from .running import (
    RUNNING,
    NoisyCall,
    Said,
    Settings,
    Site,
    State,
    forget_interrupted,
    handles,
    next_key,
)
from .telling import Read, check_samples, check_words

# Of the last noisy forward, beside the largest ratio; training.py logs the same.
MEASURED = (
    "length_min",
    "length_mean",
    "length_max",
    "magnitude_min",
    "magnitude_mean",
    "magnitude_max",
)
Root = tuple[weakref.ref[nn.Module], str | None]  # weak: a handle keeps no model alive


PARAMETRISED = (
    "the embedding was parametrised or given a forward of its own after apply_neftune: take that "
    "off first, then call remove()"
)


class _Wanted(NamedTuple):
    """How a model around sites is to be listened to."""

    sites: list[Site]
    decoder: bool
    padding: Padding


class _Followed(NamedTuple):
    """What a factor was read from, or may have come from."""

    model: weakref.ref[nn.Module]
    held: tuple[Numbers, ...] | None  # None: its row
    before: tuple[Any, ...]


class _Doubted(NamedTuple):
    """Why a model is looked at again."""

    names: set[tuple[weakref.ref[nn.Module], str]]  # numbers that changed
    factors: list[dict[torch.dtype, float]]


class _Before(NamedTuple):
    """What was in force when apply_neftune was called on a model that had noise already."""

    settings: Settings
    roots: list[Root]


class NEFTuneHandle:
    """What apply_neftune returns: change one setting, read statistics, undo.

    Settings: noise_alpha, sign, replica, noise_without_grad, distribution, equal_variance, backend,
    samples, fused, batch_first, embedding_multiplier and capturable, as apply_neftune takes them.
    Any other attribute is refused. Also a context manager: on exit the noise is gone, or is again
    what it was before this apply_neftune.

    Raises:
        TypeError, ValueError: a setting is assigned what apply_neftune would refuse.
        AttributeError: an attribute that is no setting is assigned.
        RuntimeError: it was removed, and is asked or told anything but remove() and removed.
    """

    __slots__ = (
        "__weakref__",
        "_applied",
        "_before",
        "_doubted",
        "_entered",
        "_followed",
        "_listened",
        "_noisy",
        "_places",
        "_roots",
        "_state",
        "_uninvolved",
        "_wrappers",
    )

    def __init__(self, state: State) -> None:
        state.handle_key = str(next(next_key))
        handles[state.handle_key] = self
        self._state: State | None = state
        self._applied = False  # an apply_neftune came to its end: an interrupted one is no "before"
        self._before: _Before | None = None
        self._entered: list[_Before | None] = []
        self._roots: list[Root] = []
        self._noisy: list[weakref.ref[nn.Module]] = []
        # (parent, name, child) when attached
        self._places: list[tuple[weakref.ref[nn.Module], str, weakref.ref[nn.Module]]] = []
        # (wrapper of a site, what decided about the noise inside it when attached)
        self._wrappers: list[tuple[weakref.ref[nn.Module], tuple[int, bool]]] = []
        self._listened: list[weakref.ref[nn.Module]] = []
        self._followed: list[_Followed] = []
        self._doubted: _Doubted | None = None
        # numbers of modules that change without the factor (a count of calls)
        self._uninvolved: set[tuple[weakref.ref[nn.Module], str]] = set()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__slots__ and not isinstance(
            getattr(NEFTuneHandle, name, None), property
        ):
            settings = (*Settings._fields, "sign", "distribution", "equal_variance")
            raise AttributeError(
                f"NEFTuneHandle has no setting {name!r}: it has "
                f"{', '.join(one for one in settings if one != 'variant')}"
            )
        super().__setattr__(name, value)

    def _sites(self) -> list[nn.Module]:
        """The modules with our noise that are alive."""
        return [module for reference in self._noisy if (module := reference()) is not None]

    def root(self) -> nn.Module | None:
        """The model applied to last, if it is alive."""
        return self._roots[-1][0]() if self._roots else None

    def __copy__(self) -> "NEFTuneHandle":
        """Itself: it steers its model, whoever holds it."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "NEFTuneHandle":
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a NEFTuneHandle steers a model of this process and cannot be pickled: pickle the "
            "model, and take its copy over with handle = apply_neftune(copy)"
        )

    def __repr__(self) -> str:
        if self._state is None:
            return "NEFTuneHandle(removed)"
        names: dict[nn.Module, str] = {}
        for root, _ in self._live_roots():
            for name, module in root.named_modules():
                names.setdefault(module, name or type(module).__name__)
        told = "".join(f"\n  {names.get(one, '?')}: {describe(one)}" for one in self._sites())
        return f"NEFTuneHandle(noise_alpha={self.noise_alpha:g}{told})"

    def describe(self) -> str:
        """The first site in a line: "alpha 5, replica 0, backend cpp, fused, on"."""
        self._live_state()
        return next((describe(one) for one in self._sites()), "no embedding")

    # ---- following the model

    def _apply(self, model: nn.Module, path: str | None, settings: Settings) -> None:
        """What a call of apply_neftune does; it leaves all as it was where it raises."""
        state = self._live_state()
        self._before = _Before(state.settings(), self._roots) if self._applied else None
        try:
            state.assign(settings)
            self._roots = [(root, at) for root, at in self._roots if root() not in (None, model)]
            self._roots.append((weakref.ref(model), path))
            self._attach()
        except Exception:
            if self._before is None:
                self.remove()
            else:
                self._restore(self._before)
            raise

    def _restore(self, before: _Before) -> None:
        self._live_state().assign(before.settings)
        self._roots = before.roots
        self._attach()

    def _live_roots(self) -> list[tuple[nn.Module, str | None]]:
        return [(root, at) for reference, at in self._roots if (root := reference()) is not None]

    def _modules(self) -> list[nn.Module]:
        """All modules that may be sites of ours or have hooks of ours."""
        known = (reference() for reference in (*self._noisy, *self._listened))
        modules = [one for root, _ in self._live_roots() for one in root.modules()]
        return list(dict.fromkeys([*(one for one in known if one is not None), *modules]))

    def _is_ours(self, state: State) -> bool:
        """Whether a site's or listener's state is ours, or that of a copy which PEFT made."""
        ours = self._live_state()
        return state is ours or (state.origin == ours.origin and state.handle is None)

    def _attach(self) -> None:
        """Reconcile the models with what is to be: the sites that are found in them now, and the
        listeners around those. What is right already is not touched.
        """
        forget_interrupted()
        state = self._live_state()
        roots = self._live_roots()
        found: dict[nn.Module, Found] = {}
        for root, path in roots:
            found.update({one.site: one for one in find_embeddings(root, path, state.fused)})
        # before anything is changed, so that an interrupt leaves what the next call finds again
        self._noisy = list(dict.fromkeys([*self._noisy, *(weakref.ref(one) for one in found)]))
        # what wrappers in a copied model stand around is nobody's, and would be noisy beside them
        inside = {one for place in found.values() for one in place.site.modules()}
        left = [
            module
            for module in self._modules()
            if module not in found
            and (site := module.__dict__.get("_neftune")) is not None
            and (self._is_ours(site.state) or (module in inside and site.state.handle is None))
        ]
        if any(class_to_restore(module) is None for module in left):
            raise RuntimeError(PARAMETRISED)
        changes = [make_plain(module) for module in left]
        changes += [make_noisy(one, state) for one in found.values()]
        self._noisy = [weakref.ref(module) for module in found]
        wrappers = [wrapper for one in found.values() for wrapper in (one.site, *one.wrappers)]
        self._wrappers = [(weakref.ref(one), snapshot(one)) for one in wrappers if is_wrapper(one)]
        for module in self._modules():
            drop_hooks(module, is_left)
        changed = self._listen(self._wanted(roots, found))
        self._watch_axes(roots)
        self._multiply(roots, found)
        self._places = _places(roots, found)
        _forget_compiled([*changes, (False, changed)])

    def _wanted(
        self, roots: list[tuple[nn.Module, str | None]], found: dict[nn.Module, Found]
    ) -> dict[nn.Module, _Wanted]:
        """The models around the sites that are told of samples."""
        wanted: dict[nn.Module, _Wanted] = {}
        all_speak = self._live_state().read is not None
        for root, _ in roots:
            decoders = {id(module) for module in decoder_of(root)}
            for name, module in root.named_modules(remove_duplicate=False):
                if module not in found:
                    continue
                around = [parent for parent, _ in ancestors_of(root, name)]
                # what is around is told the encoder's mask
                inside = [parent for parent in around if id(parent) in decoders]
                # samples= is asked of the outermost that runs
                hooked = around if all_speak else heard(inside, around)
                for parent in hooked:
                    if parent not in wanted:
                        padding = padding_of(root)
                        wanted[parent] = _Wanted([], id(parent) in decoders, padding)
                    site: Any = module._neftune
                    if site not in wanted[parent].sites:
                        wanted[parent].sites.append(site)
        return wanted

    def _listen(self, wanted: dict[nn.Module, _Wanted]) -> bool:
        """Make the listeners those that are wanted; whether hooks came or went."""
        state = self._live_state()
        modules = self._modules()
        sites = [module.__dict__.get("_neftune") for module in modules]
        states = {id(site.state) for site in sites if site is not None}
        kept: dict[nn.Module, Listener] = {}
        changed = False
        for model in modules:
            for listener in listeners_of(model):
                if listener.state is state and model in wanted and model not in kept:
                    kept[model] = listener
                elif self._is_ours(listener.state) or (
                    # of a deepcopied or unpickled model, or of a remove() that was interrupted
                    listener.state.handle is None and id(listener.state) not in states
                ):
                    changed |= listener.detach(model)
        self._listened = [weakref.ref(model) for model in wanted]
        for model, how in wanted.items():
            listener = kept.get(model) or Listener(state, model)
            listener.sites[:] = how.sites
            listener.decoder = how.decoder
            listener.padding = how.padding
            changed |= listener.attach(model)
            for site in how.sites:
                site.hooked = True
        return changed

    def _watch_axes(self, roots: list[tuple[nn.Module, str | None]]) -> None:
        """Where nobody said in which order the ids' axes are, hear how modules read them."""
        state = self._live_state()
        modules = self._modules()
        worn = [one for module in modules for one in watches(module)]
        axes = next((one for one in worn if one.state is state), None) or Axes(state)
        inside = {module for root, _ in roots for module in root.modules()}
        for module in modules:
            for one in watches(module):
                if one is not axes and (one.state.handle is None or self._is_ours(one.state)):
                    watch(module, one, False)
            wanted = state.batch_first and module in inside and reads_time_first(module)
            watch(module, axes, wanted)

    def _multiply(
        self, roots: list[tuple[nn.Module, str | None]], sites: Collection[nn.Module]
    ) -> None:
        """What each site's lookup is multiplied by afterwards, as far as it is known."""
        state = self._live_state()
        state.unmeasured, state.looks, self._followed = False, 0, []
        for root, _ in roots:
            for name, module in root.named_modules(remove_duplicate=False):
                if module not in sites:
                    continue
                site: Any = module._neftune
                how = known_multiplier([parent for parent, _ in ancestors_of(root, name)])
                site.multiplier_known, site.factors = how.known, dict(how.factors)
                site.each = how.each
                site.holder = None if how.holder is None else weakref.ref(how.holder)
                state.unmeasured |= not site.multiplier_known or site.holder is not None
                if how.row is not None:
                    self._followed.append(_followed(how.row, None))
                inside = [] if how.inside is None else listeners_of(how.inside)
                listener = next((one for one in inside if one.state is state), None)
                site.factor_listener = listener

    def follow(self) -> None:
        """After a look at the model: what leads to its sites may not change unseen, neither numbers
        nor modules.
        """
        sites = self._sites()
        doubted = self._doubted
        told = all(site.__dict__["_neftune"].multiplier_known for site in sites)
        if told and doubted is not None and doubted.factors == _factors(sites):
            self._uninvolved |= doubted.names
        self._doubted = None
        leading = [
            parent
            for root, _ in self._live_roots()
            for name, module in root.named_modules(remove_duplicate=False)
            if module in sites
            for parent, _ in ancestors_of(root, name)
        ]
        beside = [child for one in leading for child in one.children() if is_foreign(child)]
        rows = [one for one in self._followed if one.held is None]
        self._followed = rows + [
            _followed(one, numbers_of(one, self._uninvolved))
            for one in dict.fromkeys([*leading, *beside])
        ]

    def may_have_changed(self) -> bool:
        """Whether :meth:`refresh` may find something to do."""
        return bool(self._followed) or self.has_moved()

    def read_again(self) -> None:
        """What sites are multiplied by, where something has changed that it may follow."""
        if self._state is None or self._state.embedding_multiplier is not None:
            return
        names: set[tuple[weakref.ref[nn.Module], str]] = set()
        has_changed = False
        for model, held, before in self._followed:
            module = model()
            if module is None or (now := _read(module, held)) == before:
                continue
            has_changed = True
            for one, old, new in zip(held or (), before, now, strict=False):
                names |= {(model, name) for name in one.changed(old, new)}
        if has_changed:
            sites = self._sites()
            self._doubted = _Doubted(names, _factors(sites))
            self._multiply(self._live_roots(), sites)

    def refresh(self) -> bool:
        """Attach again if something has been put in an embedding's place since: PEFT's wrappers, a
        resized or another embedding. What embeddings are multiplied by is read again.
        """
        if not self.has_moved():
            self.read_again()
            return False
        # Dynamo fails inside inspect
        attach: Callable[[], None] = self._attach
        if "torch._dynamo" in sys.modules:
            attach = torch.compiler.disable(attach)
        attach()
        return True

    def has_moved(self) -> bool:
        for parent, name, child in self._places:  # at every forward: no generator
            module = parent()
            if module is not None and module._modules.get(name) is not child():
                return True
        for reference, before in self._wrappers:
            wrapper = reference()
            if wrapper is not None and snapshot(wrapper) != before:
                return True
        return False

    def has_lost(self, places: Collection[tuple[nn.Module, str]]) -> bool:
        """Whether something was put in one of these places that led to our sites."""
        return any(
            (module := parent()) is not None
            and (module, name) in places
            and module._modules.get(name) is not child()
            for parent, name, child in self._places
        )

    def _live_state(self) -> State:
        if self._state is None:
            raise RuntimeError("this NEFTuneHandle was removed: call apply_neftune again")
        return self._state

    # ---- settings

    @property
    def settings(self) -> Settings:
        """All of them as one value; assigning it puts them in force, as who borrows a handle does
        when he gives it back.
        """
        return self._live_state().settings()

    @settings.setter
    def settings(self, value: Settings) -> None:
        state = self._live_state()
        attach = value.fused != state.fused or (value.samples is None) != (state.read is None)
        attach = attach or value.batch_first != state.batch_first
        state.assign(value)
        if attach:
            self._attach()

    def _set(self, **changed: Any) -> None:
        self.settings = self.settings._replace(**changed)

    @property
    def noise_alpha(self) -> float:
        return self._live_state().noise_alpha

    @noise_alpha.setter
    def noise_alpha(self, value: float | None) -> None:
        self._set(noise_alpha=check_alpha(value))
        self.refresh()

    @property
    def sign(self) -> int:
        """1 or -1: the noise as it is or negated, for antithetic pairs of forwards from one seed
        (SymNoise, arXiv 2312.01523).
        """
        return self._live_state().variant.sign

    @sign.setter
    def sign(self, value: int) -> None:
        distribution, equal_variance, _ = self._live_state().variant
        self._set(variant=said_variant(distribution, equal_variance, value))

    @property
    def distribution(self) -> str:
        return self._live_state().variant.distribution

    @distribution.setter
    def distribution(self, value: str) -> None:
        _, equal_variance, sign = self._live_state().variant
        self._set(variant=said_variant(value, equal_variance, sign))

    @property
    def equal_variance(self) -> bool:
        return self._live_state().variant.equal_variance

    @equal_variance.setter
    def equal_variance(self, value: bool) -> None:
        distribution, _, sign = self._live_state().variant
        self._set(variant=said_variant(distribution, value, sign))

    @property
    def replica(self) -> int | None:
        return self._live_state().replica

    @replica.setter
    def replica(self, value: int | None) -> None:
        self._set(replica=None if value is None else check_word("replica", value))

    @property
    def noise_without_grad(self) -> bool:
        return self._live_state().noise_without_grad

    @noise_without_grad.setter
    def noise_without_grad(self, value: bool) -> None:
        self._set(noise_without_grad=value)

    @property
    def backend(self) -> str | None:
        return self._live_state().backend

    @backend.setter
    def backend(self, value: str | None) -> None:
        for module in self._sites():
            check_backend(value, module)
        self._set(backend=value)

    @property
    def samples(self) -> Read | None:
        return self._live_state().read

    @samples.setter
    def samples(self, value: Read | None) -> None:
        self._set(samples=check_samples(value))

    @property
    def fused(self) -> bool | None:
        return self._live_state().fused

    @fused.setter
    def fused(self, value: bool | None) -> None:
        for root, path in self._live_roots():
            find_embeddings(root, path, check_fused(value))  # refuses before anything changes
        self._set(fused=value)

    @property
    def batch_first(self) -> bool:
        return self._live_state().batch_first

    @batch_first.setter
    def batch_first(self, value: bool) -> None:
        self._set(batch_first=check_batch_first(value))

    @property
    def embedding_multiplier(self) -> Said | None:
        return self._live_state().embedding_multiplier

    @embedding_multiplier.setter
    def embedding_multiplier(self, value: Said | None) -> None:
        self._set(embedding_multiplier=check_multiplier(value))

    @property
    def capturable(self) -> bool:
        return self._live_state().capturable

    @capturable.setter
    def capturable(self, value: bool) -> None:
        self._set(capturable=check_capturable(value))

    # ---- samples

    @contextlib.contextmanager
    def told(self, **words: Any) -> Iterator[None]:
        """Says of which samples the lookups inside are, where no forward is heard saying it:
        `model.forward(...)`, `calculate_loss`, `encode_text`.

        It goes before samples= and what a forward is given; the innermost counts, in this thread
        only. A checkpoint that recomputes outside takes what its first pass was told.

        Args:
            words: attention_mask, key_padding_mask, lengths, document_lengths, cu_seqlens,
                position_ids, noise_mask as tensors, as `samples=` of :func:`apply_neftune` knows
                them; with input_ids they are said of those ids alone.

        Raises:
            TypeError: another word.
            ValueError: two words that contradict each other.
        """
        state = self._live_state()
        RUNNING.told.append((state, check_words(words)))
        try:
            yield
        finally:
            RUNNING.told.pop()

    # ---- undo

    @property
    def removed(self) -> bool:
        return self._state is None

    def check_single_noise(self) -> None:
        """One noise for every embedding of ours.

        Raises:
            RuntimeError: transformers' own NEFTune hook is active on one.
        """
        for module in (reference() for reference in self._noisy):
            if module is None or (site := module.__dict__.get("_neftune")) is None:
                continue
            if has_other_noise(module) or site.marked():
                raise RuntimeError(TWO_NOISES)

    def remove(self) -> None:
        """Give the model back exactly as it was: class, forward, hooks. A second call does nothing.

        Raises:
            RuntimeError: something put on the embedding since then holds its noisy class; nothing
                is changed.
        """
        if self._state is None:
            return
        forget_interrupted()
        modules = self._modules()
        # with the copies that PEFT made of one (modules_to_save, a further adapter)
        noisy = [
            module
            for module in modules
            if (site := module.__dict__.get("_neftune")) is not None and self._is_ours(site.state)
        ]
        if any(class_to_restore(module) is None for module in noisy):
            raise RuntimeError(PARAMETRISED)
        self._state.handle = None  # what an interrupt leaves is nobody's, and the next apply's
        changes = [make_plain(module) for module in noisy]
        unhooked = [
            listener.detach(model)
            for model in modules
            for listener in listeners_of(model)
            if self._is_ours(listener.state)
        ]
        for module in modules:
            drop_hooks(module, is_left)
            for axes in watches(module):
                if self._is_ours(axes.state):
                    watch(module, axes, False)
        _forget_compiled([*changes, (False, any(unhooked))])
        self._state = None

    def __enter__(self) -> "NEFTuneHandle":
        self._entered.append(self._before)
        self._before = None
        return self

    def __exit__(self, *_: Any) -> None:
        before = self._entered.pop() if self._entered else None
        if self.removed:
            return
        if before is None:
            self.remove()
        else:
            self._restore(before)

    def check(self, **batch: Any) -> Check:
        """Is my noise on, and right? One batch through the model, measured.

        The model is run in training mode with noise, and once more without grad up to its first
        block; its mode, generators, buffers and this handle's counters are put back. Nothing is
        differentiated.

        Args:
            batch: what the model that apply_neftune was given is called with, by name.

        Returns:
            A dictionary that prints as a table. ok: whether every site's noise is the paper's;
            noise_alpha; said: warnings of that forward, and what to paste where something is
            wrong; sites, a dictionary each: site (its path), way (fused or behind), backend,
            replica, multiplier (what alpha is divided by), heard (the argument that tells the
            samples), lengths of the samples with a real token, padding (True: it has no noise),
            arrives (noise at the first block over the paper's), measured (the multiplier that was
            measured, None where it could not be), noise_to_embedding, tied (True: it looked nothing
            up, but a table with its weight did).

        Raises:
            RuntimeError: the handle was removed, or its model is gone.

        Example:
            >>> from neftune_kernels import apply_neftune
            >>> class Model(nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.embed = nn.Embedding(10, 4)
            ...     def forward(self, input_ids, attention_mask=None):
            ...         return self.embed(input_ids)
            >>> model = Model()
            >>> handle = apply_neftune(model, 5.0, embedding="embed")
            >>> ids = torch.tensor([[1, 2, 3], [4, 0, 0]])
            >>> checked = handle.check(input_ids=ids, attention_mask=ids != 0)
            >>> checked["ok"], checked["sites"][0]["lengths"], checked["sites"][0]["heard"]
            (True, [3, 1], 'attention_mask')
        """
        state, root = self._live_state(), self.root()
        if root is None:
            raise RuntimeError("the model of this NEFTuneHandle is gone")
        self.refresh()
        names = {module: name for name, module in reversed(list(root.named_modules()))}
        paths = {
            names.get(module, "?") or type(module).__name__: module for module in self._sites()
        }
        return check(root, state, paths, batch)

    def stats(self) -> dict[str, Any]:
        """What the noise was, computed now: nothing is counted or synchronised in forward but two
        Python integers.

        Returns:
            calls: noisy forwards of embeddings so far; skipped: those without noise by reason
                ("eval mode", "no grad", "noise_alpha is 0").
            Of the last noisy forward (of encoder and decoder together), None before one: samples
            (with a real token), length_min, length_mean, length_max (real tokens), magnitude_min,
            magnitude_mean, magnitude_max (alpha/√(L·d)), max_noise_ratio (largest
            |noise| over its sample's magnitude, below 1 if uniform), noise_to_embedding (rms of the
            noise over rms of the embeddings it was added to, as they are now; None where the weight
            is sharded) and backend.
            compiled_forwards: how often a noisy forward was compiled; its calls are not counted.
        """
        state = self._live_state()
        stats: dict[str, Any] = {
            "calls": state.calls,
            "samples": None,
            **dict.fromkeys(MEASURED),
            "max_noise_ratio": None,
            "noise_to_embedding": None,
            "backend": None,
            "compiled_forwards": state.compilations,
            "skipped": dict(state.skipped),
        }
        lasts = [
            (site.last, module)
            for module in self._sites()
            if (site := module.__dict__.get("_neftune")) is not None and site.last is not None
        ]
        if not lasts:
            return stats
        measured = [_measure(*one) for one in lasts]
        lengths, magnitudes = (
            torch.cat([found[0] for found in measured]),
            torch.cat([found[1] for found in measured]),
        )
        stats |= {"samples": lengths.numel(), "backend": lasts[-1][0].backend.name}
        if lengths.numel() == 0:
            return stats
        values = [
            float(how(tensor))
            for tensor in (lengths, magnitudes)
            for how in (torch.min, torch.mean, torch.max)
        ]
        stats |= dict(zip(MEASURED, values, strict=True))
        stats["max_noise_ratio"] = max(found[2] for found in measured)
        ratios = [found[3] for found in measured if found[3] is not None]
        stats["noise_to_embedding"] = max(ratios, default=None)
        stats |= {"length_min": int(stats["length_min"]), "length_max": int(stats["length_max"])}
        return stats


def _factors(sites: list[nn.Module]) -> list[dict[torch.dtype, float]]:
    return [site.__dict__["_neftune"].factors for site in sites]


def _followed(model: nn.Module, held: tuple[Numbers, ...] | None) -> _Followed:
    return _Followed(weakref.ref(model), held, _read(model, held))


def _read(model: nn.Module, held: tuple[Numbers, ...] | None) -> tuple[Any, ...]:
    """What its row says, or its numbers and what modules it holds; asked at every forward."""
    if held is None:
        return (read_row(model),)
    children = [weakref.ref(one) for one in model._modules.values() if one is not None]
    return (*[one.read(model) for one in held], *children)


def _places(
    roots: list[tuple[nn.Module, str | None]], found: dict[nn.Module, Found]
) -> list[tuple[weakref.ref[nn.Module], str, weakref.ref[nn.Module]]]:
    """(parent, name, child) of all that leads from a root to an embedding, for has_moved."""
    targets = {one.embedding for one in found.values()}
    return [
        (weakref.ref(parent), child, weakref.ref(parent._modules[child]))  # type: ignore[arg-type]
        for root, _ in roots
        for parent, child in ways_to(root, targets)
    ]


def _forget_compiled(changes: list[tuple[bool, bool]]) -> None:
    """Dynamo sees a class that changes, but no hook that comes or goes after its first compilation
    (skip_nnmodule_hook_guards): where hooks changed alone, all is compiled anew.
    """
    classes = any(swapped for swapped, _ in changes)
    hooks = any(hook for _, hook in changes)
    behind = any(hook for _, hook in changes[:-1])  # the last are the listeners'
    if (behind or (hooks and not classes)) and "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def check_fused(fused: Any) -> bool | None:
    if fused is not None and not isinstance(fused, bool):
        raise TypeError(f"fused must be None, True or False, got {fused!r}")
    return fused


def check_multiplier(value: Any) -> Said | None:
    if value is None or callable(value):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"embedding_multiplier must be a number, a callable or None, got {value!r}")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(
            f"embedding_multiplier must be positive and finite, got {value!r}: it is what the "
            "model multiplies its embeddings by after the lookup"
        )
    return float(value)


def check_backend(backend: str | None, embedding: Any) -> None:
    """Whether it serves the embedding as it is; an offloaded weight is on meta and says nothing."""
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or weight.device.type == "meta":
        if backend is not None and backend not in BACKENDS:
            raise ValueError(
                f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
            )
        return
    quantised = type(weight) not in PLAIN_WEIGHTS  # its forward decides the dtype
    choose_backend(backend, weight.device, torch.float32 if quantised else weight.dtype)


def _measure(last: NoisyCall, module: nn.Module) -> tuple[Tensor, Tensor, float, float | None]:
    """float64 lengths and magnitudes of the call's samples with a real token, the largest |noise|
    over its magnitude, and noise over embeddings, of the real tokens.
    """
    sample, _, length = last.tokens()
    real = length > 0
    # One for each sample with a real token.
    lengths = torch.stack((sample[real], length[real])).unique(dim=1)[1].double()
    # A graph that was captured replays with today's.
    state: State = module.__dict__["_neftune"].state
    alpha = state.noise_alpha if last.noise.capturable else last.noise_alpha
    magnitudes = alpha / (lengths * last.embedding_dim).sqrt()
    zeros = torch.zeros((), dtype=torch.float32, device=sample.device)
    zeros = zeros.expand(*last.shape, last.embedding_dim)
    noise = embeds_with_noise(zeros, last.samples, last.noise._replace(backend=last.backend.name))
    noise = noise.view(-1, last.embedding_dim)[real]
    if lengths.numel() == 0:
        return lengths.cpu(), lengths.cpu(), 0.0, None
    clean = clean_lookup(module, last.ids)
    ratio = None
    if clean is not None:
        own = noise
        if last.factors is not None:  # of each sample
            own = noise / last.factors.to(noise).expand(last.shape).reshape(-1, 1)[real]
        ratio = ratio_of_rms(own, clean.reshape(-1, last.embedding_dim)[real])
    bound = abs(float(last.noise.alpha)) / (length[real].double() * last.embedding_dim).sqrt()
    largest = float((noise.abs().amax(-1) / bound).max()) if alpha else 0.0
    return lengths.cpu(), magnitudes.cpu(), largest, ratio
