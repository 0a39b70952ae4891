"""capturable=True, torch.optim's word: alpha in a 0-dim float64 tensor on the device, which kernels
read at every launch. A CUDA graph records its address and replays with what it holds by then.
"""

from typing import Any

import torch
from torch import Tensor

from .noise import check_alpha
from .torch_internals import dispatch_modes, vmapped

LARGEST_ALPHA = torch.finfo(torch.float32).max  # no magnitude of it is infinite

IN_CAPTURE = (
    "noise_alpha was set while a CUDA graph is captured, which would set it again at every replay: "
    "set it before or after"
)
NOT_THERE = (
    "capturable=True: noise_alpha is not on {} yet, and a tensor made while a CUDA graph is "
    "captured would hold today's for ever: run one training step before, which also compiles the "
    "kernels"
)
TO_BE_COMPILED = (
    "capturable=True: noise_alpha is on {}, the weight on {}, and compiled code cannot move it: "
    "call the module once before compiling it, or move it with .to()"
)


def check_capturable(capturable: Any) -> bool:
    if not isinstance(capturable, bool):
        raise TypeError(f"capturable must be True or False, got {capturable!r}")
    return capturable


def in_capture(device: torch.device) -> bool:
    """Whether what is launched there now is recorded in a graph, and not run."""
    if device.type not in ("cuda", "xpu"):
        return False
    module = torch.get_device_module(device)
    asked = getattr(module, "is_current_stream_capturing", None)  # not every torch's XPU
    return asked is not None and module.is_available() and bool(asked())


def check_setting(noise_alpha: float, capturable: bool) -> float:
    """A number that is to be copied to the device, where nobody looks at it again."""
    if capturable and noise_alpha > LARGEST_ALPHA:
        raise ValueError(
            f"noise_alpha must be at most {LARGEST_ALPHA:g} with capturable=True, got "
            f"{noise_alpha!r}"
        )
    return noise_alpha


def check_alpha_tensor(noise_alpha: Any, device: torch.device) -> Tensor:
    """What a function takes with capturable=True; on the CPU its value is looked at, too."""
    remedy = f"torch.tensor(5.0, dtype=torch.float64, device={str(device)!r})"
    if not isinstance(noise_alpha, Tensor):
        raise TypeError(
            f"noise_alpha must be a 0-dim float64 tensor with capturable=True, got "
            f"{noise_alpha!r}: make one, {remedy}, and fill_() it between replays"
        )
    if noise_alpha.dtype != torch.float64 or noise_alpha.dim() != 0:
        raise ValueError(
            "noise_alpha must be a 0-dim float64 tensor with capturable=True, got "
            f"{noise_alpha.dtype} of shape {tuple(noise_alpha.shape)}: make one, {remedy}"
        )
    if noise_alpha.device != device:
        raise ValueError(
            f"noise_alpha is on {noise_alpha.device}, the embeddings are on {device}: with "
            f"capturable=True they must be on one device, {remedy}"
        )
    if noise_alpha.requires_grad:
        raise ValueError(
            "noise_alpha must not require grad, as the noise is a constant for autograd: pass "
            "noise_alpha.detach()"
        )
    traced = torch.compiler.is_compiling() or dispatch_modes() or vmapped()
    if device.type == "cpu" and not traced:
        check_alpha(noise_alpha.item())
    return noise_alpha


def alpha_on(device: torch.device, noise_alpha: float) -> Tensor:
    """A new tensor for :func:`set_alpha` to write to.

    Raises:
        RuntimeError: a graph is captured, which would make it anew at each replay.
    """
    if in_capture(device):
        raise RuntimeError(NOT_THERE.format(device))
    with torch.inference_mode(False):  # whose tensors could not be written to outside it
        return torch.full((), noise_alpha, dtype=torch.float64, device=device)


def set_alpha(noise_alpha: float, *alphas: Tensor) -> None:
    """In place, without a synchronisation: what was captured with the tensors reads it."""
    if any(in_capture(alpha.device) for alpha in alphas):  # before one is written to
        raise RuntimeError(IN_CAPTURE)
    for alpha in alphas:
        alpha.fill_(noise_alpha)
