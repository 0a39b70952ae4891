"""Is my noise on, and right? One batch, measured: each site's noise, and what arrives of it."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..lookup import PLAIN_WEIGHTS, embeds_with_noise
from ..noise import alpha_tensor
from ..samples import Samples
from .find import base_class
from .multiples import Measured
from .probe import measure
from .running import NoisyCall, Site, State
from .sequences import tensors_in
from .undisturbed import copied, undisturbed

CLOSE = 0.02  # of the paper's magnitude: what low precision rounds away stays below
COLUMNS = (
    "site",
    "way",
    "backend",
    "replica",
    "multiplier",
    "heard",
    "lengths",
    "padding",
    "arrives",
)


class Check(dict[str, Any]):
    """What :meth:`NEFTuneHandle.check` measured; a table when printed."""

    def __str__(self) -> str:
        rows = [COLUMNS, *(tuple(_cell(site, name) for name in COLUMNS) for site in self["sites"])]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        verdict = "exact" if self["ok"] else "NOT as the paper's: see below"
        if self["ok"] and self["said"]:
            verdict = "exact: see below"
        told = [f"- {message}" for message in self["said"]]
        return "\n".join([*lines, f"noise_alpha {self['noise_alpha']:g}: {verdict}", *told])


def _cell(site: dict[str, Any], name: str) -> str:
    value = site[name]
    if value is None:
        return "-"
    if name == "lengths":
        shown = ", ".join(map(str, value[:6]))
        return shown + (", ..." if len(value) > 6 else "")
    if name == "padding":
        return "clean" if value else "NOISED"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check(
    root: nn.Module, state: State, sites: dict[str, nn.Module], batch: dict[str, Any]
) -> Check:
    """sites: by their paths. The model is left as it was: mode, generators, buffers, counters."""
    _refuse_meta(batch, list(sites.values()))
    caught: list[str] = []
    calls: dict[nn.Module, _Call] = {}
    with _as_it_was(root, state, list(sites.values())), _heard(caught):
        root.train()
        hooks = [
            module.register_forward_hook(_keep(module, calls), with_kwargs=True)
            for module in sites.values()
        ]
        try:
            with torch.enable_grad():
                root(**copied(batch, tensors=False))
        finally:
            for hook in hooks:
                hook.remove()
        rows = []
        factors = _arriving(root, batch, list(calls))
        for path, module in sites.items():
            row = _row(path, module, batch, calls.get(module), factors.get(module))
            row["tied"] = module not in calls and any(_share(module, other) for other in calls)
            rows.append(row)
    said = list(dict.fromkeys(caught))
    judged = [row for row in rows if not row["tied"]]
    for row in judged:
        arrives, padding = row["arrives"], row["padding"]
        if arrives is None:
            said.append(
                f"{row['site']}: no noise in this forward ({row['why'] or 'it did not run'})"
            )
        elif row["why"]:
            said.append(f"{row['site']}: {row['why']}")
        elif abs(arrives - 1) > CLOSE and row["measured"] is not None:
            said.append(
                f"{row['site']}: the noise arrives {arrives:.4g} times as loud as the paper's: "
                f"apply_neftune(..., embedding_multiplier={row['measured']!r})"
            )
        if padding is False:
            said.append(f"{row['site']}: padding is noised")
    ok = bool(judged) and all(
        row["arrives"] is not None
        and abs(row["arrives"] - 1) <= CLOSE
        and row["padding"]
        and not row["why"]
        for row in judged
    )
    return Check(ok=ok, noise_alpha=state.noise_alpha, sites=rows, said=said)


def _refuse_meta(batch: dict[str, Any], sites: list[nn.Module]) -> None:
    weights = [getattr(one, "weight", None) for one in sites]
    if any(one is not None and not one.is_meta for one in weights):
        names = [name for name, value in tensors_in(batch) if value.is_meta]
        if names:
            raise ValueError(
                f"check measures values, and {', '.join(names)} on the meta device has none: pass "
                "a batch on the model's device"
            )


class _Call(NamedTuple):
    last: NoisyCall
    output: Tensor


def _keep(module: nn.Module, calls: dict[nn.Module, _Call]) -> Any:
    """Hook behind all others: the site's first noisy lookup with what came out of it."""
    site: Site = module.__dict__["_neftune"]
    before = site.last

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if site.last is not before and site.last is not None and isinstance(output, Tensor):
            calls.setdefault(module, _Call(site.last, output.detach().clone()))

    return hook


def _share(module: nn.Module, other: nn.Module) -> bool:
    """Whether they are one table: T5 never looks up in the one that names its two others."""
    weight = getattr(module, "weight", None)
    return weight is not None and getattr(other, "weight", None) is weight


def _arriving(
    root: nn.Module, batch: dict[str, Any], sites: list[nn.Module]
) -> dict[nn.Module, Measured]:
    """By what each site's lookup arrives multiplied; none where that cannot be measured."""
    return measure(root, (), batch, sites) if sites else {}


def _row(
    path: str,
    module: nn.Module,
    batch: dict[str, Any],
    call: _Call | None,
    arriving: Measured | None,
) -> dict[str, Any]:
    site: Site = module.__dict__["_neftune"]
    state = site.state
    row: dict[str, Any] = dict.fromkeys((*COLUMNS, "measured", "noise_to_embedding", "why"))
    row |= {"site": path, "way": "fused" if site.fused else "behind"}
    if call is None:
        return row | {"why": state.skipped_last}
    last, noisy = call
    if last.noise_alpha == 0:  # capturable=True runs the kernel all the same
        return row | {"why": "noise_alpha is 0"}
    row |= {
        "backend": last.backend.name,
        "replica": int(last.noise.offsets.replica),
        "heard": _heard_from(last.samples, batch, state),
    }
    clean = clean_lookup(module, last.ids)
    if clean is None:
        return row | {"why": "its weight is not whole in this process"}
    said = state.embedding_multiplier
    known = site.factors.get(noisy.dtype, 1.0) if said is None or callable(said) else said
    each = None
    if last.factors is not None:
        each = last.factors.double().expand(last.ids.shape).reshape(-1, 1)
        known = float(each.mean())
    measured = None if arriving is None else arriving.factor
    row |= {"multiplier": float(known), "measured": measured}
    paper, length = _paper(last, noisy.device)
    real = length > 0
    width = noisy.shape[-1]
    at_lookup = (noisy.double() - clean.double()).reshape(-1, width)
    row["padding"] = not bool(at_lookup[~real].any())
    if not bool(real.any()):
        return row | {"lengths": [], "why": "every token is padding"}
    factor = known if measured is None else measured
    arrived = at_lookup[real] * factor
    if each is not None and measured is None:
        arrived = at_lookup[real] * each[real]
        low, high = (0.0, 0.0) if arriving is None else (arriving.low, arriving.high)
        inside = low * (1 - CLOSE) <= each[real].min() and each[real].max() <= high * (1 + CLOSE)
        if high and not inside:  # what arrives has other factors
            arrived *= (low + high) / 2 / known
    wanted = paper.reshape(-1, width)[real]
    row["arrives"] = float((arrived * wanted).sum() / wanted.square().sum())
    embedded = clean.double().reshape(-1, width)[real]
    row["noise_to_embedding"] = ratio_of_rms(at_lookup[real], embedded)
    row["lengths"] = _lengths(last, noisy.device)
    if arriving is not None and measured is None and each is None:
        if arriving.high:
            row["why"] = (
                f"what arrives is multiplied by {arriving.low:.4g} to {arriving.high:.4g}, each "
                "token, sample or lookup by its own number: "
                "apply_neftune(..., embedding_multiplier=lambda given: ...)"
            )
        elif said is None and not site.multiplier_known:
            row["why"] = f"what it is multiplied by could not be measured ({arriving.why})"
    return row


@contextlib.contextmanager
def _modes_kept(module: nn.Module) -> Iterator[None]:
    modes = [(one, one.training) for one in module.modules()]
    try:
        yield
    finally:
        for one, training in modes:
            one.training = training


def clean_lookup(module: nn.Module, ids: Tensor) -> Tensor | None:
    """What a site looks up without noise, by its class's forward: no hook runs, nothing is counted.

    None where the weight is not whole in this process.
    """
    site: Site = module.__dict__["_neftune"]
    weight = getattr(module if site.base is None else site.base, "weight", None)
    if weight is None or type(weight) not in PLAIN_WEIGHTS or weight.is_meta or weight.dim() != 2:
        return None
    state = site.state
    counted = state.skipped.copy(), state.skipped_last
    try:
        with _modes_kept(module), torch.no_grad():
            module.eval()
            found: Tensor = base_class(module).forward(module, ids)
    finally:
        state.skipped, state.skipped_last = counted
    return found


def ratio_of_rms(noise: Tensor, embedded: Tensor) -> float | None:
    below = float(embedded.double().square().mean())
    return (float(noise.double().square().mean()) / below) ** 0.5 if below else None


def _paper(last: NoisyCall, device: torch.device) -> tuple[Tensor, Tensor]:
    """The call's noise at noise_alpha itself, and each token's length; 0 for padding."""
    zeros = torch.zeros((), device=device).expand(*last.shape, last.embedding_dim)
    alpha = alpha_tensor(last.noise_alpha * last.noise.variant.sign)
    noise = last.noise._replace(alpha=alpha, backend=last.backend.name)
    return embeds_with_noise(zeros, last.samples, noise).double(), last.tokens()[2]


def _lengths(last: NoisyCall, device: torch.device) -> list[int]:
    sample, _, length = last.tokens()
    real = length > 0
    pairs = torch.stack((sample[real], length[real])).unique(dim=1)
    return [int(one) for one in pairs[1]]


def _heard_from(samples: Samples, batch: dict[str, Any], state: State) -> str:
    """What told the samples, by the argument's name where it is one as it was given."""
    if state.read is not None:
        return "samples="
    fields = ("attention_mask", "lengths", "cu_seqlens", "position_ids")
    told = [(name, value) for name in fields if (value := getattr(samples, name)) is not None]
    names = [
        next((key for key, one in batch.items() if one is value), name) for name, value in told
    ]
    if names:
        return " and ".join(names)
    return f"padding_idx {samples.padding_idx}" if samples.padded_ids is not None else "nothing"


@contextlib.contextmanager
def _heard(caught: list[str]) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    caught += [str(one.message) for one in seen if issubclass(one.category, UserWarning)]


@contextlib.contextmanager
def _as_it_was(root: nn.Module, state: State, sites: list[nn.Module]) -> Iterator[None]:
    """Puts back what a forward in training mode changes."""
    lasts = [(site, site.last, site.outside) for one in sites if (site := one.__dict__["_neftune"])]
    counted = (
        state.calls,
        state.skipped.copy(),
        state.skipped_last,
        set(state.warned),
        state.embedded,
    )
    state.warned.clear()  # what was said before is said again, to whom asks
    state.skipped_last = None
    try:
        with _modes_kept(root), undisturbed(root):
            yield
    finally:
        for site, last, outside in lasts:
            site.last, site.outside = last, outside
        state.calls, state.skipped, state.skipped_last = counted[:3]
        state.warned, state.embedded = counted[3:]
