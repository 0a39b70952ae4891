"""The golden vectors: calls in full and the exact bits they gave, read by every backend's tests.

tests/golden/spec_1.json says in its first lines how it is read.
tests/golden/add_cases.py adds cases to it; no case ever changes, for the noise of a given seed and
place is promised.
"""

import hashlib
import json
import pathlib
from typing import Any

import torch

from neftune_kernels import SPEC_VERSION

PATH = pathlib.Path(__file__).parent / "golden" / f"spec_{SPEC_VERSION}.json"
KEYWORDS = {"alpha": "noise_alpha"}  # its words → ours, where they differ

SIGNIFICAND_BITS = {
    torch.float64: 53,
    torch.float32: 24,
    torch.float16: 11,
    torch.bfloat16: 8,
}
INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
DIGITS_IN_FULL = 600  # a longer output is a SHA-256 and its first values


def read(path: pathlib.Path = PATH) -> dict[str, Any]:
    vectors = json.loads(path.read_text())
    if vectors["spec_version"] != SPEC_VERSION:
        raise ValueError(
            f"{path} holds vectors of specification {vectors['spec_version']}, "
            f"this package follows {SPEC_VERSION}"
        )
    return vectors


def tensor(value: dict[str, Any]) -> torch.Tensor:
    """{"int32": [[1, 2]]} as a tensor."""
    ((dtype, values),) = value.items()
    return torch.tensor(values, dtype=getattr(torch, dtype))


def make_weight(weight: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """(V, d): all zeros, every bit given, or spread over [-2, 2) by integers alone.

    No random generator: its numbers are its own library's promise, not ours.
    """
    ((kind, said),) = weight.items()
    if kind == "zeros":
        return torch.zeros(said, dtype=dtype)
    if kind == "bits":
        rows = said[str(dtype).removeprefix("torch.")]
        bits = INTEGERS[dtype].itemsize * 8
        words = [[int(word, 16) for word in row.split()] for row in rows]
        signed = [
            [word - 2**bits if word >= 2 ** (bits - 1) else word for word in row] for row in words
        ]
        return torch.tensor(signed, dtype=INTEGERS[dtype]).view(dtype)
    assert kind == "spread", kind
    num_embeddings, embedding_dim = said
    significand = SIGNIFICAND_BITS[dtype]
    values = [
        ((i * 0x9E3779B97F4A7C15 % 2**64 >> (63 - significand)) - 2**significand)
        / 2 ** (significand - 1)
        for i in range(1, num_embeddings * embedding_dim + 1)
    ]
    exact = torch.tensor(values, dtype=torch.float64)
    return exact.to(dtype).reshape(num_embeddings, embedding_dim)


def call(case: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """input_ids, weight and the keywords of noisy_embedding, noise_alpha among them."""
    keywords = {
        KEYWORDS.get(word, word): tensor(value) if isinstance(value, dict) else value
        for word, value in case["arguments"].items()
    }
    return tensor(case["input_ids"]), make_weight(case["weight"], dtype), keywords


def dtypes(case: dict[str, Any]) -> list[torch.dtype]:
    """Those the case has an output for."""
    return [getattr(torch, name) for name in case["out"]]


def spelled(out: torch.Tensor) -> list[str] | dict[str, str]:
    """The bits of (..., d) as the file holds them: a line of hexadecimal words for every token."""
    rows = out.detach().cpu().reshape(out.shape[:-1].numel(), out.shape[-1]).contiguous()
    size = out.dtype.itemsize
    words = rows.view(INTEGERS[out.dtype]).numpy().astype(f">i{size}")
    lines = [row.tobytes().hex(" ", size) for row in words]
    if sum(map(len, lines)) <= DIGITS_IN_FULL:
        return lines
    digest = hashlib.sha256(words.tobytes()).hexdigest()
    return {"sha256": digest, "first": words.flatten()[:4].tobytes().hex(" ", size)}


def expected(case: dict[str, Any], dtype: torch.dtype) -> list[str] | dict[str, str]:
    return case["out"][str(dtype).removeprefix("torch.")]
