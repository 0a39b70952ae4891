"""A forward that leaves no trace: what it moves is put back, and what it is given is a copy."""

import collections
import contextlib
import copy
import functools
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

NAMES_OF_TORCH = {*vars(nn.Module()), "_neftune"}  # torch's own and ours
LISTS = (list, collections.deque)
MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
CONTAINERS = (*LISTS, *MAPPINGS, set)
MADE_OF = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
SMALL = 64  # the most values of a parameter that may be a counter
Undo = Callable[[], Any]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward in training mode moves: generators, buffers, and what modules keep
    as attributes, in containers of Python's too. What it changes inside other objects stays.
    """
    undos: list[Undo] = [_python_generators()]
    kept: set[int] = set()
    for module in model.modules():
        undos += _of_module(module, kept)
    devices = {one.device.index for one in model.parameters() if one.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        with torch.no_grad():
            for undo in undos:
                undo()


def _python_generators() -> Undo:
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()

    def undo() -> None:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(state)

    return undo


def _of_module(module: nn.Module, kept: set[int]) -> list[Undo]:
    undos: list[Undo] = []
    for name, buffer in module._buffers.items():
        if buffer is not None:
            renamed = functools.partial(module._buffers.update, {name: buffer})
            undos += [renamed, *_of_value(buffer, kept)]
    for parameter in module._parameters.values():
        if type(parameter) is nn.Parameter and not parameter.requires_grad:
            undos += _of_value(parameter, kept) if parameter.numel() <= SMALL else []
    own = vars(module)
    before = {name: one for name, one in own.items() if name not in NAMES_OF_TORCH}
    kind = type(module)
    # a scripted module's are no containers of Python's
    names = [(one, set(one)) for name in MADE_OF if isinstance(one := own.get(name), (dict, set))]

    def undo() -> None:
        if type(module) is not kind:  # a lazy module has become what it is to be
            return
        for held, known in names:
            for name in [name for name in held if name not in known]:
                held.pop(name) if isinstance(held, dict) else held.remove(name)
        for name in [name for name in own if name not in before and name not in NAMES_OF_TORCH]:
            del own[name]
        own.update(before)

    for value in before.values():
        undos += _of_value(value, kept)
    return [*undos, undo]


def _of_value(value: Any, kept: set[int]) -> list[Undo]:
    """How to put a value's content back; kept: what is known to be put back."""
    if id(value) in kept:
        return []
    kept.add(id(value))
    if isinstance(value, Tensor):
        return [] if value.is_meta else [_of_tensor(value)]
    if isinstance(value, torch.Generator):
        drawn = value.get_state()
        return [functools.partial(value.set_state, drawn)]
    if isinstance(value, random.Random):
        state = value.getstate()
        return [functools.partial(value.setstate, state)]
    if type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
        bits = value.bit_generator.state
        return [functools.partial(setattr, value.bit_generator, "state", bits)]
    if type(value) is tuple:
        return [undo for one in value for undo in _of_value(one, kept)]
    if type(value) not in CONTAINERS:
        return []
    inside = value.values() if type(value) in MAPPINGS else value
    return [_of_container(value), *(undo for one in inside for undo in _of_value(one, kept))]


def _of_tensor(value: Tensor) -> Undo:
    before = value.detach().clone()

    def undo() -> None:
        if not torch.equal(value, before):
            value.detach().copy_(before)

    return undo


def _of_container(value: Any) -> Undo:
    before = copy.copy(value)

    def undo() -> None:
        if _holds_the_same(value, before):
            return
        value.clear()
        (value.extend if type(value) in LISTS else value.update)(before)

    return undo


def _holds_the_same(value: Any, before: Any) -> bool:
    if len(value) != len(before):
        return False
    if type(value) in MAPPINGS:
        pairs = zip(value.items(), before.items(), strict=True)
        return all(one[0] is other[0] and one[1] is other[1] for one, other in pairs)
    return all(one is other for one, other in zip(value, before, strict=True))


def copied(value: Any, inside: bool = False, tensors: bool = True) -> Any:
    """Arguments that a forward may change: what is called is not what the caller holds. Objects
    inside objects are the caller's own, and tensors where they are to stay the same ones.
    """
    if isinstance(value, Tensor):
        return value.detach().clone() if tensors else value
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if type(value) in (list, tuple):
        return type(value)(copied(one, inside, tensors) for one in value)
    if type(value) in MAPPINGS:
        other = copy.copy(value)
        for name, one in value.items():
            other[name] = copied(one, inside, tensors)
        return other
    is_object = isinstance(value, types.SimpleNamespace) or is_open(type(value))
    if is_object and not inside and not isinstance(value, nn.Module):
        other = copy.copy(value)
        vars(other).update({name: copied(one, True, tensors) for name, one in vars(value).items()})
        return other
    return value


def is_open(kind: type) -> bool:
    """Whether vars() shows all that an object holds: a class of Python's own without slots."""
    own = kind.__mro__[:-1]
    return bool(own) and not any(
        "__new__" in vars(one) or vars(one).get("__slots__") for one in own
    )
