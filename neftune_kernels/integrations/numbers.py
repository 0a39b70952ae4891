"""The numbers that a module holds, which may be a factor, and whether they have changed since."""

import operator
import types
import weakref
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..torch_internals import dispatch_modes
from .undisturbed import NAMES_OF_TORCH, is_open

NUMBERS = (bool, int, float)
PLAIN = (Tensor, nn.Parameter)
DEPTH = 4  # of configs inside configs
PLACES = 64  # the most that a module is followed at
Uninvolved = Collection[tuple["weakref.ref[nn.Module]", str]]


class Numbers(NamedTuple):
    """At one place: the module itself, its class, or a dictionary or config that it leads to."""

    path: tuple[str, ...]  # from the module's attributes on
    of: str  # "attributes", "class" or "tensors"
    names: tuple[str, ...]

    def read(self, module: nn.Module) -> tuple[Any, ...] | None:
        """At every forward: no value is asked of an accelerator."""
        if self.of == "tensors":
            return tuple([_version(module, name) for name in self.names])
        if self.of == "class":
            kind = type(module)
            return tuple([getattr(kind, name, None) for name in self.names])
        held: Any = vars(module)
        for step in self.path:
            held = _content(held.get(step))
        try:
            return operator.itemgetter(*self.names, self.names[0])(held)  # two: a tuple
        except KeyError:
            return None

    def changed(self, before: Any, now: Any) -> Iterator[str]:
        if before is not None and now is not None:
            for name, one, other in zip(self.names, before, now, strict=False):
                if one != other:
                    yield self.word(name)

    def word(self, name: str) -> str:
        return ".".join((self.of, *self.path, name))


def numbers_of(module: nn.Module, uninvolved: Uninvolved) -> tuple[Numbers, ...]:
    """uninvolved: those that have changed without the factor."""
    own = weakref.ref(module)
    tensors = {**module._parameters, **module._buffers}
    scalars = [
        name
        for name, one in tensors.items()
        if one is not None and type(one) in PLAIN and one.numel() == 1
    ]
    of_class = [
        name
        for kind in type(module).__mro__
        if kind.__module__.split(".")[0] not in ("torch", "builtins")
        for name, value in vars(kind).items()
        if type(value) in NUMBERS
    ]
    found = [
        Numbers((), "tensors", tuple(scalars)),
        Numbers((), "class", tuple(dict.fromkeys(of_class))),
        *_in_attributes(vars(module), (), {id(vars(module))}),
    ]
    kept = [
        one._replace(names=tuple([n for n in one.names if (own, one.word(n)) not in uninvolved]))
        for one in found[:PLACES]
    ]
    return tuple([one for one in kept if one.names])


def _in_attributes(held: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[Numbers]:
    names = [name for name, value in held.items() if type(value) in NUMBERS and name != "training"]
    yield Numbers(path, "attributes", tuple(names))
    if len(path) == DEPTH or len(seen) > PLACES:
        return
    for name, value in list(held.items()):
        content = None if not path and name in NAMES_OF_TORCH else _content(value)
        if content and id(content) not in seen:
            seen.add(id(content))
            yield from _in_attributes(content, (*path, name), seen)


NOTHING: dict[str, Any] = {}


def _content(value: Any) -> dict[str, Any]:
    """What a dictionary or a config holds."""
    if isinstance(value, dict):
        return value if all(type(name) is str for name in value) else NOTHING
    is_config = isinstance(value, types.SimpleNamespace) or is_open(type(value))
    if not is_config or isinstance(value, nn.Module):
        return NOTHING
    return getattr(value, "__dict__", NOTHING)


def _version(module: nn.Module, name: str) -> tuple[Any, ...] | None:
    tensor: Tensor | None = module._parameters.get(name)
    if tensor is None:
        tensor = module._buffers.get(name)
    if tensor is None or type(tensor) not in PLAIN or tensor.is_inference():
        return None
    # what is written to .data has another version
    asked = tensor.is_cpu and not dispatch_modes()
    return id(tensor), tensor._version, tensor.item() if asked else None
