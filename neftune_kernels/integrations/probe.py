"""By what a model of an unknown class multiplies its embeddings: one look at it, by values.

Nothing is differentiated: a gradient shrink has another factor in its backward than in its forward.
"""

import contextlib
import enum
import hashlib
import itertools
import types
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..distributed import DISTRIBUTED, is_dtensor
from ..torch_internals import dispatch_modes
from .find import FSDP1, is_compiled
from .multiples import Measured, multiple, thinned
from .running import LOOKUPS, RUNNING, Site, forward_runs, probing
from .undisturbed import NAMES_OF_TORCH, copied, is_open, undisturbed

CACHES = ("past_key_values", "past_key_value", "cache_params", "layer_past", "mems", "hx", "state")
TOO_FEW = "the batch has fewer than two different tokens"
THINNED = "a dropout of its own stands before its first block"
NO_MULTIPLE = "what enters its first block is no multiple of the lookup"
NEAR = 1e-3  # relative: of what two lookups of a table are multiplied by

NO_HOLDERS: dict[nn.Module, nn.Module] = {}
HELD = Measured(1.0)  # looked up by a model that is known


class _Arrived(BaseException):
    """All is known: the forward need not go on. No `except Exception` of its own is to see it."""


def measure(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sites: list[nn.Module],
    holders: dict[nn.Module, nn.Module] = NO_HOLDERS,
    whole: bool = False,
) -> dict[nn.Module, Measured]:
    """The factor of each site that runs in a forward of the model with these arguments.

    The forward is run without grad, dropouts doing nothing, up to the first tensor that enters a
    module, is made of the lookup and no longer a multiple of it, or of it and something that is the
    same in all rows. RNG states, buffers and modules' attributes are put back. Hooks of others in
    front of that place run once more.

    holders: models inside, of sites that are known to be multiplied by 1 while those run.
    whole: the forward runs to its end, as it does in other ranks whose batches tell more or less.
    """
    if why := _why_not(model, args, kwargs):
        return {site: Measured(why=why) for site in sites if site not in holders}
    watch = _Watch(sites, holders, whole)
    handles: list[Any] = []
    RUNNING.probing = measure.__code__
    failed = ""
    try:
        for site in sites:
            handles.append(site.register_forward_hook(watch.looked_up, prepend=True))
        for module in model.modules():
            if module is not model and not isinstance(module, torch.jit.ScriptModule):
                hook = module.register_forward_pre_hook(
                    watch.entered, with_kwargs=True, prepend=True
                )
                handles.append(hook)
        # an interrupt at a with's end skips the exit of its last: one that has nothing to do
        last = contextlib.nullcontext()
        with torch.no_grad(), undisturbed(model), warnings.catch_warnings(), last:
            warnings.simplefilter("ignore")  # the forward itself will say it
            args, kwargs = copied(args), copied(kwargs)
            with watch.following, last:
                output = model.forward(*args, **kwargs)
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


# ---- what was found, by the class of the model and its configuration

MOST = 4096  # values of a tensor that are read
KEPT: "weakref.WeakKeyDictionary[type, dict[tuple[bytes, str], float]]"
KEPT = weakref.WeakKeyDictionary()
_numbers: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()
_next = itertools.count()
WRITTEN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)
FUNCTIONS = (type, types.FunctionType, types.BuiltinFunctionType)


def kept_factors(
    model: nn.Module, sites: list[nn.Module], given: Any = None
) -> dict[nn.Module, Measured]:
    """What a look at another model of this class and configuration has found, called with arguments
    of the same shapes and numbers; None: the last, whatever it was called with.
    """
    known = KEPT.get(type(model))
    key = configuration_of(model, given) if known else None
    if not known or key is None:
        return {}
    paths = {module: path for path, module in model.named_modules()}
    found = {site: known.get((key, paths[site])) for site in sites}
    return {site: Measured(factor) for site, factor in found.items() if factor is not None}


def keep_factors(model: nn.Module, found: dict[nn.Module, Measured], given: Any = None) -> None:
    factors = {site: one.factor for site, one in found.items() if one.factor and not one.why}
    keys = [configuration_of(model, one) for one in (given, None)] if factors else []
    paths = {module: path for path, module in model.named_modules()}
    for key in keys:
        if key is not None:
            known = KEPT.setdefault(type(model), {})
            known |= {(key, paths[site]): factor for site, factor in factors.items()}


def configuration_of(model: nn.Module, given: Any = None) -> bytes | None:
    """A digest of all that decides by what a model multiplies: classes, what modules and their
    configs hold, and of the arguments shapes and numbers. None: there is what cannot be compared.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        digest.update(repr(_written(given, ())).encode())
        for path, module in model.named_modules():
            own = {name: one for name, one in vars(module).items() if name not in NAMES_OF_TORCH}
            tensors = {**module._parameters, **module._buffers}
            values = [_values(one) for one in (*tensors.values(), *own.values())]
            told = path, *_class(type(module)), _written(own, ()), _written(tensors, ()), values
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
    """With what may be changed on it: its methods, its numbers and what else can be written."""
    own = [one for one in kind.__mro__ if one.__module__.split(".")[0] not in ("torch", "builtins")]
    said = [
        (name, _number(value) if isinstance(value, FUNCTIONS) else value)
        for one in own
        for name, value in vars(one).items()
        if type(value) in WRITTEN or isinstance(value, FUNCTIONS)
    ]
    return _number(kind), said


def _values(value: Any) -> Any:
    """Of a small tensor: its number, where all are the same one, else of a buffer all of them. What
    is trained differs from model to model.
    """
    if type(value) not in (Tensor, nn.Parameter) or value.is_meta or not 1 < value.numel() <= MOST:
        return None
    first = value.flatten()[0]
    if bool((value == first).all()):
        return first.item()
    if isinstance(value, nn.Parameter):
        return None
    plain = value.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.blake2b(plain.numpy().tobytes(), digest_size=16).digest()


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
    if isinstance(value, nn.Module) or not is_open(kind):
        raise TypeError
    return _number(kind), _written(vars(value), inside)


def is_shared_out(model: nn.Module) -> bool:
    """Whether a forward gathers parameters from other ranks: FSDP of both kinds."""
    if not DISTRIBUTED:
        return False
    if any(map(is_dtensor, model.parameters())):
        return True
    # whole in forward: the class that FSDP2 gave a module, FSDP1's wrapper
    kinds = {("torch.distributed.fsdp", "FSDPModule"), FSDP1}
    classes = {type(one) for one in model.modules()}
    return any((one.__module__, one.__name__) in kinds for kind in classes for one in kind.__mro__)


def _why_not(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    if dispatch_modes():
        return "a dispatch mode is on, which would see it or have no values"
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


DROPOUTS = frozenset(
    (
        nn.functional.dropout,
        nn.functional.dropout1d,
        nn.functional.dropout2d,
        nn.functional.dropout3d,
        nn.functional.alpha_dropout,
        nn.functional.feature_alpha_dropout,
        torch.dropout,
        torch.dropout_,
        torch.alpha_dropout,
        torch.feature_dropout,
        torch.feature_alpha_dropout,
    )
)


class _Lookup:
    """What a site returned, and what becomes of it."""

    def __init__(self, site: nn.Module, output: Tensor) -> None:
        self.site = site
        self.embedded = output.detach().clone()  # what follows may be in place
        rows = self.embedded.reshape(-1, output.shape[-1])
        self.distinct = rows.shape[0] > 0 and not bool((rows == rows[:1]).all())
        self.made: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self.made[id(output)] = output
        self.found: Measured | None = None
        self.over = False  # what arrived is no multiple any more

    def made_it(self, tensor: Tensor) -> bool:
        return self.made.get(id(tensor)) is tensor

    def compare(self, tensors: list[Tensor]) -> None:
        results = [(multiple(self.embedded, one), one) for one in tensors]
        best = next((r for found, _ in results for r in found if r.factor is not None), None)
        if best is not None:
            # of equal tokens a norm's output is a multiple too: what arrived first counts
            if self.distinct or self.found is None:
                self.found = best
            return
        made = [(found, one) for found, one in results if found and self.made_it(one)]
        if not made:  # positions on their own, or of another shape
            return
        self.over = True
        before = self.found
        ranges = [r for found, _ in made for r in found if r.high]
        if ranges and (before is None or ranges[0].by_sample):
            self.found = ranges[0]
        elif before is not None and any(
            thinned(self.embedded, one, before.factor or 0.0) for _, one in made
        ):
            self.found = Measured(why=THINNED)

    def result(self, failed: str) -> Measured:
        if not self.distinct and self.found is not HELD:
            factor = None if self.found is None else self.found.factor
            return Measured(factor, why=TOO_FEW)
        return self.found or Measured(why=failed or NO_MULTIPLE)


class _Following(TorchFunctionMode):
    """Lets dropouts do nothing, and notes what is made of lookups."""

    def __init__(self, lookups: list[_Lookup]) -> None:
        super().__init__()
        self.lookups = lookups
        self.pauses = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.pauses:
            return func(*args, **kwargs)
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        result = func(*args, **kwargs)
        given = list(_tensors((args, kwargs)))
        for lookup in self.lookups:
            if not lookup.over and any(lookup.made_it(one) for one in given):
                made = args[:1] if result is None else result  # x[...] = y returns nothing
                lookup.made.update({id(one): one for one in _tensors(made)})
        return result


class _Watch:
    def __init__(
        self, sites: list[nn.Module], holders: dict[nn.Module, nn.Module], whole: bool = False
    ) -> None:
        self.sites = sites
        self.holders = holders
        self.whole = whole
        self.lookups: list[_Lookup] = []
        self.following = _Following(self.lookups)

    def __reduce__(self) -> Any:
        """An interrupt may leave its hooks on a model that is pickled then: it is over there."""
        return _Watch, ([], {})

    def of(self, site: nn.Module) -> list[_Lookup]:
        return [one for one in self.lookups if one.site is site]

    def looked_up(self, site: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not probing() or not isinstance(output, Tensor) or len(self.of(site)) == LOOKUPS:
            return
        lookup = _Lookup(site, output)
        self.lookups.append(lookup)
        if forward_runs(self.holders.get(site)):
            lookup.found, lookup.over = HELD, True
            self._end()

    def _waits_for(self, site: nn.Module) -> bool:
        own: Site = site.__dict__["_neftune"]
        return len(self.of(site)) < own.lookups

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if probing():  # else an interrupt has left it
            self._compare((args, kwargs))
            self._end()

    def _end(self) -> None:
        if self.whole:
            return
        if all(one.over for one in self.lookups) and not any(map(self._waits_for, self.sites)):
            raise _Arrived

    def left(self, output: Any) -> None:
        """What a model returns has arrived too, where nothing was entered behind it."""
        plain = isinstance(output, (Tensor, Mapping, list, tuple))
        self._compare(output if plain else getattr(output, "__dict__", None))

    def _compare(self, values: Any) -> None:
        waiting = [one for one in self.lookups if not one.over]
        if not waiting:
            return
        self.following.pauses = True
        try:
            tensors = list(_tensors(values))
            for lookup in waiting:
                others = [one for one in self.lookups if one is not lookup]
                lookup.compare(
                    [
                        one
                        for one in tensors
                        if lookup.made_it(one) or not any(other.made_it(one) for other in others)
                    ]
                )
        finally:
            self.following.pauses = False

    def result(self, site: nn.Module, failed: str) -> Measured | None:
        """None: it was not looked up, or too little; the next forward may tell."""
        found = [one.result(failed) for one in self.of(site)]
        if not found:
            return Measured(why=failed) if failed and site not in self.holders else None
        factors = [one.factor for one in found if one.factor is not None]
        if len(factors) == len(found) > 1 and max(factors) - min(factors) > NEAR * max(factors):
            return Measured(low=min(factors), high=max(factors))
        worst = next((one for one in found if one.factor is None), None)
        worst = worst or next((one for one in found if one.why), found[0])
        return None if worst.why == TOO_FEW and worst.factor is None else worst


def is_left(hook: Any) -> bool:
    """Whether a hook is one that an interrupted look left on a module."""
    return isinstance(getattr(hook, "__self__", None), _Watch)
