"""NEFTune in transformers.Trainer and every TRL trainer: a callback, or ours in place of
`TrainingArguments(neftune_noise_alpha=...)`.

Nothing here changes transformers until a NEFTuneCallback is made or patch_trainer() is called.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers import Trainer, TrainerCallback

from .apply import apply_neftune
from .handle import NEFTuneHandle
from .training import LOG_PREFIX, TrainingNoise


class NEFTuneCallback(TrainingNoise, TrainerCallback):  # type: ignore[misc]
    """NEFTune while a transformers.Trainer or TRL trainer (SFT, DPO, KTO, GRPO, Reward) trains, and
    only then.

    The noise is put on the model when training begins and taken off when it ends, is interrupted or
    fails. The trainer's log gets neftune/noise_alpha, neftune/calls, the lengths and magnitudes of
    the last noisy batch (see :meth:`NEFTuneHandle.stats`) and neftune/skipped/<reason>; with
    torch_compile=True, whose forwards are not counted, only the alpha. A run that ends without a
    single noisy forward warns.

    Args:
        noise_alpha: the paper's alpha, or a schedule: a function from the optimizer step to alpha
            (`neftune_kernels.schedules`).
        log_stats: False: only neftune/noise_alpha is logged; the rest costs one more noise kernel
            and a sync per log.
        embedding, samples, replica, noise_without_grad, distribution, equal_variance, backend,
            fused, batch_first, embedding_multiplier: as in :func:`apply_neftune`.

    Raises:
        ValueError, TypeError: as apply_neftune, a bad alpha at construction.
        RuntimeError: the callback is in use by another running training, or
            `TrainingArguments(neftune_noise_alpha=...)` is set too, so that the model would get two
            noises.

    Example:
        >>> from neftune_kernels.integrations.transformers import NEFTuneCallback
        >>> callback = NEFTuneCallback(noise_alpha=5.0)  # Trainer(..., callbacks=[callback])
        >>> callback.handle is None  # not training
        True
    """

    def watch(self) -> None:
        _watch_training()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        if model is None:
            raise ValueError("NEFTuneCallback was given no model to train")
        if self.handle is not None and not self.handle.removed and self.handle.root() is not model:
            raise RuntimeError(
                "this NEFTuneCallback is in use by another training that has not ended: give "
                "every trainer one of its own"
            )
        handle = self.attach(model, state.global_step)
        try:
            handle.check_single_noise()
        except RuntimeError:
            self.detach()
            raise

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.follow_schedule(state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if (
            self.handle is None or logs is None or "loss" not in logs
        ):  # evaluation and the summary at the end have no noise to tell of
            return
        counted = self.log_stats and not getattr(
            args, "torch_compile", False
        )  # compiled forwards are not
        stats = self.handle.stats() if counted else None
        told = self.told(stats)
        if stats is not None:
            told[f"{LOG_PREFIX}calls"] = stats["calls"]
            told |= {
                f"{LOG_PREFIX}skipped/{reason}": count for reason, count in stats["skipped"].items()
            }
        logs.update(told)
        if state.log_history:
            state.log_history[-1].update(told)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.handle is not None and not self.handle.removed and state.global_step > 0:
            stats = self.handle._live_state()
            if (
                stats.calls == 0
                and self.noise_alpha > 0
                and not getattr(args, "torch_compile", False)
            ):
                warnings.warn(
                    f"training ended without one noisy forward although noise_alpha was "
                    f"{self.noise_alpha}; forwards without noise: "
                    f"{dict(stats.skipped)}",
                    stacklevel=2,
                )
        self.detach()


_replaced: dict[
    str, Any
] = {}  # what patch_trainer put aside: name in transformers.trainer → the original


def _activate(
    model: nn.Module, neftune_noise_alpha: float, accelerator: Any = None
) -> NEFTuneHandle:
    """Has the signature of transformers.integrations.neftune.activate_neftune; Trainer keeps the
    handle as its hook's.
    """
    return apply_neftune(
        model if accelerator is None else accelerator.unwrap_model(model), neftune_noise_alpha
    )


def _deactivate(model: nn.Module, hook_handle: NEFTuneHandle, accelerator: Any = None) -> None:
    hook_handle.remove()


def patch_trainer() -> Callable[[], None]:
    """Make `TrainingArguments(neftune_noise_alpha=...)` use this package in place of transformers'
    own hook, for the whole process.

    For configurations that can only set that argument (axolotl, LLaMA-Factory, ms-swift): call it
    once before the trainer trains. A NEFTuneCallback beside it updates the same noise; there are
    never two. A second call does nothing.

    Returns:
        A function that undoes it.

    Example:
        >>> from neftune_kernels.integrations.transformers import patch_trainer
        >>> undo = patch_trainer()  # TrainingArguments(neftune_noise_alpha=5.0) is exact now
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
    """Trainer tells no callback of an exception or KeyboardInterrupt, so its train() is wrapped,
    once: afterwards no noise is left.
    """
    train: Any = Trainer.train
    if hasattr(train, "_neftune_kernels"):
        return

    @functools.wraps(train)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        handler = self.callback_handler
        ours = [callback for callback in handler.callbacks if isinstance(callback, NEFTuneCallback)]
        # reporters come after us in the log's order, so that they report our figures
        handler.callbacks = ours + [
            callback for callback in handler.callbacks if callback not in ours
        ]
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
