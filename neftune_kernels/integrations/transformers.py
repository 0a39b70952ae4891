"""NEFTune in transformers.Trainer and every TRL trainer: a callback, or ours in place of `TrainingArguments(neftune_noise_alpha=...)`.

Nothing here changes transformers until a NEFTuneCallback is made or patch_trainer() is called.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers import Trainer, TrainerCallback

from ..functional import check_alpha
from ..schedules import Schedule
from .models import NEFTuneHandle, applied_handle, apply_neftune

LOG_PREFIX = "neftune/"
LOGGED = ("length_min", "length_mean", "length_max", "magnitude_min", "magnitude_mean", "magnitude_max", "max_noise_ratio")


class NEFTuneCallback(TrainerCallback):  # type: ignore[misc]
    """NEFTune while a transformers.Trainer or TRL trainer (SFT, DPO, KTO, GRPO, Reward) trains, and only then.

    The noise is put on the model when training begins and taken off when it ends, is interrupted or fails. The trainer's log gets
    neftune/noise_alpha, neftune/calls, the lengths and magnitudes of the last noisy batch (see :meth:`NEFTuneHandle.stats`) and
    neftune/skipped/<reason>; with torch_compile=True, whose forwards are not counted, only the alpha. A run that ends without a single
    noisy forward warns.

    Args:
        noise_alpha: the paper's alpha, or a schedule: a function from the optimizer step to alpha (`neftune_kernels.schedules`).
        log_stats: False: only neftune/noise_alpha is logged; the rest costs one more noise kernel and a sync per log.
        **options: of :func:`apply_neftune` (embedding, samples, stream, noise_without_grad, backend, ...).

    Raises:
        ValueError, TypeError: as apply_neftune, a bad alpha at construction.
        RuntimeError: the callback is in use by another running training, or `TrainingArguments(neftune_noise_alpha=...)` is set too, so
            that the model would get two noises.

    Example:
        >>> from neftune_kernels.integrations.transformers import NEFTuneCallback
        >>> callback = NEFTuneCallback(noise_alpha=5.0)  # Trainer(..., callbacks=[callback])
        >>> callback.handle is None  # not training
        True
    """

    def __init__(self, noise_alpha: float | Schedule | None = 5.0, *, log_stats: bool = True, **options: Any) -> None:
        unknown = sorted(set(options) - set(apply_neftune.__kwdefaults__ or {}))
        if unknown:
            raise TypeError(f"NEFTuneCallback takes noise_alpha, log_stats and apply_neftune's keywords, got {', '.join(unknown)}")
        self.schedule = noise_alpha if callable(noise_alpha) else None
        self.noise_alpha = check_alpha(noise_alpha(0) if callable(noise_alpha) else noise_alpha)
        self.log_stats, self.options = log_stats, options
        self.handle: NEFTuneHandle | None = None
        self.lent: dict[str, Any] | None = None  # settings of an apply_neftune that was in force before and goes on afterwards
        _watch_training()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if model is None:
            raise ValueError("NEFTuneCallback was given no model to train")
        if self.handle is not None and not self.handle.removed and self.handle.root() is not model:
            raise RuntimeError("this NEFTuneCallback is in use by another training that has not ended: give every trainer one of its own")
        self.detach()
        lent = applied_handle(model, self.options.get("embedding"))
        self.lent = None if lent is None else lent.settings()
        self.handle = apply_neftune(model, self._alpha_at(state.global_step), **self.options)
        try:
            self.handle.check_single_noise()
        except RuntimeError:
            self.detach()
            raise

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.schedule is not None and self.handle is not None:
            self.handle.noise_alpha = self._alpha_at(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.handle is None or logs is None or "loss" not in logs:  # evaluation and the summary at the end have no noise to tell of
            return
        told = self._told(with_stats=self.log_stats and not getattr(args, "torch_compile", False))  # compiled forwards are not counted
        logs.update(told)
        if state.log_history:
            state.log_history[-1].update(told)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.handle is not None and not self.handle.removed and state.global_step > 0:
            stats = self.handle._live_state()
            if stats.calls == 0 and self.noise_alpha > 0 and not getattr(args, "torch_compile", False):
                warnings.warn(
                    f"training ended without one noisy forward although noise_alpha was {self.noise_alpha}; forwards without noise: "
                    f"{dict(stats.skipped)}",
                    stacklevel=2,
                )
        self.detach()

    def detach(self) -> None:
        """Take the noise off the model, or leave it as it was before the training; nothing happens where there is none."""
        handle, self.handle = self.handle, None
        if handle is None or handle.removed:
            return
        if self.lent is None:
            handle.remove()
        else:
            handle.restore(self.lent)

    def _alpha_at(self, step: int) -> float:
        if self.schedule is not None:
            self.noise_alpha = check_alpha(self.schedule(step))
        return self.noise_alpha

    def _told(self, with_stats: bool) -> dict[str, float]:
        assert self.handle is not None
        told: dict[str, float] = {f"{LOG_PREFIX}noise_alpha": self.handle.noise_alpha}
        if not with_stats:
            return told
        stats = self.handle.stats()
        told[f"{LOG_PREFIX}calls"] = stats["calls"]
        told |= {f"{LOG_PREFIX}{name}": stats[name] for name in LOGGED if stats[name] is not None}
        return told | {f"{LOG_PREFIX}skipped/{reason}": count for reason, count in stats["skipped"].items()}


_replaced: dict[str, Any] = {}  # what patch_trainer put aside: name in transformers.trainer → the original


def _activate(model: nn.Module, neftune_noise_alpha: float, accelerator: Any = None) -> NEFTuneHandle:
    """Has the signature of transformers.integrations.neftune.activate_neftune; Trainer keeps the handle as its hook's."""
    return apply_neftune(model if accelerator is None else accelerator.unwrap_model(model), neftune_noise_alpha)


def _deactivate(model: nn.Module, hook_handle: NEFTuneHandle, accelerator: Any = None) -> None:
    hook_handle.remove()


def patch_trainer() -> Callable[[], None]:
    """Make `TrainingArguments(neftune_noise_alpha=...)` use this package in place of transformers' own hook, for the whole process.

    For configurations that can only set that argument (axolotl, LLaMA-Factory, ms-swift): call it once before the trainer trains. A
    NEFTuneCallback beside it updates the same noise; there are never two. A second call does nothing.

    Returns:
        A function that undoes it.

    Example:
        >>> from neftune_kernels.integrations.transformers import patch_trainer
        >>> undo = patch_trainer()  # from here on Trainer(args=TrainingArguments(neftune_noise_alpha=5.0)) is exact
        >>> undo()
    """
    module: Any = transformers.trainer
    if not _replaced:
        for name, ours in (("activate_neftune", _activate), ("deactivate_neftune", _deactivate)):
            _replaced[name] = getattr(module, name)
            setattr(module, name, ours)
        _watch_training()
    return unpatch_trainer


def unpatch_trainer() -> None:
    """Undo patch_trainer; nothing happens where it was not called."""
    for name, original in _replaced.items():
        setattr(transformers.trainer, name, original)
    _replaced.clear()


def _watch_training() -> None:
    """Trainer tells no callback of an exception or KeyboardInterrupt, so its train() is wrapped, once: afterwards no noise is left."""
    train: Any = Trainer.train
    if hasattr(train, "_neftune_kernels"):
        return

    @functools.wraps(train)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        handler = self.callback_handler
        ours = [callback for callback in handler.callbacks if isinstance(callback, NEFTuneCallback)]
        # reporters come after us in the log's order, so that they report our figures
        handler.callbacks = ours + [callback for callback in handler.callbacks if callback not in ours]
        try:
            return train(self, *args, **kwargs)
        finally:
            for callback in handler.callbacks:
                if isinstance(callback, NEFTuneCallback):
                    callback.detach()
            configured = getattr(self, "neftune_hook_handle", None)
            if isinstance(configured, NEFTuneHandle):
                configured.remove()

    watched._neftune_kernels = True  # type: ignore[attr-defined]
    Trainer.train = watched  # type: ignore[method-assign]
