"""apply_neftune: noise in the input embedding of a model that somebody else wrote, with the masks its forward is given.

The embedding keeps its object, Parameter, hooks and ties: only its class is swapped for a subclass of its own class, and undo swaps it
back. A pre-hook on the model around it takes the attention mask, position ids or cumulative lengths as they arrive. Nothing here imports
transformers.
"""

import inspect
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import layout as layouts
from ..distributed import (
    class_without_noise,
    data_parallel_index,
    dtensor_with_noise,
    is_dtensor,
    is_tensor_parallel_forward,
    replicated,
)
from ..functional import (
    NOTHING,
    Offsets,
    Samples,
    alpha_tensor,
    check_alpha,
    check_word,
    embed_with_noise,
    embeds_with_noise,
    make_layout,
    real_tokens,
    seed_tensor,
)
from ..modules import HUGGING_FACE_MARK, PLAIN_WEIGHTS, TWO_NOISES, NEFTuneEmbedding
from ..ops import choose_backend


class NoisyCall(NamedTuple):
    """What it takes to compute the last call's noise again, when somebody asks for statistics."""

    shape: torch.Size
    embedding_dim: int
    noise_alpha: float
    samples: Samples
    seed: Tensor
    stream: int
    backend: str


class NEFTuneState:
    """Shared by the noisy embedding and the hook on its model; copied with them by deepcopy and pickle."""

    def __init__(self) -> None:
        self.noise_alpha = 0.0
        self.alpha = torch.zeros((), dtype=torch.float64, device="cpu")
        self.has_noise = False
        self.stream: int | None = None
        self.noise_without_grad = False
        self.backend: str | None = None
        self.hooked = False  # a model around the embedding tells us its samples
        self.running: list[Samples] = []  # what the running forwards of hooked models said, the innermost last
        self.wrappers: list[weakref.ref[nn.Module]] = []  # PEFT's layers around the embedding
        self.skipped_last: str | None = None
        self.calls = self.calls_before = 0
        self.skipped: Counter[str] = Counter()
        self.last: NoisyCall | None = None
        self.warned: set[str] = set()
        self.handle: NEFTuneHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handle": None, "running": [], "wrappers": [], "last": None}  # a copy is not steered by our handle

    def set_alpha(self, noise_alpha: float | None) -> None:
        self.noise_alpha = check_alpha(noise_alpha)
        self.has_noise = self.noise_alpha > 0
        self.alpha = torch.full((), self.noise_alpha, dtype=torch.float64, device="cpu")

    def warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=3)

    def wrapper_is_marked(self) -> bool:
        return any(hasattr(wrapper(), HUGGING_FACE_MARK) for wrapper in self.wrappers)

    def check_recomputation(self) -> None:
        """Inside backward a checkpointed segment runs again: it must see what its first pass saw."""
        if torch._C._current_graph_task_id() == -1:
            return
        if self.skipped_last == "no grad":
            raise RuntimeError(
                "a reentrant checkpoint recomputes the embedding inside backward with noise, but ran it without grad, and so without "
                "noise, before: apply_neftune(..., noise_without_grad=True), use_reentrant=False, or keep the embedding out of the segment"
            )
        if self.hooked and not self.running:
            raise RuntimeError(
                "a checkpoint recomputes the embedding inside backward, outside the forward of the model that knows the samples' lengths, "
                "so its noise would change: keep the embedding out of the checkpointed segment"
            )

    def resolve_stream(self, embedding: nn.Embedding) -> int:
        if self.stream is not None:
            return self.stream
        model = None if self.handle is None else self.handle._root()
        return data_parallel_index(embedding.weight, embedding, model)

    def skip_reason(self, embedding: nn.Embedding) -> str | None:
        if not embedding.training:
            return "eval mode"
        if not self.has_noise:
            return "noise_alpha is 0"
        if not self.noise_without_grad and not torch.is_grad_enabled():
            return "no grad"
        return None


class _Noisy(nn.Embedding):
    """Mixed in before the embedding's own class, whose forward stays what it was."""

    _neftune: NEFTuneState
    _neftune_base: type[nn.Embedding]
    _neftune_forward: Callable[..., Tensor] | None = None  # the tensor-parallel plan's, which sat on the instance

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = self._neftune
        look_up = self._neftune_forward or super().forward
        reason = state.skip_reason(self)
        if reason is not None:
            if not torch.compiler.is_compiling():
                state.skipped[reason] += 1
                state.skipped_last = reason
            return look_up(input, *args, **kwargs)
        if HUGGING_FACE_MARK in self.__dict__ or state.wrapper_is_marked():
            raise RuntimeError(TWO_NOISES)
        if getattr(self, "_is_replica", False) and state.stream is None:
            raise RuntimeError(
                "nn.DataParallel runs its replicas in threads that share one mask and one seed: use DistributedDataParallel, or give every "
                "replica a stream= of its own with NEFTuneEmbedding"
            )
        if not torch.compiler.is_compiling():
            state.check_recomputation()
        weight = self.weight
        if not state.running and state.hooked:
            state.warn_once(
                "the noisy embedding was called outside its model's forward, so the lengths of the samples are unknown and every token "
                "but padding_idx counts as real: use neftune_kernels.add_noise with an attention_mask there, or, where PEFT has "
                "copied the embedding (modules_to_save), call apply_neftune again after get_peft_model"
            )
        samples = real_tokens(input, -1 if self.padding_idx is None else self.padding_idx, state.running[-1] if state.running else NOTHING)
        if type(weight) not in PLAIN_WEIGHTS:
            samples = replicated(samples)
        stream = state.resolve_stream(self)
        fusible = self._neftune_base.forward is nn.Embedding.forward and type(weight) in PLAIN_WEIGHTS
        fusible = fusible and self.max_norm is None and not self.sparse and not self.scale_grad_by_freq
        embedded = None if fusible else look_up(input, *args, **kwargs)
        dtype = weight.dtype if embedded is None else embedded.dtype  # a quantised weight's own dtype says nothing
        seed = seed_tensor(None, None, weight.device)
        if not torch.compiler.is_compiling():
            state.calls += 1
            state.skipped_last = None
            chosen = choose_backend(state.backend, weight.device, dtype)
            state.last = NoisyCall(input.shape, self.embedding_dim, state.noise_alpha, samples, seed, stream, chosen)
        offsets = Offsets(stream, 0, 0)
        if embedded is None:
            padding = -1 if self.padding_idx is None else self.padding_idx
            return embed_with_noise(input, weight, state.alpha, samples, padding, 1.0, seed, None, offsets, state.backend)
        add = dtensor_with_noise if is_dtensor(embedded) else embeds_with_noise
        return add(embedded, state.alpha, samples, seed, None, offsets, state.backend)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild_noisy, (self._neftune_base,), self.__dict__


_noisy_classes: dict[type, Any] = {}


def _noisy_class(base: type[nn.Embedding]) -> Any:
    if base not in _noisy_classes:
        _noisy_classes[base] = type(f"Noisy{base.__name__}", (_Noisy, base), {"_neftune_base": base, "__module__": __name__})
    return _noisy_classes[base]


def _rebuild_noisy(base: type[nn.Embedding]) -> nn.Module:
    """Pickle and deepcopy: the class is made at run time, so it cannot be found by name."""
    made = _noisy_class(base)
    return made.__new__(made)


class _TakeSamples:
    """Forward pre-hook of the model around the embedding: what it is told of its samples."""

    def __init__(self, state: NEFTuneState, names: tuple[str, ...]) -> None:
        self.state, self.names = state, names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if given.get("inputs_embeds") is not None and module.training and self.state.has_noise and torch.is_grad_enabled():
            self.state.warn_once(
                "the model was given inputs_embeds, so its embedding and its NEFTune noise did not run: pass them through "
                "neftune_kernels.add_noise(inputs_embeds, noise_alpha, attention_mask=...) first"
            )
        self.state.running.append(samples_from_arguments(given, self.state))
        if not torch.compiler.is_compiling():
            self.state.calls_before = self.state.calls if given.get("inputs_embeds") is None else -1


class _ForgetSamples:
    """Forward hook, called even when the forward raised."""

    def __init__(self, state: NEFTuneState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        state = self.state
        if state.running:
            state.running.pop()
        if torch.compiler.is_compiling() or result is None or not (module.training and state.has_noise and torch.is_grad_enabled()):
            return
        if state.calls == state.calls_before and not state.running and state.skipped_last is None:
            state.warn_once(
                "a training forward of the model ended without NEFTune noise: its noisy embedding was not called. Was it replaced or "
                "wrapped after apply_neftune? Call apply_neftune again"
            )


def samples_from_arguments(given: dict[str, Any], state: NEFTuneState) -> Samples:
    """The samples of a transformers model's arguments: cu_seq_lens_q, else position_ids with attention_mask, else attention_mask.

    A mask longer than the ids (a cache before them) counts by its last columns. What cannot be read warns once.
    """
    if isinstance(given.get("cu_seq_lens_q"), Tensor):
        return Samples(cu_seqlens=given["cu_seq_lens_q"])
    mask, position_ids, input_ids = given.get("attention_mask"), given.get("position_ids"), given.get("input_ids")
    if not isinstance(input_ids, Tensor):  # under another name: the embedding compares the shapes
        return Samples(attention_mask=mask) if isinstance(mask, Tensor) else NOTHING
    columns = input_ids.shape[-1]
    if isinstance(position_ids, Tensor) and (position_ids.dim() != input_ids.dim() or position_ids.shape[-1] != columns):
        state.warn_once(f"position_ids of shape {tuple(position_ids.shape)} do not tell NEFTune where samples begin and are not used")
        position_ids = None
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[-1] >= columns):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        state.warn_once(
            f"an attention_mask that is not (batch, tokens) ({shape}) does not tell NEFTune the samples' lengths: every token "
            "but padding_idx counts as real. Pass the model a 2-D attention_mask or position_ids"
        )
        mask = None
    if mask is not None:
        mask = mask[:, mask.shape[-1] - columns :]
    return Samples(attention_mask=mask, position_ids=position_ids)


class NEFTuneHandle:
    """What apply_neftune returns: change alpha, read statistics, undo. Also a context manager that undoes on exit."""

    def __init__(self, root: nn.Module, state: NEFTuneState) -> None:
        self._embeddings: list[weakref.ref[nn.Embedding]] = []  # a handle keeps no model alive
        self._state: NEFTuneState | None = state
        self._hooks: list[Any] = []
        self._root = weakref.ref(root)

    def listen(self, model: nn.Module | None) -> None:
        """Hook the model around the embedding, once."""
        state = self._live_state()
        if model is None:
            return
        state.hooked = True
        if any(isinstance(hook, _TakeSamples) and hook.state is state for hook in model._forward_pre_hooks.values()):
            return
        _forget_hooks(model)  # of a deepcopied or unpickled model
        self._hooks += [
            model.register_forward_pre_hook(_TakeSamples(state, tuple(_parameter_names(model))), with_kwargs=True),
            model.register_forward_hook(_ForgetSamples(state), always_call=True),
        ]

    def take(self, embeddings: list[nn.Embedding]) -> None:
        """Make these embeddings noisy and ours; a copy that PEFT or deepcopy made of a noisy one comes with a state of its own."""
        for embedding in embeddings:
            if not isinstance(embedding, _Noisy):
                embedding.__class__ = _noisy_class(type(embedding))
                if "forward" in embedding.__dict__:
                    embedding._neftune_forward = embedding.__dict__.pop("forward")  # type: ignore[assignment]
            embedding._neftune = self._live_state()  # type: ignore[assignment]
        self._embeddings = [weakref.ref(embedding) for embedding in embeddings]

    def _live_state(self) -> NEFTuneState:
        if self._state is None:
            raise RuntimeError("this NEFTuneHandle was removed: call apply_neftune again")
        return self._state

    @property
    def noise_alpha(self) -> float:
        return self._live_state().noise_alpha

    @noise_alpha.setter
    def noise_alpha(self, value: float | None) -> None:
        self._live_state().set_alpha(value)
        for copied in self._copies():
            copied._neftune.set_alpha(value)

    def _copies(self) -> list[_Noisy]:
        """Noisy embeddings of the model that are not ours: copies that PEFT made of one (modules_to_save, a further adapter)."""
        root = self._root()
        modules = [] if root is None else list(root.modules())
        return [module for module in modules if isinstance(module, _Noisy) and module._neftune is not self._state]

    def remove(self) -> None:
        """Give the model back exactly as it was: class, forward, hooks. A second call does nothing.

        Raises:
            RuntimeError: something put on the embedding since then holds its noisy class; nothing is changed.
        """
        if self._state is None:
            return
        embeddings = [*self._copies(), *(reference() for reference in self._embeddings)]
        bases = {}
        for embedding in embeddings:
            if not isinstance(embedding, _Noisy):
                continue
            if is_tensor_parallel_forward(embedding.__dict__.get("forward")):
                raise RuntimeError(
                    "a tensor-parallel plan applied after apply_neftune holds the noisy forward and cannot be taken off: set noise_alpha "
                    "to 0 instead, or apply NEFTune after the plan"
                )
            base: type | None = embedding._neftune_base
            if type(embedding) is not _noisy_class(embedding._neftune_base):
                base = class_without_noise(type(embedding), embedding._neftune_base)
            bases[embedding] = base
            if base is None or "forward" in embedding.__dict__:
                raise RuntimeError(
                    "the embedding was parametrised or given a forward of its own (accelerate's device hooks do so) after apply_neftune: "
                    "take that off first, then call remove()"
                )
        for embedding, base in bases.items():
            own_forward = embedding.__dict__.pop("_neftune_forward", None)
            del embedding._neftune
            embedding.__class__ = base  # type: ignore[assignment]
            if own_forward is not None:
                embedding.forward = own_forward  # type: ignore[method-assign]
        for hook in self._hooks:
            hook.remove()
        self._state.handle = None
        self._state = None

    def __enter__(self) -> "NEFTuneHandle":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def stats(self) -> dict[str, Any]:
        """What the noise was, computed now: nothing is counted or synchronised in forward but two Python integers.

        Returns:
            calls: noisy forwards so far; skipped: forwards without noise by reason ("eval mode", "no grad", "noise_alpha is 0").
            Of the last noisy forward, None before one: samples (with a real token), length_min, length_mean, length_max (real tokens),
            magnitude_min, magnitude_mean, magnitude_max (alpha/√(L·d)), max_noise_ratio (largest |noise| over its sample's magnitude,
            below 1) and backend. Forwards inside torch.compile are not counted.
        """
        state = self._live_state()
        names = ("length_min", "length_mean", "length_max", "magnitude_min", "magnitude_mean", "magnitude_max")
        stats: dict[str, Any] = {"calls": state.calls, "samples": None, **dict.fromkeys(names), "max_noise_ratio": None, "backend": None}
        stats["skipped"] = dict(state.skipped)
        last = state.last
        if last is None:
            return stats
        device = last.seed.device
        layout = make_layout(last.shape, device, last.samples, last.backend)
        sample, _, length = layouts.per_token(layout, last.shape, device)
        real = length > 0
        lengths = torch.stack((sample[real], length[real])).unique(dim=1)[1]  # one per sample with a real token
        stats |= {"samples": lengths.numel(), "backend": last.backend}
        if lengths.numel() == 0:
            return stats
        magnitudes = last.noise_alpha / (lengths.double() * last.embedding_dim).sqrt()
        measured = (lengths.double(), magnitudes)
        values = [float(how(tensor)) for tensor in measured for how in (torch.min, torch.mean, torch.max)]
        stats |= dict(zip(names, values, strict=True))
        zeros = torch.zeros((), dtype=torch.float32, device=device).expand(*last.shape, last.embedding_dim)
        alpha, offsets = alpha_tensor(last.noise_alpha), Offsets(last.stream, 0, 0)
        noise = embeds_with_noise(zeros, alpha, last.samples, last.seed, None, offsets, last.backend)
        bound = last.noise_alpha / (length[real].double() * last.embedding_dim).sqrt()
        stats["max_noise_ratio"] = float((noise.view(-1, last.embedding_dim)[real].abs().amax(-1) / bound).max())
        stats |= {"length_min": int(stats["length_min"]), "length_max": int(stats["length_max"])}
        return stats


def _parameter_names(model: nn.Module) -> list[str]:
    return list(inspect.signature(type(model).forward).parameters)[1:]


def _find_embeddings(model: nn.Module, embedding: str | nn.Module | None) -> tuple[list[nn.Embedding], list[nn.Module]]:
    """The nn.Embedding modules behind what the caller named, and PEFT's wrappers around them."""
    if embedding is None and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, whose encoder and decoder embed tokens on their own: not served yet. "
            "Name one of its embeddings with embedding=, or use NEFTuneEmbedding or add_noise"
        )
    found: Any = embedding
    if isinstance(embedding, str):
        try:
            found = model.get_submodule(embedding)
        except AttributeError as error:
            raise ValueError(f"embedding={embedding!r} names no module of {type(model).__name__}: {error}") from None
    elif embedding is None:
        try:
            found = model.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            found = None
        if found is None:
            raise ValueError(
                f"{type(model).__name__} has no get_input_embeddings(), or it returns None: name the module with "
                'embedding="path.to.embed" or pass the module itself'
            )
    wrappers: list[Any] = [found]
    while hasattr(wrappers[-1], "base_layer"):
        wrappers.append(wrappers[-1].base_layer)
    if any(hasattr(wrapper, "token_adapter") or hasattr(wrapper, "trainable_tokens_delta") for wrapper in wrappers):
        raise ValueError(
            "PEFT's trainable_token_indices computes the embedding without calling it, so NEFTune noise would not be applied: train the "
            "tokens with modules_to_save or a LoRA on the embedding"
        )
    if hasattr(found, "modules_to_save") and hasattr(found, "original_module"):
        opened = [_open_wrapper(module) for module in (found.original_module, *found.modules_to_save.values())]
    else:
        opened = [_open_wrapper(found)]
    for module in opened:
        if isinstance(module, NEFTuneEmbedding):
            raise ValueError("the embedding is a NEFTuneEmbedding and adds noise itself: use it alone, or swap in module.to_embedding()")
        if not isinstance(module, nn.Embedding):
            raise ValueError(f"the input embedding must be an nn.Embedding, got {type(module).__name__}: name it with embedding=")
        if "forward" in module.__dict__ and not is_tensor_parallel_forward(module.forward):
            raise ValueError(
                "the embedding carries a forward of its own as an instance attribute (a monkey patch), which would hide the noise: apply "
                "NEFTune before it, or remove it"
            )
    return opened, [wrapper for wrapper in wrappers if wrapper not in opened]


def _open_wrapper(module: Any) -> Any:
    while hasattr(module, "base_layer"):  # PEFT tuner layers
        module = module.base_layer
    return module


def _model_around(model: nn.Module, embedding: nn.Module) -> nn.Module | None:
    """The innermost module around the embedding whose forward takes an attention_mask."""
    path = next((name for name, module in model.named_modules() if module is embedding), None)
    if path is None:
        raise ValueError("the embedding is not a part of the model")
    parts = path.split(".")[:-1] if path else []
    for depth in range(len(parts), -1, -1):
        ancestor = model.get_submodule(".".join(parts[:depth]))
        if ancestor is not embedding and "attention_mask" in _parameter_names(ancestor):
            return ancestor
    return None


def apply_neftune(
    model: nn.Module,
    noise_alpha: float | None = 5.0,
    *,
    embedding: str | nn.Module | None = None,
    stream: int | None = None,
    noise_without_grad: bool = False,
    backend: str | None = None,
) -> NEFTuneHandle:
    """Add NEFTune noise to a model's input embedding while it trains, with the sample lengths its own forward is told.

    Noise is added in training mode with grad enabled; never in eval mode and never under `torch.no_grad()` (rollouts, reference models)
    unless `noise_without_grad`. Lengths come from the model's arguments: cu_seq_lens_q, else position_ids with attention_mask, else
    attention_mask, positional or by keyword; without any, every token but padding_idx is real. What cannot be read warns once.

    Args:
        model: a transformers PreTrainedModel, a PEFT model, or any module with get_input_embeddings().
        noise_alpha: the paper's alpha, finite and >= 0; applying twice updates it and returns the same handle.
        embedding: the embedding's path in the model or the module itself, where get_input_embeddings() does not tell.
        stream: word that separates data-parallel replicas; None: `distributed.data_parallel_index`, at each call.
        noise_without_grad: noise also where grad is disabled.
        backend: as in :func:`noisy_embedding`.

    Returns:
        A handle with noise_alpha, stats() and remove(); also a context manager.

    Raises:
        ValueError: no nn.Embedding can be found or noised; bad alpha, stream or backend.

    Example:
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = torch.nn.Embedding(10, 4)
        ...     def forward(self, input_ids, attention_mask=None):
        ...         return self.embed(input_ids)
        >>> model = Model()
        >>> with apply_neftune(model, 5.0, embedding="embed") as handle:
        ...     _ = model(torch.tensor([[1, 2, 3], [4, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]))
        ...     handle.stats()["length_min"], handle.stats()["length_max"]
        (1, 3)
        >>> type(model.embed).__name__
        'Embedding'
    """
    alpha = check_alpha(noise_alpha)
    if stream is not None:
        check_word("stream", stream)
    embeddings, wrappers = _find_embeddings(model, embedding)
    for module in embeddings:
        quantised = type(module.weight) not in PLAIN_WEIGHTS  # its forward decides the dtype
        choose_backend(backend, module.weight.device, torch.float32 if quantised else module.weight.dtype)
    around = _model_around(model, embeddings[0])
    states = [module._neftune for module in embeddings if isinstance(module, _Noisy)]
    state = next((state for state in states if state.handle is not None), None)
    if state is None or state.handle is None:
        state = NEFTuneState()
        state.handle = NEFTuneHandle(model, state)
    state.handle.take(embeddings)
    state.handle.listen(around)
    state.wrappers = [weakref.ref(wrapper) for wrapper in wrappers]
    state.set_alpha(alpha)
    state.stream, state.noise_without_grad, state.backend = stream, noise_without_grad, backend
    return state.handle


def _forget_hooks(model: nn.Module | None) -> None:
    if model is None:
        return
    hooks: Callable[..., Any]
    for registered, extras in (
        (model._forward_pre_hooks, (model._forward_pre_hooks_with_kwargs,)),
        (model._forward_hooks, (model._forward_hooks_with_kwargs, model._forward_hooks_always_called)),
    ):
        for key, hooks in list(registered.items()):
            if isinstance(hooks, (_TakeSamples, _ForgetSamples)):
                for where in (registered, *extras):
                    where.pop(key, None)  # type: ignore[attr-defined]
