"""Hooks on the models around an embedding: what their forwards are told of the samples."""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .arguments import from_arguments, from_callable, parameter_names, tells_samples
from .factors import may_call_embedding
from .running import NEFTuneState, Running, Site, has_moved


class TakeSamples:
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
                if isinstance(hook, TakeSamples) and hook.state is state
            )
            return next(fresh)(module, args, kwargs)
        if torch.compiler.is_compiling() and not state.running and has_moved(state.handle_number):
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
            if isinstance(hook, TakeSamples) and hook.state is state:
                hook.end(interrupted)
                break
        else:  # no hook of ours is left on it
            state.running.pop()


class ForgetSamples:
    """Forward hook, called even when the forward raised."""

    def __init__(self, taken: TakeSamples) -> None:
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


def speakers(ancestors: list[nn.Module], all_speak: bool) -> list[nn.Module]:
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
    return [model for model in telling if model is telling[-1] or may_call_embedding(model)]


def forget_hooks(model: nn.Module) -> None:
    hooks: Callable[..., Any]
    for registered, extras in (
        (model._forward_pre_hooks, (model._forward_pre_hooks_with_kwargs,)),
        (
            model._forward_hooks,
            (model._forward_hooks_with_kwargs, model._forward_hooks_always_called),
        ),
    ):
        for key, hooks in list(registered.items()):
            if isinstance(hooks, (TakeSamples, ForgetSamples)):
                for where in (registered, *extras):
                    where.pop(key, None)  # type: ignore[attr-defined]
