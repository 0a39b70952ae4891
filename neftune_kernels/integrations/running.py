"""What is in force and what is running: one apply_neftune's settings and counters, the stack of
running forwards, and sites with their last call.
"""

import inspect
import itertools
import threading
import uuid
import warnings
import weakref
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import Backend
from ..distributed import data_parallel_index
from ..modules import HUGGING_FACE_MARK
from ..noise import UNIFORM, Noise, Variant, check_alpha
from ..samples import UNSAID, Samples, real_tokens
from ..torch_internals import asked_outside_the_graph
from .arguments import KNOWN_NAMES, from_arguments, trailing_padding
from .checkpoints import FirstPasses
from .places import place, same
from .telling import IDS, Read, Words, samples_of, words_said


class NoisyCall(NamedTuple):
    """What it takes to compute the last call's noise again, when somebody asks for statistics."""

    shape: torch.Size
    embedding_dim: int
    noise_alpha: float
    samples: Samples
    noise: Noise
    backend: Backend


class Settings(NamedTuple):
    """What apply_neftune is told."""

    noise_alpha: float = 0.0
    replica: int | None = None
    noise_without_grad: bool = False
    backend: str | None = None
    variant: Variant = UNIFORM
    samples: Read | None = None  # how the user reads arguments
    fused: bool | None = None
    embedding_multiplier: float | None = None  # None: known or measured


class State:
    """Settings and counters of one apply_neftune; shared by its sites and listeners, copied with
    them by deepcopy and pickle.
    """

    def __init__(self) -> None:
        self.origin = uuid.uuid4().hex  # copies keep it: their sites are taken for ours by remove()
        self.calls = 0
        self.outside = False  # a lookup outside its model's forward has had noise since the last
        self.skipped: Counter[str] = Counter()
        self.skipped_last: str | None = None
        self.warned: set[str] = set()
        self.unmeasured = False  # a site's multiplier is to be measured at the next forward
        self.looks = 0  # of the probe
        self.handle: Any = None  # the NEFTuneHandle, which stands above this room
        self.handle_number = -1
        self.assign(Settings())

    def __getstate__(self) -> dict[str, Any]:
        # a copy is not steered by our handle
        return {**self.__dict__, "handle": None, "handle_number": -1}

    def assign(self, settings: Settings) -> None:
        """Each setting becomes an attribute of its own: Dynamo guards on what a forward reads."""
        self.noise_alpha = check_alpha(settings.noise_alpha)
        self.has_noise = self.noise_alpha > 0
        self.alpha = torch.full((), self.noise_alpha, dtype=torch.float64, device="cpu")
        self.replica = settings.replica
        self.noise_without_grad = settings.noise_without_grad
        self.backend = settings.backend
        self.variant = settings.variant
        self.read = settings.samples
        self.fused = settings.fused
        self.embedding_multiplier = settings.embedding_multiplier

    def settings(self) -> Settings:
        return Settings(
            self.noise_alpha,
            self.replica,
            self.noise_without_grad,
            self.backend,
            self.variant,
            self.read,
            self.fused,
            self.embedding_multiplier,
        )

    def warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=3)

    def warned_outside(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=2)

    def resolve_replica(self, embedding: nn.Module) -> int:
        if self.replica is not None:
            return self.replica
        return data_parallel_index(
            getattr(embedding, "weight", None),  # type: ignore[arg-type]
            embedding,
            None if self.handle is None else self.handle.root(),
        )

    def skip_reason(self, module: nn.Module) -> str | None:
        if not module.training:
            return "eval mode"
        if not self.has_noise:
            return "noise_alpha is 0"
        if not self.noise_without_grad and not torch.is_grad_enabled():
            return "no grad"
        return None


# ---- forwards


class Forward:
    """A running forward of a model around sites: who listens to it, and what it was given."""

    def __init__(self, listener: Any, given: dict[str, Any]) -> None:
        self.listener = listener
        self.state: State = listener.state
        self.sites: list[Site] = listener.sites
        self.decoder: bool = listener.decoder
        self.pad_token_id: int | None = listener.pad_token_id
        self.given = given
        self.samples: Samples | None = None  # read when the first site asks
        self.words: list[Words] | None = None  # what samples= says, likewise
        self.claimed: Tensor | None = None  # the ids that samples= speaks of where it names none
        self.used = False  # a site has taken these samples
        self.ran = False  # a site has run, with noise or without

    def told(self) -> Samples:
        if self.samples is None:
            row = self.listener.row
            given = self.given if row is None else {**self.given, **row(self.given)}
            self.samples = from_arguments(given, self.pad_token_id, self.state.warn_once)
        return self.samples

    def said(self, read: Read) -> list[Words]:
        if self.words is None:
            listener = self.listener
            self.words = words_said(read, self.given, listener.names, listener.name)
        return self.words

    @property
    def has_embeds(self) -> bool:
        given = self.given
        return (
            given.get("inputs_embeds") is not None or given.get("decoder_inputs_embeds") is not None
        )

    @property
    def has_ids(self) -> bool:
        """Whether it was given token ids under any name, in a dictionary too."""
        values: list[Any] = []
        for name, value in self.given.items():
            if isinstance(value, dict):
                values += [one for inner, one in value.items() if inner not in NO_IDS]
            elif name not in NO_IDS:
                values.append(value)
        return any(is_ids(value) for value in values)


NO_IDS = (*KNOWN_NAMES, "labels", "token_type_ids", "cache_position")


def is_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)


class _Running(threading.local):
    def __init__(self) -> None:
        self.forwards: list[Forward] = []  # of heard models, one inside the other
        self.told: list[tuple[State, Words]] = []  # by handle.told(), likewise
        self.probing = False  # a model is looked at: no noise, and nobody is told


RUNNING = _Running()  # of this thread


def forget_interrupted(entering: Any = None) -> None:
    """KeyboardInterrupt runs no hook: what is entered as running, but lies on no call's path, is
    over, and with it all that is above it. `entering` is a listener whose model's call is there
    already, but has not been entered.
    """
    forwards = RUNNING.forwards
    if not forwards:
        return
    calls: Counter[int] = Counter()
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            calls[id(frame.f_locals["self"])] += 1
        frame = frame.f_back
    entered: Counter[int] = Counter()
    kept = 0
    for forward in forwards:
        listener = forward.listener
        entered[id(listener)] += 1  # a model that calls itself is there as often as it runs
        there = calls[id(listener.model())] - (listener is entering)
        if entered[id(listener)] > there:
            break
        kept += 1
    while len(forwards) > kept:
        forwards.pop()


def _runs_here(model: nn.Module | None) -> bool:
    """Whether the call that asks comes from a forward of this model."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is model:
            return True
        frame = frame.f_back
    return False


OUTSIDE = (
    "the noisy embedding was called outside its model's forward, so the lengths of the samples are "
    "unknown and every token but padding_idx counts as real: call it inside `with "
    "handle.told(attention_mask=...)`, or, where PEFT has wrapped the model (prompt tuning), call "
    "apply_neftune again after get_peft_model"
)


def does_not_fit(mask: Tensor, input: Tensor) -> str:
    return (
        f"an attention_mask of shape {tuple(mask.shape)} does not fit the embedding's input "
        f"{tuple(input.shape)}: every token but padding_idx counts as real. Tell NEFTune the "
        "samples with apply_neftune(..., samples=...)"
    )


def is_flattened(mask: Tensor, input: Tensor) -> bool:
    """Flattened or not, never transposed."""
    return mask.numel() == input.numel() and (
        mask.shape[-1] == input.shape[-1] or 1 in (mask.dim(), input.dim(), input.shape[0])
    )


# ---- sites


class Site:
    """A place where noise is added, kept as `_neftune` of its module, and its last call."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.fused = True
        self.base: nn.Module | None = None  # the embedding inside, where the site is around it
        self.hooked = False  # a model around the site tells us its samples
        self.wrappers: list[weakref.ref[nn.Module]] = []  # around the site
        self.multiplier_known = True  # else it is to be measured
        self.measured = False  # by a probe
        self.factors: dict[torch.dtype, float] = {}  # that the lookup is multiplied by afterwards
        self.factor_listener: Any = None  # only while its model runs; None: always
        self.last: NoisyCall | None = None
        self.firsts = FirstPasses()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "wrappers": [], "last": None}

    def marked(self) -> bool:
        return any(hasattr(wrapper(), HUGGING_FACE_MARK) for wrapper in self.wrappers)

    def forwards(self) -> list[Forward]:
        """Those that tell this site, the innermost last."""
        running = RUNNING.forwards
        if (
            running
            and not torch.compiler.is_compiling()
            and not _runs_here(running[-1].listener.model())
        ):
            forget_interrupted()
        return [one for one in running if any(site is self for site in one.sites)]

    def has_run(self) -> None:
        for forward in RUNNING.forwards:
            if forward.state is self.state:
                forward.ran = True
                break  # the outermost asks

    def samples(
        self, forwards: list[Forward], input: Tensor, padding_idx: int
    ) -> tuple[Samples, bool]:
        """Those of the innermost running forward, where they fit the ids; and whether the call
        looks up something besides its forward's tokens.
        """
        said = self._said(forwards, input)
        if said is not None:
            return real_tokens(input, padding_idx, said), False
        if not forwards:
            if self.hooked:
                self.state.warn_once(OUTSIDE)
            return real_tokens(input, padding_idx, UNSAID), False
        running = forwards[-1]
        # An outer model may be told what it does not pass on (Rwkv).
        if not running.decoder:
            outer = (one for one in reversed(forwards) if not one.told().padding_unsaid)
            running = next(outer, running)
        told = running.told()
        if told.padding_unsaid:
            if (
                running.decoder
                and (samples := trailing_padding(input, running.pad_token_id)) is not UNSAID
            ):
                return samples._replace(noise_mask=told.noise_mask), False
            return real_tokens(input, padding_idx, told), False
        mask = told.attention_mask
        if mask is not None and mask.shape != input.shape:
            if is_flattened(mask, input):
                mask = mask.reshape(input.shape)
            elif running.used:
                return real_tokens(input, padding_idx, UNSAID), True
            else:
                self.state.warn_once(does_not_fit(mask, input))
                return real_tokens(input, padding_idx, UNSAID), False
            told = told._replace(attention_mask=mask)
        running.used = True
        return told, False

    def _said(self, forwards: list[Forward], input: Tensor) -> Samples | None:
        """What the user says of these ids: handle.told() before samples=, which is asked of the
        outermost forward, the model that apply_neftune was given if it runs. None: nothing.
        """
        state = self.state
        told = next((words for owner, words in reversed(RUNNING.told) if owner is state), None)
        if told is not None:
            return self._spoken_of([told], None, input)
        if state.read is None or not forwards:
            return None
        outermost = forwards[0].listener
        forward = next(one for one in reversed(forwards) if one.listener is outermost)
        words = forward.said(state.read)
        return self._spoken_of(words, forward, input) if words else UNSAID

    def _spoken_of(
        self, said: list[Words], forward: Forward | None, input: Tensor
    ) -> Samples | None:
        """The words that speak of these ids; None where none does."""
        for words in said:
            ids = words.get(IDS)
            if ids is None:
                if forward is not None and not self._claims(forward, input):
                    continue
                return self._fitting(samples_of(words, input), input)
            if not isinstance(ids, Tensor):
                raise TypeError(f"NEFTune was told {IDS}, which is {type(ids).__name__}: no tensor")
            if (where := place(input, ids)) is not None:
                told = samples_of(words, ids)
                return told if where is same else told.at(where, ids.shape)
        return None

    def _claims(self, forward: Forward, input: Tensor) -> bool:
        """Words without ids of their own speak of the first that are looked up, of no others."""
        if forward.claimed is None:
            forward.claimed = input
        return place(input, forward.claimed) is not None

    def _fitting(self, samples: Samples, input: Tensor) -> Samples:
        """A mask that only is flattened, or is not, is reshaped; one that does not fit warns."""
        mask = samples.attention_mask
        if mask is None or mask.shape == input.shape:
            return samples
        if is_flattened(mask, input):
            return samples._replace(attention_mask=mask.reshape(input.shape))
        self.state.warn_once(does_not_fit(mask, input))
        return UNSAID

    def divisor(self, forwards: list[Forward], dtype: torch.dtype) -> float:
        """Of the noise at the lookup: what the model multiplies its embeddings by afterwards."""
        said = self.state.embedding_multiplier
        if said is not None:
            return said
        listener = self.factor_listener
        if listener is not None and not any(one.listener is listener for one in forwards):
            return 1.0  # another model looks its tokens up
        return self.factors.get(dtype, 1.0)


COMPILED = (
    "it is not known whether the model multiplies its embeddings, since its first noisy forward is "
    "compiled: NEFTune takes 1. Say it: apply_neftune(..., embedding_multiplier=1.0)"
)
numbers = itertools.count()
# for questions asked outside the graph
handles: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


@asked_outside_the_graph
def has_moved(handle_number: int) -> bool:
    handle = handles.get(handle_number)
    return handle is not None and handle.has_moved()


@asked_outside_the_graph
def warn_unmeasured(handle_number: int) -> bool:
    handle = handles.get(handle_number)
    if handle is not None and not handle.removed:
        handle._live_state().warned_outside(COMPILED)
    return handle is not None
