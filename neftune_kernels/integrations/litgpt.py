"""NEFTune in LitGPT, whose commands have no plugin, hook or registry: `neftune-run --alpha 5 litgpt
finetune_full ...` calls patch_gpt for each of its modules that has a GPT.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .apply import apply_neftune
from .handle import NEFTuneHandle

EMBEDDING = "transformer.wte"


def read_samples(given: dict[str, Any]) -> Tensor:
    """GPT.forward is given no mask. litgpt.data pads with id 0 on the right, so a row is real up
    to its last other id; where 0 is also the eos (Pythia), the last eos counts as padding.
    """
    ids: Tensor = given["idx"]
    return (ids != 0).flip(-1).cumsum(-1).flip(-1) > 0


def patch_gpt(module: ModuleType, noise_alpha: float, on_noise: Callable[[], None]) -> None:
    """Every GPT that is built from now on has noise while it trains; the first process says so
    when it does.

    Args:
        module: litgpt.model, litgpt.lora, litgpt.adapter or litgpt.adapter_v2.
        noise_alpha: the paper's alpha.
        on_noise: called in every process at a model's first training forward.

    Raises:
        RuntimeError: its GPT is built in another way than LitGPT 0.5's.
    """
    gpt: Any = getattr(module, "GPT", None)
    build = vars(gpt).get("__init__") if isinstance(gpt, type) else None
    if build is None:
        raise RuntimeError(
            f"{module.__name__} of this litgpt has no GPT with an __init__ of its own"
        )

    @functools.wraps(build)
    def with_noise(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        handle = apply_neftune(self, noise_alpha, embedding=EMBEDDING, samples=read_samples)
        if noise_alpha:
            _announce_once(self, handle, on_noise)

    setattr(gpt, "__init__", with_noise)  # noqa: B010  # mypy takes gpt for an instance


def _announce_once(model: nn.Module, handle: NEFTuneHandle, on_noise: Callable[[], None]) -> None:
    def before(module: nn.Module, args: Any) -> None:
        ids = args[0] if args else None
        if not (module.training and torch.is_grad_enabled()) or (
            torch.is_tensor(ids) and ids.is_meta  # counting of floating point operations
        ):
            return
        hook.remove()
        on_noise()
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            told = handle.describe().rpartition(", ")[0]
            print(f"noise by neftune_kernels, {told}", flush=True)

    hook = model.register_forward_pre_hook(before)
