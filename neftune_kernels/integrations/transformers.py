"""NEFTune in transformers.Trainer and every TRL trainer: a callback, or ours in place of
`TrainingArguments(neftune_noise_alpha=...)`.

Nothing here changes transformers until a NEFTuneCallback is made or patch_trainer() is called.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

try:
    import transformers
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "neftune_kernels.integrations.transformers is for transformers, whose environment it needs "
        f"({error}): pip install 'neftune_kernels[transformers]'"
    ) from error

from ..noise import check_alpha
from .handle import NEFTuneHandle
from .training import LOG_PREFIX, TrainingNoise


class NEFTuneCallback(TrainingNoise, TrainerCallback):  # type: ignore[misc]
    """NEFTune while a transformers.Trainer or TRL trainer (SFT, DPO, KTO, GRPO, RLOO, Reward,
    ORPO, CPO, GKD) trains, and only then.

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
            fused, batch_first, embedding_multiplier, capturable: as in :func:`apply_neftune`.

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
        for patch in _patches:
            patch.on_noise()

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


class AnnouncedCallback(NEFTuneCallback):
    """For who has written no Python: the first process says once per run what it does."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        super().on_train_begin(args, state, control, model=model)
        if state.is_world_process_zero and self.handle is not None:
            # without "on": train() of the model may come later
            told = self.handle.describe().rpartition(", ")[0]
            print(f"noise by neftune_kernels, {told}", flush=True)


class _Configured(AnnouncedCallback):
    """TrainingArguments(neftune_noise_alpha=...) for one train(): its alpha is read when training
    begins, after a hyperparameter search has set its trial's.
    """

    def __init__(self, trainer: Trainer, patch: "TrainerPatch") -> None:
        super().__init__()
        self.trainer: Any = trainer
        self.patch = patch

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        alpha = getattr(args, "neftune_noise_alpha", None)
        if alpha is None:  # a trainer may keep it to itself
            alpha = getattr(self.trainer, "neftune_noise_alpha", None)
        if alpha is None:
            alpha = self.patch.noise_alpha
        if alpha is None:
            return
        self.noise_alpha = check_alpha(alpha)
        super().on_train_begin(args, state, control, model=model)
        self.patch.handle = self.handle

    def detach(self) -> None:
        if self.handle is not None and not self.handle.removed:
            self.patch.keep(self.handle)
        super().detach()


def _nothing() -> None:
    """Nobody has asked to be told."""


class TrainerPatch:
    """What patch_trainer returns."""

    def __init__(self) -> None:
        self.noise_alpha: float | None = None  # of trainings that say none
        self.on_noise: Callable[[], None] = _nothing  # in every process whose training has noise
        self.handle: NEFTuneHandle | None = None  # of the training that runs
        self._last: dict[str, Any] | None = None

    @property
    def last_stats(self) -> dict[str, Any] | None:
        """stats() of the training that runs, else of the last that ended; None before one. See
        :meth:`NEFTuneHandle.stats`.
        """
        if self.handle is not None and not self.handle.removed:
            return self.handle.stats()
        return self._last

    def keep(self, handle: NEFTuneHandle) -> None:
        self.handle = None
        try:
            self._last = handle.stats()
        except RuntimeError:  # after a device's error nothing can be computed, and that is raised
            self._last = None

    def undo(self) -> None:
        """TrainingArguments(neftune_noise_alpha=...) means transformers' own hook again; a second
        call does nothing.
        """
        unpatch_trainer()


# What patch_trainer put aside: (where, name) → the original
_replaced: dict[tuple[Any, str], Any] = {}
_patches: list[TrainerPatch] = []  # at most one, in force


def _activate(model: nn.Module, *_: Any, **__: Any) -> None:
    """In place of transformers' hook: our callback adds the noise when training begins."""


def _activate_method(self: Trainer, model: nn.Module) -> nn.Module:
    """The same where it is a method of Trainer (transformers 4), which returns the model."""
    return model


def _deactivate(*_: Any, **__: Any) -> None:
    """The callback has taken its noise off."""


def _places() -> list[tuple[Any, str, Any]]:
    """(where, name, ours) of what activates transformers' own hook."""
    module: Any = transformers.trainer
    functions = (module, "activate_neftune", _activate), (module, "deactivate_neftune", _deactivate)
    methods = (
        (Trainer, "_activate_neftune", _activate_method),
        (Trainer, "_deactivate_neftune", _deactivate),
    )
    for places in (functions, methods):  # transformers 5, transformers 4
        if all(hasattr(where, name) for where, name, _ in places):
            return list(places)
    raise RuntimeError(
        f"transformers {transformers.__version__} activates NEFTune in a way that patch_trainer() "
        "does not know: give the trainer a NEFTuneCallback"
    )


def patch_trainer(noise_alpha: float | None = None) -> TrainerPatch:
    """Make `TrainingArguments(neftune_noise_alpha=...)` use this package in place of transformers'
    own hook, for the whole process.

    For configurations that can only set that argument (axolotl, LLaMA-Factory, ms-swift): call it
    once before the trainer trains. Noise, log and cleaning up are those of
    :class:`NEFTuneCallback`; a trial of a hyperparameter search trains with its own alpha. The
    first process says once per run what it does. Where the trainer has a NEFTuneCallback, that one
    alone adds noise. A second call changes no more than a `noise_alpha` that it is given. Who has
    a command and no Python of their own starts it with `neftune-run` (docs/neftune_run.md).

    Args:
        noise_alpha: of trainings whose arguments say None; what they say counts, 0 too.

    Returns:
        An object with undo(), and last_stats: the handle's stats() of the last training.

    Raises:
        RuntimeError: a transformers that activates its hook in another way (4.55 to 5.23 are
            known).
        ValueError, TypeError: noise_alpha is no finite number >= 0.

    Example:
        >>> from neftune_kernels.integrations.transformers import patch_trainer
        >>> patch = patch_trainer()  # TrainingArguments(neftune_noise_alpha=5.0) is exact now
        >>> patch.last_stats is None  # nothing has trained
        True
        >>> patch.undo()
    """
    if noise_alpha is not None:
        noise_alpha = check_alpha(noise_alpha)
    if not _patches:
        for where, name, ours in _places():
            _replaced[where, name] = getattr(where, name)
            setattr(where, name, ours)
        _patches.append(TrainerPatch())
        _watch_training()
    if noise_alpha is not None:
        _patches[0].noise_alpha = noise_alpha
    return _patches[0]


def unpatch_trainer() -> None:
    """Undo patch_trainer; nothing happens where it was not called."""
    for (where, name), original in _replaced.items():
        setattr(where, name, original)
    _replaced.clear()
    _patches.clear()


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
        if _patches and not ours:
            ours = [_Configured(self, _patches[0])]
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
            handler.callbacks = [
                callback for callback in handler.callbacks if not isinstance(callback, _Configured)
            ]

    watched._neftune_kernels = True  # type: ignore[attr-defined]
    Trainer.train = watched  # type: ignore[method-assign]
