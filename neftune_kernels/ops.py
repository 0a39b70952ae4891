"""The contract of the operators: one table of schemas and implementations, fakes and autograd.

`torch.ops.neftune_kernels.noisy_embedding` (lookup, scale, noise) and `add_noise` (noise on
embeddings made elsewhere) dispatch to the best kernel of the device; their twins
`reference_noisy_embedding` and `reference_add_noise` always run `reference.py`, the family
`cuda_...` the CUDA C++ kernels. What is registered here is the reference for every device: native
libraries and the Triton kernels only add implementations (backends.py), so an install without a
compiler or without triton has the same operators. `out` overloads have no autograd.
`add_variant_noise`, for the other distributions, is `add_noise` unfused: it asks the kernel for the
uniform draws alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gradients, reference_ops
from . import layout as layouts
from .noise import draw_seed
from .torch_internals import entry

NAMESPACE = "neftune_kernels"
TAGS = (torch.Tag.pt2_compliant_tag,)
# alpha may be the host's, read at the launch, so a CUDA graph would replay the first one: Inductor
# is to launch these outside its graphs; but for their capturable twins
LAUNCH_TAGS = (
    (*TAGS, torch.Tag.cudagraph_unsafe) if hasattr(torch.Tag, "cudagraph_unsafe") else TAGS
)
DRAW_TAGS = (*TAGS, torch.Tag.nondeterministic_seeded)

LAYOUT = (
    "Tensor? document=None, Tensor? position=None, Tensor? lengths=None, Tensor? cu_seqlens=None, "
    "Tensor? numbering=None"
)
NOISE = (
    f"Tensor seed, Tensor noise_alpha, {LAYOUT}, "
    "SymInt replica=0, SymInt sample_offset=0, SymInt position_offset=0"
)
EMBEDDING = (
    f"Tensor input_ids, Tensor weight, {NOISE}, SymInt padding_idx=-1, float embed_scale=1.0"
)
ADD = f"Tensor inputs_embeds, {NOISE}"
VARIANT = f'{ADD}, str distribution="normal", bool equal_variance=True'
PER_TOKEN = "(Tensor, Tensor, Tensor)"  # document, position, lengths: layout.mask_layout


# ---- fakes


READ = ("seed", "noise_alpha", *layouts.Layout._fields)  # beside the first arguments


def check_devices(names: tuple[str, ...], tensors: tuple[Any, ...]) -> None:
    """One device for all tensors, but that noise_alpha may be the host's.

    Where one is on the meta device torch asks this fake alone, and nothing would be computed.
    """
    device: torch.device | None = None
    for name, tensor in zip(names, tensors, strict=False):
        if not isinstance(tensor, Tensor):
            continue
        if name == "noise_alpha" and tensor.device.type == "cpu":
            continue
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(
                f"{first} is on {device}, {name} on {tensor.device}: they must be on one device"
            )


def fake_embedding(*args: Any) -> Tensor:
    input_ids, weight, *_ = args
    check_devices(("input_ids", "weight", *READ), args)
    return weight.new_empty((*input_ids.shape, weight.shape[1]))


def fake_add(*args: Any) -> Tensor:
    inputs_embeds, *_ = args
    check_devices(("inputs_embeds", *READ), args)
    return inputs_embeds.new_empty(inputs_embeds.shape)


def fake_embedding_out(*args: Any, out: Tensor) -> None:
    check_devices(("out", "input_ids", "weight", *READ), (out, *args))


def fake_add_out(*args: Any, out: Tensor) -> None:
    check_devices(("out", "inputs_embeds", *READ), (out, *args))


def fake_embedding_gradient_out(*args: Any, out: Tensor) -> None:
    check_devices(("out", "grad", "input_ids"), (out, *args))


def fake_sorted_gradient_out(*args: Any, out: Tensor) -> None:
    check_devices(("out", "grad", "ids", "order", "scratch"), (out, *args))


def fake_mask_layout(
    attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    given = attention_mask if attention_mask is not None else position_ids
    assert given is not None
    check_devices(("attention_mask", "position_ids"), (attention_mask, position_ids))
    document, position, lengths = (
        given.new_empty((given.numel(),), dtype=torch.int64) for _ in range(3)
    )
    return document, position, lengths


def fake_padding_layout(input_ids: Tensor, padding_idx: int) -> tuple[Tensor, Tensor, Tensor]:
    return fake_mask_layout(input_ids, None)


def fake_number_documents(attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    given = attention_mask if attention_mask is not None else position_ids
    assert given is not None
    check_devices(("attention_mask", "position_ids"), (attention_mask, position_ids))
    rows, _ = layouts.rows_and_columns(given.shape)
    return given.new_empty((layouts.ROW_WORDS * rows + 3 * given.numel(),), dtype=torch.int32)


def fake_number_padding(input_ids: Tensor, padding_idx: int) -> Tensor:
    return fake_number_documents(input_ids, None)


def fake_noisy_documents(noise_mask: Tensor, *args: Any) -> Tensor:
    return noise_mask.new_empty((noise_mask.numel(),), dtype=torch.int64)


def fake_untailed(
    input_ids: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None, *_: Any
) -> Tensor:
    names = ("input_ids", "position_ids", "cu_seqlens")
    check_devices(names, (input_ids, position_ids, cu_seqlens))
    dtype = torch.bool if cu_seqlens is None else torch.int64
    return input_ids.new_empty(input_ids.shape, dtype=dtype)


def fake_draw_seed(like: Tensor, owner: str = "") -> Tensor:
    return like.new_empty(())


# ---- implementations made of other operators


def by_out(operator: str, new_output: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The functional overload by the `out` overload of the same operator."""

    def call(*args: Any) -> Tensor:
        out = new_output(*args)
        OUT[operator](*args, out=out)
        return out

    return call


def padding_by_mask(operator: str) -> Callable[..., Any]:
    """Tokens equal to padding_idx are padding: that operator on masks, of the mask saying so."""

    def call(input_ids: Tensor, padding_idx: int) -> Any:
        mask = (input_ids != padding_idx).contiguous()
        return getattr(torch.ops.neftune_kernels, operator)(mask, None)

    return call


# Called with the owner and the seed of what compiled code draws: nothing else of it runs in Python.
when_drawn: list[Callable[[str, Tensor], None]] = []


def draw_seed_like(like: Tensor, owner: str = "") -> Tensor:
    seed = draw_seed(like.device)
    if owner:
        for told in when_drawn:
            told(owner, seed)
    return seed


# ---- autograd: the noise is a constant


def setup_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input_ids, weight, *_, padding_idx, embed_scale = inputs
    ctx.num_embeddings = weight.shape[0]
    ctx.padding_idx = padding_idx
    ctx.embed_scale = embed_scale
    ctx.gradient = None  # deterministic_grad's operator; these do not know the word
    ctx.save_for_backward(input_ids)


class EmbeddingGradients(NamedTuple):
    """One for each argument of noisy_embedding."""

    input_ids: None = None
    weight: Tensor | None = None
    seed: None = None
    noise_alpha: None = None
    document: None = None
    position: None = None
    lengths: None = None
    cu_seqlens: None = None
    numbering: None = None
    replica: None = None
    sample_offset: None = None
    position_offset: None = None
    padding_idx: None = None
    embed_scale: None = None


class AddGradients(NamedTuple):
    """One for each argument of add_noise, in front of the variant's two."""

    inputs_embeds: Tensor | None = None
    seed: None = None
    noise_alpha: None = None
    document: None = None
    position: None = None
    lengths: None = None
    cu_seqlens: None = None
    numbering: None = None
    replica: None = None
    sample_offset: None = None
    position_offset: None = None


def weight_gradient(ctx: Any, grad: Tensor) -> Tensor:
    (input_ids,) = ctx.saved_tensors
    how = grad, input_ids, ctx.num_embeddings, ctx.padding_idx, ctx.embed_scale
    if ctx.gradient is None:
        return gradients.dense(*how)
    return gradients.deterministic(*how, operator=ctx.gradient)


def backward_embedding(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, weight, *_ = ctx.needs_input_grad
    return tuple(EmbeddingGradients(weight=weight_gradient(ctx, grad) if weight else None))


def setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def backward_add(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(AddGradients(inputs_embeds=grad))


def backward_variant(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    distribution = equal_variance = None
    return *AddGradients(inputs_embeds=grad), distribution, equal_variance


class Autograd(NamedTuple):
    setup: Callable[..., None]
    backward: Callable[..., tuple[Tensor | None, ...]]


OF_EMBEDDING = Autograd(setup_embedding, backward_embedding)
OF_ADD = Autograd(setup_nothing, backward_add)
OF_VARIANT = Autograd(setup_nothing, backward_variant)


# ---- the table


class Operator(NamedTuple):
    name: str
    schema: str
    implementation: Callable[..., Any]  # for every device, unless somebody registers a better one
    fake: Callable[..., Any]
    autograd: Autograd | None = None
    tags: tuple[torch.Tag, ...] = TAGS


def embedding_operators(name: str) -> tuple[Operator, Operator]:
    by_reference = reference_ops.noisy_embedding_out
    functional = by_out(name, fake_embedding)
    return (
        Operator(
            f"{name}.out",
            f"({EMBEDDING}, *, Tensor(a!) out) -> ()",
            by_reference,
            fake_embedding_out,
            None,
            LAUNCH_TAGS,
        ),
        Operator(
            name, f"({EMBEDDING}) -> Tensor", functional, fake_embedding, OF_EMBEDDING, LAUNCH_TAGS
        ),
    )


def add_operators(name: str) -> tuple[Operator, Operator]:
    by_reference = reference_ops.add_noise_out
    functional = by_out(name, fake_add)
    return (
        Operator(
            f"{name}.out",
            f"({ADD}, *, Tensor(a!) out) -> ()",
            by_reference,
            fake_add_out,
            None,
            LAUNCH_TAGS,
        ),
        Operator(name, f"({ADD}) -> Tensor", functional, fake_add, OF_ADD, LAUNCH_TAGS),
    )


def variant_operator(name: str, uniform: str) -> Operator:
    """The operator of that name; its uniform draws are the add_noise operator `uniform`'s."""
    implementation = partial(reference_ops.add_variant_noise, uniform=uniform)
    return Operator(
        name, f"({VARIANT}) -> Tensor", implementation, fake_add, OF_VARIANT, LAUNCH_TAGS
    )


def mask_operator(name: str) -> Operator:
    schema = f"(Tensor? attention_mask, Tensor? position_ids) -> {PER_TOKEN}"
    return Operator(name, schema, layouts.mask_layout, fake_mask_layout)


def padding_operator(name: str, mask_operator: str) -> Operator:
    schema = f"(Tensor input_ids, SymInt padding_idx) -> {PER_TOKEN}"
    return Operator(name, schema, padding_by_mask(mask_operator), fake_padding_layout)


def number_operator(name: str) -> Operator:
    schema = "(Tensor? attention_mask, Tensor? position_ids) -> Tensor"
    return Operator(name, schema, layouts.number_documents, fake_number_documents)


def number_padding_operator(name: str, number_operator: str) -> Operator:
    schema = "(Tensor input_ids, SymInt padding_idx) -> Tensor"
    return Operator(name, schema, padding_by_mask(number_operator), fake_number_padding)


def gradient_operator(name: str) -> Operator:
    schema = (
        "(Tensor grad, Tensor input_ids, SymInt padding_idx, float embed_scale, "
        "bool scale_grad_by_freq, *, Tensor(a!) out) -> ()"
    )
    by_reference = reference_ops.embedding_gradient_out
    return Operator(f"{name}.out", schema, by_reference, fake_embedding_gradient_out)


BY_DEVICE = (
    # the device's best kernel
    *embedding_operators("noisy_embedding"),
    *add_operators("add_noise"),
    variant_operator("add_variant_noise", "add_noise"),
    mask_operator("mask_layout"),
    padding_operator("padding_layout", "mask_layout"),
    number_operator("number_documents"),
    number_padding_operator("number_padding", "number_documents"),
    # reference.py, whatever the device
    *embedding_operators("reference_noisy_embedding"),
    *add_operators("reference_add_noise"),
    variant_operator("reference_add_variant_noise", "reference_add_noise"),
    mask_operator("reference_mask_layout"),
    padding_operator("reference_padding_layout", "reference_mask_layout"),
    number_operator("reference_number_documents"),
    number_padding_operator("reference_number_padding", "reference_number_documents"),
    # the CUDA C++ kernels
    *embedding_operators("cuda_noisy_embedding"),
    *add_operators("cuda_add_noise"),
    variant_operator("cuda_add_variant_noise", "cuda_add_noise"),
    mask_operator("cuda_mask_layout"),
    padding_operator("cuda_padding_layout", "cuda_mask_layout"),
    number_operator("cuda_number_documents"),
    number_padding_operator("cuda_number_padding", "cuda_number_documents"),
    gradient_operator("cuda_embedding_gradient"),
    # of tokens that cuda_gradients.py has sorted
    Operator(
        "cuda_sorted_gradient.out",
        "(Tensor grad, Tensor ids, Tensor order, Tensor(a!) scratch, SymInt chunk, "
        "SymInt padding_idx, float embed_scale, bool scale_grad_by_freq, *, Tensor(b!) out) -> ()",
        reference_ops.sorted_gradient_out,
        fake_sorted_gradient_out,
    ),
    # one for all
    gradient_operator("embedding_gradient"),
    Operator(
        "noisy_documents",
        f"(Tensor noise_mask, {LAYOUT}, SymInt position_offset=0) -> Tensor",
        reference_ops.noisy_documents,
        fake_noisy_documents,
    ),
    Operator(
        "untailed",
        "(Tensor input_ids, Tensor? position_ids, Tensor? cu_seqlens, SymInt? token, bool is_end) "
        "-> Tensor",
        layouts.untailed,
        fake_untailed,
    ),
    # Its argument is a fresh torch.empty: the compiler merges equal calls whatever their tags say,
    # but never two torch.empty, so that two draws of one graph stay two.
    Operator(
        "draw_seed",
        '(Tensor like, str owner="") -> Tensor',
        draw_seed_like,
        fake_draw_seed,
        None,
        DRAW_TAGS,
    ),
)


def capturable(twin: Operator) -> Operator:
    """That operator for an alpha on the device, whose launches CUDA graphs may record."""

    def call(*args: Any) -> Any:
        return getattr(torch.ops.neftune_kernels, twin.name).default(*args)

    return twin._replace(name=f"capturable_{twin.name}", implementation=call, tags=TAGS)


OPERATORS = (*BY_DEVICE, *(capturable(one) for one in BY_DEVICE if one.autograd is not None))

library = torch.library.Library(NAMESPACE, "DEF")
for _operator in OPERATORS:
    _name = f"{NAMESPACE}::{_operator.name}"
    library.define(_operator.name + _operator.schema, tags=_operator.tags)
    library.impl(_operator.name, _operator.implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(_name, _operator.fake, lib=library)
    if _operator.autograd is not None:
        torch.library.register_autograd(
            _name, _operator.autograd.backward, setup_context=_operator.autograd.setup, lib=library
        )


# The `out` overloads' entries; backends.py puts the comparison of a first call in front of CUDA's.
OUT: dict[str, Callable[..., None]] = {
    name: entry(getattr(torch.ops.neftune_kernels, name).out)
    for name in (
        "noisy_embedding",
        "add_noise",
        "reference_noisy_embedding",
        "reference_add_noise",
        "cuda_noisy_embedding",
        "cuda_add_noise",
        "cuda_sorted_gradient",
    )
}


# ---- the same as Functions, for torch.func and torch.compile


class NoisyEmbedding(torch.autograd.Function):
    """`apply(operator, input_ids, weight, ...)`, all arguments of noisy_embedding."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, *args: Any) -> Tensor:
        return operator(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        setup_embedding(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _, _, weight, *_ = ctx.needs_input_grad
        return None, *EmbeddingGradients(weight=weight_gradient(ctx, grad) if weight else None)


class DeterministicNoisyEmbedding(NoisyEmbedding):
    """The same with `deterministic_grad=True`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        setup_embedding(ctx, inputs[1:], output)
        ctx.gradient = gradients.BEST


class CudaDeterministicNoisyEmbedding(NoisyEmbedding):
    """The same of backend="cuda"."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        setup_embedding(ctx, inputs[1:], output)
        ctx.gradient = "cuda_embedding_gradient"


class AddNoise(torch.autograd.Function):
    """`apply(operator, inputs_embeds, ...)`, all arguments of add_noise or add_variant_noise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, *args: Any) -> Tensor:
        return operator(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arguments = len(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = None, *AddGradients(inputs_embeds=grad)
        return gradients + (None,) * (ctx.arguments - len(gradients))
