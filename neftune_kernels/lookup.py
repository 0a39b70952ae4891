"""The ways of one call: the same bits, gradients and generator state, other host time."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from . import gradients, ops
from .backends import CAPTURABLE, CPP, CPP_SERVES, choose_backend, number_documents
from .distributed import dtensor_with_noise, is_dtensor
from .layout import INTEGER_DTYPES, ROWS, check_tensor
from .noise import Noise, alpha_tensor, draw_on_cpu, make_noise, seed_tensor
from .samples import (
    UNSAID,
    Samples,
    is_mask_alone,
    make_layout,
    real_tokens,
    says_nothing,
)
from .torch_internals import dispatch_modes, transformed

PLAIN_WEIGHTS = (nn.Parameter, Tensor)
QUICK_MASKS = frozenset((torch.bool, *INTEGER_DTYPES))  # which have no gradient
IN_PLACE_LIMIT = (
    1 << 16
    # elements: below it a lookup and noise in its cache-warm output cost less than the fused
    # Function and its many arguments
)


def check_dense(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one: pass {name}.values(), with "
            f"cu_seqlens={name}.offsets()"
        )


def check_embeds(inputs_embeds: Tensor) -> None:
    check_dense("inputs_embeds", inputs_embeds)
    if inputs_embeds.dim() == 0:
        raise ValueError("inputs_embeds must have shape (..., embedding_dim), got ()")


def check_ids(input_ids: Tensor) -> None:
    check_dense("input_ids", input_ids)
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids must be int32 or int64, got {input_ids.dtype}")


def _embed_quickly(
    input_ids: Tensor,
    weight: Tensor,
    alpha: Tensor,
    seed: Tensor | None,
    attention_mask: Tensor | None,
    padding_idx: int,
) -> Tensor | None:
    """embed_with_noise of ids and perhaps a mask, in eager mode on a CPU, with the host time
    halved.

    None where any of that does not hold; nothing is drawn then.
    """
    if not (
        type(input_ids) is Tensor
        and input_ids.dtype is torch.int64
        and input_ids.is_cpu
        and weight.is_cpu
        and CPP_SERVES.get(weight.dtype)
        and not dispatch_modes()
        and not transformed()
    ):
        return None
    needs_graph = weight.requires_grad and torch.is_grad_enabled()
    if needs_graph and input_ids.numel() * weight.shape[1] > IN_PLACE_LIMIT:
        return None
    numbering = None
    if attention_mask is not None:
        if not (
            type(attention_mask) is Tensor
            and attention_mask.is_cpu
            and attention_mask.shape == input_ids.shape
            and attention_mask.dtype in QUICK_MASKS
        ):
            return None
        numbering = number_documents(attention_mask, None)
    if seed is None:
        seed = draw_on_cpu()  # which asks for no device: 5 us here
    elif seed.dtype is not torch.int64 or seed.dim() or not seed.is_cpu:
        return None
    if needs_graph:
        embedded = _lookup(input_ids, weight, padding_idx)
        rows = embedded.detach()  # the noise is a constant: autograd need not see it arrive
        if numbering is None:
            CPP.add_noise_out(rows, seed, alpha, out=rows)
        else:
            CPP.add_noise_out(rows, seed, alpha, None, None, None, None, numbering, out=rows)
        return embedded
    out = weight.new_empty((*input_ids.shape, weight.shape[1]))
    if numbering is None:
        CPP.noisy_embedding_out(input_ids, weight, seed, alpha, out=out)
    else:
        layout = (None, None, None, None, numbering)
        CPP.noisy_embedding_out(input_ids, weight, seed, alpha, *layout, out=out)
    return out


def embed_with_noise(
    input_ids: Tensor,
    weight: Tensor,
    samples: Samples,
    noise: Noise,
    padding_idx: int = -1,
    embed_scale: float = 1.0,
    deterministic_grad: bool = False,
) -> Tensor:
    """Lookup with noise of alpha > 0: fused for uniform noise, else a lookup and then noise.

    input_ids (..., T) of int32 or int64, weight (V, d), padding_idx -1 for none.
    """
    if noise.variant.distribution != "uniform":
        how = padding_idx, embed_scale, deterministic_grad
        embedded = embed_with_noise(input_ids, weight, UNSAID, _no_noise(weight, noise), *how)
        return embeds_with_noise(embedded, real_tokens(input_ids, padding_idx, samples), noise)
    alpha, seed, generator, offsets, _, backend, plain, _ = noise
    unsaid = says_nothing(samples)
    if (
        plain
        and embed_scale == 1
        and (padding_idx < 0 if unsaid else is_mask_alone(samples))
        and (seed is None or isinstance(seed, Tensor))
        and not torch.compiler.is_compiling()
    ):
        mask = samples.attention_mask
        quick = _embed_quickly(input_ids, weight, alpha, seed, mask, padding_idx)
        if quick is not None:
            return quick
    plain = plain and unsaid and padding_idx < 0
    check_ids(input_ids)
    device = weight.device
    if device != input_ids.device:
        raise ValueError(
            f"input_ids is on {input_ids.device}, weight on {device}: they must be on one device"
        )
    chosen = choose_backend(backend, device, weight.dtype)
    if noise.capturable:
        chosen = CAPTURABLE[chosen.name]
    layout = ROWS
    if not plain:
        samples = real_tokens(input_ids, padding_idx, samples)
        layout = make_layout(input_ids.shape, device, samples, chosen, offsets.position_offset)
    seed = seed_tensor(seed, generator, device)
    needs_graph = weight.requires_grad and torch.is_grad_enabled()
    by_function = transformed()
    if not by_function and not torch.compiler.is_compiling():
        # The operators' defaults are left out: host time goes by arguments.
        drawn: tuple[Any, ...] = (seed, alpha) if plain else (seed, alpha, *layout, *offsets)
        if not needs_graph:
            out = weight.new_empty((*input_ids.shape, weight.shape[1]))
            if embed_scale == 1:
                chosen.noisy_embedding_out(input_ids, weight, *drawn, out=out)
            else:
                drawn = (seed, alpha, *layout, *offsets, padding_idx, embed_scale)
                chosen.noisy_embedding_out(input_ids, weight, *drawn, out=out)
            return out
        small = input_ids.numel() * weight.shape[1] <= IN_PLACE_LIMIT
        if small and embed_scale == 1 and device.type == "cpu" and not dispatch_modes():
            embedded = _lookup(input_ids, weight, padding_idx)
            rows = embedded.detach()  # the noise is a constant: autograd need not see it arrive
            chosen.add_noise_out(rows, *drawn, out=rows)
            return embedded
    args = (input_ids, weight, seed, alpha, *layout, *offsets, padding_idx, embed_scale)
    if by_function:
        _refuse_forward_mode(weight)
    if deterministic_grad and gradients.asks_for_ours(weight):
        if chosen.name == "cuda":
            return ops.CudaDeterministicNoisyEmbedding.apply(chosen.noisy_embedding, *args)
        return ops.DeterministicNoisyEmbedding.apply(chosen.noisy_embedding, *args)
    if by_function or needs_graph:
        return ops.NoisyEmbedding.apply(chosen.noisy_embedding, *args)
    return chosen.noisy_embedding(*args)


def _refuse_forward_mode(tensor: Tensor) -> None:
    """Dynamo traces no autograd.Function that has a jvp, so none can say it itself."""
    if unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            "NEFTune noise has no forward-mode derivative (jvp): use backward(), torch.func.vjp or "
            "jacrev, or add neftune_noise(...) to F.embedding"
        )


def _no_noise(weight: Tensor, noise: Noise) -> Noise:
    """Of the same backend: a lookup with the operators' checks, scale and gradient."""
    seed = torch.zeros((), dtype=torch.int64, device=weight.device)
    alpha = torch.zeros_like(noise.alpha) if noise.capturable else alpha_tensor(0.0)
    return make_noise(alpha, seed, backend=noise.backend, capturable=noise.capturable)


def _lookup(input_ids: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
    """gradients.apply_lookup, its IndexError with the value and the rule."""
    try:
        return gradients.apply_lookup(input_ids, weight, padding_idx, False, False, False)
    except (IndexError, RuntimeError):  # a table without rows is a RuntimeError to torch
        bad = input_ids[(input_ids < 0) | (input_ids >= weight.shape[0])]
        if bad.numel() == 0:
            raise
        raise IndexError(
            f"input_ids must lie in [0, num_embeddings = {weight.shape[0]}), got {int(bad[0])}"
        ) from None


def embeds_with_noise(inputs_embeds: Tensor, samples: Samples, noise: Noise) -> Tensor:
    """Noise of alpha > 0 on embeddings (..., T, d), in any variant."""
    check_embeds(inputs_embeds)
    device, offsets, variant = inputs_embeds.device, noise.offsets, noise.variant
    chosen = choose_backend(noise.backend, device, inputs_embeds.dtype)
    if noise.capturable:
        chosen = CAPTURABLE[chosen.name]
    shape = inputs_embeds.shape[:-1]
    layout = make_layout(shape, device, samples, chosen, offsets.position_offset)
    seed = seed_tensor(noise.seed, noise.generator, device)
    args: tuple[Any, ...] = (inputs_embeds, seed, noise.alpha, *layout, *offsets)
    fused = variant.distribution == "uniform"
    operator = chosen.add_noise
    if not fused:
        operator = chosen.add_variant_noise
        args = (*args, variant.distribution, variant.equal_variance)
    by_function = transformed()
    if by_function:
        _refuse_forward_mode(inputs_embeds)
    if by_function or (inputs_embeds.requires_grad and torch.is_grad_enabled()):
        return ops.AddNoise.apply(operator, *args)
    if torch.compiler.is_compiling() or not fused:
        return operator(*args)
    out = torch.empty_like(inputs_embeds, memory_format=torch.contiguous_format)
    chosen.add_noise_out(*args, out=out)
    return out


def noisy_lookup(
    embedding: Any,
    input_ids: Tensor,
    samples: Samples,
    noise: Noise,
    embed_scale: float = 1.0,
    look_up: Callable[[], Tensor] | None = None,
    weight: Tensor | None = None,
    deterministic_grad: bool = False,
) -> Tensor:
    """What every noisy embedding does in training: one pass where it can be, else its own lookup,
    the scale, and noise on that, a DTensor included.

    embedding: the nn.Embedding; look_up: its own forward, None for nn.Embedding's; weight: the
        embedding's, where the caller has it (nn.Module's __getattr__ takes its time).
    """
    padding_idx = -1 if embedding.padding_idx is None else embedding.padding_idx
    if look_up is None:
        weight = embedding.weight if weight is None else weight
        if (
            type(weight) in PLAIN_WEIGHTS
            and embedding.max_norm is None
            and not embedding.sparse
            and not embedding.scale_grad_by_freq
        ):
            how = padding_idx, embed_scale, deterministic_grad
            return embed_with_noise(input_ids, weight, samples, noise, *how)
    if look_up is None:
        embedded = plain_lookup(embedding, input_ids, deterministic_grad)
    else:
        embedded = look_up()
    if embed_scale != 1:
        embedded = embedded * embed_scale
    samples = real_tokens(input_ids, padding_idx, samples)
    if is_dtensor(embedded):
        return dtensor_with_noise(embeds_with_noise, embedded, samples, noise)
    return embeds_with_noise(embedded, samples, noise)


def plain_lookup(embedding: Any, input_ids: Tensor, deterministic_grad: bool = False) -> Tensor:
    """nn.Embedding's forward, with our gradient where it serves."""
    weight, max_norm = embedding.weight, embedding.max_norm
    asked = deterministic_grad and gradients.asks_for_ours(weight, embedding.sparse)
    if asked or (
        type(weight) in PLAIN_WEIGHTS
        and weight.is_cpu
        and weight.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not transformed()
    ):
        if max_norm is not None:
            rows = weight.detach()
            torch.embedding_renorm_(rows, input_ids.contiguous(), max_norm, embedding.norm_type)
        padding_idx = -1 if embedding.padding_idx is None else embedding.padding_idx
        how = padding_idx, embedding.scale_grad_by_freq, embedding.sparse, asked
        look_up = gradients.Lookup.apply if asked else gradients.apply_lookup
        return look_up(input_ids, weight, *how)
    return F.embedding(
        input_ids,
        weight,
        embedding.padding_idx,
        embedding.max_norm,
        embedding.norm_type,
        embedding.scale_grad_by_freq,
        embedding.sparse,
    )
