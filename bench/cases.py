"""What is compared: shapes, batches as trainers make them, inputs that rotate, and ours and its
rivals as plain functions of one input.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import neftune_kernels
from neftune_kernels import noisy_embedding

NOISE_ALPHA = 5.0
WEIGHT_STD = 0.02
LARGE = 1 << 30  # bytes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Layouts: how much of a batch is real, and what tells ours so.
RAGGED = "ragged, 70 % real"  # the common case: rows of unequal length, an attention_mask
FULL, SHORT = "100 % real, with a mask", "ragged, 30 % real"
FILLS = {RAGGED: 0.7, FULL: 1.0, SHORT: 0.3}
CU_SEQLENS, POSITION_IDS = "packed, cu_seqlens", "packed, position_ids"
UNTOLD = "no mask, every token real"
LAYOUTS = (RAGGED, FULL, SHORT, CU_SEQLENS, POSITION_IDS, UNTOLD)


class Case(NamedTuple):
    key: str
    model: str
    batch: int
    columns: int  # T, tokens of one row
    embedding_dim: int
    num_embeddings: int
    dtype: torch.dtype
    layout: str = UNTOLD

    @property
    def tokens(self) -> int:
        return self.batch * self.columns

    @property
    def elements(self) -> int:
        return self.tokens * self.embedding_dim

    @property
    def packed(self) -> bool:
        return self.layout in (CU_SEQLENS, POSITION_IDS)

    @property
    def lengths(self) -> list[int]:
        """Of the samples. A batch is padded to its longest row; the others share what is left."""
        fill = FILLS.get(self.layout, FILLS[RAGGED] if self.packed else 1.0)
        if self.batch == 1 or fill == 1:
            lengths = [self.columns] * self.batch
        else:
            rest = max(1, round((fill * self.tokens - self.columns) / (self.batch - 1)))
            lengths = [self.columns] + [rest] * (self.batch - 1)
        if not self.packed:
            return lengths
        left = self.tokens - sum(lengths)  # packing puts more documents where padding was
        while left > 0:
            lengths.append(min(left, lengths[-1]))
            left -= lengths[-1]
        return lengths

    @property
    def magnitude(self) -> float:
        """Of the longest row, whose every token is real."""
        return NOISE_ALPHA / math.sqrt(self.columns * self.embedding_dim)

    @property
    def hook_magnitude(self) -> float:
        """HF's hook divides by the length of the tensor's rows."""
        columns = self.tokens if self.packed else self.columns
        return NOISE_ALPHA / math.sqrt(columns * self.embedding_dim)

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
    "base": ("base point", 4, 512, 2048, 32000),
    "smollm2-short": ("SmolLM2, short", 2, 64, 576, 49152),
}


def make_case(key: str, dtype: torch.dtype, layout: str = UNTOLD) -> Case:
    return Case(key, *SHAPES[key], dtype, layout)


class Inputs(NamedTuple):
    input_ids: Tensor  # (B, T) int64; (1, B·T) where packed
    attention_mask: Tensor  # as input_ids, int64: 1 where a token is real
    weight: Tensor  # (V, d)
    out: Tensor  # (*input_ids.shape, d), already faulted in: for who takes a buffer or a gradient
    seed: Tensor  # 0-dim int64
    alpha: Tensor  # 0-dim float64, as the operator takes it
    told: dict[str, Any] = {}  # noqa: RUF012 (never written): the arguments that tell ours the samples


def _told(case: Case, lengths: Tensor, mask: Tensor) -> dict[str, Any]:
    if case.layout == CU_SEQLENS:
        return {"cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).int()}
    if case.layout == POSITION_IDS:
        return {"position_ids": torch.cat([torch.arange(int(one)) for one in lengths])[None]}
    return {} if case.layout == UNTOLD else {"attention_mask": mask}


def make_inputs(case: Case, cache_bytes: int = 0, generator_seed: int = 0) -> list[Inputs]:
    """A set to rotate through: one weight; ids, lengths, seed and buffer of each its own; together
    at least twice `cache_bytes`.

    Ids are uniform over the vocabulary, the worst case for caches: real text repeats its frequent
    rows. Padding is id 0.
    """
    generator = torch.Generator().manual_seed(generator_seed)
    weight = torch.empty(case.num_embeddings, case.embedding_dim, dtype=case.dtype).normal_(
        0.0, WEIGHT_STD, generator=generator
    )
    shape = (1, case.tokens) if case.packed else (case.batch, case.columns)
    lengths = torch.tensor(case.lengths)
    made: list[Inputs] = []
    for _ in range(max(4, -(-2 * cache_bytes // case.bytes_moved))):
        order = torch.randperm(len(lengths), generator=generator)
        own = lengths[order]
        ids = torch.randint(case.num_embeddings, shape, generator=generator)
        mask = torch.ones(shape, dtype=torch.int64)
        if not case.packed:
            mask = (torch.arange(case.columns) < own[:, None]).long()
            ids = ids.masked_fill(mask == 0, 0)
        if made and case.bytes_moved > LARGE:  # no cache holds it, and few memories four of it
            out = made[0].out
        else:
            out = torch.zeros(*shape, case.embedding_dim, dtype=case.dtype).fill_(math.nan)
        seed = torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        alpha = torch.full((), NOISE_ALPHA, dtype=torch.float64)
        made.append(Inputs(ids, mask, weight, out, seed, alpha, _told(case, own, mask)))
    return made


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
    return noisy_embedding(
        inputs.input_ids, inputs.weight, NOISE_ALPHA, seed=inputs.seed, **inputs.told
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


BASE, OURS, HOOK = "F.embedding", "ours", "HF hook"
OFFICIAL, COMPILED_HOOK, COMPILED_OFFICIAL = "official", "HF hook, compiled", "official, compiled"
GATHER, ALONE = "gather floor", "kernel alone"


def compiled_providers() -> list[Provider]:
    """The strongest rivals: the same mathematics with rand_like, which Inductor fuses.

    Compiled for each case's shape alone.
    """
    torch.compiler.reset()
    compiled_hook: Callable[..., Tensor] = torch.compile(hook_with_rand_like, dynamic=False)
    compiled_official: Callable[..., Tensor] = torch.compile(official_with_rand_like, dynamic=False)
    return [
        Provider(
            COMPILED_HOOK,
            lambda inputs: compiled_hook(inputs.input_ids, inputs.weight),
            "rival",
        ),
        Provider(
            COMPILED_OFFICIAL,
            lambda inputs: compiled_official(
                inputs.input_ids, inputs.attention_mask, inputs.weight
            ),
            "rival",
        ),
    ]


def make_providers(case: Case, compiled: bool = True) -> list[Provider]:
    """The lookup without noise first. The official code cannot be told what is packed."""
    providers = [
        Provider(BASE, embedding, "plain"),
        Provider(OURS, ours, "ours"),
        Provider(HOOK, hf_hook, "rival"),
        Provider(OFFICIAL, official, "rival"),
        *(compiled_providers() if compiled else []),
    ]
    return [one for one in providers if not (case.packed and one.name.startswith(OFFICIAL))]


def floor_providers() -> list[Provider]:
    """Without allocation: what the kernel costs over moving the rows."""
    return [Provider(GATHER, gather, "plain"), Provider(ALONE, kernel_alone, "untold")]


# ---- equality before any clock


def _close(deviation: float, expected: float, count: int) -> bool:
    """Six standard errors of a uniform sample's deviation, and 1 % for what bfloat16 rounds."""
    return abs(deviation / expected - 1) <= 6 * math.sqrt(0.2 / count) + 0.01


def check(case: Case, provider: Provider, inputs: Inputs) -> str:
    """ "" when the provider computes what it should on these inputs, else what is wrong."""
    inputs.out.fill_(math.nan)
    got, plain = provider.run(inputs), F.embedding(inputs.input_ids, inputs.weight)
    if got.shape != plain.shape or got.dtype != plain.dtype:
        return f"{tuple(got.shape)} {got.dtype} instead of {tuple(plain.shape)} {plain.dtype}"
    if provider.kind == "plain":
        return "" if torch.equal(got, plain) else "differs from F.embedding"
    if provider.kind in ("ours", "untold"):
        told = inputs if provider.kind == "ours" else inputs._replace(told={})
        return _check_ours(case, got, told)
    magnitudes = [case.hook_magnitude] * len(got)
    if provider.name.startswith(OFFICIAL):
        lengths = inputs.attention_mask.sum(1).tolist()
        magnitudes = [NOISE_ALPHA / math.sqrt(one * case.embedding_dim) for one in lengths]
    noise = got.float() - plain.float()
    rounding = 0.0 if case.dtype == torch.float32 else float(got.abs().max()) * 2.0**-8
    for row, real, magnitude in zip(noise, inputs.attention_mask.bool(), magnitudes, strict=True):
        count, rounded = row[real].numel(), magnitude * 2**-7 + rounding
        largest, deviation = float(row[real].abs().max()), float(row[real].std())
        # the largest of n is below 1 - 24 / n once in e**24 samples
        if not magnitude * (1 - 24 / count) - rounded <= largest <= magnitude + rounded:
            return f"largest |noise| {largest:.3g} instead of {magnitude:.3g}"
        expected = magnitude / math.sqrt(3)
        if not _close(deviation, expected, count):
            return f"noise of standard deviation {deviation:.3g} instead of {expected:.3g}"
    return ""


def _check_ours(case: Case, got: Tensor, inputs: Inputs) -> str:
    """Bit for bit the reference backend. Packed: everything. Else the first and last real tokens of
    the first and last sample, computed as shards of their sample, and all padding.
    """
    arguments: dict[str, Any] = {"seed": inputs.seed, "backend": "reference"}
    if case.packed:
        arguments |= inputs.told
        expected = noisy_embedding(inputs.input_ids, inputs.weight, NOISE_ALPHA, **arguments)
        return "" if torch.equal(got, expected) else "differs from the reference backend"
    if not bool(torch.isfinite(got).all()):
        return "has cells that are not finite or were not written"
    real = inputs.attention_mask.bool() if inputs.told else torch.ones_like(inputs.input_ids).bool()
    plain = F.embedding(inputs.input_ids, inputs.weight)
    if not torch.equal(got[~real], plain[~real]):
        return "puts noise on padding"
    for sample in (0, case.batch - 1):
        length = int(real[sample].sum())
        width = min(16, length)
        for start in (0, length - width):
            expected = noisy_embedding(
                inputs.input_ids[sample : sample + 1, start : start + width],
                inputs.weight,
                NOISE_ALPHA,
                lengths=torch.tensor([length]),
                sample_offset=sample,
                position_offset=start,
                **arguments,
            )
            if not torch.equal(got[sample : sample + 1, start : start + width], expected):
                return (
                    f"differs from the reference backend in sample {sample} from position {start}"
                )
        noise = (got[sample] - plain[sample])[real[sample]].float()
        expected_deviation = NOISE_ALPHA / math.sqrt(3 * length * case.embedding_dim)
        deviation = float(noise.std())
        if not _close(deviation, expected_deviation, noise.numel()):
            return (
                f"noise of standard deviation {deviation:.3g} instead of {expected_deviation:.3g}"
            )
    return ""


def backend_name() -> str:
    """What runs "ours" here, with the reason when it is not the C++ kernel."""
    reason = neftune_kernels.available_backends("cpu")["cpp"]
    return "cpp" if reason == "available" else f"reference, SLOW ({reason})"
