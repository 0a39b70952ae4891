"""By what a model of an unknown class multiplies its embeddings: one look at it, by values.

Nothing is differentiated: a gradient shrink has another factor in its backward than in its forward.
"""

import contextlib
import enum
import hashlib
import itertools
import random
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .find import is_compiled
from .running import RUNNING, probing

CACHES = ("past_key_values", "past_key_value", "cache_params", "layer_past", "mems", "hx", "state")
ROUNDINGS = 4  # of a product, in the coarser of the two dtypes
TOO_FEW = "the batch has fewer than two different tokens"


class Measured(NamedTuple):
    """Of one site. Neither a factor nor a range: it could not be told, and why."""

    factor: float | None = None
    low: float = 0.0
    high: float = 0.0  # of factors that differ by token or sample
    why: str = ""


class _Arrived(Exception):
    """All is known: the forward need not go on."""


def measure(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], sites: list[nn.Module]
) -> dict[nn.Module, Measured]:
    """The factor of each site that runs in a forward of the model with these arguments.

    The forward is run without grad up to the first tensor that enters a module and is no longer a
    multiple of the lookup, or of it and something that is the same in all rows. RNG states,
    buffers and modules' attributes are put back. Hooks of others in front of that place run once
    more.
    """
    if why := _why_not(model, args, kwargs):
        return {site: Measured(why=why) for site in sites}
    watch = _Watch(sites)
    handles = [site.register_forward_hook(watch.looked_up, prepend=True) for site in sites]
    RUNNING.probing = measure.__code__
    failed = ""
    try:
        handles += [
            module.register_forward_pre_hook(watch.entered, with_kwargs=True, prepend=True)
            for module in model.modules()
            if module is not model
        ]
        with torch.no_grad(), undisturbed(model):
            output = model.forward(*_copied(args), **_copied(kwargs))
            watch.left(output)
    except _Arrived:
        pass
    except Exception as error:
        failed = f"its forward cannot be run once more ({type(error).__name__})"
    finally:
        RUNNING.probing = None
        for handle in handles:
            handle.remove()
    return {site: found for site in sites if (found := watch.result(site, failed)) is not None}


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward in training mode moves: generators, buffers, and what modules keep
    as attributes, in lists, dictionaries and sets of theirs too. What it changes inside other
    objects stays.
    """
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    kept = [(module, type(module), _attributes(module)) for module in model.modules()]
    devices = {one.device.index for one in model.parameters() if one.device.type == "cuda"}
    python = random.getstate()
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        random.setstate(python)
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        for module, kind, attributes in kept:
            if type(module) is kind:  # a lazy module has become what it is to be
                _put_back(module, attributes)


NAMES_OF_TORCH = {*vars(nn.Module()), "_neftune"}  # torch's own and ours
Attributes = dict[str, tuple[Any, Any]]  # the object, and what it held where it is a container


def _attributes(module: nn.Module) -> Attributes:
    return {
        name: (value, value.copy() if type(value) in (list, dict, set) else None)
        for name, value in vars(module).items()
        if name not in NAMES_OF_TORCH
    }


def _put_back(module: nn.Module, before: Attributes) -> None:
    own = vars(module)
    for name in [name for name in own if name not in before and name not in NAMES_OF_TORCH]:
        del own[name]
    for name, (value, held) in before.items():
        own[name] = value
        if held is not None:
            value.clear()
            (value.extend if type(value) is list else value.update)(held)


# ---- what was found, by the class of the model and its configuration

KEPT: "weakref.WeakKeyDictionary[type, dict[tuple[bytes, str], float]]"
KEPT = weakref.WeakKeyDictionary()
_numbers: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()
_next = itertools.count()
WRITTEN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)
FUNCTIONS = (type, types.FunctionType, types.BuiltinFunctionType)


def kept_factors(model: nn.Module, sites: list[nn.Module]) -> dict[nn.Module, Measured]:
    """What a look at another model of this class and configuration has found."""
    known = KEPT.get(type(model))
    key = configuration_of(model) if known else None
    if not known or key is None:
        return {}
    paths = {module: path for path, module in model.named_modules()}
    found = {site: known.get((key, paths[site])) for site in sites}
    return {site: Measured(factor) for site, factor in found.items() if factor is not None}


def keep_factors(model: nn.Module, found: dict[nn.Module, Measured]) -> None:
    factors = {site: one.factor for site, one in found.items() if one.factor and not one.why}
    key = configuration_of(model) if factors else None
    if key is None:
        return
    paths = {module: path for path, module in model.named_modules()}
    known = KEPT.setdefault(type(model), {})
    known |= {(key, paths[site]): factor for site, factor in factors.items()}


def configuration_of(model: nn.Module) -> bytes | None:
    """A digest of all that decides by what a model multiplies, but its arguments: classes, and what
    modules and their configs hold. None: it holds what cannot be compared by value.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        for path, module in model.named_modules():
            own = {name: one for name, one in vars(module).items() if name not in NAMES_OF_TORCH}
            tensors = {**module._parameters, **module._buffers}
            told = path, *_class(type(module)), _written(own, ()), _written(tensors, ())
            digest.update(repr(told).encode())
    except (TypeError, RuntimeError):
        return None
    return digest.digest()


def _number(value: Any) -> int:
    """Of a class or function: of two objects never the same, also where one is gone."""
    if value not in _numbers:
        _numbers[value] = next(_next)
    return _numbers[value]


def _class(kind: type) -> tuple[Any, ...]:
    """With what may be changed on it: its forward and its numbers."""
    own = [one for one in kind.__mro__ if one.__module__.split(".")[0] not in ("torch", "builtins")]
    said = [
        (name, value)
        for one in own
        for name, value in vars(one).items()
        if type(value) in (bool, int, float)
    ]
    forward: Any = getattr(kind, "forward", None)
    return _number(kind), _number(forward) if forward is not None else -1, said


def _written(value: Any, inside: tuple[int, ...]) -> Any:
    """A value as it is written down; TypeError where it cannot be."""
    if type(value) in WRITTEN:
        return value
    if isinstance(value, FUNCTIONS):
        return "function", _number(value)
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter):
            raise TypeError
        one = value.tolist() if value.numel() == 1 and not value.is_meta else None
        return tuple(value.shape), value.dtype, one
    if id(value) in inside:
        raise TypeError
    inside = (*inside, id(value))
    if type(value) in (list, tuple):
        return [_written(one, inside) for one in value]
    if type(value) is dict:
        return [(_written(name, inside), _written(one, inside)) for name, one in value.items()]
    kind = type(value)
    if isinstance(value, enum.Enum):
        return _number(kind), value.name
    if isinstance(value, nn.Module) or not _is_open(kind):
        raise TypeError
    return _number(kind), _written(vars(value), inside)


def _is_open(kind: type) -> bool:
    """Whether vars() shows all that an object holds: a class of Python's own without slots."""
    own = kind.__mro__[:-1]
    return not any("__new__" in vars(one) or vars(one).get("__slots__") for one in own)


def _why_not(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "its parameters are split by DeepSpeed ZeRO-3"
    if any(
        is_compiled(one) or getattr(one, "_compiled_call_impl", None) is not None
        for one in model.modules()
    ):
        return "a part of it is compiled"
    if any(kwargs.get(name) is not None for name in CACHES) or any(
        _is_cache(one) for one in (*args, *kwargs.values())
    ):
        return "its forward was given a cache"
    return ""


def _is_cache(value: Any) -> bool:
    return "cache" in type(value).__name__.lower() or isinstance(value, Iterator)


def _copied(value: Any) -> Any:
    """Arguments that a forward may change: what is called is not what the caller holds."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {name: _copied(one) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(one) for one in value)
    return value


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, Mapping):
        for one in values.values():
            yield from _tensors(one)
    elif isinstance(values, (list, tuple)):
        for one in values:
            yield from _tensors(one)


class _Watch:
    def __init__(self, sites: list[nn.Module]) -> None:
        self.sites = sites
        self.embedded: dict[nn.Module, Tensor] = {}
        self.distinct: dict[nn.Module, bool] = {}
        self.found: dict[nn.Module, Measured] = {}
        self.over: set[nn.Module] = set()

    def looked_up(self, site: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not probing() or site in self.embedded or not isinstance(output, Tensor):
            return
        self.embedded[site] = output.detach().clone()  # what follows may be in place
        rows = self.embedded[site].reshape(-1, output.shape[-1])
        self.distinct[site] = rows.shape[0] > 0 and not bool((rows == rows[:1]).all())

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not probing():  # what an interrupt left
            return
        self._compare((args, kwargs))
        if len(self.over) == len(self.sites):
            raise _Arrived

    def left(self, output: Any) -> None:
        """What a model returns has arrived too, where nothing was entered before."""
        plain = isinstance(output, (Tensor, Mapping, list, tuple))
        values = output if plain else getattr(output, "__dict__", None)
        for site in self.embedded:
            if site not in self.found and site not in self.over:
                self._compare(values)

    def _compare(self, values: Any) -> None:
        waiting = [site for site in self.embedded if site not in self.over]
        tensors = list(_tensors(values)) if waiting else []
        for site in waiting:
            results = [
                one
                for tensor in tensors
                for view in _views(tensor, self.embedded[site].shape)
                if (one := _multiple(self.embedded[site], view)) is not None
            ]
            best = next((one for one in results if one.factor is not None), None)
            if best is not None:
                self.found[site] = best
            elif results:  # of the same shape, and no multiple any more
                self.over.add(site)
                ranges = [one for one in results if one.high]
                if site not in self.found and ranges:
                    self.found[site] = ranges[0]

    def result(self, site: nn.Module, failed: str) -> Measured | None:
        """None: it was not looked up, or too little; the next forward may tell."""
        if site not in self.embedded:
            return Measured(why=failed) if failed else None
        if not self.distinct[site]:
            found = self.found.get(site)
            return None if found is None else found._replace(why=TOO_FEW)
        return self.found.get(
            site, Measured(why=failed or "what enters its first block is no multiple of the lookup")
        )


def _views(tensor: Tensor, shape: torch.Size) -> Iterator[Tensor]:
    """A tensor as the lookup's shape, with axes exchanged, flattened, or with tokens before or
    behind.
    """
    if tensor.shape == shape:
        yield tensor
    if tensor.dim() == len(shape) == 3:
        for axes in ((1, 0, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1)):
            moved = tensor.permute(axes)
            if moved.shape == shape:
                yield moved
        if tensor.shape[::2] == shape[::2] and tensor.shape[1] > shape[1]:
            yield tensor[:, : shape[1]]
            yield tensor[:, tensor.shape[1] - shape[1] :]
    elif tensor.numel() == shape.numel() and tensor.dim() and tensor.shape[-1] == shape[-1]:
        yield tensor.reshape(shape)


def _multiple(embedded: Tensor, arrived: Tensor) -> Measured | None:
    """factor where it is one number; a range where each token has its own; neither: none."""
    if embedded.device != arrived.device:
        return None
    eps = max(torch.finfo(embedded.dtype).eps, torch.finfo(arrived.dtype).eps) * ROUNDINGS
    e, t = embedded.double(), arrived.detach().double()
    rows = (e != 0).any(-1) & (t != 0).any(-1)  # padding may be zero on either side
    if not bool(rows.any()):
        return Measured()
    own_e, own_t = e[rows], t[rows]
    by_token = (own_e * own_t).sum(-1) / own_e.square().sum(-1)
    product = by_token[:, None] * own_e
    if bool(((own_t - product).abs() <= eps * product.abs()).all()):
        low, high = float(by_token.min()), float(by_token.max())
        whole = float((own_e * own_t).sum() / own_e.square().sum())
        if high - low <= 2 * eps * abs(whole):
            return Measured(_exactly(embedded, arrived, whole, eps))
        return Measured(low=low, high=high)
    factor = _by_differences(e, t, rows, eps)
    return Measured() if factor is None else Measured(_nearest(factor, e.shape[-1], eps))


def _by_differences(e: Tensor, t: Tensor, rows: Tensor, eps: float) -> float | None:
    """Of two rows at the same column: learned positions cancel."""
    if e.dim() != 3 or e.shape[0] < 2:
        return None
    both = rows[1:] & rows[:1]
    de, dt = (e[1:] - e[:1])[both], (t[1:] - t[:1])[both]
    size = (e[1:].abs() + e[:1].abs())[both], (t[1:].abs() + t[:1].abs())[both]
    if not bool((de != 0).any()):
        return None
    factor = float((de * dt).sum() / de.square().sum())
    rest = (dt - factor * de).abs()
    if bool((rest > eps * (abs(factor) * size[0] + size[1])).any()):
        return None
    # positions so large that rounding hides the embeddings say nothing
    return factor if float(rest.square().sum()) < 0.01 * float(dt.square().sum()) else None


def _candidates(factor: float, columns: int) -> list[float]:
    root = columns**0.5
    roots = [root, *(_rounded(root, dtype) for dtype in (torch.bfloat16, torch.float16))]
    usual = [1.0, *roots, 1 / root, float(round(factor)), round(factor * 2) / 2]
    return sorted(set(usual) - {0.0}, key=lambda one: abs(one - factor))


def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=dtype, device="cpu"))


def _exactly(embedded: Tensor, arrived: Tensor, factor: float, eps: float) -> float:
    """The usual number that makes the arrival bit for bit, else the nearest."""
    for one in _candidates(factor, embedded.shape[-1]):
        if abs(one - factor) <= eps * abs(factor) and torch.equal(embedded * one, arrived):
            return one
    return _nearest(factor, embedded.shape[-1], eps)


def _nearest(factor: float, columns: int, eps: float) -> float:
    one = _candidates(factor, columns)[0]
    return one if abs(one - factor) <= eps * abs(factor) else factor


def is_left(hook: Any) -> bool:
    """Whether a hook is one that an interrupted look left on a module."""
    return isinstance(getattr(hook, "__self__", None), _Watch)
