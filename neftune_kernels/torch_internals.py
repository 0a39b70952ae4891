"""Every private name of torch that this package touches, each with the reason why.

tests/test_torch_internals.py holds them against the torch that is installed.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
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


# Which backward autograd runs on this thread: a checkpoint recomputes there. The function itself,
# for host time.
backward_task, NO_BACKWARD = torch._C._current_graph_task_id, -1


def entry(overload: Any) -> Callable[..., Any]:
    """An operator overload's bound C++ entry: what OpOverload.__call__ calls, one frame sooner."""
    return getattr(overload, "_op", overload)


def applied_quickly(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What Function.apply calls outside torch.func's transforms, eight frames sooner: it looks for
    setup_context and for wrappers that a transform has left behind.
    """
    above: Any = super(torch.autograd.Function, function)
    applied: Callable[..., Any] = above.apply
    return applied


def asked_outside_the_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result, without the import of Dynamo that it makes to set this
    mark. Dynamo cannot trace the import machinery.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# The functions through which saved tensors go (pack, unpack), as inside a non-reentrant
# checkpoint's first pass; None where there are none. torch.autograd.graph can set such hooks and
# has no public word for those that are set. No frame of Python, for host time.
saved_tensors_hooks: Callable[[], tuple[Any, Any] | None] = functools.partial(
    torch._C._autograd._top_saved_tensors_default_hooks, True
)


# ---- torch.distributed: each name is looked up when asked, as a torch may be built without it


def ranks_of_groups() -> list[list[int]]:
    """The world's ranks in every process group that this process was told of.

    There is no public list of groups.
    """
    groups = torch.distributed.distributed_c10d._world.pg_group_ranks
    return [list(ranks) for ranks in list(groups.values())]


def root_mesh(mesh: Any) -> Any:
    """The DeviceMesh that this one was sliced from. A slice does not say so in public."""
    return mesh._get_root_mesh()


class ShardedParameter(NamedTuple):
    """A parameter that FSDP2 (`fully_shard`) manages."""

    owners: tuple[nn.Module, ...]
    mesh_info: Any  # .mesh: a DeviceMesh; .is_spmd_mesh where this torch has it


def sharded_parameters() -> Iterator[ShardedParameter]:
    """Of all modules. In forward they are plain tensors again, and only FSDP2's state knows."""
    from torch.distributed._composable_state import _module_state_mapping

    for reference in list(_module_state_mapping.values()):
        state: Any = reference()
        # Several groups since torch 2.13, one or none before.
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in groups or [getattr(state, "_fsdp_param_group", None)]:
            for parameter in () if group is None else group.fsdp_params:
                info = parameter._module_info
                owners = (info.module, *info.shared_modules)
                yield ShardedParameter(owners, parameter.mesh_info)


def fsdp_classes() -> dict[type, type]:
    """The class that `fully_shard` gave modules of a class: it swaps a module's class, and keeps
    the new ones here.
    """
    from torch.distributed.fsdp._fully_shard._fully_shard import get_cls_to_fsdp_cls

    return get_cls_to_fsdp_cls()
