"""The contract of the operators: schemas, fakes, autograd, registration, the native library and the
table of backends.

`torch.ops.neftune_kernels.noisy_embedding` (lookup, scale, noise) and `add_noise` (noise on
embeddings made elsewhere) dispatch to the best kernel of the device; their twins
`reference_noisy_embedding` and `reference_add_noise` always run `reference.py`, the family
`cuda_...` the CUDA C++ kernels. Native libraries and the Triton kernels only add implementations of
what is defined here, so an install without a compiler or without triton has the same operators.
Each has an `out` overload without autograd. `add_variant_noise`, for the other distributions, is
`add_noise` unfused: it asks the kernel for the uniform draws alone.
"""

import ctypes
import importlib
import importlib.util
import math
import os
import pathlib
import warnings
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import layout as layouts
from . import reference, self_check

NAMESPACE = "neftune_kernels"
NOISE_ARGS = (
    "Tensor seed, Tensor noise_alpha, Tensor? document=None, Tensor? position=None, Tensor? "
    "lengths=None, Tensor? cu_seqlens=None, "
    "SymInt replica=0, SymInt sample_offset=0, SymInt position_offset=0"
)
EMBEDDING_ARGS = (
    f"Tensor input_ids, Tensor weight, {NOISE_ARGS}, SymInt padding_idx=-1, float embed_scale=1.0"
)
ADD_ARGS = f"Tensor inputs_embeds, {NOISE_ARGS}"
FAMILIES = ("", "reference_", "cuda_")

REFERENCE_CHUNK = 1 << 20  # elements the reference computes at once: bounds its int64 scratch

library = torch.library.Library(NAMESPACE, "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)
# alpha is read on the host at the launch, so a CUDA graph would replay the first one: Inductor is
# to launch these outside its graphs
LAUNCH_TAGS = (
    (*TAGS, torch.Tag.cudagraph_unsafe) if hasattr(torch.Tag, "cudagraph_unsafe") else TAGS
)

for _family in FAMILIES:
    for _name, _args in (("noisy_embedding", EMBEDDING_ARGS), ("add_noise", ADD_ARGS)):
        library.define(f"{_family}{_name}({_args}) -> Tensor", tags=LAUNCH_TAGS)
        library.define(f"{_family}{_name}.out({_args}, *, Tensor(a!) out) -> ()", tags=LAUNCH_TAGS)
    library.define(
        f'{_family}add_variant_noise({ADD_ARGS}, str distribution="normal", bool '
        f"equal_variance=True) -> Tensor",
        tags=LAUNCH_TAGS,
    )
    library.define(
        f"{_family}mask_layout(Tensor? attention_mask, Tensor? position_ids) -> (Tensor, Tensor, "
        f"Tensor)",
        tags=TAGS,
    )
    library.define(
        f"{_family}padding_layout(Tensor input_ids, SymInt padding_idx) -> (Tensor, Tensor, "
        f"Tensor)",
        tags=TAGS,
    )
library.define(
    "noisy_documents(Tensor noise_mask, Tensor? document=None, Tensor? position=None, Tensor? "
    "lengths=None, Tensor? cu_seqlens=None, "
    "SymInt position_offset=0) -> Tensor",
    tags=TAGS,
)
# Its argument is a fresh torch.empty: the compiler merges equal calls whatever their tags say, but
# never two torch.empty, so that two draws of one graph stay two.
library.define("draw_seed(Tensor like) -> Tensor", tags=(*TAGS, torch.Tag.nondeterministic_seeded))


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """One 64-bit draw from the device's default (or the given) generator: a 0-dim int64 tensor on
    the device.
    """
    return torch.empty((), dtype=torch.int64, device=device).random_(
        -(2**63), None, generator=generator
    )


def _reference_embedding_out(
    input_ids: Tensor,
    weight: Tensor,
    seed: Tensor,
    noise_alpha: Tensor,
    document: Tensor | None = None,
    position: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    replica: int = 0,
    sample_offset: int = 0,
    position_offset: int = 0,
    padding_idx: int = -1,
    embed_scale: float = 1.0,
    *,
    out: Tensor,
) -> None:
    ids = input_ids.reshape(-1).long()
    outside = (ids < 0) | (ids >= weight.shape[0])
    if ids.device.type == "cpu" and bool(outside.any()):
        raise IndexError(
            f"input_ids must lie in [0, num_embeddings = {weight.shape[0]}), got "
            f"{int(ids[outside][0])}"
        )
    safe = torch.where(outside, 0, ids)

    def rows(chunk: slice) -> Tensor:
        if (
            weight.shape[0] == 0
        ):  # only an accelerator gets here with tokens: every id is out of range
            return weight.new_full((outside[chunk].numel(), weight.shape[1]), float("nan"))
        embedded = reference.embed(safe[chunk], weight, embed_scale)
        if ids.device.type == "cpu":
            return embedded
        return torch.where(outside[chunk, None], float("nan"), embedded)

    _reference_rows_out(
        rows,
        input_ids.shape,
        weight.shape[1],
        seed,
        noise_alpha,
        layouts.Layout(document, position, lengths, cu_seqlens),
        (replica, sample_offset, position_offset),
        out,
    )


def _reference_add_out(
    inputs_embeds: Tensor,
    seed: Tensor,
    noise_alpha: Tensor,
    document: Tensor | None = None,
    position: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    replica: int = 0,
    sample_offset: int = 0,
    position_offset: int = 0,
    *,
    out: Tensor,
) -> None:
    embedding_dim = inputs_embeds.shape[-1]
    embeddings = inputs_embeds.reshape(inputs_embeds.shape[:-1].numel(), embedding_dim)
    _reference_rows_out(
        lambda chunk: embeddings[chunk],
        inputs_embeds.shape[:-1],
        embedding_dim,
        seed,
        noise_alpha,
        layouts.Layout(document, position, lengths, cu_seqlens),
        (replica, sample_offset, position_offset),
        out,
    )


def _reference_rows_out(
    rows: Callable[[slice], Tensor],
    shape: torch.Size,
    embedding_dim: int,
    seed: Tensor,
    noise_alpha: Tensor,
    layout: layouts.Layout,
    offsets: tuple[int, int, int],
    out: Tensor,
    distribution: str = "uniform",
    equal_variance: bool = True,
) -> None:
    """reference.py over all tokens, a bounded number of rows at a time."""
    replica, sample_offset, position_offset = offsets
    sample, position, length = layouts.per_token(
        layout, shape, out.device, sample_offset, position_offset
    )
    flat = out.view(sample.numel(), embedding_dim)
    for chunk in _chunks(sample.numel(), embedding_dim):
        noise = reference.neftune_noise(
            sample[chunk],
            position[chunk],
            length[chunk],
            embedding_dim,
            noise_alpha,
            seed,
            replica,
            distribution,
            equal_variance,
        )
        flat[chunk] = reference.add_noise(rows(chunk), noise)


def _chunks(num_rows: int, embedding_dim: int) -> list[slice]:
    rows = max(1, REFERENCE_CHUNK // max(1, embedding_dim))
    return [slice(start, start + rows) for start in range(0, num_rows, rows)]


def _add_variant(
    inputs_embeds: Tensor,
    seed: Tensor,
    noise_alpha: Tensor,
    document: Tensor | None = None,
    position: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    replica: int = 0,
    sample_offset: int = 0,
    position_offset: int = 0,
    distribution: str = "normal",
    equal_variance: bool = True,
    *,
    family: str,
) -> Tensor:
    """reference.py; or the same with the draws of the family's own add_noise, as noise of step 1 on
    zeros.
    """
    device, shape, embedding_dim = (
        inputs_embeds.device,
        inputs_embeds.shape[:-1],
        inputs_embeds.shape[-1],
    )
    embeddings = inputs_embeds.reshape(shape.numel(), embedding_dim)
    layout = layouts.Layout(document, position, lengths, cu_seqlens)
    out = inputs_embeds.new_empty(inputs_embeds.shape)
    if family == "reference_":
        offsets = (replica, sample_offset, position_offset)
        _reference_rows_out(
            lambda chunk: embeddings[chunk],
            shape,
            embedding_dim,
            seed,
            noise_alpha,
            layout,
            offsets,
            out,
            distribution,
            equal_variance,
        )
        return out
    sample, place, length = layouts.per_token(layout, shape, device, 0, position_offset)
    counts = cu_seqlens if lengths is None else lengths
    samples = layouts.rows_and_columns(shape)[0] if counts is None else counts.numel()
    # Every sample counts one token, so alpha / √(1·d) is 2³¹ exactly and the noise is the lattice
    # value x itself.
    lattice = getattr(torch.ops.neftune_kernels, f"{family}add_noise")(
        torch.zeros((), dtype=torch.float32, device=device).expand(inputs_embeds.shape),
        seed,
        torch.full((), 2.0**31 * math.sqrt(embedding_dim), dtype=torch.float64, device="cpu"),
        torch.where(length > 0, sample, -1),
        place,
        torch.ones(samples, dtype=torch.int64, device=device),
        None,
        replica,
        sample_offset,
    ).view_as(embeddings)
    flat = out.view_as(embeddings)
    for chunk in _chunks(shape.numel(), embedding_dim):
        noise = reference.scaled_draws(
            lattice[chunk], length[chunk], embedding_dim, noise_alpha, distribution, equal_variance
        )
        flat[chunk] = reference.add_noise(embeddings[chunk], noise)
    return out


def _noisy_documents(
    noise_mask: Tensor,
    document: Tensor | None = None,
    position: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_offset: int = 0,
) -> Tensor:
    return layouts.noisy_documents(
        noise_mask, layouts.Layout(document, position, lengths, cu_seqlens), position_offset
    )


def _functional(
    out_overload: Callable[..., None], new_output: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        out = new_output(*args)
        out_overload(*args, out=out)
        return out

    return call


def _fake_embedding(input_ids: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return weight.new_empty((*input_ids.shape, weight.shape[1]))


def _fake_add(inputs_embeds: Tensor, *args: Any) -> Tensor:
    return inputs_embeds.new_empty(inputs_embeds.shape)


def _fake_out(*args: Any, out: Tensor) -> None:
    pass


def _fake_mask_layout(
    attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    given = attention_mask if attention_mask is not None else position_ids
    assert given is not None
    document, position, lengths = (
        given.new_empty((given.numel(),), dtype=torch.int64) for _ in range(3)
    )
    return document, position, lengths


def _fake_noisy_documents(noise_mask: Tensor, *args: Any) -> Tensor:
    return noise_mask.new_empty((noise_mask.numel(),), dtype=torch.int64)


def _fake_padding_layout(input_ids: Tensor, padding_idx: int) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_mask_layout(input_ids, None)


def _padding_layout(family: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Tokens equal to padding_idx are padding: mask_layout of the mask that says so."""
    packet = getattr(torch.ops.neftune_kernels, f"{family}mask_layout")
    return lambda input_ids, padding_idx: packet((input_ids != padding_idx).contiguous(), None)


GRADIENT_STRIP = 64  # columns


def embedding_weight_grad(
    grad: Tensor, input_ids: Tensor, num_embeddings: int, padding_idx: int, embed_scale: float
) -> Tensor:
    """F.embedding's own dense gradient of `grad * embed_scale`, bit for bit.

    A scale is applied in strips of columns, whose sums do not depend on each other, over the ids
    that occur: no second (tokens, d) or (V, d) buffer is made. Where the compiler or torch.func
    traces, it fuses the product itself and cannot follow ids that depend on data.
    """
    dense = torch.ops.aten.embedding_dense_backward
    if embed_scale == 1:
        return dense(grad, input_ids, num_embeddings, padding_idx, False)
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or type(grad) is not Tensor or grad.device.type != "cpu" or torch.is_grad_enabled():
        return dense(grad * embed_scale, input_ids, num_embeddings, padding_idx, False)
    rows, local_ids = input_ids.unique(return_inverse=True)
    local_padding = (
        int((rows == padding_idx).nonzero()[0])
        if padding_idx >= 0 and bool((rows == padding_idx).any())
        else -1
    )
    weight_grad = grad.new_zeros((num_embeddings, grad.shape[-1]))
    for start in range(0, grad.shape[-1], GRADIENT_STRIP):
        strip = slice(start, start + GRADIENT_STRIP)
        weight_grad[rows, strip] = dense(
            grad[..., strip] * embed_scale, local_ids, rows.numel(), local_padding, False
        )
    return weight_grad


def _setup_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input_ids, weight = inputs[0], inputs[1]
    ctx.num_embeddings, ctx.padding_idx, ctx.embed_scale = weight.shape[0], inputs[-2], inputs[-1]
    ctx.save_for_backward(input_ids)


def _backward_embedding(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (input_ids,) = ctx.saved_tensors
    weight_grad = None
    if ctx.needs_input_grad[1]:
        weight_grad = embedding_weight_grad(
            grad, input_ids, ctx.num_embeddings, ctx.padding_idx, ctx.embed_scale
        )
    return (None, weight_grad, *(None,) * 11)


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.other_inputs = len(inputs) - 1


def _backward_add(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (grad, *(None,) * ctx.other_inputs)


# ---- an accelerator's first call


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    return next(value for value in args if value is not None)


def _first_compared(name: str, overload: str = "default") -> Callable[..., Any]:
    """The CUDA operator of that name, its first call on a device compared with the reference."""
    serve, otherwise = (
        getattr(getattr(torch.ops.neftune_kernels, family + name), overload)
        for family in ("cuda_", "reference_")
    )
    return _compared(name, getattr(serve, "_op", serve), getattr(otherwise, "_op", otherwise))


def _compared(
    name: str, serve: Callable[..., Any], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    """`serve`, and from its first wrong bit on `otherwise`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        device = _first_tensor(args).device
        done = ("cuda", device.type, name)
        if self_check.failure("cuda", device.type):
            return otherwise(*args, **kwargs)
        if done in self_check.passed or not self_check.wanted(device):
            return serve(*args, **kwargs)
        expected = _expected_rows(name, args) if kwargs else None
        served = serve(*args, **kwargs)
        if not kwargs:
            mask, places = _mask_of(args) if name == "padding_layout" else args
            agrees = self_check.numbering_agrees("cuda", mask, places, served)
        elif expected is None:
            return served
        else:
            agrees = self_check.rows_agree("cuda", kwargs["out"], expected)
        if not agrees:
            return otherwise(*args, **kwargs)
        self_check.passed.add(done)
        return served

    return call


def _expected_rows(name: str, args: tuple[Any, ...]) -> self_check.Expected | None:
    """What the reference has for some tokens of an out operator's arguments."""
    if name == "noisy_embedding":
        input_ids, weight, *args = args  # type: ignore[assignment]
        source, shape, scale = weight, input_ids.shape, args[10] if len(args) > 10 else 1.0
    else:
        embeds, *args = args  # type: ignore[assignment]
        input_ids, shape, scale = None, embeds.shape[:-1], 1.0
        source = embeds.reshape(shape.numel(), embeds.shape[-1])
    seed, noise_alpha, *rest = args
    defaults = [None, None, None, None, 0, 0, 0]
    layout_and_offsets = [*rest[:7], *defaults[len(rest[:7]) :]]
    layout, offsets = layouts.Layout(*layout_and_offsets[:4]), tuple(layout_and_offsets[4:])
    return self_check.expected_rows(
        source, shape, seed, noise_alpha, layout, offsets, input_ids, scale
    )


def _mask_of(args: tuple[Any, ...]) -> tuple[Tensor, None]:
    """padding_layout's arguments as mask_layout's."""
    input_ids, padding_idx = args
    return input_ids != padding_idx, None


for _family in FAMILIES:
    for _name, _out, _new, _fake, _setup, _backward in (
        (
            "noisy_embedding",
            _reference_embedding_out,
            _fake_embedding,
            _fake_embedding,
            _setup_embedding,
            _backward_embedding,
        ),
        ("add_noise", _reference_add_out, _fake_add, _fake_add, _setup_add, _backward_add),
    ):
        _packet = getattr(torch.ops.neftune_kernels, _family + _name)
        _serve = _first_compared(_name, "out") if _family == "cuda_" else _packet.out
        library.impl(f"{_family}{_name}.out", _out, "CompositeExplicitAutograd")
        library.impl(f"{_family}{_name}", _functional(_serve, _new), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{_family}{_name}", _fake, lib=library)
        torch.library.register_fake(f"{NAMESPACE}::{_family}{_name}.out", _fake_out, lib=library)
        torch.library.register_autograd(
            f"{NAMESPACE}::{_family}{_name}", _backward, setup_context=_setup, lib=library
        )
    library.impl(
        f"{_family}add_variant_noise",
        partial(_add_variant, family=_family),
        "CompositeExplicitAutograd",
    )
    torch.library.register_fake(f"{NAMESPACE}::{_family}add_variant_noise", _fake_add, lib=library)
    torch.library.register_autograd(
        f"{NAMESPACE}::{_family}add_variant_noise",
        _backward_add,
        setup_context=_setup_add,
        lib=library,
    )
    library.impl(f"{_family}mask_layout", layouts.mask_layout, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"{NAMESPACE}::{_family}mask_layout", _fake_mask_layout, lib=library
    )
    library.impl(f"{_family}padding_layout", _padding_layout(_family), "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"{NAMESPACE}::{_family}padding_layout", _fake_padding_layout, lib=library
    )
library.impl("noisy_documents", _noisy_documents, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::noisy_documents", _fake_noisy_documents, lib=library)
library.impl("draw_seed", lambda like: draw_seed(like.device), "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::draw_seed", lambda like: like.new_empty(()), lib=library)


class NoisyEmbedding(torch.autograd.Function):
    """noisy_embedding as a Function, for torch.func and torch.compile: `apply(operator_name,
    input_ids, weight, ...)`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(operator_name: str, *args: Any) -> Tensor:
        return getattr(torch.ops.neftune_kernels, operator_name)(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup_embedding(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (input_ids,) = ctx.saved_tensors
        weight_grad = None
        if ctx.needs_input_grad[2]:
            weight_grad = embedding_weight_grad(
                grad, input_ids, ctx.num_embeddings, ctx.padding_idx, ctx.embed_scale
            )
        return (None, None, weight_grad, *(None,) * 11)


class AddNoise(torch.autograd.Function):
    """add_noise or add_variant_noise as a Function: the gradient passes through.

    `apply(operator_name, inputs_embeds, ...)`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(operator_name: str, *args: Any) -> Tensor:
        return getattr(torch.ops.neftune_kernels, operator_name)(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup_add(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (None, *_backward_add(ctx, grad))


# ---- the native libraries


class NativeLibrary(NamedTuple):
    handle: ctypes.CDLL | None
    reason: str  # "" when loaded


def _load_library(name: str, switch: str, log: str, unfit: str = "") -> NativeLibrary:
    """The library `name` beside the package, unless the environment's `switch` is 1 or this torch
    is `unfit` for it.
    """
    if os.environ.get(switch) == "1":
        return NativeLibrary(None, f"switched off by {switch}=1")
    folder = pathlib.Path(__file__).parent
    paths = sorted(
        path
        for suffix in ("so", "pyd")
        for path in (*folder.glob(f"{name}.{suffix}"), *folder.glob(f"{name}.*.{suffix}"))
    )
    if not paths:
        reason = (
            (folder / log).read_text().strip()
            if (folder / log).exists()
            else "no library beside the package"
        )
        return NativeLibrary(None, f"not built: {reason}")
    if unfit:
        return NativeLibrary(None, unfit)
    try:
        return NativeLibrary(
            ctypes.CDLL(str(paths[0])), ""
        )  # its static initialisers register the kernels
    except OSError as error:
        return NativeLibrary(None, f"{paths[0].name} failed to load: {error}")


def _unfit_for_cuda() -> str:
    if torch.version.cuda is not None:
        return ""
    return f"built, but not loaded: this torch ({torch.__version__}) has no CUDA"


native = _load_library("_C", "NEFTUNE_DISABLE_CPP", "_build_error.txt")
native_cuda = _load_library(
    "_C_cuda", "NEFTUNE_DISABLE_CUDA", "_build_error_cuda.txt", _unfit_for_cuda()
)


def simd_level() -> str:
    """The instruction set the C++ kernel uses on this machine ("avx512", "avx2", "neon", "scalar"),
    or "none" without the library.
    """
    if native.handle is None:
        return "none"
    native.handle.neftune_kernels_simd_level.restype = ctypes.c_char_p
    return str(native.handle.neftune_kernels_simd_level().decode())


# ---- the Triton kernels

TRITON_DEVICES = ("cuda", "xpu")  # torch calls AMD's GPUs cuda too
NO_TRITON = "triton is not installed (pip install triton)"


def _no_triton() -> str:
    if os.environ.get("NEFTUNE_DISABLE_TRITON") == "1":
        return "switched off by NEFTUNE_DISABLE_TRITON=1"
    return NO_TRITON if importlib.util.find_spec("triton") is None else ""


@cache
def _load_triton() -> ModuleType | str:
    """triton_kernels, imported when first needed; or the reason why there is none."""
    if reason := _no_triton():
        return reason
    try:
        return importlib.import_module("neftune_kernels.triton_kernels")
    except Exception as error:  # whatever a broken or foreign triton raises
        return f"triton failed to load: {type(error).__name__}: {error}"


def _on_gpu(
    name: str, otherwise: Callable[..., Any], cuda: Callable[..., Any] | None
) -> Callable[..., Any]:
    """An operator's implementation on a GPU: the Triton launcher of that name, without triton the
    CUDA library's, else the reference.
    """

    def serve(*args: Any, **kwargs: Any) -> Any:
        device_type = _first_tensor(args).device.type
        kernels = _load_triton()
        if not isinstance(kernels, str) and not self_check.failure("triton", device_type):
            served = getattr(kernels, name)(*args, **kwargs)
            if served is not NotImplemented:
                return served
        elif cuda is not None and not self_check.failure("cuda", device_type):
            return cuda(*args, **kwargs)
        return otherwise(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        out = kwargs.get("out")
        if out is not None and out.dtype not in CPP_DTYPES:
            return otherwise(*args, **kwargs)
        if out is None or out.is_contiguous():
            return serve(*args, **kwargs)
        rounded = torch.empty_like(out, memory_format=torch.contiguous_format)
        serve(*args, out=rounded)
        out.copy_(rounded)

    return call


for _name, _overload, _launcher, _otherwise in (
    ("noisy_embedding", "out", "noisy_embedding_out", _reference_embedding_out),
    ("add_noise", "out", "add_noise_out", _reference_add_out),
    ("mask_layout", "default", "mask_layout", layouts.mask_layout),
    ("padding_layout", "default", "padding_layout", _padding_layout("reference_")),
):
    _schema = _name if _overload == "default" else f"{_name}.{_overload}"
    _cuda = None if native_cuda.reason else _first_compared(_name, _overload)
    library.impl(_schema, _on_gpu(_launcher, _otherwise, _cuda), "CUDA")
    library.impl(_schema, _on_gpu(_launcher, _otherwise, None), "XPU")


def asked_outside_the_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result, as Dynamo cannot trace the import machinery; but that
    imports Dynamo to set this mark.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@asked_outside_the_graph
def _triton_reason(device_type: str | None) -> str:
    """Empty where Triton can serve tensors of that device (None: of any), else why not.

    Does not import triton.
    """
    if device_type is not None and device_type not in TRITON_DEVICES:
        return f"wrong device: runs on GPUs, not on {device_type}"
    if _load_triton.cache_info().currsize and isinstance(reason := _load_triton(), str):
        return reason
    if reason := _no_triton() or self_check.failure("triton", device_type):
        return reason
    devices = TRITON_DEVICES if device_type is None else (device_type,)
    if not any(torch.get_device_module(name).is_available() for name in devices):
        return f"no device: torch sees no {' or '.join(devices)}"
    return ""


# ---- the CUDA C++ kernels


@asked_outside_the_graph
def _cuda_reason(device_type: str | None) -> str:
    """Empty where the CUDA library serves tensors of that device (None: of any), else why not."""
    if device_type not in (None, "cuda"):
        return f"wrong device: runs on GPUs, not on {device_type}"
    if reason := native_cuda.reason or self_check.failure("cuda", device_type):
        return reason
    return "" if torch.cuda.is_available() else "no device: torch sees no cuda"


# ---- the table of backends

BACKENDS = ("reference", "cpp", "triton", "cuda")
DEFAULT_BACKEND = os.environ.get("NEFTUNE_BACKEND") or None  # for who cannot reach the code
CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE_DTYPES = (*CPP_DTYPES, torch.float64)
CPP_SERVES = dict.fromkeys(CPP_DTYPES, not native.reason and DEFAULT_BACKEND in (None, "cpp"))


def available_backends(device_type: str | None = None) -> dict[str, str]:
    """Every backend's name → "available", or the reason why it is not.

    Args:
        device_type: "cpu", "cuda", ...: judge for tensors of that device; None: for any device.

    Example:
        >>> available_backends("cpu")["reference"]
        'available'
    """
    if device_type is not None:
        try:
            device_type = torch.device(device_type).type
        except RuntimeError as error:
            raise ValueError(f"device_type: {error}") from None
    cpp = native.reason or "available"
    if cpp == "available" and device_type not in (None, "cpu"):
        cpp = f"wrong device: runs on cpu, not on {device_type}"
    gpu = {
        "triton": _triton_reason(device_type) or "available",
        "cuda": _cuda_reason(device_type) or "available",
    }
    return {"reference": "available", "cpp": cpp, **gpu}


_warned_devices: set[str] = set()


@cache
def _import_for(device_type: str) -> str:
    reason: str = _triton_reason(device_type)
    if not reason and isinstance(loaded := _load_triton(), str):
        reason = loaded
    return reason


@asked_outside_the_graph  # not the cached function: Dynamo looks through its cache
def _triton_fails(device_type: str) -> str:
    """_triton_reason, after importing it if nothing spoke against that."""
    return self_check.failure("triton", device_type) or _import_for(device_type)


@cache
def _float64_error(device_type: str) -> str:
    try:
        (torch.full((), 3.0, dtype=torch.float64, device=device_type).sqrt() * 2).float()
    except Exception as error:  # TypeError, RuntimeError: each device has its own words
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


@asked_outside_the_graph
def _no_float64(device_type: str) -> str:
    """Why no backend can serve a device without float64 (MPS, some of Intel's); "" with it."""
    error: str = _float64_error(device_type)
    if not error:
        return ""
    return (
        f"embeddings on {device_type} get no NEFTune noise: its magnitude alpha/√(L·d) is computed "
        f"in float64, which {device_type} does not have ({error}). Keep the embedding on the CPU "
        "and move its output, or set noise_alpha to 0"
    )


def choose_backend(
    backend: str | None, device: torch.device, dtype: torch.dtype, noisy: bool = True
) -> str:
    """The backend's name for tensors of this device and dtype, which are to get noise or not;
    ValueError with the reason where `backend` cannot serve them.
    """
    if dtype not in REFERENCE_DTYPES:
        raise TypeError(f"embeddings must be float32, bfloat16, float16 or float64, got {dtype}")
    if (
        noisy
        and device.type not in ("cpu", "cuda", "meta")
        and (reason := _no_float64(device.type))
    ):
        raise ValueError(reason)
    said_by = ""
    if backend is None and DEFAULT_BACKEND is not None:
        backend, said_by = DEFAULT_BACKEND, " (NEFTUNE_BACKEND)"
    if backend is None:
        if device.type == "cpu" or device.type == "meta":
            return "cpp" if not native.reason and dtype in CPP_DTYPES else "reference"
        if dtype not in CPP_DTYPES:
            return "reference"
        triton, cuda = _triton_fails(device.type), _cuda_reason(device.type)
        if not triton or not cuda:
            return "cuda" if triton else "triton"
        if device.type not in _warned_devices and not torch.compiler.is_compiling():
            _warned_devices.add(device.type)
            warnings.warn(
                f"neftune_kernels has no fused kernel for {device.type} here and uses its slow "
                f"reference backend: "
                f"triton: {triton}; cuda: {cuda}",
                stacklevel=4,
            )
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(
            f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, "
            f"got {backend!r}{said_by}"
        )
    reason = available_backends(device.type)[backend]
    if backend == "triton" and reason == "available":
        reason = _triton_fails(device.type) or reason
    if reason != "available":
        raise ValueError(f"backend {backend!r}{said_by} is not available: {reason}")
    if backend != "reference" and dtype not in CPP_DTYPES:
        raise ValueError(
            f"backend {backend!r}{said_by} is not available: "
            f"dtype {dtype} is served by the reference backend alone"
        )
    return backend


def operator_name(name: str, backend: str) -> str:
    return f"{backend}_{name}" if backend in ("reference", "cuda") else name


def _direct(name: str, backend: str) -> Callable[..., None]:
    """An out overload's bound C++ entry: what OpOverload.__call__ itself calls, one Python frame
    sooner.
    """
    overload = getattr(torch.ops.neftune_kernels, operator_name(name, backend)).out
    return getattr(overload, "_op", overload)


def _past_the_dispatcher(name: str) -> Callable[..., None]:
    """The Triton launcher itself, which spares the dispatcher's way into Python; the operator where
    a mode or subclass must see it.
    """
    operator, reference_operator = _direct(name, "triton"), _direct(name, "reference")

    def call(first: Tensor, *args: Any, out: Tensor) -> None:
        kernels = _load_triton()
        if (
            isinstance(kernels, str)
            or type(first) is not Tensor
            or torch._C._len_torch_dispatch_stack()
        ):
            operator(first, *args, out=out)
        elif getattr(kernels, f"{name}_out")(first, *args, out=out) is NotImplemented:
            reference_operator(first, *args, out=out)

    return call


EMBEDDING_OUT = {backend: _direct("noisy_embedding", backend) for backend in BACKENDS}
ADD_OUT = {backend: _direct("add_noise", backend) for backend in BACKENDS}
EMBEDDING_OUT["triton"] = _past_the_dispatcher("noisy_embedding")
ADD_OUT["triton"] = _past_the_dispatcher("add_noise")
EMBEDDING_OUT["cuda"] = _first_compared("noisy_embedding", "out")
ADD_OUT["cuda"] = _first_compared("add_noise", "out")
_NUMBERING = {name: _first_compared(name) for name in ("mask_layout", "padding_layout")}


def numbering(name: str, backend: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The operator `mask_layout` or `padding_layout` of that backend."""
    if backend == "cuda" and not torch.compiler.is_compiling():
        return _NUMBERING[name]
    return getattr(torch.ops.neftune_kernels, operator_name(name, backend))
