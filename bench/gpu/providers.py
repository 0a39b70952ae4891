"""What bench.gpu.times measures: shapes, inputs on the device, every provider with its check."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import cases
from neftune_kernels import noisy_embedding
from neftune_kernels.layout import Layout, per_token

from .clock import same_bits

ROTATED_BYTES = 256 << 20  # more than any GPU's cache
MOST_ROTATED = 64
DOCUMENT = 512  # tokens of a packed document, at most
ROWS = {8: (1, 8), 64: (1, 64), 512: (1, 512), 4096: (8, 512), 16384: (8, 2048)}  # tokens: (B, T)
VOCABULARIES = {576: 49152, 1024: 32000, 2048: 128256, 4096: 32000, 8192: 32000}
PACKED = (1, 65536, 1024)
NUMBERING_WIDTHS = (4096, 1024)  # numbering does not depend on d: once per number of tokens
DIFFERENT = "differs from the reference on the same device"
OPERATORS = {
    "triton": "number_documents",
    "cuda": "cuda_number_documents",
    "cpp": "number_documents",
}

Shape = tuple[int, int, int]  # (B, T, d)
Told = dict[str, Tensor]  # arguments that tell the samples


def shapes(tiny: bool) -> list[Shape]:
    """The most telling first: a usual batch, a few tokens, one sample, packing, narrow, wide."""
    if tiny:
        return [(1, 8, 576), (2, 8, 1024)]
    first = [(8, 512, 4096), (1, 8, 4096), (1, 512, 4096), PACKED]
    first += [(8, 512, 576), (8, 2048, 8192), (8, 512, 2048)]
    rest = [(*ROWS[tokens], d) for d in (4096, 2048, 576, 8192) for tokens in ROWS]
    return list(dict.fromkeys([*first, *rest]))


def case_of(shape: Shape, dtype: torch.dtype, tiny: bool) -> cases.Case:
    return cases.Case("", "", *shape, 50 if tiny else VOCABULARIES[shape[2]], dtype)


def rotation(case: cases.Case, device: str) -> int:
    """How many sets of inputs take turns."""
    if device == "cpu":
        return 2
    return min(MOST_ROTATED, max(2, -(-ROTATED_BYTES // case.bytes_moved)))


def make_inputs(case: cases.Case, device: str) -> list[cases.Inputs]:
    """A set to rotate through: one weight, all else each its own.

    Ids are uniform over the vocabulary: the worst case for caches.
    """
    weight = torch.randn(case.num_embeddings, case.embedding_dim, device=device)
    weight = weight.mul_(cases.WEIGHT_STD).to(case.dtype)
    rows = (case.batch, case.columns)
    return [
        cases.Inputs(
            input_ids=torch.randint(case.num_embeddings, rows, device=device),
            attention_mask=torch.ones(rows, dtype=torch.int64, device=device),
            weight=weight,
            out=torch.zeros(*rows, case.embedding_dim, dtype=case.dtype, device=device),
            seed=torch.randint(2**62, (), device=device),
            alpha=torch.full((), cases.NOISE_ALPHA, dtype=torch.float64),
        )
        for _ in range(rotation(case, device))
    ]


def layouts(case: cases.Case, device: str) -> dict[str, Told]:
    """Every token is real, so that ours and the rivals do the same work."""
    rows = (case.batch, case.columns)
    document = min(DOCUMENT, max(1, case.columns // 2))
    ones = torch.ones(rows, dtype=torch.int64, device=device)
    starts = torch.arange(0, case.tokens, document, device=device, dtype=torch.int32)
    place = torch.arange(case.columns, device=device).remainder_(document)
    return {
        "nothing": {},
        "lengths": {"lengths": torch.full((case.batch,), case.columns, device=device)},
        "int64 mask": {"attention_mask": ones},
        "bool mask": {"attention_mask": ones.bool()},
        "cu_seqlens": {"cu_seqlens": torch.cat([starts, starts.new_full((1,), case.tokens)])},
        "position_ids": {"position_ids": place.expand(rows).contiguous()},
    }


class Measured(NamedTuple):
    what: str
    layout: str
    backend: str
    run: Callable[[cases.Inputs], object]
    check: Callable[[cases.Inputs], str]  # "" if it computes what it should
    moves_rows: bool = True

    @property
    def key(self) -> tuple[str, str, str]:
        return self.what, self.layout, self.backend


def copy(inputs: cases.Inputs) -> Tensor:
    """As many bytes as lookup and noise must move: every output row read and written once."""
    return inputs.out.clone()


def nothing_to_check(inputs: cases.Inputs) -> str:
    return ""


def make_plain(case: cases.Case) -> list[Measured]:
    """Without noise: the lookup, over which all ratios are, and the copy."""
    lookup = cases.Provider("F.embedding", cases.embedding, "plain")
    return [
        Measured(lookup.name, "", "", lookup.run, partial(cases.check, case, lookup)),
        Measured("copy", "", "", copy, nothing_to_check),
    ]


def make_rivals(case: cases.Case) -> list[Measured]:
    """HF's hook and the official code as they are, and both rewritten for the compiler."""
    rivals = [
        cases.Provider("HF hook", cases.hf_hook, "rival"),
        cases.Provider("official", cases.official, "rival"),
        *cases.compiled_providers(),
    ]
    return [
        Measured(rival.name, "", "", rival.run, partial(cases.check, case, rival))
        for rival in rivals
    ]


class Ours:
    """Our calls on one case, and the reference's results, which layouts of one meaning share."""

    def __init__(self, told: dict[str, Told]) -> None:
        self.told = told
        self._expected: dict[str, Tensor] = {}

    def run(self, layout: str, backend: str, inputs: cases.Inputs) -> Tensor:
        given: dict[str, Any] = {**self.told[layout], "seed": inputs.seed, "backend": backend}
        return noisy_embedding(inputs.input_ids, inputs.weight, cases.NOISE_ALPHA, **given)

    def run_by_default(self, layout: str, inputs: cases.Inputs) -> Tensor:
        """As a user calls it: the seed is drawn, the backend chosen."""
        alpha, told = cases.NOISE_ALPHA, self.told[layout]
        return noisy_embedding(inputs.input_ids, inputs.weight, alpha, **told)  # type: ignore[arg-type]

    def check_by_default(self, layout: str, inputs: cases.Inputs) -> str:
        """The seed is one draw from the device's default generator."""
        torch.manual_seed(0)
        got = self.run_by_default(layout, inputs)
        torch.manual_seed(0)
        seed = torch.empty((), dtype=torch.int64, device=got.device).random_(-(2**63), None)
        same = same_bits(got, self.run(layout, "reference", inputs._replace(seed=seed)))
        return "" if same else DIFFERENT

    def check(self, layout: str, backend: str, inputs: cases.Inputs) -> str:
        """Always called with the same inputs."""
        meaning = layout if layout in ("cu_seqlens", "position_ids") else "whole rows"
        if meaning not in self._expected:
            self._expected[meaning] = self.run(layout, "reference", inputs)
        if same_bits(self.run(layout, backend, inputs), self._expected[meaning]):
            return ""
        return DIFFERENT


def make_ours(told: dict[str, Told], backends: list[str]) -> list[Measured]:
    ours = Ours(told)
    found = []
    for layout in told:
        for backend in backends:
            run, check = partial(ours.run, layout, backend), partial(ours.check, layout, backend)
            found.append(Measured("ours", layout, backend, run, check))
    for layout in ("nothing", "int64 mask"):
        run_, check_ = partial(ours.run_by_default, layout), partial(ours.check_by_default, layout)
        found.append(Measured("ours, by default", layout, "", run_, check_))
    return found


class Numbering:
    """The launches that number documents, alone."""

    def __init__(self, told: Told, backend: str) -> None:
        self._operator = getattr(torch.ops.neftune_kernels, OPERATORS[backend])
        self._arguments = (told.get("attention_mask"), told.get("position_ids"))

    def run(self, _: cases.Inputs) -> object:
        return self._operator(*self._arguments)

    def check(self, _: cases.Inputs) -> str:
        """Sample and position of real tokens, the length of every token."""
        shape = next(tensor for tensor in self._arguments if tensor is not None).shape
        arrays = torch.ops.neftune_kernels.reference_mask_layout(*self._arguments)
        found = self._operator(*self._arguments)
        own = (None, None, None, None, found) if isinstance(found, Tensor) else found
        (*places, length), (*expected_places, expected_length) = (
            per_token(Layout(*fields), shape, arrays[0].device) for fields in (own, arrays)
        )
        real, pairs = expected_length > 0, zip(places, expected_places, strict=True)
        same = all(torch.equal(one[real], other[real]) for one, other in pairs)
        same = same and torch.equal(length, expected_length)
        return "" if same else "numbers otherwise than the reference"


def make_numbering(told: dict[str, Told], backends: list[str]) -> list[Measured]:
    found = []
    for layout in ("int64 mask", "position_ids"):
        for backend in backends:
            one = Numbering(told[layout], backend)
            found.append(Measured("numbering alone", layout, backend, one.run, one.check, False))
    return found


def make_all(case: cases.Case, told: dict[str, Told], backends: list[str]) -> list[Measured]:
    """The lookup first, the compilers last."""
    numbering = make_numbering(told, backends) if case.embedding_dim in NUMBERING_WIDTHS else []
    return [*make_plain(case), *make_ours(told, backends), *numbering, *make_rivals(case)]
