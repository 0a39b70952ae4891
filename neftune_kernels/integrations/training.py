"""What the trainers' callbacks share: noise on a model while it trains, alpha on a schedule,
figures for the log.
"""

from typing import Any, NoReturn

from torch import nn

from ..noise import check_alpha, refuse_unknown
from ..schedules import Schedule
from .apply import applied_handle, apply_neftune
from .handle import MEASURED, NEFTuneHandle
from .running import Settings
from .telling import Read

LOG_PREFIX = "neftune/"
IN_A_TRAINER = "In a trainer these are keywords of NEFTuneCallback(embedding=..., samples=...)"
LOGGED = (*MEASURED, "max_noise_ratio")


class TrainingNoise:
    """apply_neftune for the length of a training; what was applied before goes on afterwards."""

    def __init__(
        self,
        noise_alpha: float | Schedule | None = 5.0,
        *,
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
        if unknown:
            refuse_unknown("NEFTuneCallback", unknown)
        self.options: dict[str, Any] = {
            "embedding": embedding,
            "samples": samples,
            "replica": replica,
            "noise_without_grad": noise_without_grad,
            "distribution": distribution,
            "equal_variance": equal_variance,
            "backend": backend,
            "fused": fused,
            "batch_first": batch_first,
            "embedding_multiplier": embedding_multiplier,
            "capturable": capturable,
        }
        self.schedule = noise_alpha if callable(noise_alpha) else None
        self.noise_alpha = check_alpha(noise_alpha(0) if callable(noise_alpha) else noise_alpha)
        self.log_stats = log_stats
        self.handle: NEFTuneHandle | None = None
        # of an apply_neftune that was in force before
        self.lent: Settings | None = None
        self.watch()

    def watch(self) -> None:
        """What a trainer needs beside its callback's methods, in every process that has one."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.watch()

    def __getstate__(self) -> dict[str, Any]:
        """Without the noise that is on: a copy, and another process's, begins with none."""
        return {**self.__dict__, "handle": None, "lent": None}

    def attach(self, model: nn.Module, step: int) -> NEFTuneHandle:
        """Raises what apply_neftune raises, which names its own keywords: here they are ours."""
        self.detach()
        noise_alpha = self.alpha_at(step)
        try:
            lent = applied_handle(model, self.options["embedding"])
            self.lent = None if lent is None else lent.settings
            self.handle = apply_neftune(model, noise_alpha, **self.options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}. {IN_A_TRAINER}") from error
        return self.handle

    def detach(self) -> None:
        """Take the noise off the model, or leave it as it was before the training; nothing happens
        where there is none.
        """
        handle, self.handle = self.handle, None
        if handle is None or handle.removed:
            return
        if self.lent is None:
            handle.remove()
        else:
            handle.settings = self.lent

    def alpha_at(self, step: int) -> float:
        if self.schedule is not None:
            self.noise_alpha = check_alpha(self.schedule(step))
        return self.noise_alpha

    def follow_schedule(self, step: int) -> None:
        if self.schedule is not None and self.handle is not None:
            self.handle.noise_alpha = self.alpha_at(step)

    def told(self, stats: dict[str, Any] | None) -> dict[str, float]:
        """neftune/noise_alpha, and of the handle's stats, where given, the lengths and magnitudes
        of the last noisy batch.
        """
        assert self.handle is not None
        told = {f"{LOG_PREFIX}noise_alpha": self.handle.noise_alpha}
        return told | {
            f"{LOG_PREFIX}{name}": float(stats[name])
            for name in LOGGED
            if stats is not None and stats[name] is not None
        }
