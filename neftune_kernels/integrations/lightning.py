"""NEFTune in a PyTorch Lightning Trainer: a callback. Nothing of Lightning changes, and only who imports this file needs Lightning."""

from typing import Any

from torch import nn

try:
    from pytorch_lightning import Callback
except ImportError:  # the same library under its other name
    from lightning.pytorch import Callback  # type: ignore[no-redef]

from ..functional import check_alpha
from ..schedules import Schedule
from .models import NEFTuneHandle, apply_neftune

LOG_PREFIX = "neftune/"
LOGGED = ("length_min", "length_mean", "length_max", "magnitude_min", "magnitude_mean", "magnitude_max", "max_noise_ratio")


class NEFTuneCallback(Callback):  # type: ignore[misc]
    """NEFTune while a Lightning Trainer fits, and only then.

    The noise is put on the model after the sanity check, when training starts, and taken off when it ends, is interrupted or fails;
    validation, test and predict have none. Every `log_every_n_steps` the logger gets neftune/noise_alpha and the lengths and magnitudes of
    the last noisy batch (see :meth:`NEFTuneHandle.stats`). A first training batch without noise warns: Lightning leaves a model that
    `from_pretrained` put in eval mode there.

    Args:
        noise_alpha: the paper's alpha, or a schedule: a function from trainer.global_step to alpha (`neftune_kernels.schedules`).
        model: path of the noised model in the LightningModule, "" for itself; None: itself or its only child with get_input_embeddings().
        log_stats: False: only neftune/noise_alpha is logged; the rest costs one more noise kernel and a sync per log.
        **options: of :func:`apply_neftune` (embedding, samples, stream, noise_without_grad, backend).

    Raises:
        ValueError, TypeError: as apply_neftune, a bad alpha at construction; no model, or several, without model=.

    Example:
        >>> from neftune_kernels.integrations.lightning import NEFTuneCallback
        >>> callback = NEFTuneCallback(noise_alpha=5.0)  # pytorch_lightning.Trainer(callbacks=[callback])
        >>> callback.handle is None  # not training
        True
    """

    def __init__(
        self, noise_alpha: float | Schedule | None = 5.0, *, model: str | None = None, log_stats: bool = True, **options: Any
    ) -> None:
        unknown = sorted(set(options) - set(apply_neftune.__kwdefaults__ or {}))
        if unknown:
            raise TypeError(f"NEFTuneCallback takes noise_alpha, model, log_stats and apply_neftune's keywords, got {', '.join(unknown)}")
        self.schedule = noise_alpha if callable(noise_alpha) else None
        self.noise_alpha = check_alpha(noise_alpha(0) if callable(noise_alpha) else noise_alpha)
        self.model, self.log_stats, self.options = model, log_stats, options
        self.handle: NEFTuneHandle | None = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self.detach()
        self.handle = apply_neftune(self._find_model(pl_module), self._alpha_at(trainer.global_step), **self.options)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
        if self.schedule is not None and self.handle is not None:
            self.handle.noise_alpha = self._alpha_at(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.handle is None:
            return
        state = self.handle._live_state()
        missed = ", ".join(reason for reason in state.skipped if reason != "noise_alpha is 0")
        if state.calls == 0 and state.has_noise and missed:
            state.warn_once(
                f"a training batch ended without one noisy forward although noise_alpha is {state.noise_alpha}; skipped: "
                f"{missed}. Lightning leaves a model that is in eval mode (from_pretrained) in eval mode: call its train() before fit"
            )
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self._told(), on_step=True, on_epoch=False, batch_size=1)  # type: ignore[operator]

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self.detach()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        self.detach()

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        self.detach()

    def detach(self) -> None:
        """Take the noise off the model; nothing happens where there is none."""
        handle, self.handle = self.handle, None
        if handle is not None:
            handle.remove()

    def _find_model(self, pl_module: nn.Module) -> nn.Module:
        if self.model is not None:
            return pl_module.get_submodule(self.model)
        if hasattr(pl_module, "get_input_embeddings") or self.options.get("embedding") is not None:
            return pl_module
        found = [name for name, child in pl_module.named_children() if hasattr(child, "get_input_embeddings")]
        if len(found) != 1:
            raise ValueError(
                f"{type(pl_module).__name__} has no get_input_embeddings() and {len(found)} children with one"
                f"{' (' + ', '.join(found) + ')' if found else ''}: name the one to be noised: NEFTuneCallback(model='path.in.module')"
            )
        return pl_module.get_submodule(found[0])

    def _alpha_at(self, step: int) -> float:
        if self.schedule is not None:
            self.noise_alpha = check_alpha(self.schedule(step))
        return self.noise_alpha

    def _told(self) -> dict[str, float]:
        assert self.handle is not None
        told: dict[str, float] = {f"{LOG_PREFIX}noise_alpha": self.handle.noise_alpha}
        if self.log_stats:
            stats = self.handle.stats()
            told |= {f"{LOG_PREFIX}{name}": float(stats[name]) for name in LOGGED if stats[name] is not None}
        return told
