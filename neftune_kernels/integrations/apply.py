"""apply_neftune: noise in the input embeddings of a model that somebody else wrote, with the
samples its own forward is told.

The embedding keeps its object, Parameter, hooks and ties: its class is swapped for a subclass of
its own class (fused) or a hook adds noise to its output (behind), and undo takes that back. Hooks
on the models around it hear the attention mask, position ids or cumulative lengths as they arrive.
Nothing here imports transformers.
"""

from typing import Any, NoReturn

from torch import nn

from ..capturable import check_capturable, check_setting
from ..modules import check_batch_first
from ..noise import check_alpha, check_word, refuse_unknown, said_variant
from .find import Found, chains, find_embeddings, path_of, ways_to
from .handle import NEFTuneHandle, check_backend, check_fused, check_multiplier
from .running import Said, Settings, State, handles
from .telling import Read, check_samples


def apply_neftune(
    model: nn.Module,
    noise_alpha: float | None = 5.0,
    *,
    embedding: str | nn.Module | None = None,
    samples: Read | None = None,
    replica: int | None = None,
    noise_without_grad: bool = False,
    distribution: str = "uniform",
    equal_variance: bool = True,
    backend: str | None = None,
    fused: bool | None = None,
    batch_first: bool = True,
    embedding_multiplier: Said | None = None,
    capturable: bool = False,
    **unknown: NoReturn,
) -> NEFTuneHandle:
    """Add NEFTune noise to a model's input embeddings while it trains, with the sample lengths its
    own forward is told.

    Noise is added in training mode with grad enabled; never in eval mode and never under
    `torch.no_grad()` (rollouts, reference models) unless `noise_without_grad`. Lengths come from
    the arguments of the models around the embedding, positional or by keyword, the first of:
    cu_seq_lens_q, seq_idx, position_ids with attention_mask, attention_mask. Without any, every
    token is real but padding_idx, and the config's pad_token_id at the rows' ends; in a decoder of
    an encoder-decoder every token up to the last that is not padding. What cannot be read warns
    once. Encoder and decoder of an encoder-decoder
    get noise each with its own mask. What takes the embedding's place later (PEFT's wrappers, a
    resized embedding) is found at the next forward. What the model multiplies embeddings by after
    its lookup divides alpha, so that the noise arrives as loud as the paper's.

    Args:
        model: a transformers PreTrainedModel, a PEFT model, or any module with
            get_input_embeddings().
        noise_alpha: the paper's alpha, finite and >= 0; applying twice updates it and returns the
            same handle.
        embedding: the embedding's path in the model or the module itself, where
            get_input_embeddings() does not tell.
        samples: how the arguments of `model` tell samples, where their names say nothing. A mapping
            of our words to its arguments' names, {"attention_mask": "keep"}; "a.b" reaches into a
            dictionary. Words: attention_mask, key_padding_mask ((B, T), True = padding), lengths,
            document_lengths ((B, documents) or a list), cu_seqlens, position_ids, noise_mask. Or a
            list of such mappings, each with "input_ids", where more than one sequence is looked up:
            each speaks of the ids it names only. Or a callable, given the arguments by name:
            returns an attention_mask, a dictionary of these words, or None for "every token is
            real". An argument left out or None says nothing. What is inside `model` is asked only
            where it is called alone.
        replica: number of this data-parallel replica; None: what
            `distributed.data_parallel_index` finds, at each call.
        noise_without_grad: noise also where grad is disabled.
        distribution, equal_variance, backend: as in :func:`noisy_embedding`.
        fused: None chooses for each embedding: lookup and noise in one pass, by a swap of its
            class, where its forward is nn.Embedding's, else a forward hook behind it. False: always
            the hook, for tools that look at the exact class (Opacus, quantize_dynamic,
            torch.jit.script, FSDP policies by class). True: refuse where it cannot be one pass. The
            noise is the same, bit for bit.
        batch_first: False: the model's ids are (T, B) and their columns are samples. Masks and
            position ids are then (T, B) as the ids, key_padding_mask is (B, T), lengths are (B,),
            cu_seqlens are refused. Where nobody says so and a module with batch_first=False of its
            own is given the embeddings as they were looked up, a warning does.
        embedding_multiplier: what the model multiplies its embeddings by after looking them up,
            positive and finite: the noise of noise_alpha / embedding_multiplier is added at the
            lookup, so that the paper's arrives. Where samples have factors of their own, a
            callable: given the arguments by name, as samples= is, it returns a tensor of them, one
            for each row (or token), or a number. None: known for transformers' models,
            else measured by values in a look at the model before its first noisy forward; what
            cannot be told is 1, and warns with the line to paste.
        capturable: True: alpha is kept on the embeddings' device, where `handle.noise_alpha = ...`
            and a callback's schedule write it, and kernels read it there: a captured CUDA graph
            replays with today's alpha, and `torch.compile(mode="reduce-overhead")` has the noise
            inside its graphs. Alpha 0 draws a seed, too. Set alpha between steps: compiled code in
            a checkpoint takes the alpha of when it runs. False is faster for small calls.

    Returns:
        A handle with the settings, stats() and remove(); also a context manager, which takes the
        noise off on exit, or puts back what was in force before this call.

    Raises:
        ValueError: no embedding can be found or noised, or not as `fused` says; bad alpha, replica
            or backend.
        TypeError: `model` is no module; samples= is none of these; at a forward, a name that it is
            not given.

    Example:
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = torch.nn.Embedding(10, 4)
        ...     def forward(self, input_ids, attention_mask=None):
        ...         return self.embed(input_ids)
        >>> model = Model()
        >>> with apply_neftune(model, 5.0, embedding="embed") as handle:
        ...     mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
        ...     _ = model(torch.tensor([[1, 2, 3], [4, 0, 0]]), attention_mask=mask)
        ...     handle.stats()["length_min"], handle.stats()["length_max"]
        (1, 3)
        >>> type(model.embed).__name__
        'Embedding'
    """
    if unknown:
        refuse_unknown("apply_neftune", unknown)
    settings = Settings(
        noise_alpha=check_setting(check_alpha(noise_alpha), check_capturable(capturable)),
        replica=None if replica is None else check_word("replica", replica),
        noise_without_grad=noise_without_grad,
        backend=backend,
        variant=said_variant(distribution, equal_variance, 1),
        samples=check_samples(samples),
        fused=check_fused(fused),
        batch_first=check_batch_first(batch_first),
        embedding_multiplier=check_multiplier(embedding_multiplier),
        capturable=capturable,
    )
    check_model(model, embedding)
    path = path_of(model, embedding)
    found = find_embeddings(model, path, fused)
    for one in found:
        check_backend(backend, one.embedding)
    handle = _live_handle(model, found)
    if handle is None:
        state = State()
        handle = state.handle = NEFTuneHandle(state)
    handle._apply(model, path, settings)
    if not any(one.site._neftune.hooked for one in found):  # type: ignore[union-attr]
        handle._live_state().warn_once(
            "no forward around the embedding takes an attention_mask, so every token but "
            "padding_idx counts as real: tell NEFTune the "
            "samples with apply_neftune(..., samples=...)"
        )
    handle._applied = True
    return handle


def check_model(model: Any, embedding: str | nn.Module | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"apply_neftune wants a model (a torch.nn.Module), got {type(model).__name__} "
            f"{model!r}: load it first, AutoModelForCausalLM.from_pretrained(...)"
        )
    inner = getattr(model, "module", None)
    if (
        embedding is None
        and not hasattr(model, "get_input_embeddings")
        and hasattr(inner, "get_input_embeddings")
    ):
        raise ValueError(
            f"{type(model).__name__} is a wrapper without get_input_embeddings(): call "
            "apply_neftune(model.module), before or after it was wrapped"
        )


def _live_handle(model: nn.Module, found: list[Found]) -> NEFTuneHandle | None:
    """Of the sites that are in the places now, or are wrapped there (PEFT after apply_neftune), or
    were there (a resized embedding).
    """
    sites = [
        site
        for one in found
        for chain in chains(one.site)
        for module in (*one.wrappers, *chain)
        if (site := module.__dict__.get("_neftune")) is not None
    ]
    live = (site.state.handle for site in sites if site.state.handle is not None)
    return next(live, None) or _handle_of_places(model, found)


def _handle_of_places(model: nn.Module, found: list[Found]) -> NEFTuneHandle | None:
    places = set(ways_to(model, {(*one.wrappers, one.site)[0] for one in found}))
    followed = (one for one in [*handles.values()] if not one.removed and one.has_lost(places))
    return next(followed, None)


def applied_handle(
    model: nn.Module, embedding: str | nn.Module | None = None
) -> NEFTuneHandle | None:
    """The handle of an apply_neftune that is in force on the model, if there is one."""
    return _live_handle(model, find_embeddings(model, path_of(model, embedding)))
