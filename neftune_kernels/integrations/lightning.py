"""NEFTune in a PyTorch Lightning Trainer: a callback.

Nothing of Lightning changes, and only who imports this file needs Lightning.
"""

from typing import Any, NoReturn

from torch import nn

try:
    from pytorch_lightning import Callback
except ImportError:  # the same library under its other name
    try:
        from lightning.pytorch import Callback  # type: ignore[no-redef]
    except ImportError as error:
        raise ImportError(
            "neftune_kernels.integrations.lightning is for PyTorch Lightning, whose environment it "
            "needs: pip install 'neftune_kernels[lightning]'"
        ) from error

from ..schedules import Schedule
from .telling import Read
from .training import TrainingNoise


class NEFTuneCallback(TrainingNoise, Callback):  # type: ignore[misc]
    """NEFTune while a Lightning Trainer fits, and only then.

    The noise is put on the model after the sanity check, when training starts, and taken off when
    it ends, is interrupted or fails; validation, test and predict have none. Every
    `log_every_n_steps` the logger gets neftune/noise_alpha and the lengths and magnitudes of the
    last noisy batch (see :meth:`NEFTuneHandle.stats`). A first training batch without noise warns:
    Lightning leaves a model that `from_pretrained` put in eval mode there.

    Args:
        noise_alpha: the paper's alpha, or a schedule: a function from trainer.global_step to alpha
            (`neftune_kernels.schedules`).
        model: path of the noised model in the LightningModule, "" for itself; None: itself or its
            only child with get_input_embeddings().
        log_stats: False: only neftune/noise_alpha is logged; the rest costs one more noise kernel
            and a sync per log.
        embedding, samples, replica, noise_without_grad, distribution, equal_variance, backend,
            fused, batch_first, embedding_multiplier, capturable: as in :func:`apply_neftune`.

    Raises:
        ValueError, TypeError: as apply_neftune, a bad alpha at construction; no model, or several,
            without model=.

    Example:
        >>> from neftune_kernels.integrations.lightning import NEFTuneCallback
        >>> callback = NEFTuneCallback(noise_alpha=5.0)  # Trainer(callbacks=[callback])
        >>> callback.handle is None  # not training
        True
    """

    def __init__(
        self,
        noise_alpha: float | Schedule | None = 5.0,
        *,
        model: str | None = None,
        log_stats: bool = True,
        embedding: str | nn.Module | None = None,
        samples: Read | None = None,
        replica: int | None = None,
        noise_without_grad: bool = False,
        distribution: str = "uniform",
        equal_variance: bool = True,
        backend: str | None = None,
        fused: bool | None = None,
        batch_first: bool = True,
        embedding_multiplier: float | None = None,
        capturable: bool = False,
        **unknown: NoReturn,
    ) -> None:
        super().__init__(
            noise_alpha,
            log_stats=log_stats,
            embedding=embedding,
            samples=samples,
            replica=replica,
            noise_without_grad=noise_without_grad,
            distribution=distribution,
            equal_variance=equal_variance,
            backend=backend,
            fused=fused,
            batch_first=batch_first,
            embedding_multiplier=embedding_multiplier,
            capturable=capturable,
            **unknown,
        )
        self.model = model

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self.attach(self._find_model(pl_module), trainer.global_step)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
        self.follow_schedule(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.handle is None:
            return
        state = self.handle._live_state()
        missed = ", ".join(reason for reason in state.skipped if reason != "noise_alpha is 0")
        if state.calls == 0 and state.has_noise and missed:
            state.warn_once(
                f"a training batch ended without one noisy forward although noise_alpha is "
                f"{state.noise_alpha}; skipped: "
                f"{missed}. Lightning leaves a model that is in eval mode (from_pretrained) in "
                f"eval mode: call its train() before fit"
            )
        if trainer.global_step % trainer.log_every_n_steps == 0:
            told = self.told(self.handle.stats() if self.log_stats else None)
            pl_module.log_dict(told, on_step=True, on_epoch=False, batch_size=1)  # type: ignore[operator]

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self.detach()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        self.detach()

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        self.detach()

    def _find_model(self, pl_module: nn.Module) -> nn.Module:
        if self.model is not None:
            return pl_module.get_submodule(self.model)
        if hasattr(pl_module, "get_input_embeddings") or self.options["embedding"] is not None:
            return pl_module
        found = [
            name
            for name, child in pl_module.named_children()
            if hasattr(child, "get_input_embeddings")
        ]
        if len(found) != 1:
            raise ValueError(
                f"{type(pl_module).__name__} has no get_input_embeddings() and {len(found)} "
                f"children with one"
                f"{' (' + ', '.join(found) + ')' if found else ''}: name the one to be noised: "
                f"NEFTuneCallback(model='path.in.module')"
            )
        return pl_module.get_submodule(found[0])
