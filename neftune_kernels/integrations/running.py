"""What is in force and what is running: one apply_neftune's settings and counters, the stack of
running forwards, and sites with their last call.
"""

import itertools
import sys
import threading
import types
import uuid
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import Backend, choose_backend
from ..capturable import alpha_on, check_setting, set_alpha
from ..distributed import data_parallel_index, has_group
from ..layout import per_token
from ..modules import has_other_noise
from ..noise import UNIFORM, Noise, Variant, check_alpha
from ..ops import when_drawn
from ..samples import (
    UNSAID,
    Samples,
    check_time_first,
    joins_rows,
    make_layout,
    real_tokens,
    says_no_padding,
    says_nothing,
)
from ..torch_internals import asked_outside_the_graph
from .advice import could_tell, paste
from .arguments import Padding, from_arguments, tail
from .checkpoints import FirstPasses, drawn_in_compiled_code
from .places import (
    Columns,
    Place,
    behind,
    padded,
    place,
    rearranged,
    same,
    transposed,
    values_cost_nothing,
)
from .quirks import Each
from .sequences import Sequence, among_arguments, other_sequences, sequence, tokens_in
from .telling import IDS, Read, Words, samples_of, words_said


class NoisyCall(NamedTuple):
    """What it takes to compute the last call's noise again, when somebody asks for statistics."""

    ids: Tensor
    noise_alpha: float
    samples: Samples
    noise: Noise
    embedded: torch.Size  # what it returned: a quantised weight's own dtype says nothing
    device: torch.device
    dtype: torch.dtype
    factors: Tensor | None = None  # of each row or token, that divided the noise

    @property
    def shape(self) -> torch.Size:
        return self.ids.shape

    @property
    def embedding_dim(self) -> int:
        return self.embedded[-1]

    @property
    def backend(self) -> Backend:
        return choose_backend(self.noise.backend, self.device, self.dtype)

    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sample, position, length) of every token, each (N,); length 0 marks padding."""
        layout = make_layout(self.shape, self.ids.device, self.samples, self.backend)
        return per_token(layout, self.shape, self.ids.device)


# embedding_multiplier=: a number, or what makes one, or one for each row, of a forward's arguments
Said = float | Callable[[dict[str, Any]], Any]


class Settings(NamedTuple):
    """What apply_neftune is told."""

    noise_alpha: float = 0.0
    replica: int | None = None
    noise_without_grad: bool = False
    backend: str | None = None
    variant: Variant = UNIFORM
    samples: Read | None = None  # how the user reads arguments
    fused: bool | None = None
    batch_first: bool = True
    embedding_multiplier: Said | None = None  # None: known or measured
    capturable: bool = False


class State:
    """Settings and counters of one apply_neftune; shared by its sites and listeners, copied with
    them by deepcopy and pickle.
    """

    def __init__(self) -> None:
        self.origin = uuid.uuid4().hex  # copies keep it: their sites are taken for ours by remove()
        self.calls = 0
        self.compilations = 0  # traces of noisy forwards
        self.embedded: torch.Size | None = None  # the shape of the last noisy lookup's output
        self.skipped: Counter[str] = Counter()
        self.skipped_last: str | None = None
        self.warned: set[str] = set()
        self.unmeasured = False  # a site's multiplier is to be measured at the next forward
        self.looks = 0  # of the probe, since something changed
        self.has_looked = False  # ever
        self.compiled_firsts = FirstPasses()  # of compiled code in checkpoints
        self.handle: Any = None  # the NEFTuneHandle, which stands above this room
        self.handle_key = ""  # a text: Dynamo makes a number that changes a symbol
        self.alphas: dict[torch.device, Tensor] = {}  # of sites on each, while capturable
        self.noise_alpha = 0.0
        self.assign(Settings())

    def __getstate__(self) -> dict[str, Any]:
        # a copy is not steered by our handle
        return {**self.__dict__, "handle": None, "handle_key": "", "alphas": {}}

    def assign(self, settings: Settings) -> None:
        """Each setting becomes an attribute of its own: Dynamo guards on what a forward reads."""
        noise_alpha = check_setting(check_alpha(settings.noise_alpha), settings.capturable)
        if noise_alpha != self.noise_alpha:
            set_alpha(noise_alpha, *self.alphas.values())  # a captured graph has them
        self.noise_alpha = noise_alpha
        self.capturable = settings.capturable
        self.has_noise = noise_alpha > 0 or self.capturable
        self.alpha = torch.full((), self.noise_alpha, dtype=torch.float64, device="cpu")
        self.replica = settings.replica
        self.noise_without_grad = settings.noise_without_grad
        self.backend = settings.backend
        self.variant = settings.variant
        self.read = settings.samples
        self.fused = settings.fused
        self.batch_first = settings.batch_first
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
            self.batch_first,
            self.embedding_multiplier,
            self.capturable,
        )

    def alpha_on(self, device: torch.device, compiling: bool) -> Tensor:
        """What a capturable call reads, the same tensor for as long as this State lives."""
        if compiling:
            place_alpha(self.handle_key, device)
        else:
            self.place_alpha(device)
        alpha = self.alphas.get(device)
        return alpha_on(device, self.noise_alpha) if alpha is None else alpha

    def place_alpha(self, device: torch.device) -> None:
        if device not in self.alphas:
            alpha = alpha_on(device, self.noise_alpha)
            if type(alpha) is Tensor:  # no fake of a trace
                self.alphas[device] = alpha

    def warn_once(self, message: str, advice: Callable[[], str] | None = None) -> None:
        """advice: what comes behind it, made of the call where it is said."""
        if torch.compiler.is_compiling():
            warn_outside(self.handle_key, message)
        else:
            self.say_once(message, advice)

    def say_once(self, message: str, advice: Callable[[], str] | None = None) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message + (advice() if advice else ""), stacklevel=4)

    def resolve_replica(self, embedding: nn.Module) -> int:
        if self.replica is not None:
            return self.replica
        if not has_group():
            return 0
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


LOOKUPS = 4  # of a table in one forward, the most that a look sees


class Forward:
    """A running forward of a model around sites: who listens to it, and what it was given."""

    words: list[Words] | None = None  # what samples= says
    claimed: Tensor | None = None  # the ids that samples= speaks of where it names none
    ran = False  # a site has run, with noise or without
    _own: Sequence | None = None  # found when the first site asks
    _others: list[Sequence] | None = None  # found when a site asks for other ids than its own
    _looked_up: Tensor | None = None  # the first ids that came as none of them
    _lookups: Counter["Site"] | None = None  # of sites that were looked at
    _columns: dict[tuple["Site", int], Columns] | None = None  # that a site read first, of each

    def __init__(self, listener: Any, given: dict[str, Any], frame: int = 0) -> None:
        """frame: the id of the frame that has called the model's hook and will call its forward."""
        self.listener = listener
        self.state: State = listener.state
        self.sites: list[Site] = listener.sites
        self.decoder: bool = listener.decoder
        self.padding: Padding = listener.padding
        self.given = given
        self.frame = frame
        self._samples: dict[int, Samples] = {}  # of each sequence, read when a site asks

    def runs(self, frame: types.FrameType | None) -> bool:
        """Whether its call is this frame or lies around it. A frame that has ended may have left
        its id to another.
        """
        while frame is not None:
            if id(frame) == self.frame and frame.f_locals.get("self") is self.listener.model():
                return True
            frame = frame.f_back
        return False

    def _read(self) -> dict[str, Any]:
        """Its arguments, and what a row of the table makes of them."""
        given = self.given
        return {**given, **self.listener.quirks.samples(given)} if self.listener.has_row else given

    @property
    def own(self) -> Sequence:
        """What its ids are, and what its arguments say of them."""
        if self._own is None:
            given = self._read() if self.listener.has_row else self.given
            self._own = sequence(given, self.decoder, not self.state.batch_first)
        return self._own

    @property
    def sequences(self) -> list[Sequence]:
        if self._others is None:
            self._others = other_sequences(self._read(), self.decoder, not self.state.batch_first)
        return [self.own, *self._others]

    def told(self, index: int, input: Tensor) -> Samples:
        """What the arguments say of a sequence."""
        if index not in self._samples:
            given = (self.sequences[index] if index else self._own or self.own).given

            def warn(message: str) -> None:
                self.state.warn_once(message, lambda: self.advice(message, input))

            self._samples[index] = from_arguments(given, self.padding, warn)
        return self._samples[index]

    def advice(self, message: str, input: Tensor) -> str:
        """What is behind a message that names a remedy: the arguments that could tell, where it
        has no line of its own.
        """
        lines = "" if "samples={" in message else could_tell(self.given, input)
        return f". Of this call's arguments, {lines} could tell" if lines else ""

    def reads(self, input: Tensor) -> tuple[int, Tensor, Place] | None:
        """Which of the forward's sequences a lookup reads, that sequence's ids, and where in it."""
        own = self._own or self.own
        if own.ids is input:
            return 0, input, same
        for index, one in enumerate(self.sequences):
            ids = one.ids
            if ids is None:
                continue
            where = place(input, ids)
            if where is None:
                where = self._by_row(input, ids)
            if where is not None:
                return index, ids, where
        for index, one in enumerate(self.sequences):
            if one.ids is not None and (where := rearranged(input, one.ids)) is not None:
                return index, one.ids, where
        if own.ids is not None:
            return None
        found = among_arguments(input, own.given)
        if found is None or not _fits(own.given.get("attention_mask"), found[0]):
            return None
        ids, where = found  # the first that are looked up
        self._own = own._replace(ids=ids, given={**own.given, "input_ids": ids})
        return 0, ids, where

    def _by_row(self, input: Tensor, ids: Tensor) -> Place | None:
        """As the table says, where values are not asked."""
        quirks = self.listener.quirks
        if quirks.ids_transposed and input.shape == ids.t().shape:
            return transposed
        if quirks.pads_window and not values_cost_nothing(input):
            return padded(input, ids)
        others = input.shape[-1] - ids.shape[-1] if input.dim() == ids.dim() else 0
        return behind(others) if quirks.prompts is not None and others > 0 else None

    def in_parts(self, site: "Site", index: int, where: Columns) -> str:
        """What is to be said where a site has read other columns of that sequence before."""
        if self._columns is None:
            self._columns = {}
        first = self._columns.setdefault((site, index), where)
        return "" if where.meets(first) else IN_PARTS.format(self.listener.name)

    def claims(self, input: Tensor) -> bool:
        """Whether ids that are no argument, nor a part of one, are taken for the forward's own by
        their shape: a copy with other values at images' places, ids that the forward made. Of
        those, the first count and no others, where they can be told apart.
        """
        own = self.own
        if own.ids is not None and not _is_flattened(own.ids, input):
            return False
        if any(value is input for _, value in tokens_in(self.given)):
            return False  # it is another argument
        if torch.compiler.is_compiling() or self._looked_up is None:
            self._looked_up = input
            return True
        return place(input, self._looked_up) is not None

    def said(self, read: Read) -> list[Words]:
        if self.words is None:
            listener = self.listener
            self.words = words_said(read, self.given, listener.names, listener.name)
        return self.words

    def count(self, site: "Site") -> None:
        """Of a table that is looked up more often than a look has seen, each may be multiplied by
        its own number: the next forward is looked at again.
        """
        if self._lookups is None:
            self._lookups = Counter()
        self._lookups[site] += 1
        if site.lookups < self._lookups[site] <= LOOKUPS:
            site.lookups = self._lookups[site]
            site.multiplier_known, self.state.unmeasured, self.state.looks = False, True, 0

    @property
    def has_embeds(self) -> bool:
        given = self.given
        return (
            given.get("inputs_embeds") is not None or given.get("decoder_inputs_embeds") is not None
        )

    @property
    def has_ids(self) -> bool:
        """Whether it was given token ids under any name, in a dictionary too."""
        return any(True for _ in tokens_in(self.given))


class _Running(threading.local):
    def __init__(self) -> None:
        self.forwards: list[Forward] = []  # of heard models, one inside the other
        self.told: list[tuple[State, Words]] = []  # by handle.told(), likewise
        # of the function that looks at a model: no noise meanwhile, and nobody is told
        self.probing: types.CodeType | None = None


RUNNING = _Running()  # of this thread


def _told_to(state: State) -> Words | None:
    """What the innermost told() of this apply_neftune says."""
    for owner, words in reversed(RUNNING.told):
        if owner is state:
            return words
    return None


def probing() -> bool:
    """Whether a model is being looked at; an interrupt may have ended that without a word."""
    if RUNNING.probing is None:
        return False
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is RUNNING.probing:
            return True
        frame = frame.f_back
    RUNNING.probing = None
    return False


def forget_interrupted(frame: types.FrameType | None = None) -> None:
    """KeyboardInterrupt runs no hook: what is entered as running, but is not around the frame (of
    the caller), is over.
    """
    forwards = RUNNING.forwards
    if forwards and frame is None:
        frame = sys._getframe(1)
    while forwards and not forwards[-1].runs(frame):
        forwards.pop()


def forward_runs(model: nn.Module | None) -> bool:
    """Whether a forward of this model is running, called by its name: no hook hears that."""
    if model is None:
        return False
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back
    return False


OUTSIDE = (
    "the noisy embedding was called outside its model's forward, so the lengths of the samples are "
    "unknown and every token but padding_idx counts as real: call it inside `with "
    "handle.told(attention_mask=...)`, or, where PEFT has wrapped the model (prompt tuning), call "
    "apply_neftune again after get_peft_model"
)


UNKNOWN = (
    "the noisy embedding was given ids that are none of the tokens which its model's forward was "
    "told about, so every one of them but padding_idx counts as real"
)
NOTHING_TO_ASK = (
    "embedding_multiplier= is asked with the arguments of the model's forward, and none was heard: "
    "call model(...), or say a number"
)
NOT_LOOKED_AT = (
    "it is not known whether the model multiplies its embeddings after looking them up, since no "
    "forward of two different tokens was heard that could be looked at: NEFTune takes 1. Say it: "
    "apply_neftune(..., embedding_multiplier=1.0)"
)
COMPILED = (
    "it is not known whether the model multiplies its embeddings, since its first noisy forward is "
    "compiled: NEFTune takes 1. Say it: apply_neftune(..., embedding_multiplier=1.0)"
)
UNSTEERED = (
    "capturable=True: a copy that no handle steers cannot be compiled. Take it over with handle = "
    "apply_neftune(copy, capturable=True)"
)
UNTOLD = (
    "no forward around the embedding takes an attention_mask, so every token but padding_idx "
    "counts as real"
)
IN_PARTS = (
    "{} looks its tokens up some columns at a time, and to NEFTune each of these parts is samples "
    "of its own, of the part's length: louder than the paper's noise of a whole sample. Where the "
    "parts are one sample, look it up in one call, embedding(input_ids), and cut its output"
)


def does_not_fit(mask: Tensor, input: Tensor) -> str:
    return (
        f"an attention_mask of shape {tuple(mask.shape)} does not fit the embedding's input "
        f"{tuple(input.shape)}: every token but padding_idx counts as real. Tell NEFTune one that "
        "does, or whose input_ids it is, with apply_neftune(..., samples=...) or handle.told(...)"
    )


def _is_flattened(mask: Tensor, input: Tensor) -> bool:
    """Flattened or not, never transposed."""
    return mask.numel() == input.numel() and (
        mask.shape[-1] == input.shape[-1] or 1 in (mask.dim(), input.dim(), input.shape[0])
    )


def _fits(mask: Any, ids: Tensor) -> bool:
    """Whether a mask may speak of these ids."""
    return not isinstance(mask, Tensor) or mask.dim() != ids.dim() or mask.shape == ids.shape


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
        # whose lookups alone it is known of, while others are to be looked at
        self.holder: weakref.ref[nn.Module] | None = None
        self.said: float | None = None  # the factor that was measured last
        self.lookups = 1  # of a forward, which a look is to see
        self.factors: dict[torch.dtype, float] = {}  # that the lookup is multiplied by afterwards
        self.each: Each | None = None  # factors of each sample, by the arguments of that model
        self.factor_listener: Any = None  # only while its model runs; None: always
        self.outside = False  # its last lookup was in no forward: one is given what it made
        self.last: NoisyCall | None = None
        self.firsts = FirstPasses()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "wrappers": [], "holder": None, "last": None}

    def marked(self) -> bool:
        return any(
            (one := wrapper()) is not None and has_other_noise(one) for wrapper in self.wrappers
        )

    def enter(self, compiling: bool) -> list[Forward]:
        """The site runs: the forwards that tell it of samples, the innermost last."""
        running = RUNNING.forwards
        if running and not compiling:
            forget_interrupted()
        found: list[Forward] = []
        outermost = True
        for forward in running:
            if outermost and forward.state is self.state:
                forward.ran = True  # the outermost asks
                outermost = False
            if self in forward.sites:
                found.append(forward)
        return found

    def samples_in_columns(
        self, forwards: list[Forward], input: Tensor, padding_idx: int
    ) -> tuple[Samples, bool]:
        """:meth:`samples` of ids (T, B)."""
        check_time_first(input.shape)
        samples, follows = self.samples(forwards, input.t(), padding_idx)
        return samples._replace(time_first=not samples.time_first), follows

    def reads_types(self, forwards: list[Forward], input: Tensor) -> bool:
        """Whether it is token_type_ids that are looked up in the table of words, as GPT-2 does."""
        for forward in forwards:
            types = forward.given.get("token_type_ids")
            if isinstance(types, Tensor) and place(input, types) is not None:
                return not any(one.reads(input) for one in forwards)
        return False

    def samples(
        self, forwards: list[Forward], input: Tensor, padding_idx: int
    ) -> tuple[Samples, bool]:
        """Of which samples the ids are that are looked up, and whether they are something besides
        the forward's tokens.

        By what the user says, else by the innermost running forward that was told of these ids:
        an outer one may be told what it does not pass on (Rwkv).
        """
        if self.state.read is not None or RUNNING.told:
            said = self._said(forwards, input)
            if said is not None:
                return real_tokens(input, padding_idx, said), False
        if not forwards:
            if self.hooked:
                self.state.warn_once(OUTSIDE)
            return real_tokens(input, padding_idx, UNSAID), False
        known: Forward | None = None
        untold, decoder = UNSAID, False
        joined: tuple[Samples, Place, Tensor] | None = None
        for forward in reversed(forwards):
            found = forward.reads(input)
            if found is None:
                continue
            index, ids, where = found
            of_decoder = (forward.sequences[index] if index else forward).decoder
            if decoder and not of_decoder:
                continue  # a decoder's own ids are not the encoder's, even where they are alike
            told = forward.told(index, input)
            if isinstance(where, Columns) and (message := forward.in_parts(self, index, where)):
                self.state.warn_once(message)
            if where is not same:
                prompts = forward.listener.quirks.prompts
                if prompts is not None and says_no_padding(told):
                    told = told._replace(attention_mask=ids != prompts)
                if says_no_padding(told) and joins_rows(ids.shape, input.shape):
                    joined = told, where, ids
            if where is not same and (not says_nothing(told) or where is transposed):
                told = _at(told, where, ids, input)
            if told is not UNSAID and not says_no_padding(told):
                return self._fitting(told, input, forward), False
            known = known or forward
            decoder = decoder or of_decoder
            untold = told if untold is UNSAID or says_nothing(untold) else untold
        if known is not None:
            if not (decoder or forwards[0].listener.tells):
                self._nothing_told(forwards, input)
            if joined is not None:
                untold, where, ids = joined
                told = _explicit(_untold(untold, ids, padding_idx, known.padding, decoder), ids)
                return _at(told, where, ids, input), False
            return _untold(untold, input, padding_idx, known.padding, decoder), False
        return self._of_no_argument(forwards, input, padding_idx)

    def _nothing_told(self, forwards: list[Forward], input: Tensor) -> None:
        if not any(forward.listener.tells for forward in forwards):
            self.state.warn_once(UNTOLD, lambda: f": {paste(forwards[0].given, input)}")

    def _of_no_argument(
        self, forwards: list[Forward], input: Tensor, padding_idx: int
    ) -> tuple[Samples, bool]:
        """Ids that no forward was given as they are."""
        padding = forwards[-1].padding.token
        if padding is not None and _is_window(forwards[-1], input, padding):
            # LED embeds the padding of its attention's window
            return Samples(attention_mask=input != padding), True
        claiming = [forward for forward in reversed(forwards) if forward.claims(input)]
        for forward in claiming:
            told = forward.told(0, input)
            if says_nothing(told) and not forward.decoder:
                continue
            if says_no_padding(told):
                return _untold(told, input, padding_idx, forward.padding, forward.decoder), False
            ids = forward.own.ids
            if ids is not None and ids.shape != input.shape:
                told = told.at(lambda values: values.reshape(input.shape), ids.shape, input.shape)
            return self._fitting(told, input, forward), False
        if len(claiming) < len(forwards):
            given = forwards[-1].given
            self.state.warn_once(UNKNOWN, lambda: f": {paste(given, input, many=True)}")
        else:
            self._nothing_told(forwards, input)
        return _untold(UNSAID, input, padding_idx, forwards[-1].padding), False

    def _said(self, forwards: list[Forward], input: Tensor) -> Samples | None:
        """What the user says of these ids: handle.told() before samples=, which is asked of the
        outermost forward, the model that apply_neftune was given if it runs. None: nothing.
        """
        state = self.state
        told = _told_to(state)
        if told is not None:
            return self._spoken_of([told], None, input)
        if state.read is None or not forwards:
            return None
        outermost = forwards[0].listener
        forward = next(one for one in reversed(forwards) if one.listener is outermost)
        said = forward.said(state.read)
        return self._spoken_of(said, forward, input) if said else UNSAID

    def _spoken_of(
        self, said: list[Words], forward: Forward | None, input: Tensor
    ) -> Samples | None:
        """The words that speak of these ids; None where none does."""
        rows_first = self.state.batch_first
        others = []
        for words in said:
            ids = words.get(IDS)
            if ids is None:
                if forward is not None and not self._claims(forward, input):
                    continue
                return self._fitting(samples_of(words, input, rows_first), input, forward)
            if not isinstance(ids, Tensor):
                raise TypeError(f"NEFTune was told {IDS}, which is {type(ids).__name__}: no tensor")
            ids = ids if rows_first or ids.dim() != 2 else ids.t()
            if (where := place(input, ids)) is not None:
                return _at(samples_of(words, ids, rows_first), where, ids, input)
            others.append((words, ids))
        for words, ids in others:
            if (where := rearranged(input, ids)) is not None:
                return _at(samples_of(words, ids, rows_first), where, ids, input)
        return None

    def _claims(self, forward: Forward, input: Tensor) -> bool:
        """Words without ids of their own speak of the first that are looked up, of no others."""
        if forward.claimed is None:
            forward.claimed = input
        return place(input, forward.claimed) is not None

    def _fitting(self, samples: Samples, input: Tensor, forward: Forward | None) -> Samples:
        """A mask that only is flattened, or is not, is reshaped; one that does not fit warns."""
        mask = samples.attention_mask
        shape = input.t().shape if samples.time_first else input.shape
        if mask is None or samples.before or mask.shape == shape:
            return samples
        if _is_flattened(mask, input):
            if joins_rows(mask.shape, input.shape):
                return samples.at(lambda values: values.reshape(input.shape), mask.shape, shape)
            return samples._replace(attention_mask=mask.reshape(input.shape))
        message = does_not_fit(mask, input)
        self.state.warn_once(message, lambda: forward.advice(message, input) if forward else "")
        return UNSAID

    def divisor(
        self, forwards: list[Forward], dtype: torch.dtype, compiling: bool
    ) -> float | Tensor:
        """Of the noise at the lookup: what the model multiplies its embeddings by afterwards. A
        tensor where each row or token has its own.
        """
        said = self.state.embedding_multiplier
        if callable(said):
            if not forwards:
                raise RuntimeError(NOTHING_TO_ASK)
            return said(forwards[0].given)  # type: ignore[no-any-return]
        if said is not None:
            return said
        if self.each is not None:
            running = [one for one in forwards if one.listener is self.factor_listener]
            return self.each(running[-1].given) if running else 1.0
        if compiling:
            read_factors_again(self.state.handle_key)
        elif self.said is not None and forwards:
            forwards[0].count(self)
        factor = self.factors.get(dtype, 1.0)
        if factor == 1:
            if not self.multiplier_known and not self.factors:
                self.state.warn_once(COMPILED if compiling else NOT_LOOKED_AT)
            return 1.0
        listener = self.factor_listener
        if listener is None or any(one.listener is listener for one in forwards):
            return factor
        # else another model looks its tokens up
        return factor if not compiling and forward_runs(listener.model()) else 1.0


def _at(told: Samples, where: Place, ids: Tensor, input: Tensor) -> Samples:
    """What is told of ids, of a lookup at some place in them."""
    if where is same:
        return told
    if where is transposed:
        return told._replace(time_first=True)
    return told.at(where, ids.shape, input.shape)


def _explicit(told: Samples, ids: Tensor) -> Samples:
    """With a mask, where padding is known by its token or every token is real."""
    if told.attention_mask is not None:
        return told
    if told.padded_ids is None:
        return told._replace(attention_mask=torch.ones_like(ids))
    mask = told.padded_ids != told.padding_idx
    return told._replace(attention_mask=mask, padded_ids=None, padding_idx=-1)


def _untold(
    told: Samples, input: Tensor, padding_idx: int, padding: Padding, decoder: bool = False
) -> Samples:
    """Where nothing tells padding: the embedding's padding_idx, else what the config names, at the
    rows' ends.

    A decoder's shifted labels have padding at their ends alone. So has a model whose padding token
    ends its samples too: it stands inside rows.
    """
    token = padding.token
    ends_too = padding.is_end and padding_idx in (-1, token)
    if token is None or not input.dim() or not (decoder or padding_idx < 0 or ends_too):
        return real_tokens(input, padding_idx, told) if padding_idx >= 0 else told
    if told.time_first:
        input = input.t()
    kept = ~tail(input, padding._replace(is_end=False) if decoder else padding)
    if padding_idx == token and not decoder:  # and at their beginnings, as padding_idx says
        leading = (input == token).cummin(-1).values
        kept = kept & ~leading
    return told._replace(attention_mask=kept)


def _is_window(forward: Forward, input: Tensor, padding: int) -> bool:
    """Whether nothing but padding is looked up: by value on the CPU, else as the table says."""
    if not input.numel() or not values_cost_nothing(input):
        pads: bool = forward.listener.quirks.pads_window
        return pads
    return bool((input == padding).all())


next_key = itertools.count()
# for questions asked outside the graph
handles: "weakref.WeakValueDictionary[str, Any]" = weakref.WeakValueDictionary()


def _state_of(handle_key: str) -> State | None:
    return getattr(handles.get(handle_key), "_state", None)


@asked_outside_the_graph
def warn_outside(handle_key: str, message: str) -> None:
    state = _state_of(handle_key)
    if state is not None:
        state.say_once(message)


@asked_outside_the_graph
def count_compilation(handle_key: str) -> None:
    state = _state_of(handle_key)
    if state is not None:
        state.compilations += 1


@asked_outside_the_graph
def place_alpha(handle_key: str, device: torch.device) -> None:
    """A graph cannot make the tensor that it is to read."""
    state = _state_of(handle_key)
    if state is None:
        raise RuntimeError(UNSTEERED)
    state.place_alpha(device)


class _Told:
    """What told() said; equal where it said the same tensors."""

    def __init__(self, words: Words) -> None:
        self.words = words

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Told)
            and self.words.keys() == other.words.keys()
            and all(value is other.words[word] for word, value in self.words.items())
        )


def _drawn(handle_key: str, seed: Tensor) -> None:
    state = _state_of(handle_key)
    if state is not None:
        told = _Told(_told_to(state) or {})
        drawn_in_compiled_code(state.compiled_firsts, (state.settings(), told), seed)


when_drawn.append(_drawn)


@asked_outside_the_graph
def has_moved(handle_key: str) -> bool:
    handle = handles.get(handle_key)
    return handle is not None and handle.has_moved()


@asked_outside_the_graph
def read_factors_again(handle_key: str) -> None:
    handle = handles.get(handle_key)
    if handle is not None:
        handle.read_again()
