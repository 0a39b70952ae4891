"""Shapes named after models, inputs that rotate, and what is compared: ours and its rivals as plain
functions of one input.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import neftune_kernels
from neftune_kernels import noisy_embedding

NOISE_ALPHA = 5.0
WEIGHT_STD = 0.02
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Case(NamedTuple):
    key: str
    model: str
    batch: int
    columns: int  # T, tokens of one row
    embedding_dim: int
    num_embeddings: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return self.batch * self.columns

    @property
    def elements(self) -> int:
        return self.tokens * self.embedding_dim

    @property
    def magnitude(self) -> float:
        return NOISE_ALPHA / math.sqrt(self.columns * self.embedding_dim)

    @property
    def bytes_moved(self) -> int:
        """What must move: every row read once, every output row written once, one int64 id each."""
        return 2 * self.elements * self.dtype.itemsize + 8 * self.tokens

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def shape(self) -> str:
        return f"({self.batch}, {self.columns}, {self.embedding_dim})"


SHAPES = {
    "llama2-7b": ("Llama-2-7B", 8, 512, 4096, 32000),
    "smollm2": ("SmolLM2-135M", 4, 2048, 576, 49152),
    "llama3-1b": ("Llama-3.2-1B", 4, 512, 2048, 128256),
    "smollm2-short": ("SmolLM2, short", 2, 64, 576, 49152),
}


def make_case(key: str, dtype: torch.dtype) -> Case:
    return Case(key, *SHAPES[key], dtype)


class Inputs(NamedTuple):
    input_ids: Tensor  # (B, T) int64
    attention_mask: (
        Tensor  # (B, T) int64, all ones: every token is real, so all rivals do the same work
    )
    weight: Tensor  # (V, d)
    out: Tensor  # (B, T, d), already faulted in: only the providers that take a buffer write it
    seed: Tensor  # 0-dim int64
    alpha: Tensor  # 0-dim float64, as the operator takes it


def make_inputs(case: Case, cache_bytes: int = 0, generator_seed: int = 0) -> list[Inputs]:
    """A set to rotate through: one weight; ids, seed and buffer of each its own; together at least
    twice `cache_bytes`.

    Ids are uniform over the vocabulary, the worst case for caches: real text repeats its frequent
    rows.
    """
    generator = torch.Generator().manual_seed(generator_seed)
    weight = torch.empty(case.num_embeddings, case.embedding_dim, dtype=case.dtype).normal_(
        0.0, WEIGHT_STD, generator=generator
    )
    ids_shape, out_shape = (
        (case.batch, case.columns),
        (case.batch, case.columns, case.embedding_dim),
    )
    return [
        Inputs(
            torch.randint(case.num_embeddings, ids_shape, generator=generator),
            torch.ones(ids_shape, dtype=torch.int64),
            weight,
            torch.zeros(out_shape, dtype=case.dtype).fill_(math.nan),
            torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator),
            torch.full((), NOISE_ALPHA, dtype=torch.float64),
        )
        for _ in range(max(4, -(-2 * cache_bytes // case.bytes_moved)))
    ]


# ---- ours


def kernel_alone(inputs: Inputs) -> Tensor:
    """The operator into a buffer that is already there: no allocation, no page faults, no checks of
    ours in Python.
    """
    torch.ops.neftune_kernels.noisy_embedding.out(
        inputs.input_ids, inputs.weight, inputs.seed, inputs.alpha, out=inputs.out
    )
    return inputs.out


def ours(inputs: Inputs) -> Tensor:
    return noisy_embedding(inputs.input_ids, inputs.weight, NOISE_ALPHA, seed=inputs.seed)


def ours_masked(inputs: Inputs) -> Tensor:
    """As the official code is called: the lengths come from the mask."""
    return noisy_embedding(
        inputs.input_ids,
        inputs.weight,
        NOISE_ALPHA,
        attention_mask=inputs.attention_mask,
        seed=inputs.seed,
    )


# ---- without noise: the floors


def gather(inputs: Inputs) -> Tensor:
    """Rows into a buffer that is already there: what moving the bytes costs."""
    flat = inputs.out.view(-1, inputs.weight.shape[1])
    torch.index_select(inputs.weight, 0, inputs.input_ids.view(-1), out=flat)
    return inputs.out


def embedding(inputs: Inputs) -> Tensor:
    return F.embedding(inputs.input_ids, inputs.weight)


# ---- rivals


def hf_hook(inputs: Inputs) -> Tensor:
    """What transformers' neftune_post_forward_hook computes, in eager mode."""
    embedded = F.embedding(inputs.input_ids, inputs.weight)
    dims = torch.tensor(embedded.size(1) * embedded.size(2))
    magnitude = NOISE_ALPHA / torch.sqrt(dims)
    return embedded + torch.zeros_like(embedded).uniform_(-magnitude, magnitude)  # type: ignore[arg-type]


def official(inputs: Inputs) -> Tensor:
    """Algorithm 1 with one magnitude per sample, everything in the embeddings' dtype, as the
    paper's training code does it.
    """
    embedded = F.embedding(inputs.input_ids, inputs.weight)
    input_mask = inputs.attention_mask.to(embedded)  # (B, T)
    input_lengths = torch.sum(input_mask, 1)  # (B,)
    noise = torch.zeros_like(embedded).uniform_(-1, 1)
    delta = noise * input_mask.unsqueeze(2)
    magnitude = NOISE_ALPHA / torch.sqrt(input_lengths * embedded.size(-1))
    return embedded + (delta * magnitude.view(-1, 1, 1)).detach()


def hook_with_rand_like(input_ids: Tensor, weight: Tensor) -> Tensor:
    embedded = F.embedding(input_ids, weight)
    magnitude = NOISE_ALPHA / math.sqrt(embedded.size(1) * embedded.size(2))
    return embedded + (torch.rand_like(embedded) * 2 - 1) * magnitude


def official_with_rand_like(input_ids: Tensor, attention_mask: Tensor, weight: Tensor) -> Tensor:
    embedded = F.embedding(input_ids, weight)
    input_mask = attention_mask.to(embedded)
    magnitude = NOISE_ALPHA / torch.sqrt(torch.sum(input_mask, 1) * embedded.size(-1))
    delta = (torch.rand_like(embedded) * 2 - 1) * input_mask.unsqueeze(2)
    return embedded + delta * magnitude.view(-1, 1, 1)


Run = Callable[[Inputs], Tensor]


class Provider(NamedTuple):
    name: str
    run: Run
    kind: str  # "ours" (exact noise), "plain" (no noise), "rival" (other noise of the same size)
    cached: bool = False  # measured on one input that stays in cache, instead of rotating


def compiled_providers() -> list[Provider]:
    """The strongest rivals: the same mathematics with rand_like, which Inductor fuses.

    Compiled for each case's shape alone.
    """
    torch.compiler.reset()
    compiled_hook: Callable[..., Tensor] = torch.compile(hook_with_rand_like, dynamic=False)
    compiled_official: Callable[..., Tensor] = torch.compile(official_with_rand_like, dynamic=False)
    return [
        Provider(
            "HF hook, compiled",
            lambda inputs: compiled_hook(inputs.input_ids, inputs.weight),
            "rival",
        ),
        Provider(
            "official, compiled",
            lambda inputs: compiled_official(
                inputs.input_ids, inputs.attention_mask, inputs.weight
            ),
            "rival",
        ),
    ]


def make_providers(compiled: bool = True, cached: bool = False) -> list[Provider]:
    providers = [
        Provider("gather floor", gather, "plain"),
        Provider("ours, into a buffer", kernel_alone, "ours"),
        Provider("F.embedding", embedding, "plain"),
        Provider("ours", ours, "ours"),
        Provider("ours, attention_mask", ours_masked, "ours"),
        Provider("HF hook", hf_hook, "rival"),
        Provider("official", official, "rival"),
    ]
    if cached:
        providers[2:2] = [
            Provider("gather floor, in cache", gather, "plain", cached=True),
            Provider("ours, into a buffer, in cache", kernel_alone, "ours", cached=True),
        ]
    return providers + (compiled_providers() if compiled else [])


# ---- equality before any clock


def check(case: Case, provider: Provider, inputs: Inputs) -> str:
    """ "" when the provider computes what it should on these inputs, else what is wrong."""
    inputs.out.fill_(math.nan)
    got, plain = provider.run(inputs), F.embedding(inputs.input_ids, inputs.weight)
    if got.shape != plain.shape or got.dtype != plain.dtype:
        return f"{tuple(got.shape)} {got.dtype} instead of {tuple(plain.shape)} {plain.dtype}"
    if provider.kind == "plain":
        return "" if torch.equal(got, plain) else "differs from F.embedding"
    if provider.kind == "ours":
        return _check_ours(case, got, inputs)
    noise = got.float() - plain.float()
    largest, deviation = float(noise.abs().max()), float(noise.std())
    rounding = 0.0 if case.dtype == torch.float32 else float(got.abs().max()) * 2.0**-8
    if not 0.98 * case.magnitude <= largest <= case.magnitude * (1 + 2**-7) + rounding:
        return f"largest |noise| {largest:.3g} instead of {case.magnitude:.3g}"
    if abs(deviation / (case.magnitude / math.sqrt(3)) - 1) > 0.03:
        expected = case.magnitude / math.sqrt(3)
        return f"noise of standard deviation {deviation:.3g} instead of {expected:.3g}"
    return ""


def _check_ours(case: Case, got: Tensor, inputs: Inputs) -> str:
    """Bit for bit the reference backend: the first and last tokens of the first and last sample,
    computed as shards of their sample.
    """
    if not bool(torch.isfinite(got).all()):
        return "has cells that are not finite or were not written"
    width = min(16, case.columns)
    for sample in (0, case.batch - 1):
        for start in (0, case.columns - width):
            expected = noisy_embedding(
                inputs.input_ids[sample : sample + 1, start : start + width],
                inputs.weight,
                NOISE_ALPHA,
                lengths=torch.tensor([case.columns]),
                seed=inputs.seed,
                sample_offset=sample,
                position_offset=start,
                backend="reference",
            )
            if not torch.equal(got[sample : sample + 1, start : start + width], expected):
                return (
                    f"differs from the reference backend in sample {sample} from position {start}"
                )
    noise = got.float() - F.embedding(inputs.input_ids, inputs.weight).float()
    if abs(float(noise.std()) / (case.magnitude / math.sqrt(3)) - 1) > 0.03:
        deviation = case.magnitude / math.sqrt(3)
        return f"noise of standard deviation {float(noise.std()):.3g} instead of {deviation:.3g}"
    return ""


def backend_name() -> str:
    """What runs "ours" here, with the reason when it is not the C++ kernel."""
    reason = neftune_kernels.available_backends("cpu")["cpp"]
    return "cpp" if reason == "available" else f"reference, SLOW ({reason})"
