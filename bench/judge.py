"""The verdict on one model and one way to tell it samples: EXACT, WARNED, REFUSED, SILENT WRONG or
CRASH, by bench/witness.py.
"""

import ast
import contextlib
import math
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neftune_kernels import add_noise, apply_neftune

from .witness import (
    ALPHA,
    Lookup,
    Sequence,
    Watched,
    arrival,
    noise_of,
    watching,
)

Call = Callable[[nn.Module, dict[str, Any]], Any]
FINE = ("EXACT", "WARNED", "REFUSED")
FAULTS = ("SILENT WRONG", "CRASH", "FALSE ALARM", "NO WAY OUT", "NOT EXACT")


class Subject(NamedTuple):
    """A model, how it is called, and what is told of the sequences it looks up."""

    model: nn.Module
    given: dict[str, Any]
    sequences: list[Sequence]
    words: list[dict[str, Any]]  # of each sequence, as handle.told() takes them; {}: nothing
    call: Call = lambda model, given: model(**given)
    options: Mapping[str, Any] = {}  # of apply_neftune, where the plain call is not the question


class Verdict(NamedTuple):
    word: str
    detail: str = ""
    message: str = ""  # of the warning or error
    remedy: str = ""
    arrivals: str = ""  # factor and module
    options: dict[str, Any] | None = None  # with which it ended EXACT; None: not by apply_neftune


def tensors_of(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_of(value)


def kept(output: Any) -> list[Tensor]:
    return [one.detach().clone() for one in tensors_of(output)]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """0 where all bits are the same, else the largest difference over the largest value."""
    if len(ours) != len(theirs):
        return float("inf")
    largest = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)):
            continue
        scale = max(float(one.abs().max()), float(other.abs().max()), 1e-30)
        largest = max(largest, float((one - other).abs().max()) / scale)
    return largest


class State:
    """Buffers and RNG before a forward, so that every forward of a model starts alike."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.buffers = [one.detach().clone() for one in model.buffers()]

    def put_back(self) -> None:
        with torch.no_grad():
            for now, before in zip(self.model.buffers(), self.buffers, strict=False):
                if now.shape == before.shape:
                    now.copy_(before)
        torch.manual_seed(0)


class Ran(NamedTuple):
    watched: Watched
    outputs: list[Tensor]
    output: Any


def run(
    subject: Subject,
    state: State,
    targets: set[nn.Module] | None = None,
    by_hand: Mapping[int, float] | None = None,
) -> Ran:
    state.put_back()
    with watching(subject.sequences, targets, by_hand) as watched:
        output = subject.call(subject.model, subject.given)
    return Ran(watched, kept(output), output)


def targets_of(subject: Subject, clean: Watched) -> set[nn.Module]:
    """Of the modules that look a sequence up, the model's input embedding."""
    chosen: set[nn.Module] = set()
    for number in range(len(subject.sequences)):
        modules = {one.module for one in clean.lookups if one.sequence == number}
        if len(modules) > 1:
            inputs = set()
            parts: Any = subject.model.modules()
            for one in parts:
                if hasattr(one, "get_input_embeddings"):
                    try:
                        inputs.add(one.get_input_embeddings())
                    except (NotImplementedError, AttributeError, TypeError):
                        continue
            modules = (modules & inputs) or modules
        chosen |= modules
    return chosen


class Expected(NamedTuple):
    """The model without us: clean, and with noise put in by hand."""

    clean: Ran
    noisy: Ran  # what the package is to give
    targets: set[nn.Module]
    factors: dict[int, float]  # of each sequence, what the model multiplies its lookup by
    shares: dict[int, float]  # of each sequence, the alpha that was put in by hand


class Unusable(Exception):
    """The model cannot be judged: nothing was looked up."""


def expectation(subject: Subject, state: State) -> Expected:
    clean = run(subject, state)
    again = run(subject, state)
    if difference(clean.outputs, again.outputs):
        raise Unusable("two clean forwards from one seed differ")
    if not clean.watched.lookups:
        raise Unusable("no lookup of the ids was seen")
    targets = targets_of(subject, clean.watched)
    clean = run(subject, state, targets)
    shares = dict.fromkeys(range(len(subject.sequences)), ALPHA)
    noisy = run(subject, state, targets, shares)
    factors = {}
    for number, lookup in enumerate(noisy.watched.lookups):
        found = arrival(clean.watched, noisy.watched, number, subject.sequences)
        factors[lookup.sequence] = found.factor
    for number, factor in factors.items():
        if abs(factor - 1) > 1e-5:
            shares[number] = ALPHA / _as_written(factor)
    if any(alpha != ALPHA for alpha in shares.values()):
        noisy = run(subject, state, targets, shares)
    return Expected(clean, noisy, targets, factors, shares)


def _as_written(factor: float) -> float:
    """The number that the model multiplies by, from one measured in float32: a short decimal, or
    the root of an integer.
    """
    for candidate in (float(f"{factor:.4g}"), round(factor**2) ** 0.5):
        if candidate and abs(candidate / factor - 1) < 1e-5:
            return candidate
    return factor


# ---- one attempt


class Attempt(NamedTuple):
    exact: bool
    detail: str
    messages: list[str]  # warnings
    error: BaseException | None
    arrivals: str = ""


def ours(error: BaseException) -> bool:
    """Whether the error was raised by the package on purpose: its last frame is the package's."""
    frames = traceback.extract_tb(error.__traceback__)
    named = (ValueError, TypeError, RuntimeError, AttributeError)
    return bool(frames) and "/neftune_kernels/" in frames[-1].filename and isinstance(error, named)


@contextlib.contextmanager
def applied(subject: Subject, options: dict[str, Any]) -> Iterator[None]:
    """Under apply_neftune with these options and what handle.told() is told; the model is left as
    it was.
    """
    settings = {"noise_alpha": ALPHA, **subject.options, **options}
    told = settings.pop("told", None)
    handle = apply_neftune(subject.model, **settings)
    try:
        with contextlib.nullcontext() if told is None else handle.told(**told):
            yield
    finally:
        handle.remove()


def attempt(subject: Subject, state: State, expected: Expected, options: dict[str, Any]) -> Attempt:
    """Two forwards."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with applied(subject, options):
                first = run(subject, state, expected.targets)
                ran = run(subject, state, expected.targets)
        except Exception as error:
            return Attempt(False, "", _messages(caught), error)
    detail, arrivals = _compare(subject, expected, ran)
    if not detail and difference(first.outputs, ran.outputs):
        detail = "the first forward differs from the second"
    return Attempt(not detail, detail, _messages(caught), None, arrivals)


def _messages(caught: list[warnings.WarningMessage]) -> list[str]:
    words = ("NEFTune", "noise", "padding_idx counts")
    texts = [str(one.message) for one in caught]
    return list(dict.fromkeys(one for one in texts if any(word in one for word in words)))


def _compare(subject: Subject, expected: Expected, ran: Ran) -> tuple[str, str]:
    """(what is wrong, or nothing; where the noise arrived)"""
    if len(ran.watched.lookups) != len(expected.noisy.watched.lookups):
        return "other lookups than without noise", ""
    wrong, arrived = [], []
    for number, lookup in enumerate(ran.watched.lookups):
        found = arrival(expected.clean.watched, ran.watched, number, subject.sequences)
        arrived.append(f"{found.factor:.6g} at {found.at}")
        if math.isnan(expected.factors[lookup.sequence]):
            continue  # noise by hand is not seen to arrive either: the output tells
        if not (found.error <= 1 and abs(found.factor - 1) < 1e-5):
            wrong.append(_describe(subject, expected, ran, number, found.factor, lookup))
    off = difference(ran.outputs, expected.noisy.outputs)
    scaled = any(abs(one - 1) > 1e-5 for one in expected.factors.values())
    if off and not wrong and not (scaled and off < 1e-4):
        wrong.append(f"output differs from noise by hand by {off:.2g}")
    return "; ".join(dict.fromkeys(wrong)), ", ".join(dict.fromkeys(arrived))


def _describe(
    subject: Subject, expected: Expected, ran: Ran, number: int, factor: float, lookup: Lookup
) -> str:
    if factor == factor:
        return f"the noise arrives {factor:.4g} times too loud"
    sequence = subject.sequences[lookup.sequence]
    begun = expected.clean.watched.lookups[number].begun
    pairs = zip(
        expected.clean.watched.events[begun:], ran.watched.events[lookup.begun :], strict=False
    )
    noise = noise_of(lookup, subject.sequences)
    for before, after in pairs:
        if before.tensor.numel() != noise.numel() or torch.equal(before.tensor, after.tensor):
            continue
        delta = (after.tensor - before.tensor).reshape(noise.shape).abs().amax(-1)
        per_token = [
            f"{float(one / paper):.3g}" if paper > 0 else ("pad:0" if one == 0 else "pad:noisy")
            for one, paper in zip(delta, noise.abs().amax(-1), strict=True)
        ]
        return f"|noise| over the paper's by token: {' '.join(_runs(per_token))}"
    return f"no noise arrives ({sequence.ids.numel()} ids)"


def _runs(values: list[str]) -> list[str]:
    made: list[list[Any]] = []
    for one in values:
        if made and made[-1][0] == one:
            made[-1][1] += 1
        else:
            made.append([one, 1])
    return [f"{one}x{times}" for one, times in made[:8]]


# ---- remedies


def remedies(
    text: str, subject: Subject, expected: Expected
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a message tells its reader to do, the most literal first."""
    if found := re.search(r"embedding_multiplier=([\d.e+-]*\d)", text):
        yield f"embedding_multiplier={found[1]}", {"embedding_multiplier": float(found[1])}
    for found in re.finditer(r"samples=(\[.*\]|\{[^{}]*\})", text):
        try:
            yield f"samples={found[1]}", {"samples": ast.literal_eval(found[1])}
        except (SyntaxError, ValueError):
            continue
    if "batch_first=False" in text:
        yield "batch_first=False", {"batch_first": False}
    if "embedding=" in text and len(expected.targets) == 1:
        paths = [name for name, one in subject.model.named_modules() if one in expected.targets]
        yield f'embedding="{paths[0]}"', {"embedding": paths[0]}
    factors = {one for one in expected.factors.values() if one == one}
    if "divide noise_alpha" in text and len(factors) == 1:
        alpha = ALPHA / _as_written(factors.pop())
        yield f"noise_alpha={alpha:.6g}", {"noise_alpha": alpha}
    if "samples=" in text or "told(" in text:
        if len(subject.words) == 1:
            yield "told(...)", {"told": subject.words[0]}
        said = [
            {**words, "input_ids": sequence.ids}
            for words, sequence in zip(subject.words, subject.sequences, strict=True)
        ]
        yield "samples=a callable", {"samples": _reader(said)}


def _reader(said: list[dict[str, Any]]) -> Callable[[dict[str, Any]], Any]:
    """samples= may return the words of one sequence."""
    return lambda given: next(iter(said), None)


def follow(
    text: str,
    subject: Subject,
    state: State,
    expected: Expected,
    so_far: dict[str, Any],
    depth: int,
) -> tuple[str, dict[str, Any] | None, str]:
    """(what was done where it ended EXACT, or nothing; with which options; the last complaint)"""
    last = text
    for name, options in remedies(text, subject, expected):
        if any(so_far.get(key) == value for key, value in options.items() if key != "samples"):
            continue
        merged = {**so_far, **options}
        tried = attempt(subject, state, expected, merged)
        complaint = str(tried.error) if tried.error is not None else " | ".join(tried.messages)
        if tried.error is not None and not ours(tried.error):
            last = f"{type(tried.error).__name__}: {tried.error}"
            continue
        if tried.exact and set(tried.messages) <= set(text.split(" | ")):
            return name, merged, ""
        last = complaint or tried.detail or last
        if complaint and depth:
            more, found, last = follow(complaint, subject, state, expected, merged, depth - 1)
            if more:
                return f"{name}, then {more}", found, ""
    outside = "inputs_embeds" in text and _takes_embeds(subject)
    if outside and _with_embeds(subject, state, expected):
        return "add_noise as inputs_embeds", None, ""
    return "", None, last


def silenced(
    text: str, subject: Subject, state: State, expected: Expected
) -> tuple[str, dict[str, Any] | None]:
    """What was done after which nothing of this is said any more and all is exact; or nothing."""
    for name, options in remedies(text, subject, expected):
        tried = attempt(subject, state, expected, options)
        if tried.exact and not tried.messages:
            return name, options
    return "", None


def is_true(message: str, subject: Subject, expected: Expected) -> bool:
    """Of a warning over exact noise; what is not known here to be true is a false alarm."""
    if "takes an attention_mask" in message:
        around = [one for one in subject.model.modules() if expected.targets & {*one.modules()}]
        return not any("attention_mask" in signature(one.forward).parameters for one in around)
    if found := re.search(r"multiplies its embeddings by ([\d.e+-]*\d)", message):
        return all(abs(float(found[1]) / one - 1) < 1e-5 for one in expected.factors.values())
    return "it is not known whether" in message


def _takes_embeds(subject: Subject) -> bool:
    return len(subject.sequences) == 1 and "input_ids" in subject.given


def _with_embeds(subject: Subject, state: State, expected: Expected) -> bool:
    """The noise outside the model: what arrives is compared through the whole output."""
    table: Any = next(iter(expected.targets))
    words = {name: value for name, value in subject.words[0].items() if value is not None}
    ids = subject.given["input_ids"]
    given = {name: value for name, value in subject.given.items() if name != "input_ids"}
    lookup = expected.noisy.watched.lookups[0]
    try:
        rows = table(ids)
        rows = rows[0] if isinstance(rows, tuple) else rows
        embedded = add_noise(rows, ALPHA, seed=lookup.seed, **words)
        state.put_back()
        output = subject.call(subject.model, {**given, "inputs_embeds": embedded})
    except Exception:
        return False
    return difference(kept(output), expected.noisy.outputs) < 1e-5


# ---- the verdict


def judge(subject: Subject, state: State, expected: Expected) -> Verdict:
    tried = attempt(subject, state, expected, {})
    text = " | ".join(tried.messages)
    if tried.error is not None:
        if not ours(tried.error):
            frames = traceback.extract_tb(tried.error.__traceback__)
            where = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}"
            return Verdict("CRASH", f"{type(tried.error).__name__} at {where}: {tried.error}")
        text = str(tried.error)
        done, options, last = follow(text, subject, state, expected, {}, 2)
        return Verdict("REFUSED" if done else "NO WAY OUT", last, text, done, options=options)
    if tried.exact and not tried.messages:
        return Verdict("EXACT", arrivals=tried.arrivals, options={})
    if tried.exact:
        done, options = silenced(text, subject, state, expected)
        true = all(is_true(one, subject, expected) for one in tried.messages)
        word = "WARNED" if true and done else "FALSE ALARM"
        return Verdict(word, "", text, done, tried.arrivals, options)
    if not tried.messages:
        return Verdict("SILENT WRONG", tried.detail, "", "", tried.arrivals)
    done, options, last = follow(text, subject, state, expected, {}, 2)
    detail = tried.detail if done else f"{tried.detail}; after the remedies: {last}"
    return Verdict("WARNED" if done else "NO WAY OUT", detail, text, done, tried.arrivals, options)


# ---- what else must hold


def _looks(model: nn.Module) -> list[Any]:
    """All that apply_neftune may touch, to be compared after its removal."""
    return [
        (
            type(one),
            sorted(name for name in vars(one) if not name.startswith("_backward")),
            len(one._forward_hooks),
            len(one._forward_pre_hooks),
        )
        for one in model.modules()
    ]


def _held(model: nn.Module) -> list[tuple[str, int]]:
    """The state_dict's names and storages."""
    return [(name, value.data_ptr()) for name, value in model.state_dict().items()]


def gradients(model: nn.Module, output: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = sum(one.float().pow(2).mean() for one in tensors_of(output) if one.requires_grad)
    if isinstance(loss, Tensor):
        loss.backward()
    found = {
        name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found


class _Constant(torch.autograd.Function):
    """Another value for what was looked up, as a constant added to it makes: the gradient is the
    lookup's.
    """

    @staticmethod
    def forward(ctx: Any, looked_up: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def _gradients_behind(
    subject: Subject, state: State, expected: Expected, hook: Callable[[Tensor], Any]
) -> dict[str, Tensor]:
    """Of a forward and backward with a hook behind each lookup, which is given its output. Before
    that forward a look at the model may run hooks too, without grad.
    """

    def behind(module: nn.Module, args: Any, output: Any) -> Any:
        is_lookup = bool(args) and isinstance(output, Tensor) and not args[0].is_floating_point()
        return hook(output) if is_lookup and torch.is_grad_enabled() else None

    hooks = [one.register_forward_hook(behind) for one in expected.targets]
    state.put_back()
    try:
        with watching(subject.sequences, expected.targets):
            return gradients(subject.model, subject.call(subject.model, subject.given))
    finally:
        for one in hooks:
            one.remove()


def around(
    subject: Subject, state: State, expected: Expected, options: dict[str, Any]
) -> list[str]:
    """Of eval, no-grad, state_dict, gradient and removal those that do not hold; apply_neftune with
    these options is exact.
    """
    model = subject.model
    wrong = []
    model.eval()
    eval_clean = run(subject, state).outputs
    model.train()
    with torch.no_grad():  # attention may take another kernel
        silent_clean = run(subject, state, expected.targets).outputs
    before, held = _looks(model), _held(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(applied(subject, options))
        if _held(model) != held:
            wrong.append("state_dict")
        looked_up: list[Tensor] = []

        def keep(looked: Tensor) -> None:
            looked_up.append(looked.detach().clone())  # some models change it in place

        mine = _gradients_behind(subject, state, expected, keep)
        model.eval()
        if difference(run(subject, state).outputs, eval_clean):
            wrong.append("eval")
        model.train()
        with torch.no_grad():
            silent = run(subject, state, expected.targets).outputs
        if difference(silent, silent_clean):
            wrong.append("no-grad")
    theirs = _gradients_behind(
        subject, state, expected, lambda out: _Constant.apply(out, looked_up.pop(0).detach())
    )
    if wrong_gradient(model, mine, theirs, expected.targets):
        wrong.append("gradient")
    if _looks(model) != before:
        wrong.append("removal leaves something")
    if difference(run(subject, state, expected.targets).outputs, expected.clean.outputs):
        wrong.append("removal")
    return wrong


def wrong_gradient(
    model: nn.Module,
    mine: dict[str, Tensor],
    theirs: dict[str, Tensor],
    targets: set[nn.Module],
) -> bool:
    """The embedding's own may be summed in another order: 2⁻¹⁶ of its largest."""
    if mine.keys() != theirs.keys():
        return True
    tables = {id(one) for target in targets for one in target.parameters()}
    names = {name for name, one in model.named_parameters() if id(one) in tables}
    return any(
        difference([mine[name]], [theirs[name]]) > (2.0**-16 if name in names else 0.0)
        for name in mine
    )
