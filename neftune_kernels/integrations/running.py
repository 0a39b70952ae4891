"""What is in force and what is running: settings of one apply_neftune, forwards of hooked models,
and the noisy embeddings with their last call.
"""

import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import Backend
from ..distributed import data_parallel_index
from ..modules import HUGGING_FACE_MARK
from ..noise import UNIFORM, Noise, check_alpha
from ..samples import UNSAID, Samples, real_tokens
from ..torch_internals import asked_outside_the_graph, in_backward
from .arguments import trailing_padding


class NoisyCall(NamedTuple):
    """What it takes to compute the last call's noise again, when somebody asks for statistics."""

    shape: torch.Size
    embedding_dim: int
    noise_alpha: float
    samples: Samples
    noise: Noise
    backend: Backend


class NEFTuneState:
    """Settings and counters of one apply_neftune; shared by its embeddings and hooks, copied with
    them by deepcopy and pickle.
    """

    def __init__(self) -> None:
        self.noise_alpha = 0.0
        self.alpha = torch.zeros((), dtype=torch.float64, device="cpu")
        self.has_noise = False
        self.replica: int | None = None
        self.noise_without_grad = False
        self.backend: str | None = None
        self.variant = UNIFORM
        self.read: Callable[[dict[str, Any]], Any] | None = (
            None  # the user's own reading of a forward's arguments
        )
        self.skipped_last: str | None = None
        self.calls = self.calls_before = 0
        self.running: list[
            Running
        ] = []  # forwards of hooked models that are running, one inside the other
        self.skipped: Counter[str] = Counter()
        self.warned: set[str] = set()
        self.handle: Any = None  # the NEFTuneHandle, which stands above this room
        self.handle_number = -1

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "handle": None,
            "handle_number": -1,
            "running": [],
        }  # a copy is not steered by our handle

    def set_alpha(self, noise_alpha: float | None) -> None:
        self.noise_alpha = check_alpha(noise_alpha)
        self.has_noise = self.noise_alpha > 0
        self.alpha = torch.full((), self.noise_alpha, dtype=torch.float64, device="cpu")

    def warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=3)

    def resolve_replica(self, embedding: nn.Module) -> int:
        if self.replica is not None:
            return self.replica
        return data_parallel_index(
            embedding.weight,  # type: ignore[arg-type]
            embedding,
            None if self.handle is None else self.handle.root(),
        )

    def skip_reason(self, embedding: nn.Module) -> str | None:
        if not embedding.training:
            return "eval mode"
        if not self.has_noise:
            return "noise_alpha is 0"
        if not self.noise_without_grad and not torch.is_grad_enabled():
            return "no grad"
        return None


class Running:
    """A running forward of a model around the embedding, and what it was told."""

    def __init__(
        self, model: nn.Module, samples: Samples, decoder: bool, pad_token_id: int | None
    ) -> None:
        self.model, self.samples, self.decoder, self.pad_token_id = (
            model,
            samples,
            decoder,
            pad_token_id,
        )
        self.used = False  # an embedding call has taken these samples
        self.scale = (
            1.0  # what this model would multiply embeddings by, taken over by the noisy embedding
        )


class Site:
    """One noisy embedding: the forwards around it that are running, the innermost last, and its
    last call.
    """

    def __init__(self, state: NEFTuneState) -> None:
        self.state = state
        self.hooked = False  # a model around the embedding tells us its samples
        self.running: list[Running] = []
        self.wrappers: list[weakref.ref[nn.Module]] = []  # PEFT's layers around the embedding
        self.scaling: tuple[weakref.ref[nn.Module], str] | None = (
            None  # who multiplies embeddings afterwards, and its factor's name
        )
        self.last: NoisyCall | None = None
        # the running call looks up something besides its forward's tokens: LED's padding of its
        # window
        self.follows = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "running": [], "wrappers": [], "scaling": None, "last": None}

    def marked(self) -> bool:
        return any(hasattr(wrapper(), HUGGING_FACE_MARK) for wrapper in self.wrappers)

    def check_recomputation(self) -> None:
        """Inside backward a checkpointed segment runs again: it must see what it saw first."""
        if not in_backward():
            return
        if self.state.skipped_last == "no grad":
            raise RuntimeError(
                "a reentrant checkpoint recomputes the embedding inside backward with noise, but "
                "ran it without grad, and so without "
                "noise, before: apply_neftune(..., noise_without_grad=True), use_reentrant=False, "
                "or keep the embedding out of the segment"
            )
        if self.hooked and not self.running:
            raise RuntimeError(
                "a checkpoint recomputes the embedding inside backward, outside the forward of "
                "the model that knows the samples' lengths, "
                "so its noise would change: keep the embedding out of the checkpointed segment"
            )

    def samples(self, input: Tensor, padding_idx: int) -> Samples:
        """Those of the innermost running forward, where they fit the ids."""
        self.follows = False
        if not self.running:
            if self.hooked:
                self.state.warn_once(
                    "the noisy embedding was called outside its model's forward, so the lengths "
                    "of the samples are unknown and every token "
                    "but padding_idx counts as real: use neftune_kernels.add_noise with an "
                    "attention_mask there, or, where PEFT has "
                    "wrapped the model (prompt tuning), call apply_neftune again after "
                    "get_peft_model"
                )
            return real_tokens(input, padding_idx, UNSAID)
        running = self.running[-1]
        # An outer model may be told what it does not pass on (Rwkv).
        if not running.decoder:
            outer = (one for one in reversed(self.running) if not one.samples.padding_unsaid)
            running = next(outer, running)
        told = running.samples
        if told.padding_unsaid:
            if (
                running.decoder
                and (samples := trailing_padding(input, running.pad_token_id)) is not UNSAID
            ):
                return samples._replace(noise_mask=told.noise_mask)
            return real_tokens(input, padding_idx, told)
        mask = told.attention_mask
        if mask is not None and mask.shape != input.shape:
            if mask.numel() == input.numel() and (
                mask.shape[-1] == input.shape[-1] or 1 in (mask.dim(), input.dim(), input.shape[0])
            ):
                mask = mask.reshape(input.shape)  # flattened or not, never transposed
            elif running.used:
                self.follows = True
                return real_tokens(input, padding_idx, UNSAID)
            else:
                self.state.warn_once(
                    f"an attention_mask of shape {tuple(mask.shape)} does not fit the embedding's "
                    f"input {tuple(input.shape)}: every token "
                    "but padding_idx counts as real. Tell NEFTune the samples with "
                    "apply_neftune(..., samples=...)"
                )
                return real_tokens(input, padding_idx, UNSAID)
            told = told._replace(attention_mask=mask)
        running.used = True
        return told

    def outer_scale(self) -> tuple[float, float]:
        """(factor of the embedding that this call takes over, divisor of its noise) where the model
        scales embeddings afterwards.
        """
        if self.running and self.running[-1].scale != 1:
            return self.running[-1].scale, 1.0
        if self.scaling is None or (model := self.scaling[0]()) is None:
            return 1.0, 1.0
        return 1.0, float(getattr(model, self.scaling[1]))


numbers = itertools.count()


handles: weakref.WeakValueDictionary[int, Any] = (
    weakref.WeakValueDictionary()
)  # for questions asked outside the graph


@asked_outside_the_graph
def has_moved(handle_number: int) -> bool:
    handle = handles.get(handle_number)
    return handle is not None and handle.has_moved()
