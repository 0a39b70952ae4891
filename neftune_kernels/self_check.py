"""An accelerator's first results, compared with reference.py on the accelerator itself: a
miscompiled kernel must not noise anybody's training.

Compared are the first call of the CUDA library in a process and the first call of every kernel that
Triton compiles: at most 64 of its tokens, every bit, with one synchronisation. Where a bit differs
the backend is out of service for this process, a warning says so, and the reference gives the
result. Nothing is compared while a graph is captured or traced. NEFTUNE_SELF_CHECK=0 switches it
off; `python -m neftune_kernels --check` compares more.
"""

import importlib.metadata
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .capturable import in_capture
from .layout import Layout, mask_layout, per_token, untailed
from .torch_internals import dispatch_modes

ENABLED = os.environ.get("NEFTUNE_SELF_CHECK") != "0"
TOKENS = 64  # compared at most
ELEMENTS = 1 << 18  # of them, likewise: a bound on the reference's time

passed: set[tuple[str, str, str]] = set()  # (backend, device type, operator)
_failures: dict[tuple[str, str], str] = {}  # (backend, device type) -> what differed


def failure(backend: str, device_type: str | None) -> str:
    """Why the backend is out of service on that type of device (None: on any); "" if it is not."""
    if not _failures:
        return ""
    if device_type is None:
        return next((why for (name, _), why in _failures.items() if name == backend), "")
    return _failures.get((backend, device_type), "")


def wanted(device: torch.device) -> bool:
    """Whether a call on that device may be compared now: not inside a capture, trace or mode."""
    if not ENABLED or torch.compiler.is_compiling() or dispatch_modes():
        return False
    return not in_capture(device)


class Expected(NamedTuple):
    """What the reference has for some tokens of a call: made before the launch, as out may be the
    input itself.
    """

    token: Tensor  # (k,) int64, flat
    rows: Tensor  # (k, d) of the call's dtype


def _some_tokens(count: int, embedding_dim: int, device: torch.device) -> Tensor:
    """(k,) int64: the first, the last and tokens between them."""
    k = max(2, min(TOKENS, ELEMENTS // max(1, embedding_dim)))
    return (
        torch.linspace(0, count - 1, min(k, count), dtype=torch.float64).round().long().to(device)
    )


def expected_rows(
    rows: Tensor,
    shape: torch.Size,
    seed: Tensor,
    noise_alpha: float | Tensor,
    layout: Layout,
    offsets: tuple[int, int, int],
    input_ids: Tensor | None = None,
    embed_scale: float = 1.0,
) -> Expected | None:
    """What add_noise gives for some of the embeddings (N, d); with input_ids, noisy_embedding for
    rows of the weight (V, d). None where there is nothing to compare.
    """
    replica, sample_offset, position_offset = offsets
    embedding_dim, device = rows.shape[-1], rows.device
    if shape.numel() == 0 or embedding_dim == 0 or rows.shape[0] == 0:
        return None
    token = _some_tokens(shape.numel(), embedding_dim, device)
    places = per_token(layout, shape, device, sample_offset, position_offset)
    sample, position, length = (value[token] for value in places)
    noise = reference.neftune_noise(
        (sample, position, length), embedding_dim, noise_alpha, seed, replica
    )
    if input_ids is None:
        return Expected(token, reference.add_noise(rows[token], noise))
    ids = input_ids.reshape(-1)[token].long()
    inside = (ids >= 0) & (ids < rows.shape[0])
    embedded = reference.embed(torch.where(inside, ids, 0), rows, embed_scale)
    noisy = reference.add_noise(embedded, noise)
    return Expected(token, torch.where(inside[:, None], noisy, float("nan")))


def same_bits(left: Tensor, right: Tensor) -> bool:
    """NaN is NaN, whatever its payload; the one synchronisation."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[left.element_size()]
    same = left.contiguous().view(integers) == right.contiguous().view(integers)
    return bool((same | (left.isnan() & right.isnan())).all())


def rows_agree(backend: str, out: Tensor, expected: Expected) -> bool:
    """Whether `out` (..., d) has the expected bits; where not, the backend is out of service."""
    rows = out.view(-1, out.shape[-1])[expected.token]
    if same_bits(rows, expected.rows):
        return True
    _put_out_of_service(backend, out.device, f"{out.dtype} rows of {out.shape[-1]} columns")
    return False


def numbering_agrees(
    backend: str,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    numbered: tuple[Tensor | None, ...],
) -> bool:
    """Whether a kernel's Layout of a mask says of every token what mask_layout does."""
    given = attention_mask if attention_mask is not None else position_ids
    assert given is not None
    if given.numel() == 0:
        return True
    expected = mask_layout(attention_mask, position_ids)
    own, theirs = (
        per_token(Layout(*layout), given.shape, given.device) for layout in (numbered, expected)
    )
    real = theirs[2] > 0
    same = [(ours == other) | ~real for ours, other in zip(own, theirs, strict=True)]
    if bool((same[0] & same[1] & (own[2] == theirs[2])).all()):
        return True
    _put_out_of_service(backend, given.device, "numbers of the samples in a mask")
    return False


def tails_agree(mask: Tensor, *args: Any) -> bool:
    """Whether Triton's mask of a padding-free batch is layout.untailed's."""
    if torch.equal(mask, untailed(*args)):
        return True
    _put_out_of_service("triton", mask.device, "tails of padding-free batches")
    return False


def gradient_agrees(backend: str, out: Tensor, rows: Tensor, input_ids: Tensor, *how: Any) -> bool:
    """Whether some columns of the weight's gradient `out` (V, d), of rows (N, d), have the bits of
    chunked_gradient, which adds up on the host. how: what that takes last.
    """
    some = max(1, min(8, ELEMENTS // rows.shape[0]))
    column = torch.linspace(0, rows.shape[1] - 1, some).long()
    expected, ids = reference.chunked_gradient(
        rows[:, column.to(rows.device)].cpu(), input_ids.reshape(-1).cpu(), out.shape[0], *how
    )
    found = out[ids.to(out.device)][:, column.to(out.device)].cpu()
    if same_bits(found, expected):
        return True
    _put_out_of_service(backend, out.device, f"{out.dtype} gradients of {out.shape[1]} columns")
    return False


def _put_out_of_service(backend: str, device: torch.device, what: str) -> None:
    name = device.type
    if device.type != "cpu" and torch.get_device_module(device).is_available():
        name = torch.get_device_module(device).get_device_name(device)
    versions = [f"torch {torch.__version__}"]
    if backend == "triton":
        versions.append(f"triton {importlib.metadata.version('triton')}")
    why = f"self-check failed: {what} differ from the reference on {name}, {', '.join(versions)}"
    _failures[backend, device.type] = why
    warnings.warn(
        f"neftune_kernels: backend {backend!r} is out of service in this process, the slow "
        f"reference serves instead. {why}. Please report it with the output of "
        "`python -m neftune_kernels --check`; NEFTUNE_SELF_CHECK=0 switches the comparison off",
        RuntimeWarning,
        stacklevel=5,
    )
