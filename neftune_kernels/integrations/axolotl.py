"""NEFTune in axolotl: `plugins: [neftune_kernels.integrations.axolotl.NEFTunePlugin]` in its YAML.

Only axolotl imports this file.
"""

from typing import Any, Literal

from ..schedules import Schedule, cosine_schedule, linear_schedule, warmup_schedule

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel, Field, NonNegativeInt, field_validator
except ImportError as error:
    raise ImportError(
        "neftune_kernels.integrations.axolotl is for axolotl, whose environment it needs: "
        "pip install 'neftune_kernels[axolotl]'"
    ) from error

from .telling import check_samples
from .transformers import AnnouncedCallback, NEFTuneCallback, patch_trainer

ALPHA = "neftune_noise_alpha"


class NEFTuneArgs(BaseModel):  # type: ignore[misc]
    """Keys of the YAML beside neftune_noise_alpha, which is axolotl's own."""

    neftune_schedule: Literal["constant", "linear", "cosine"] = "constant"
    # of linear and cosine, at the last step; None: 0
    neftune_final_alpha: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    neftune_warmup_steps: NonNegativeInt = 0
    neftune_distribution: Literal["uniform", "gaussian"] = "uniform"
    neftune_samples: dict[str, str] | list[dict[str, str]] | None = None

    @field_validator("neftune_samples")  # type: ignore[untyped-decorator]
    @classmethod
    def check_words(cls, samples: Any) -> Any:
        try:
            return check_samples(samples)
        except TypeError as error:  # pydantic reports a ValueError, and which key
            raise ValueError(str(error)) from error


class NEFTunePlugin(BasePlugin):  # type: ignore[misc]
    """Noise by this package in whatever trainer axolotl makes: SFT, reward models, and RL, to
    which axolotl's own setting does not come.

    The alpha is axolotl's `neftune_noise_alpha`. Its schedule, the distribution and what tells the
    samples are the keys of NEFTuneArgs; other keys of the YAML that begin with `neftune_` are
    refused, since axolotl would pass them over.

    Raises:
        ValueError: no `neftune_noise_alpha`, an unknown key or a value that its key does not take.
    """

    def register(self, cfg: Any) -> None:
        if cfg.get(ALPHA) is None and cfg.get("noisy_embedding_alpha") is None:
            raise ValueError(
                f"{type(self).__name__} is among the plugins, but {ALPHA} is not set: set it "
                f"({ALPHA}: 5), or take the plugin out"
            )
        known = {ALPHA, *NEFTuneArgs.model_fields}
        unknown = [key for key in cfg if key.startswith("neftune_") and key not in known]
        if unknown:
            raise ValueError(
                f"{type(self).__name__} takes the keys {', '.join(sorted(known))}, got "
                f"{', '.join(sorted(unknown))}"
            )
        falling = cfg.get("neftune_schedule") not in (None, "constant")
        if cfg.get("neftune_final_alpha") is not None and not falling:
            raise ValueError(
                "neftune_final_alpha is where neftune_schedule: linear or cosine ends: set that, "
                "too, or leave it out"
            )

    def get_input_args(self) -> str:
        return f"{__name__}.{NEFTuneArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[NEFTuneCallback]:
        patch_trainer()  # transformers' own hook stays away, and our callback alone adds noise
        options = {"distribution": cfg.neftune_distribution, "samples": cfg.neftune_samples}
        return [AnnouncedCallback(alpha_of(cfg, trainer.args.max_steps), **options)]


def alpha_of(cfg: Any, max_steps: int) -> float | Schedule:
    alpha, warmup = cfg[ALPHA], cfg.neftune_warmup_steps
    falling = {"linear": linear_schedule, "cosine": cosine_schedule}.get(cfg.neftune_schedule)
    if falling is not None:
        alpha = falling(alpha, cfg.get("neftune_final_alpha") or 0.0, max_steps - warmup)
    return warmup_schedule(warmup, alpha) if warmup else alpha
