"""Every private name of torch that this package touches, each with the reason why.

tests/test_torch_internals.py holds them against the torch that is installed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

# How many dispatch modes are active: a mode must see every operator, and its fake tensors must stay
# in no cache. torch.utils._python_dispatch asks the same. The function itself, for host time.
dispatch_modes = torch._C._len_torch_dispatch_stack


def transformed() -> bool:
    """Inside a torch.func transform or forward-mode AD: only an autograd.Function does right, or
    says that it cannot.

    forward_ad has no public word for whether a level is open.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def vmapped() -> bool:
    """Inside a torch.func transform, forward mode left out."""
    return torch._C._are_functorch_transforms_active()


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread: a checkpoint recomputes there."""
    return torch._C._current_graph_task_id() != -1


def entry(overload: Any) -> Callable[..., Any]:
    """An operator overload's bound C++ entry: what OpOverload.__call__ calls, one frame sooner."""
    return getattr(overload, "_op", overload)


def asked_outside_the_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result, without the import of Dynamo that it makes to set this
    mark. Dynamo cannot trace the import machinery.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def saved_tensors_hooked() -> bool:
    """Whether saved tensors go through hooks, as inside a non-reentrant checkpoint's first pass.

    torch.autograd.graph can set such hooks and has no public word for whether there are any.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
