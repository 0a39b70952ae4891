"""The golden vectors: the noise of a given seed and place, promised bit for bit, on every backend.

tests/test_triton.py and tests/test_cuda.py run the same file on GPUs and on what stands for them.
"""

import json
import shutil
from collections.abc import Iterator

import golden_vectors
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import same_bits
from golden import add_cases

from neftune_kernels import NEFTuneEmbedding, add_noise, neftune_noise, noisy_embedding

VECTORS = golden_vectors.read()
CASES = [pytest.param(case, id=case["name"]) for case in VECTORS["cases"]]
OF_THE_MODULE = ("padding_idx", "noise_alpha", "embed_scale", "distribution", "equal_variance")


def in_every_way(
    ids: torch.Tensor, weight: torch.Tensor, keywords: dict, backend: str | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The public functions and the module, which promise the same bits."""
    yield "noisy_embedding", noisy_embedding(ids, weight, **keywords, backend=backend)
    of_module = {word: keywords[word] for word in OF_THE_MODULE if word in keywords}
    of_call = {word: keywords[word] for word in keywords if word not in OF_THE_MODULE}
    module = NEFTuneEmbedding.from_pretrained(weight, freeze=False, **of_module, backend=backend)
    yield "NEFTuneEmbedding", module(ids, **of_call)
    added = {
        word: keywords[word] for word in keywords if word not in ("padding_idx", "embed_scale")
    }
    if "padding_idx" in keywords and "attention_mask" not in keywords:
        added["attention_mask"] = ids != keywords["padding_idx"]
    embeds = F.embedding(ids, weight)
    if keywords.get("embed_scale", 1.0) != 1:
        embeds = embeds * keywords["embed_scale"]
    yield "add_noise", add_noise(embeds, **added, backend=backend)
    no_weight = torch.zeros_like(weight, dtype=torch.float32)
    if same_bits(weight, no_weight) and "embed_scale" not in keywords:
        shape = (ids.shape, weight.shape[1])
        yield "neftune_noise", neftune_noise(*shape, **added, backend=backend)


@pytest.mark.parametrize("case", CASES)
def test_golden_vectors(backend, case):
    served = golden_vectors.dtypes(case)
    if backend != "reference":
        served = [dtype for dtype in served if dtype != torch.float64]  # the reference's alone
    assert served
    for dtype in served:
        call = golden_vectors.call(case, dtype)
        for way, out in in_every_way(*call, backend):
            assert out.dtype == dtype
            assert golden_vectors.spelled(out) == golden_vectors.expected(case, dtype), way


@pytest.mark.parametrize("case", CASES)
def test_oracle_agrees(case):
    """The vectors came from the reference; the oracle's plain loops share no arithmetic with it."""
    for dtype in golden_vectors.dtypes(case):
        ids, weight, keywords = golden_vectors.call(case, dtype)
        places = places_of(ids, keywords)
        alpha, seed = keywords["noise_alpha"], keywords["seed"]
        of_noise = {word: keywords[word] for word in NOISE_WORDS if word in keywords}
        wide = (weight.double() if dtype == torch.float64 else weight.float()).numpy()
        name = str(dtype).removeprefix("torch.")
        out = oracle.noisy_embedding(
            places, ids.flatten().tolist(), wide, name, alpha, seed, **of_noise
        )
        exact = torch.from_numpy(out).to(dtype).reshape(*ids.shape, weight.shape[1])
        assert golden_vectors.spelled(exact) == golden_vectors.expected(case, dtype), dtype


LAYOUT_WORDS = ("attention_mask", "lengths", "cu_seqlens", "position_ids")
PLACE_WORDS = (*LAYOUT_WORDS, "padding_idx", "sample_offset", "position_offset")
NOISE_WORDS = ("replica", "embed_scale", "sign", "distribution", "equal_variance")


def places_of(ids: torch.Tensor, keywords: dict) -> list[tuple[int, int, int] | None]:
    """The oracle's (sample, position, length) of every token, None where it gets no noise."""
    said = {word: flat(keywords[word], word, ids) for word in PLACE_WORDS if word in keywords}
    places = oracle.places(ids.shape, input_ids=ids.flatten().tolist(), **said)
    noisy = keywords.get("noise_mask", torch.ones_like(ids)).flatten().tolist()
    return [place if noise else None for place, noise in zip(places, noisy, strict=True)]


def flat(value: torch.Tensor | int, word: str, ids: torch.Tensor) -> list | int:
    """As the oracle takes it: a flat list, one row of position ids repeated."""
    if not isinstance(value, torch.Tensor):
        return value
    return (value.expand(ids.shape) if word == "position_ids" else value).flatten().tolist()


# ---- what manual_seed leads to


def next_draw() -> int:
    return int(torch.empty((), dtype=torch.int64).random_(-(2**63), None))


DRAWS = [(int(seed), draws) for seed, draws in VECTORS["draws"].items()]


@pytest.mark.parametrize("seed, draws", DRAWS)
def test_one_draw_per_noisy_call(backend, seed, draws):
    """Every noisy call takes one 64-bit draw of the default generator and leaves it at the next."""
    (case,) = (c for c in VECTORS["cases"] if c["name"] == f"drawn after manual_seed({seed})")
    ids, weight, keywords = golden_vectors.call(case, torch.float32)
    assert keywords.pop("seed") == draws[0]
    expected = golden_vectors.expected(case, torch.float32)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    assert [next_draw() for _ in draws] == draws
    torch.set_rng_state(before)
    ways = []
    for way, out in in_every_way(ids, weight, keywords, backend):
        ways.append(way)
        assert golden_vectors.spelled(out) == expected, way
        assert [next_draw(), next_draw()] == draws[1:], way
        torch.manual_seed(seed)  # for the next way, which has not begun
    assert len(ways) == 4


def test_draws_are_the_mersenne_twister_s():
    """numpy's own: two 32-bit numbers make a draw, the first is its upper half."""
    for seed, draws in DRAWS:
        words = np.frombuffer(np.random.RandomState(seed).bytes(8 * len(draws)), "<u4").tolist()
        bits = [high << 32 | low for high, low in zip(words[::2], words[1::2], strict=True)]
        assert [draw % 2**64 for draw in draws] == bits


# ---- the file


def test_every_case_is_in_the_file_and_none_changes(tmp_path):
    path = tmp_path / golden_vectors.PATH.name
    shutil.copy(golden_vectors.PATH, path)
    assert add_cases.add_cases(path) == 0
    assert path.read_bytes() == golden_vectors.PATH.read_bytes()


def test_cases_are_added_and_never_changed(tmp_path):
    path = tmp_path / golden_vectors.PATH.name

    def write(change):
        vectors = json.loads(golden_vectors.PATH.read_text())
        change(vectors)
        path.write_text(json.dumps(vectors))
        return path.read_bytes()

    write(lambda vectors: vectors["cases"].pop(3))
    assert add_cases.add_cases(path) == 1
    assert json.loads(path.read_text())["cases"][-1] == VECTORS["cases"][3]

    def one_bit(vectors):
        (lines,) = vectors["cases"][1]["out"].values()
        lines[0] = ("1" if lines[0][0] == "0" else "0") + lines[0][1:]

    def another_call(vectors):
        vectors["cases"][1]["arguments"]["alpha"] = 6.0

    def another_draw(vectors):
        vectors["draws"]["0"][0] += 1

    def another_version(vectors):
        vectors["spec_version"] = 2

    for change, error, message in (
        (one_bit, SystemExit, "would change"),
        (another_call, SystemExit, "take a new name"),
        (another_draw, SystemExit, r"manual_seed\(0\)"),
        (another_version, ValueError, "specification 2"),
    ):
        written = write(change)
        with pytest.raises(error, match=message):
            add_cases.add_cases(path)
        assert path.read_bytes() == written
