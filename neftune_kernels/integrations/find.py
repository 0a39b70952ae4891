"""Which modules of a model embed its tokens, and what is around them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ..distributed import is_tensor_parallel_forward
from ..modules import NEFTuneEmbedding


class Found(NamedTuple):
    """An embedding to be made noisy: the module whose output gets the noise, and the wrappers
    around it.
    """

    noisy: nn.Module
    wrappers: list[nn.Module]


def ancestors_of(root: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """(ancestor, name of its child on the path) from root to the module's parent."""
    module = root
    for name in path.split(".") if path else []:
        yield module, name
        module = module._modules[name]  # type: ignore[assignment]


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _stack(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) and found is not model else None


def decoder_of(model: nn.Module) -> Iterator[nn.Module]:
    """The decoder of an encoder-decoder, with all that is inside it."""
    decoder = _stack(model, "get_decoder") if _is_encoder_decoder(model) else None
    if decoder is not None:
        yield from decoder.modules()


def pad_token_id_of(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    found = getattr(config, "pad_token_id", None)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def unwrapped(module: Any) -> list[Any]:
    """The module and what it wraps, one inside the other: PEFT's tuner layers, its trainable
    tokens.
    """
    chain = [module]
    while True:
        inner = chain[-1].__dict__.get("_modules", {}) if isinstance(chain[-1], nn.Module) else {}
        following = inner.get("base_layer", inner.get("token_adapter"))
        if following is None:
            return chain
        chain.append(following)


def open_wrapper(module: Any) -> Any:
    return unwrapped(module)[-1]


def _computes_alone(module: Any) -> bool:
    """PEFT's trainable tokens look rows up in a weight of their own and never call the embedding
    that they wrap.
    """
    return "token_adapter" in module._modules or hasattr(module, "trainable_tokens_delta")


def _found(module: Any) -> Found:
    chain = unwrapped(module)
    noisy = next((one for one in chain if _computes_alone(one)), chain[-1])
    embedding = chain[-1]
    if isinstance(embedding, NEFTuneEmbedding):
        raise ValueError(
            "the embedding is a NEFTuneEmbedding and adds noise itself: use it alone, or swap in "
            "module.to_embedding()"
        )
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"the input embedding must be an nn.Embedding, got "
            f"{type(embedding).__module__}.{type(embedding).__qualname__}: name the "
            "embedding with embedding=, or pass this one's output through "
            "neftune_kernels.add_noise(...)"
        )
    if "forward" in noisy.__dict__ and not is_tensor_parallel_forward(noisy.__dict__["forward"]):
        raise ValueError(
            "the embedding carries a forward of its own as an instance attribute (a monkey "
            "patch), which would hide the noise: apply "
            "NEFTune before it, or remove it"
        )
    return Found(noisy, chain[: chain.index(noisy)])


def _all_found(module: Any) -> list[Found]:
    """The embedding behind a module; of modules_to_save the original and every copy."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        return [
            Found(one.noisy, [module, *one.wrappers])
            for one in (
                _found(inner)
                for inner in (module.original_module, *module.modules_to_save.values())
            )
        ]
    return [_found(module)]


def find_embeddings(model: nn.Module, path: str | None) -> list[Found]:
    """The embeddings to be made noisy: at the path, else the model's input embeddings, of encoder
    and decoder where it has both.
    """
    if path is not None:
        return _all_found(model.get_submodule(path))
    try:
        module = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        module = None
    if module is None and not _is_encoder_decoder(model):
        raise ValueError(
            f"{type(model).__name__} has no get_input_embeddings(), or it returns None: name the "
            f"module with "
            'embedding="path.to.embed" or pass the module itself'
        )
    if not _is_encoder_decoder(model):
        return _with_tied(model, _all_found(module))
    found: dict[nn.Module, Found] = {}
    stacks = [_stack(model, "get_encoder"), _stack(model, "get_decoder")]
    for stack in (model, *stacks):
        try:
            module = None if stack is None else stack.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            module = getattr(stack, "embed_tokens", None)  # FSMT's decoder is a plain module
        if module is not None and isinstance(
            open_wrapper(getattr(module, "original_module", module)), nn.Embedding
        ):
            found.update(
                {one.noisy: one for one in _all_found(module)}
            )  # an encoder of speech or images embeds no tokens
    if not found:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder without token embeddings: name the "
            f"module with embedding="
        )
    return list(found.values())


def _with_tied(model: nn.Module, found: list[Found]) -> list[Found]:
    """And the embeddings that share their weight: T5's encoder alone keeps a `shared` that never
    runs.
    """
    weights = {id(open_wrapper(one.noisy).weight) for one in found}
    seen = {
        inner for one in found for outer in (one.noisy, *one.wrappers) for inner in outer.modules()
    }
    tied = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module not in seen and id(module.weight) in weights
    ]
    return [*found, *(one for module in tied for one in _all_found(module))]


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
