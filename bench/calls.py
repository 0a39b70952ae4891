"""The ways a lookup with noise is called: as a function, with backward, as a module, in a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neftune_kernels import NEFTuneEmbedding, apply_neftune

from . import cases
from .cases import BASE, HOOK, NOISE_ALPHA, OURS, Case, Inputs
from .interleaved import Runs

FORWARD, BACKWARD = "forward", "forward + backward"
MODULE, MODEL = "module call", "applied model's forward"
WAYS = (FORWARD, BACKWARD, MODULE, MODEL)


def forward_runs() -> Runs:
    return {BASE: cases.embedding, OURS: cases.ours, HOOK: cases.hf_hook}


def backward_runs(weight: Tensor) -> Runs:
    """The weight is trained; the gradient that arrives is `out`, whatever it holds."""

    def backward(forward: Callable[[Inputs], Any]) -> Callable[[Inputs], object]:
        parameter = nn.Parameter(weight)

        def run(inputs: Inputs) -> object:
            parameter.grad = None
            forward(inputs._replace(weight=parameter)).backward(inputs.out)
            return parameter.grad

        return run

    return {name: backward(forward) for name, forward in forward_runs().items()}


def hooked(embedding: nn.Embedding) -> nn.Embedding:
    """With transformers' own hook."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    embedding.neftune_noise_alpha = NOISE_ALPHA  # type: ignore[assignment]
    embedding.register_forward_hook(neftune_post_forward_hook)
    return embedding


def module_runs(weight: Tensor) -> Runs:
    def plain() -> nn.Embedding:
        return nn.Embedding.from_pretrained(weight, freeze=False).train()

    theirs = hooked(plain())
    noisy = NEFTuneEmbedding.from_pretrained(weight, noise_alpha=NOISE_ALPHA, freeze=False).train()
    base = plain()
    return {
        BASE: lambda inputs: base(inputs.input_ids),
        OURS: lambda inputs: noisy(inputs.input_ids, **inputs.told),
        HOOK: lambda inputs: theirs(inputs.input_ids),
    }


def llama(weight: Tensor) -> Any:
    """A Llama without layers is what stands around its lookup, and a norm behind it."""
    import transformers

    embedding_dim = weight.shape[1]
    config = transformers.LlamaConfig(
        vocab_size=1,  # the table comes from outside
        hidden_size=embedding_dim,
        intermediate_size=embedding_dim,
        num_hidden_layers=0,
        num_attention_heads=8,
        max_position_embeddings=1 << 20,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = transformers.LlamaModel(config)
    model.to(weight.dtype)
    model.set_input_embeddings(nn.Embedding.from_pretrained(weight, freeze=False))
    return model.train()


def model_runs(weight: Tensor) -> Runs:
    base, noisy, theirs = (llama(weight) for _ in range(3))
    apply_neftune(noisy, NOISE_ALPHA)
    hooked(theirs.get_input_embeddings())

    def run(model: Any) -> Callable[[Inputs], object]:
        return lambda inputs: model(input_ids=inputs.input_ids, use_cache=False, **inputs.told)

    return {BASE: run(base), OURS: run(noisy), HOOK: run(theirs)}


def runs_of(way: str, case: Case, weight: Tensor) -> Runs:
    if way == FORWARD:
        return forward_runs()
    make = {BACKWARD: backward_runs, MODULE: module_runs, MODEL: model_runs}[way]
    return make(weight)


@contextmanager
def grad_mode_of(way: str) -> Iterator[None]:
    with torch.set_grad_enabled(way != FORWARD):
        yield


def check_way(way: str, case: Case, inputs: Inputs) -> str:
    """ "" where ours gives the bits of the function's with the generator in the same state."""
    if way == FORWARD:
        return cases.check(case, cases.Provider(OURS, cases.ours, "ours"), inputs)
    inputs.out.fill_(1)
    run = runs_of(way, case, inputs.weight)[OURS]
    if way == BACKWARD:  # of ones: how often each id occurs, which bfloat16 sums cannot count
        counts = torch.bincount(inputs.input_ids.flatten(), minlength=len(inputs.weight))
        expected = counts.to(inputs.weight.dtype)[:, None].expand_as(inputs.weight)
        return "" if torch.equal(run(inputs), expected) else "gives another gradient"  # type: ignore[arg-type]
    torch.manual_seed(0)
    got = run(inputs)
    torch.manual_seed(0)
    seed = torch.empty((), dtype=torch.int64).random_(-(2**63), None)
    expected_rows = cases.ours(inputs._replace(seed=seed))
    if way == MODEL:
        norm = llama(inputs.weight).norm
        return "" if torch.equal(got[0], norm(expected_rows)) else "is not the function's noise"  # type: ignore[index]
    return "" if torch.equal(got, expected_rows) else "is not the function's noise"  # type: ignore[arg-type]
