"""Whether a model takes its tokens time first, (T, B), though nobody said so: told by what its
recurrent and attention modules are given, whose own batch_first says how they read.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .noisy import drop_hooks
from .running import State

TIME_FIRST = (
    "{kind} has batch_first=False and so reads its input time first, (T, B, features), and it was "
    "given the embeddings of ids {ids} as they were looked up: NEFTune took the {rows} rows for "
    "samples. If the columns are, apply_neftune(..., batch_first=False); if the rows are, that "
    "{kind} mixes samples and wants batch_first=True"
)


class Axes:
    """The hook of an apply_neftune on the modules that read time first."""

    def __init__(self, state: State) -> None:
        self.state = state

    def enters(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        given = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
        embedded = self.state.embedded
        if embedded is None or given is None or len(embedded) != 3 or given.shape != embedded:
            return
        rows, columns, _ = embedded
        if rows != columns:
            kind = type(module).__name__
            self.state.warn_once(TIME_FIRST.format(kind=kind, ids=(rows, columns), rows=rows))


def reads_time_first(module: nn.Module) -> bool:
    return getattr(module, "batch_first", None) is False


def watches(module: nn.Module) -> list[Axes]:
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Axes)]


def watch(module: nn.Module, axes: Axes, wanted: bool) -> None:
    """Put the hook on, once, or take it off."""
    if wanted and watches(module) == [axes]:
        return
    drop_hooks(module, lambda hook: getattr(hook, "__self__", None) is axes)
    if wanted:
        module.register_forward_pre_hook(axes.enters, with_kwargs=True)
