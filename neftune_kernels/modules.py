"""NEFTuneEmbedding: nn.Embedding whose training forward adds NEFTune noise."""

import warnings
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import BACKENDS
from .capturable import TO_BE_COMPILED, alpha_on, check_capturable, check_setting, set_alpha
from .distributed import has_group, module_replica
from .gradients import asks_for_ours, check_deterministic_grad
from .lookup import noisy_lookup, plain_lookup
from .noise import (
    Noise,
    check_alpha,
    check_offsets,
    check_scale,
    check_variant,
    check_word,
    make_noise,
    refuse_unknown,
)
from .samples import UNSAID, Samples, says_nothing, time_first

# transformers' own noise: its hook reads the attribute from the embedding that it noises. The
# attribute alone is no noise: it stays after `hook.remove()`, and Unsloth sets it without a hook.
HUGGING_FACE_MARK = "neftune_noise_alpha"
HUGGING_FACE_HOOK = "neftune_post_forward_hook"
TWO_NOISES = (
    "this embedding would get two noises: transformers' own NEFTune hook is active on it. Set "
    "neftune_noise_alpha=None in the training "
    "arguments, or take neftune_kernels off the model"
)


def check_batch_first(batch_first: Any) -> bool:
    if not isinstance(batch_first, bool):
        raise TypeError(f"batch_first must be True or False, got {batch_first!r}")
    return batch_first


def has_other_noise(module: nn.Module) -> bool:
    """Whether transformers' own NEFTune hook is active on the module."""
    return HUGGING_FACE_MARK in module.__dict__ and any(
        getattr(hook, "__name__", None) == HUGGING_FACE_HOOK
        for hook in module._forward_hooks.values()
    )


class NEFTuneEmbedding(nn.Embedding):
    """A drop-in for nn.Embedding that adds NEFTune noise in training mode, like nn.Dropout, and is
    nn.Embedding in eval mode.

    Training: out[token] = weight[id]·embed_scale + noise_alpha/√(L·d) · u[token], L the real tokens
        of the token's own sample.
    The state_dict, weight tying, padding_idx, max_norm, sparse, scale_grad_by_freq and every other
    argument are nn.Embedding's.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            device, dtype: as nn.Embedding.
        noise_alpha: the paper's alpha, finite and >= 0; None or 0: no noise. Assign
            `module.noise_alpha` for a schedule.
        embed_scale: factor of the embedding, in eval mode too (Gemma, BART); not of the noise.
        distribution, equal_variance: as in :func:`noisy_embedding`; only "uniform" is fused with
            the lookup.
        replica: number of this data-parallel replica: replicas with the same seed then draw other
            noise. None: worked out at each call, 0 without a process group, the data-parallel index
            of an FSDP2 or DTensor weight, else the rank. Pass 0 where a tensor-parallel mesh spans
            all ranks, which a plain weight does not show; beside a group of some ranks a plain
            weight leaves it open, and a noisy forward raises RuntimeError.
        backend: None (best for the device), "reference", "cpp", "triton" or "cuda".
        batch_first: False: ids are (T, B) and columns are samples, nn.LSTM's and nn.Transformer's
            word. Masks and position ids are then (T, B) too, lengths (B,), cu_seqlens is refused.
            The noise is the transposed call's, bit for bit.
        capturable: True: alpha is kept on the weight's device, where `module.noise_alpha = ...`
            writes it and the kernel reads it: a captured CUDA graph replays with today's, and
            `torch.compile(mode="reduce-overhead")` has the noise inside its graphs. Alpha 0 draws a
            seed, too; training or eval mode is what it was at the capture. False is faster for
            small calls, and its alpha the host's.
        deterministic_grad: True: on a GPU, and in compiled code, the weight's gradient is ours, of
            float32 sums in a fixed order (docs/specification.md), whether there is noise or not.
            False leaves torch's there: small calls add in the weight's dtype, compiled code by
            atomics. Eager code on the CPU it does not change: noisy lookups have ours there.
            Refused in forward where the gradient is sparse,
            the weight a DTensor or a torch.func transform at work, and in a backward with
            create_graph=True.

    Shape:
        input (..., T) int32 or int64 → (..., T, embedding_dim).

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the message names both.

    Source: arXiv 2310.05914.

    Example:
        >>> embedding = NEFTuneEmbedding(100, 16, padding_idx=0, noise_alpha=5.0)
        >>> ids = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0]])
        >>> noisy = embedding(ids, attention_mask=ids != 0)
        >>> clean = embedding.eval()(ids)
        >>> ((noisy - clean).abs().amax((1, 2)) <= 5 / (torch.tensor([3, 1]) * 16) ** 0.5).tolist()
        [True, True]
        >>> NEFTuneEmbedding(100, 16, distribution="normal")
        NEFTuneEmbedding(100, 16, noise_alpha=5.0, distribution='normal')
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        noise_alpha: float | None = 5.0,
        embed_scale: float = 1.0,
        distribution: str = "uniform",
        equal_variance: bool = True,
        replica: int | None = None,
        backend: str | None = None,
        batch_first: bool = True,
        capturable: bool = False,
        deterministic_grad: bool = False,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            refuse_unknown("NEFTuneEmbedding", unknown)
        check_batch_first(batch_first)
        check_capturable(capturable)
        check_deterministic_grad(deterministic_grad)
        if padding_idx is not None and not hasattr(padding_idx, "__index__"):
            raise TypeError(
                f"padding_idx must be an int or None, got {padding_idx!r}: noise_alpha goes by its "
                f"name, NEFTuneEmbedding({num_embeddings}, {embedding_dim}, noise_alpha=...)"
            )
        # refuse before anything is allocated
        alpha = check_setting(check_alpha(noise_alpha), capturable)
        check_variant(distribution, equal_variance, 1)
        embed_scale = check_scale(embed_scale)
        if replica is not None:
            replica = check_word("replica", replica)
        if backend is not None and backend not in BACKENDS:
            raise ValueError(
                f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
            )
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            _weight=_weight,
            _freeze=_freeze,
            device=device,
            dtype=dtype,
        )
        self._noise_alpha = alpha
        self.capturable = capturable
        self.embed_scale = embed_scale
        self.distribution = distribution
        self.equal_variance = equal_variance
        self.replica = replica
        self.backend = backend
        self.batch_first = batch_first
        self.deterministic_grad = deterministic_grad

    batch_first = True  # of modules that were pickled before there was the word
    _capturable = False  # likewise
    deterministic_grad = False  # likewise

    @property
    def noise_alpha(self) -> float:
        return self._noise_alpha

    @noise_alpha.setter
    def noise_alpha(self, value: float | None) -> None:
        alpha = check_setting(check_alpha(value), self._capturable)
        if self._capturable:
            set_alpha(alpha, self._alpha)  # a captured graph has the tensor
            self._noise_alpha = alpha
        else:
            self._noise_alpha = alpha
            self._place_alpha()

    @property
    def capturable(self) -> bool:
        return self._capturable

    @capturable.setter
    def capturable(self, value: bool) -> None:
        check_setting(self._noise_alpha, check_capturable(value))
        self._capturable = value
        self._place_alpha()

    def _place_alpha(self) -> None:
        """A new tensor of alpha: a graph input, so that nothing is compiled anew for its value."""
        if self._capturable:
            self._alpha = alpha_on(self.weight.device, self._noise_alpha)
        else:
            self._alpha = torch.full((), self._noise_alpha, dtype=torch.float64, device="cpu")
        self._has_noise = self._noise_alpha > 0 or self._capturable
        self._noise = self._make_noise()

    def _apply(self, *args: Any, **kwargs: Any) -> "NEFTuneEmbedding":
        super()._apply(*args, **kwargs)
        if self._capturable and self._alpha.device != self.weight.device:
            self._place_alpha()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._capturable:
            self._place_alpha()  # a copy of its own, a shallow one's too

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script asks every module for what it is to compile."""
        raise TypeError(
            "TorchScript knows no NEFTune noise: script module.to_embedding() in its place"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("distribution", "equal_variance", "replica", "backend"):
            self._noise = self._make_noise()

    def _make_noise(self) -> Noise | None:
        """The noise of a call that says nothing of its own, made when a setting is assigned; None
        while a setting is wrong or missing, for the call to say so.
        """
        settings = self.__dict__
        try:
            variant = check_variant(settings["distribution"], settings["equal_variance"], 1)
            offsets = check_offsets(settings["replica"] or 0, 0, 0)
            return make_noise(
                self._alpha,
                offsets=offsets,
                variant=variant,
                backend=settings["backend"],
                capturable=self._capturable,
            )
        except (KeyError, TypeError, ValueError):
            return None

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        attention_mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        noise_mask: Tensor | None = None,
        sign: int = 1,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        replica: int | None = None,
        sample_offset: int = 0,
        position_offset: int = 0,
        **unknown: NoReturn,
    ) -> Tensor:
        """Look up (..., T) ids; in training mode with noise_alpha > 0 add noise. Keywords as
        :func:`noisy_embedding`'s.

        noise_mask (..., T) says which tokens get noise, sign=-1 negates it exactly.

        Raises:
            TypeError, ValueError, IndexError, NotImplementedError: as :func:`noisy_embedding`.
            RuntimeError: the replica cannot be known; transformers' own noise is on, too.
        """
        if unknown:
            refuse_unknown("forward", unknown)
        with_noise = self.training and self._has_noise
        samples = UNSAID
        if not (
            attention_mask is None
            and lengths is None
            and cu_seqlens is None
            and position_ids is None
            and noise_mask is None
        ):
            samples = Samples(attention_mask, lengths, cu_seqlens, position_ids, noise_mask)
        turn = not self.batch_first
        own_sign = type(sign) is int and sign == 1
        if not with_noise:  # checks are host time, but what noise would refuse is refused
            if not own_sign:
                check_variant(self.distribution, self.equal_variance, sign)
            if not says_nothing(samples):
                if turn:
                    time_first(samples, input.shape).check(input.t().shape, input.device)
                else:
                    samples.check(input.shape, input.device)
            if self.deterministic_grad and asks_for_ours(self.weight, self.sparse):
                embedded = plain_lookup(self, input, True)
            else:
                embedded = F.embedding(  # as nn.Embedding's forward, without one more frame
                    input,
                    self.weight,
                    self.padding_idx,
                    self.max_norm,
                    self.norm_type,
                    self.scale_grad_by_freq,
                    self.sparse,
                )
            return embedded if self.embed_scale == 1 else embedded * self.embed_scale
        if HUGGING_FACE_MARK in self.__dict__ and has_other_noise(self):
            raise RuntimeError(TWO_NOISES)
        if turn:
            samples = time_first(samples, input.shape)
        if self._capturable and self._alpha.device != self.weight.device:
            if torch.compiler.is_compiling():
                there, wanted = self._alpha.device, self.weight.device
                raise RuntimeError(TO_BE_COMPILED.format(there, wanted))
            self._place_alpha()
        noise = self._noise
        if replica is None and self.replica is None and has_group():
            replica = module_replica(self) or None
        own = replica is None and seed is None and generator is None and own_sign
        own = own and type(sample_offset) is type(position_offset) is int
        if not own or noise is None or sample_offset != 0 or position_offset != 0:
            if replica is None:
                replica = self.replica or 0
            offsets = check_offsets(replica, sample_offset, position_offset)
            variant = check_variant(self.distribution, self.equal_variance, sign)
            said = seed, generator, offsets, variant, self.backend, self._capturable
            noise = make_noise(self._alpha, *said)
        how = self.embed_scale, None, None, self.deterministic_grad
        return noisy_lookup(self, input, samples, noise, *how)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        noise_alpha: float | None = 5.0,
        *,
        embed_scale: float = 1.0,
        distribution: str = "uniform",
        equal_variance: bool = True,
        replica: int | None = None,
        backend: str | None = None,
        batch_first: bool = True,
        capturable: bool = False,
        deterministic_grad: bool = False,
        **unknown: NoReturn,
    ) -> "NEFTuneEmbedding":
        """The noisy twin of a plain nn.Embedding: the same Parameter object, settings and training
        mode.

        Raises:
            TypeError: not an nn.Embedding, or a subclass with a forward of its own, which this
                class would replace (use apply_neftune).
            ValueError: a keyword breaks a rule of the class.

        Example:
            >>> plain = nn.Embedding(10, 4)
            >>> NEFTuneEmbedding.from_embedding(plain).weight is plain.weight
            True
        """
        if unknown:
            refuse_unknown("from_embedding", unknown)
        if not isinstance(embedding, nn.Embedding):
            remedy = ": from_pretrained takes a weight" if isinstance(embedding, Tensor) else ""
            raise TypeError(
                f"embedding must be an nn.Embedding, got {type(embedding).__name__}{remedy}"
            )
        if isinstance(embedding, NEFTuneEmbedding):
            raise TypeError(
                "embedding is a NEFTuneEmbedding already: assign its noise_alpha, or convert its "
                "to_embedding()"
            )
        if type(embedding).forward is not nn.Embedding.forward or "forward" in embedding.__dict__:
            raise TypeError(
                f"{type(embedding).__name__} has a forward of its own, which NEFTuneEmbedding "
                f"would replace: apply_neftune keeps it"
            )
        module = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            padding_idx=embedding.padding_idx,
            max_norm=embedding.max_norm,
            norm_type=embedding.norm_type,
            scale_grad_by_freq=embedding.scale_grad_by_freq,
            sparse=embedding.sparse,
            _weight=embedding.weight.detach(),
            noise_alpha=noise_alpha,
            embed_scale=embed_scale,
            distribution=distribution,
            equal_variance=equal_variance,
            replica=replica,
            backend=backend,
            batch_first=batch_first,
            capturable=capturable,
            deterministic_grad=deterministic_grad,
        )
        module.weight = embedding.weight
        return module.train(embedding.training)

    def to_embedding(self) -> nn.Embedding:
        """A plain nn.Embedding with the same Parameter object. It has no embed_scale: a scale other
        than 1 warns.
        """
        if self.embed_scale != 1:
            warnings.warn(
                f"nn.Embedding has no embed_scale: multiply its output by {self.embed_scale} "
                f"yourself",
                stacklevel=2,
            )
        plain = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            padding_idx=self.padding_idx,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            _weight=self.weight.detach(),
        )
        plain.weight = self.weight
        return plain.train(self.training)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        **noise: Any,
    ) -> "NEFTuneEmbedding":
        """nn.Embedding.from_pretrained with our keywords: noise_alpha, embed_scale, distribution,
        equal_variance, replica, backend, batch_first, capturable, deterministic_grad.

        Raises:
            TypeError: embeddings is no tensor.
            ValueError: it is not (num_embeddings, embedding_dim).

        Example:
            >>> NEFTuneEmbedding.from_pretrained(torch.ones(3, 2), noise_alpha=10.0).noise_alpha
            10.0
        """
        if not isinstance(embeddings, Tensor):
            is_module = isinstance(embeddings, nn.Embedding)
            remedy = ": from_embedding takes a module" if is_module else ""
            raise TypeError(f"embeddings must be a tensor, got {type(embeddings).__name__}{remedy}")
        if embeddings.dim() != 2:
            raise ValueError(
                f"embeddings must have shape (num_embeddings, embedding_dim), got "
                f"{tuple(embeddings.shape)}"
            )
        return cls(
            num_embeddings=embeddings.shape[0],
            embedding_dim=embeddings.shape[1],
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            _weight=embeddings,
            _freeze=freeze,
            **noise,
        )

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"noise_alpha={self.noise_alpha}"]
        if self.embed_scale != 1:
            parts.append(f"embed_scale={self.embed_scale}")
        if self.distribution != "uniform":
            parts.append(f"distribution={self.distribution!r}")
        if not self.equal_variance:
            parts.append("equal_variance=False")
        if self.replica is not None:
            parts.append(f"replica={self.replica}")
        if self.backend is not None:
            parts.append(f"backend={self.backend!r}")
        if not self.batch_first:
            parts.append("batch_first=False")
        if self.capturable:
            parts.append("capturable=True")
        if self.deterministic_grad:
            parts.append("deterministic_grad=True")
        return ", ".join(parts)
