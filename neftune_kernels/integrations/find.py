"""Sites: the modules of a model whose output is its tokens' embeddings, and how they get noise.

A site is what `get_input_embeddings()` returns or `embedding=` names, climbed through the wrappers
declared here and no further. It is fused where lookup and noise can be one pass, else behind.
"""

import functools
import types
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import nn

from ..modules import NEFTuneEmbedding
from .arguments import Padding

COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule")
CHECKPOINT = ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper")
# (module of the class, its name) → the child around which it is wrapped
FSDP1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
WRAPPERS = {
    FSDP1: "_fsdp_wrapped_module",
    COMPILED: "_orig_mod",
    CHECKPOINT: "_checkpoint_wrapped_module",
}
PEFT_CHILDREN = ("base_layer", "token_adapter")  # of its tuners' layers, of its trainable tokens
PEFT_LORA = ("peft.tuners.lora.layer", "LoraLayer")


class Found(NamedTuple):
    """A place for noise."""

    site: nn.Module  # whose class is swapped, or whose output gets the noise
    embedding: nn.Module  # the innermost: the site itself, or what the site wraps
    wrappers: list[nn.Module]  # around the site, the outermost first
    fused: bool


@functools.lru_cache(1024)  # asked at every forward
def _kinds_of(kind: type) -> frozenset[tuple[str, str]]:
    return frozenset((one.__module__, one.__name__) for one in kind.__mro__)


def _kinds(module: nn.Module) -> frozenset[tuple[str, str]]:
    return _kinds_of(type(module))  # type: ignore[arg-type]


@functools.lru_cache(1024)
def _is_peft_class(kind: type) -> bool:
    return any(one.__module__.split(".")[0] == "peft" for one in kind.__mro__)


def _is_peft(module: nn.Module) -> bool:
    return _is_peft_class(type(module))  # type: ignore[arg-type]


def _wrapped(module: nn.Module) -> list[nn.Module]:
    """What a declared wrapper is around: one module, or PEFT's original and its copies; empty for
    any other module.
    """
    children: Any = module._modules
    if _is_peft(module):
        if "modules_to_save" in children and "original_module" in children:
            return [children["original_module"], *children["modules_to_save"].values()]
        return [children[name] for name in PEFT_CHILDREN if name in children][:1]
    names = [name for kind, name in WRAPPERS.items() if kind in _kinds(module)]
    return [children[name] for name in names if name in children]


def chains(module: nn.Module) -> list[list[nn.Module]]:
    """From the module to each embedding inside it, the outermost first."""
    return [[module, *chain] for inner in _wrapped(module) for chain in chains(inner)] or [[module]]


def innermost(module: nn.Module) -> nn.Module:
    return chains(module)[0][-1]


def is_compiled(wrapper: nn.Module) -> bool:
    return COMPILED in _kinds(wrapper)


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is of a class that may change what it is around, or what it does with it."""
    return _is_peft(module) or not WRAPPERS.keys().isdisjoint(_kinds(module))


def snapshot(wrapper: nn.Module) -> tuple[int, bool]:
    """What decides about the noise inside a wrapper: when it changes, sites are looked for anew."""
    return len(_wrapped(wrapper)), _lets_noise_in(wrapper)


def _lets_noise_in(wrapper: nn.Module) -> bool:
    """Whether what the wrapper does with the lookup leaves the noise what it is.

    LoRA adds to it; DoRA and OFT multiply; trainable tokens never call the embedding that they are
    around; a checkpoint would run the noise again.
    """
    kinds = _kinds(wrapper)
    if not _is_peft(wrapper):
        return CHECKPOINT not in kinds
    if PEFT_LORA in kinds:
        dora: Any = getattr(wrapper, "use_dora", {})
        return not getattr(wrapper, "lora_variant", None) and not any(dora.values())
    return "modules_to_save" in wrapper._modules


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without our swap."""
    return getattr(type(module), "_neftune_base", type(module))


def is_own_method(forward: Any, module: nn.Module) -> bool:
    """Whether a forward on an instance is a bound method of its own class, as accelerate leaves it
    behind: it hides nothing.
    """
    return (
        isinstance(forward, types.MethodType)
        and forward.__self__ is module
        and forward.__func__ in (base_class(module).forward, type(module).forward)
    )


def why_not_fused(module: nn.Module) -> str:
    """Why lookup and noise of this module cannot be one pass; empty where they can."""
    name = base_class(module).__name__
    forward = module.__dict__.get("forward")
    if not isinstance(module, nn.Embedding):
        return f"{name} is no nn.Embedding"
    if base_class(module).forward is not nn.Embedding.forward:
        return f"{name} has a forward of its own"
    # accelerate's hooks that came after the swap are around the noise
    swapped = base_class(module) is not type(module)
    inside = getattr(module.__dict__.get("_old_forward"), "__func__", None)
    noised_inside = swapped and inside is type(module).forward
    if forward is not None and not is_own_method(forward, module) and not noised_inside:
        return "a forward of its own is on the instance"
    if "parametrizations" in module._modules and not swapped:
        return f"{name} is parametrised"
    return ""


def _found(chain: list[nn.Module], fused: bool | None) -> Found:
    embedding = chain[-1]
    if isinstance(embedding, NEFTuneEmbedding):
        raise ValueError(
            "the embedding is a NEFTuneEmbedding and adds noise itself: use it alone, or swap in "
            "module.to_embedding()"
        )
    kind = base_class(embedding)
    package = ".".join(kind.__module__.split(".")[:2])
    if not isinstance(embedding, nn.Embedding) and package in ("torch.nn", "torch.ao"):
        raise ValueError(
            f"the input embedding must be an nn.Embedding, got "
            f"{kind.__module__}.{kind.__qualname__}: name the "
            "embedding with embedding=, or pass this one's output through "
            "neftune_kernels.add_noise(...)"
        )
    shut = [one for one in chain[:-1] if not _lets_noise_in(one)]
    site = shut[0] if shut else embedding
    why = f"{type(site).__name__} is around it" if shut else why_not_fused(embedding)
    if fused and why:
        raise ValueError(
            f"fused=True, but lookup and noise cannot be one pass here: {why}. fused=None adds the "
            "noise behind it"
        )
    return Found(site, embedding, chain[: chain.index(site)], not why and fused is not False)


def _all_found(module: nn.Module, fused: bool | None) -> list[Found]:
    return [_found(chain, fused) for chain in chains(module)]


def ancestors_of(root: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """(ancestor, name of its child on the path) from root to the module's parent."""
    module = root
    for name in path.split(".") if path else []:
        yield module, name
        module = module._modules[name]  # type: ignore[assignment]


def ways_to(root: nn.Module, targets: Collection[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """(ancestor, name of its child) of all that leads from root to one of these."""
    for name, module in root.named_modules(remove_duplicate=False):
        if module in targets:
            yield from ancestors_of(root, name)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _stack(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    if not isinstance(found, nn.Module) or found is model:
        return None
    # Florence-2's decoder is a whole BART, which has one itself
    inner = _stack(found, getter) if _is_encoder_decoder(found) else None
    return inner or found


def decoder_of(model: nn.Module) -> Iterator[nn.Module]:
    """The decoder of an encoder-decoder, with what is inside it and not in its encoder too: a
    table's wrapper is both's.
    """
    decoder = _stack(model, "get_decoder") if _is_encoder_decoder(model) else None
    if decoder is None:
        return
    encoder = _stack(model, "get_encoder")
    shared = set() if encoder is None else set(encoder.modules())
    yield from (one for one in decoder.modules() if one is decoder or one not in shared)


def padding_of(model: nn.Module) -> Padding:
    """What the outer config names, else that of its text model."""
    outer = getattr(model, "config", None)
    try:
        configs = [outer, getattr(outer, "get_text_config", lambda: None)()]
    except ValueError:  # MusicGen has two: of which one, it does not say
        configs = [outer]
    token = next((pad for pad in (_token(one, "pad_token_id") for one in configs) if pad), (None,))
    ends = {end for one in configs for end in _token(one, "eos_token_id")}
    return Padding(token[0], token[0] is not None and token[0] in ends)


def _token(config: Any, name: str) -> tuple[int, ...]:
    found = getattr(config, name, None)
    listed = found if isinstance(found, (list, tuple)) else (found,)
    return tuple(one for one in listed if type(one) is int and one >= 0)


def find_embeddings(model: nn.Module, path: str | None, fused: bool | None = None) -> list[Found]:
    """The places for noise: at the path, else the model's input embeddings, of encoder and decoder
    where it has both.

    Raises:
        ValueError: there is none, it cannot be noised, or not in the way that `fused` says.
    """
    if path is not None:
        return _all_found(model.get_submodule(path), fused)
    try:
        module = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        module = None
    if module is None and not _is_encoder_decoder(model):
        inner = _inside_of_a_pipeline(model)
        if inner is not None:
            return find_embeddings(inner, None, fused)
        raise ValueError(
            f"{type(model).__name__} has no get_input_embeddings(), or it returns None: name the "
            f'module with embedding="path.to.embed", {_tables(model)}'
        )
    if module is not None and not isinstance(module, nn.Module):
        raise ValueError(
            f"{type(model).__name__}.get_input_embeddings() returns {type(module).__name__} and no "
            f"module: name the embedding of its tokens with embedding=, {_tables(model)}"
        )
    if not _is_encoder_decoder(model):
        return _with_tied(model, _all_found(module, fused), fused)  # type: ignore[arg-type]
    found: dict[nn.Module, Found] = {}
    stacks = [_stack(model, "get_encoder"), _stack(model, "get_decoder")]
    for stack in (model, *stacks):
        try:
            module = None if stack is None else stack.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            module = getattr(stack, "embed_tokens", None)  # FSMT's decoder is a plain module
        if isinstance(module, nn.Module) and _embeds_tokens(innermost(module)):
            found.update({one.site: one for one in _all_found(module, fused)})
    if not found:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder without token embeddings: name the "
            f"module with embedding="
        )
    return list(found.values())


def _embeds_tokens(module: nn.Module) -> bool:
    """An encoder of speech or images embeds none: transformers' and torch's modules are taken where
    they hold a table, anybody else's always, as they have noise where they look ids up.
    """
    if isinstance(module, nn.Embedding):
        return True
    package = base_class(module).__module__.split(".")
    if package[:2] in (["torch", "nn"], ["torch", "ao"]):
        return any(isinstance(inner, nn.Embedding) for inner in module.modules())
    return package[0] != "transformers"


# Lists of modules, of which one is a model of transformers.
PIPELINES = ("sentence_transformers",)


def _inside_of_a_pipeline(model: nn.Module) -> nn.Module | None:
    """The only model in it that has input embeddings; None where there are none, or several."""
    if type(model).__module__.split(".")[0] not in PIPELINES:
        return None
    found: list[nn.Module] = []
    for module in model.modules():
        if any(module in set(one.modules()) for one in found):
            continue
        try:
            embedding = module.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(embedding, nn.Module):
            found.append(module)
    return found[0] if len(found) == 1 else None


LISTED = 8


def _tables(model: nn.Module) -> str:
    """The embeddings in a model by path and size, the largest first: the table of words is."""
    tables = [
        (path, module) for path, module in model.named_modules() if isinstance(module, nn.Embedding)
    ]
    tables.sort(key=lambda table: -table[1].num_embeddings)
    if not tables:
        return "or pass it itself; this model holds no nn.Embedding"
    listed = [
        f'embedding="{path}" ({one.num_embeddings}, {one.embedding_dim})'
        for path, one in tables[:LISTED]
    ]
    more = f" and {len(tables) - LISTED} more" if len(tables) > LISTED else ""
    return f"the largest first: {', '.join(listed)}{more}"


def _with_tied(model: nn.Module, found: list[Found], fused: bool | None) -> list[Found]:
    """And the embeddings that share their weight: T5's encoder alone keeps a `shared` that never
    runs.
    """
    weights = {id(one.embedding.weight) for one in found if hasattr(one.embedding, "weight")}
    seen = {
        inner for one in found for outer in (one.site, *one.wrappers) for inner in outer.modules()
    }
    tied = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module not in seen and id(module.weight) in weights
    ]
    return [*found, *(one for module in tied for one in _all_found(module, fused))]


def path_of(model: nn.Module, embedding: str | nn.Module | None) -> str | None:
    """embedding= as a path in the model, so that it is found again when PEFT has put a wrapper
    there.
    """
    if embedding is None:
        return None
    if isinstance(embedding, str):
        try:
            model.get_submodule(embedding)
        except AttributeError as error:
            raise ValueError(
                f"embedding={embedding!r} names no module of {type(model).__name__}: {error}"
            ) from None
        return embedding
    path = next((name for name, module in model.named_modules() if module is embedding), None)
    if path is None:
        raise ValueError("the embedding is not a part of the model")
    return path
