"""The handle of an apply_neftune: change alpha, read statistics, undo."""

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .. import layout as layouts
from ..lookup import embeds_with_noise
from ..modules import HUGGING_FACE_MARK, TWO_NOISES
from ..noise import check_variant
from ..samples import make_layout
from .arguments import parameter_names
from .factors import factor_of_embeddings
from .find import Found, ancestors_of, decoder_of, find_embeddings, pad_token_id_of
from .listening import ForgetSamples, TakeSamples, forget_hooks, speakers
from .noisy import NoisyEmbedding, class_to_restore, make_noisy, make_plain
from .running import NEFTuneState, NoisyCall, Site, handles, numbers


class NEFTuneHandle:
    """What apply_neftune returns: change alpha, read statistics, undo.

    Also a context manager that undoes on exit.
    """

    def __init__(self, state: NEFTuneState) -> None:
        state.handle_number = next(numbers)
        handles[state.handle_number] = self
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
        self._hooks: list[tuple[weakref.ref[nn.Module], TakeSamples, list[Any]]] = []

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
            if isinstance(module, NoisyEmbedding) and module not in found:
                make_plain(module)
        for module, one in found.items():
            make_noisy(module, state).wrappers = [weakref.ref(wrapper) for wrapper in one.wrappers]
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
            decoders = {id(module) for module in decoder_of(root)}
            for name, module in list(root.named_modules(remove_duplicate=False)):
                if isinstance(module, NoisyEmbedding) and module in found:
                    ancestors = list(ancestors_of(root, name))
                    places += [
                        (weakref.ref(parent), child, weakref.ref(parent._modules[child]))  # type: ignore[arg-type]
                        for parent, child in ancestors
                    ]
                    around = [parent for parent, _ in ancestors]
                    inside = [
                        parent for parent in around if id(parent) in decoders
                    ]  # what is around is told the encoder's mask
                    for parent in speakers(inside or around, state.read is not None) or inside[:1]:
                        sites = listeners.setdefault(parent, [])
                        if module._neftune not in sites:
                            sites.append(module._neftune)
            for parent, sites in listeners.items():
                self._listen(parent, sites, id(parent) in decoders, pad_token_id_of(root))
        self._places = places

    def _listen(
        self, model: nn.Module, sites: list[Site], decoder: bool, pad_token_id: int | None
    ) -> None:
        if any(
            isinstance(hook, TakeSamples) and hook.state is self._state
            for hook in model._forward_pre_hooks.values()
        ):
            return
        forget_hooks(model)  # of a deepcopied or unpickled model
        taken = TakeSamples(self._live_state(), tuple(parameter_names(model)))
        taken.sites, taken.decoder, taken.pad_token_id = sites, decoder, pad_token_id
        taken.factor = factor_of_embeddings(model)
        if taken.factor is not None:
            taken.true_factor = float(getattr(model, taken.factor))
        for site in sites:
            site.hooked = True
            if taken.factor is not None:
                site.scaling = (weakref.ref(model), taken.factor)
        hooks = [
            model.register_forward_pre_hook(taken, with_kwargs=True),
            model.register_forward_hook(ForgetSamples(taken), always_call=True),
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
            if isinstance(module, NoisyEmbedding) and (
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
            if isinstance(module, NoisyEmbedding)
        ]
        for root in (
            reference() for reference, _ in self._roots
        ):  # copies that PEFT made of one (modules_to_save, a further adapter)
            noisy += (
                []
                if root is None
                else [module for module in root.modules() if isinstance(module, NoisyEmbedding)]
            )
        bases = {module: class_to_restore(module) for module in noisy}
        if any(base is None for base in bases.values()):
            raise RuntimeError(
                "the embedding was parametrised or given a forward of its own (accelerate's "
                "device hooks do so) after apply_neftune: "
                "take that off first, then call remove()"
            )
        for module in bases:
            make_plain(module)
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
            if isinstance(module, NoisyEmbedding)
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
