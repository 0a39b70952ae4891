"""Add cases to the golden vectors; change none.

    python tests/golden/add_cases.py

The outputs are the reference's. Every case already in the file is computed again first: if one bit
of it would change, or this script means another call by its name, nothing is written.
To add cases, write them here under new names. A case stays in the file when it leaves this script.
"""

import json
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

TESTS = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # this checkout's reference, whatever is installed

import golden_vectors as golden  # noqa: E402
import torch  # noqa: E402

from neftune_kernels import SPEC_VERSION, noisy_embedding  # noqa: E402

ABOUT = [
    "Golden vectors of neftune_kernels: docs/specification.md, section 'Golden vectors'.",
    "A case is one call of noisy_embedding, its arguments in full, and its output in every dtype",
    "the weight may have. Cases are added by tests/golden/add_cases.py and never change.",
    "Tensors are {dtype: values}. 'replica' is the fourth word of the Philox counter; a word that",
    "is left out is 0, sign and embed_scale 1, distribution 'uniform', equal_variance true.",
    "Outputs: a line for every token in row-major order, its columns as the bits of IEEE numbers",
    "(or bfloat16), most significant digit first: 1.0 in float32 is 3f800000. Long outputs are the",
    "SHA-256 of the bytes that those digits spell, and the first four values.",
    "weight (V, d): 'zeros'; 'bits', given as the outputs are; or 'spread': with p = 53, 24, 11, 8",
    "bits in the significand of float64, float32, float16, bfloat16 and i = row * d + column + 1,",
    "((i * 0x9E3779B97F4A7C15 mod 2**64 >> 63 - p) - 2**p) / 2**(p - 1), exact in its dtype.",
    "draws: manual_seed -> the first seeds drawn from a CPU generator, one for every noisy call.",
]

FLOAT32 = ("float32",)
EVERY_DTYPE = ("float32", "bfloat16", "float16", "float64")
LAST = 2**32 - 1  # the largest counter word
COLUMNS = 12  # one and a half Philox blocks
IDS = [[3, 10, 6, 2, 9, 5], [1, 8, 4, 0, 7, 3], [10, 6, 2, 9, 5, 1]]
SHORT_IDS = [[2, 0, 4], [1, 3, 2]]
PADDED_IDS = [[3, 10, 6, 2, 0, 0], [0, 0, 4, 5, 7, 3], [10, 0, 2, 0, 5, 0]]

RIGHT = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
LEFT = [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]
HOLES = [[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0], [1, 1, 0, 1, 1, 1]]
NUMBERED = [[1, 1, 2, 2, 0, 3], [2, 2, 0, 2, 1, 1], [0, 7, 7, 0, 7, 0]]
NOISY = [[1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0]]
RESTARTS = [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [4, 5, 0, 1, 2, 3]]
SHUFFLED = [[5, 0, 3, 1, 4, 2], [0, 1, 2, 3, 4, 5], [9, 8, 2, 1, 30, 0]]


def int32(values: Any) -> dict[str, Any]:
    return {"int32": values}


def int64(values: Any) -> dict[str, Any]:
    return {"int64": values}


LAYOUTS = {
    "nothing told": {},
    "mask, right-padded": {"attention_mask": {"bool": RIGHT}},
    "mask, left-padded": {"attention_mask": int64(LEFT)},
    "mask, holes": {"attention_mask": int32(HOLES)},
    "mask, numbered": {"attention_mask": int64(NUMBERED)},
    "lengths": {"lengths": int64([6, 3, 0])},
    "lengths beyond T": {"lengths": int64([40, 12, 0]), "position_offset": 8},
    "lengths, shuffled places": {
        "lengths": int64([6, 4, 40]),
        "position_ids": int64(SHUFFLED),
    },
    "lengths, shuffled places, a later shard": {
        "lengths": int32([12, 11, 100]),
        "position_ids": int32(SHUFFLED),
        "position_offset": 6,
    },
    "cu_seqlens": {"cu_seqlens": int64([0, 5, 12, 18])},
    "cu_seqlens, empty documents": {"cu_seqlens": int32([0, 0, 4, 4, 4, 17, 18, 18])},
    "cu_seqlens, position_offset": {"cu_seqlens": int32([0, 7, 18]), "position_offset": 3},
    "position_ids": {"position_ids": int64(RESTARTS)},
    "position_ids, one row for all": {"position_ids": int64([[0, 1, 0, 1, 2, 3]])},
    "position_ids, mask with holes": {
        "position_ids": int64(RESTARTS),
        "attention_mask": int64(HOLES),
    },
    "position_ids, left-padded mask as transformers gives them": {
        "position_ids": int64([[1, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 0]]),
        "attention_mask": int64(LEFT),
    },
    "noise_mask": {"noise_mask": int64(NOISY)},
    "noise_mask, mask": {"noise_mask": int64(NOISY), "attention_mask": int64(NUMBERED)},
    "noise_mask, lengths": {
        "noise_mask": int64(NOISY),
        "lengths": int64([40, 9, 12]),
        "position_offset": 5,
    },
    "noise_mask, cu_seqlens": {
        "noise_mask": int64(NOISY),
        "cu_seqlens": int64([0, 4, 4, 11, 18]),
    },
    "noise_mask, position_ids": {
        "noise_mask": int64(NOISY),
        "position_ids": int64(RESTARTS),
        "position_offset": 2,
    },
    "padding_idx": {"padding_idx": 0},
    "padding_idx, noise_mask": {"padding_idx": 0, "noise_mask": int64(NOISY)},
    "padding_idx beside a mask that calls it real": {
        "padding_idx": 0,
        "attention_mask": int64(RIGHT),
    },
}


def layouts() -> Iterator[dict[str, Any]]:
    """Every way of telling samples in every dtype, with every offset beside it once."""
    for name, layout in LAYOUTS.items():
        ids = PADDED_IDS if "padding_idx" in layout else IDS
        told = {"alpha": 5.0, "seed": 3, **layout}
        yield case(f"layout: {name}", ids, (11, COLUMNS), EVERY_DTYPE, **told)
        moved = {**told, "seed": 2**63 + 11, "replica": 2, "sample_offset": LAST - 1}
        moved["position_offset"] = layout.get("position_offset", 0) + 1
        yield case(f"layout, offsets: {name}", ids, (11, 5), ("float16",), **moved)


def shapes() -> Iterator[dict[str, Any]]:
    same = {"alpha": 5.0, "seed": 4, "replica": 1}
    yield case("shape: 0-D", 3, (5, 10), EVERY_DTYPE, **same)
    yield case("shape: (N,)", [3, 1, 4, 1, 0], (5, 10), EVERY_DTYPE, **same)
    packed = {"cu_seqlens": int32([0, 2, 2, 5])}
    yield case("shape: (N,), packed", [3, 1, 4, 1, 0], (5, 10), EVERY_DTYPE, **same, **packed)
    three = [[[0, 1, 2], [3, 4, 0]], [[4, 3, 2], [1, 1, 1]]]
    lengths = {"lengths": int64([[3, 1], [0, 2]])}
    yield case("shape: (2, 2, 3)", three, (5, 5), EVERY_DTYPE, **same, **lengths)
    yield case("shape: (0,)", [], (5, 5), FLOAT32, **same)
    yield case("shape: (2, 0)", [[], []], (5, 5), FLOAT32, **same)
    told = {"attention_mask": int64(NUMBERED)}
    yield case("ids: int32", IDS, (11, COLUMNS), EVERY_DTYPE, ids="int32", **same, **told)
    yield case("ids: int32, nothing told", IDS, (11, 8), ("float16",), ids="int32", **same)
    pads = {"padding_idx": 0, "embed_scale": 1.7}
    yield case("ids: int32, padding_idx", PADDED_IDS, (11, 8), FLOAT32, ids="int32", **same, **pads)


def widths() -> Iterator[dict[str, Any]]:
    for width in (1, 7, 8, 9, 20, 64, 576):
        name, same = f"width: {width}", {"alpha": 5.0, "seed": 5}
        yield case(name, SHORT_IDS, (5, width), EVERY_DTYPE, **same)
        told = {"lengths": int64([3, 1]), "replica": 3, "embed_scale": 24.125}
        yield case(f"{name}, scaled", SHORT_IDS, (5, width), EVERY_DTYPE, **same, **told)


def integer_dtypes() -> Iterator[dict[str, Any]]:
    """Masks, lengths and position ids of every dtype they may have."""
    same = {"alpha": 5.0, "seed": 6}
    integers = ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
    for dtype in ("bool", *integers, "float16", "bfloat16", "float32", "float64"):
        kind = float if "float" in dtype else int
        mask = HOLES if dtype == "bool" else NUMBERED
        numbered = {dtype: [[kind(v) for v in row] for row in mask]}
        yield case(f"mask: {dtype}", IDS, (11, 3), FLOAT32, **same, attention_mask=numbered)
        noisy = {dtype: [[kind(v) for v in row] for row in NOISY]}
        yield case(f"noise_mask: {dtype}", IDS, (11, 3), FLOAT32, **same, noise_mask=noisy)
    for dtype in integers[:5]:
        lengths = {"lengths": {dtype: [40, 5, 0]}, "position_offset": 3}
        yield case(f"lengths: {dtype}", IDS, (11, 3), FLOAT32, **same, **lengths)
        places = {"position_ids": {dtype: RESTARTS}}
        yield case(f"position_ids: {dtype}", IDS, (11, 3), FLOAT32, **same, **places)


def counters() -> Iterator[dict[str, Any]]:
    """The key's and the counter's words at their extremes; the noise alone, on zeros."""
    seeds = (0, 1, -1, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), 2**63, 2**64 - 1)
    for seed in (*seeds, 0x0123456789ABCDEF):
        name = f"seed: {seed}"
        yield case(name, [[0, 0]], {"zeros": [1, 9]}, FLOAT32, alpha=5.0, seed=seed)
    for word in ("replica", "sample_offset", "position_offset"):
        for value in (1, 2**31, LAST):
            told = {"alpha": 5.0, "seed": 7, word: value}
            yield case(f"{word}: {value}", [[0, 0], [0, 0]], {"zeros": [1, 9]}, FLOAT32, **told)
    for value in (1, 2**31, LAST):
        told = {"alpha": 5.0, "seed": -8, "replica": value, "sample_offset": value}
        told["position_offset"] = value
        name = f"every word: {value}"
        yield case(name, [[0] * 3] * 2, {"zeros": [1, 9]}, FLOAT32, **told)
        told["lengths"] = int64([2**33, 2])
        yield case(f"{name}, lengths", [[0] * 3] * 2, {"zeros": [1, 9]}, FLOAT32, **told)
        told["position_ids"] = int64([[0, 2, 1], [1, 0, 5]])
        yield case(f"{name}, places", [[0] * 3] * 2, {"zeros": [1, 9]}, FLOAT32, **told)
        told = {**told, "cu_seqlens": int64([0, 1, 6])}
        del told["lengths"], told["position_ids"]
        yield case(f"{name}, packed", [[0] * 3] * 2, {"zeros": [1, 9]}, FLOAT32, **told)


SMALL_ALPHAS = (5e-324, 1e-28, 1e-26, 2.0**-86, 1e-6)
ALPHAS = (*SMALL_ALPHAS, 1 / 3, 5.0, 15.000000001, 1e4, 1e30, 3.4e38, 1e39, 1e300, 1.7e308)


def alphas() -> Iterator[dict[str, Any]]:
    for alpha in ALPHAS:
        told = {"alpha": alpha, "seed": 9, "lengths": int64([3, 2])}
        yield case(f"alpha: {alpha}", SHORT_IDS, (5, 4), EVERY_DTYPE, **told)
        if alpha in (5e-324, 2.0**-86, 1 / 3, 1.7e308):
            yield case(f"alpha: {alpha}, sign -1", SHORT_IDS, (5, 4), EVERY_DTYPE, **told, sign=-1)
    for length in (1, 3, 70000, 2**31 - 1, 2**33 + 1):
        told = {"alpha": 1 / 3, "seed": 10, "lengths": int64([length])}
        yield case(f"length: {length}", [[0]], {"zeros": [1, 11]}, FLOAT32, **told)
    for times, name in ((16.0, "smallest magnitude"), (15.99, "below the smallest magnitude")):
        told = {"alpha": times * 2.0**-90, "seed": 0}
        minus_zeros = {"bits": {"float32": [" ".join(["80000000"] * 64)]}}
        yield case(f"alpha: {name}", [[0] * 4], minus_zeros, FLOAT32, **told)


def scales() -> Iterator[dict[str, Any]]:
    for scale in (math.sqrt(576), math.sqrt(2880), 0.1, -3.0, 1e-30, 65504.0, 0.0):
        told = {"alpha": 5.0, "seed": 11, "embed_scale": scale}
        mask = {"attention_mask": int64([[1, 1, 0], [0, 1, 1]])}
        yield case(f"embed_scale: {scale}", SHORT_IDS, (5, 12), EVERY_DTYPE, **told, **mask)


def variants() -> Iterator[dict[str, Any]]:
    kinds: dict[str, dict[str, Any]] = {"sign -1": {"sign": -1}}
    for distribution in ("normal", "rademacher"):
        for sign in (1, -1):
            for equal in (True, False):
                name = f"{distribution}, sign {sign}, equal_variance {equal}"
                kinds[name] = {"distribution": distribution, "sign": sign, "equal_variance": equal}
    kinds["uniform, equal_variance False"] = {"equal_variance": False}
    told: dict[str, dict[str, Any]] = {
        "nothing told": {},
        "mask": {"attention_mask": int64(NUMBERED), "replica": 1},
        "lengths": {"lengths": int64([20, 12, 7]), "position_offset": 6},
        "cu_seqlens": {"cu_seqlens": int32([0, 4, 4, 18]), "sample_offset": LAST},
        "noise_mask": {"noise_mask": int64(NOISY), "embed_scale": 1.7},
    }
    for name, variant in kinds.items():
        for way, layout in told.items():
            if name.startswith("rademacher, sign -1") and way != "mask":
                continue  # the sign goes with every distribution alike
            arguments = {"alpha": 5.0, "seed": 12, **variant, **layout}
            yield case(f"{name}: {way}", IDS, (11, 9), EVERY_DTYPE, **arguments)
    for distribution in ("normal", "rademacher"):
        for alpha in (5e-324, 1e-26, 1e30, 1e300):
            arguments = {"alpha": alpha, "seed": 13, "distribution": distribution}
            yield case(
                f"{distribution}: alpha {alpha}", [[0, 1, 2]], (5, 4), EVERY_DTYPE, **arguments
            )
        arguments = {"alpha": 5.0, "seed": 14, "distribution": distribution}
        yield case(f"{distribution}: wide", [[0, 1, 2]], (3, 576), EVERY_DTYPE, **arguments)


SPECIAL = {  # zeros, subnormals, the smallest normal, 1 and its neighbour, the largest, infinities
    "float32": "00000000 80000000 00000001 80000001 007fffff 00800000 "
    "3f800000 3f800001 7f7fffff ff7fffff 7f800000 ff800000",
    "bfloat16": "0000 8000 0001 8001 007f 0080 3f80 3f81 7f7f ff7f 7f80 ff80",
    "float16": "0000 8000 0001 8001 03ff 0400 3c00 3c01 7bff fbff 7c00 fc00",
    "float64": "0000000000000000 8000000000000000 0000000000000001 8000000000000001 "
    "000fffffffffffff 0010000000000000 3ff0000000000000 3ff0000000000001 "
    "7fefffffffffffff ffefffffffffffff 7ff0000000000000 fff0000000000000",
}


def rounding() -> Iterator[dict[str, Any]]:
    weight = {"bits": {dtype: [bits] for dtype, bits in SPECIAL.items()}}
    for alpha in (1e-26, 1e-7, 5.0, 6e5, 3e38):
        for scale in (1.0, 1.5) if alpha in (1e-7, 6e5) else (1.0,):
            told = {"alpha": alpha, "seed": 15, "embed_scale": scale, "lengths": int64([2])}
            name = f"special values: alpha {alpha}, embed_scale {scale}"
            yield case(name, [[0, 0, 0]], weight, EVERY_DTYPE, **told)
    # sqrt(L * d) = 128: noise is an odd number of half units in the last place of 1
    for dtype, one, unit in (("bfloat16", "3f80", 2.0**-7), ("float16", "3c00", 2.0**-10)):
        ones = {"bits": {dtype: [" ".join([one] * 8)]}}
        told = {"alpha": 128 * 2.0**15 * unit, "seed": 16, "lengths": int64([2048])}
        yield case(f"ties: {dtype}", [[0] * 12], ones, (dtype,), **told)


# Magnitudes whose float64 value is the middle of two float32 numbers, rounded to even, or the next
# float64 above it, rounded up: found by search. One unit in the last place of 1/sqrt(3) or of the
# square root, or another order of the operations, turns the last bit of the magnitude.
QUOTIENTS = (2.4583273686496874, 2.458327368649688)  # / sqrt(3 * 7)
DEVIATIONS = (1.8582890193635582, 1.8582890193635586)  # * 1/sqrt(3) / sqrt(1 * 4)
PRODUCTS = (4.257888293891016, 4.2629457029716304)  # * 1/sqrt(3) / sqrt(3 * 7)


def middles() -> Iterator[dict[str, Any]]:
    for alpha in QUOTIENTS:
        name, told = f"middle: alpha {alpha}", {"alpha": alpha, "seed": 17}
        yield case(name, [[0, 1, 2]], (3, 7), EVERY_DTYPE, **told)
        told["lengths"] = int64([3])
        yield case(f"{name}, lengths", [[0, 1, 2]], (3, 7), EVERY_DTYPE, **told)
    for distribution in ("normal", "rademacher"):
        told = {"seed": 18, "distribution": distribution}
        for alpha in DEVIATIONS:
            name = f"middle: alpha {alpha}, {distribution}"
            yield case(name, [[0]], {"zeros": [1, 4]}, FLOAT32, alpha=alpha, **told)
        for alpha in PRODUCTS:
            name = f"middle: alpha {alpha}, {distribution}"
            yield case(name, [[0] * 3], {"zeros": [1, 7]}, FLOAT32, alpha=alpha, **told)


def together() -> Iterator[dict[str, Any]]:
    told: dict[str, Any] = {"alpha": 7.5, "seed": -(2**62) - 3, "replica": 5, "sign": -1}
    told |= {"sample_offset": 2**32 - 2, "position_offset": 2**32 - 3, "embed_scale": 33.9}
    told |= {"attention_mask": int64(NUMBERED), "position_ids": int64(RESTARTS)}
    told |= {"noise_mask": int64(NOISY), "padding_idx": 3}
    yield case("everything at once", IDS, (11, 20), EVERY_DTYPE, **told)
    for seed, (first, *_) in drawn().items():
        told = {"alpha": 5.0, "seed": first, "attention_mask": int64(RIGHT)}
        yield case(f"drawn after manual_seed({seed})", IDS, {"zeros": [11, 9]}, FLOAT32, **told)


def case(
    name: str,
    input_ids: Any,
    weight: tuple[int, int] | dict[str, Any],
    dtypes: tuple[str, ...],
    ids: str = "int64",
    **arguments: Any,
) -> dict[str, Any]:
    if not isinstance(weight, dict):
        weight = {"spread": list(weight)}
    given = {"name": name, "input_ids": {ids: input_ids}, "weight": weight, "arguments": arguments}
    return {**given, "out": dict.fromkeys(dtypes)}


def drawn() -> dict[str, list[int]]:
    """manual_seed → the first three draws of the CPU's generator, each a 0-dim int64's 64 bits."""
    generators = {str(seed): torch.Generator().manual_seed(seed) for seed in (0, 42)}
    return {
        seed: [
            int(torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator))
            for _ in range(3)
        ]
        for seed, generator in generators.items()
    }


def outputs(case: dict[str, Any]) -> dict[str, Any]:
    """The reference's output in every dtype that the case has."""
    found = {}
    for dtype in golden.dtypes(case):
        input_ids, weight, keywords = golden.call(case, dtype)
        out = noisy_embedding(input_ids, weight, **keywords, backend="reference")
        if bool(out.isnan().any()):
            raise SystemExit(f"{case['name']!r} gives NaN, whose bits are nobody's promise")
        found[str(dtype).removeprefix("torch.")] = golden.spelled(out)
    return found


def formatted(value: Any, indent: int = 0, before: int = 0) -> str:
    """JSON of lines of at most 100 columns, where its strings allow that: one token a line."""
    flat = json.dumps(value)
    if not isinstance(value, (list, dict)) or (indent + before + len(flat) < 100 and indent > 1):
        return flat
    if isinstance(value, dict):
        keys = [f"{json.dumps(key)}: " for key in value]
        parts = [key + formatted(value[json.loads(key[:-2])], indent + 1, len(key)) for key in keys]
    else:
        parts = [formatted(part, indent + 1) for part in value]
    start, end = ("{", "}") if isinstance(value, dict) else ("[", "]")
    space = "\n" + " " * (indent + 1)
    return start + space + ("," + space).join(parts) + "\n" + " " * indent + end


def refuse_changes(vectors: dict[str, Any], mine: dict[str, dict[str, Any]]) -> None:
    for old in vectors["cases"]:
        name = old["name"]
        call = {key: value for key, value in old.items() if key != "out"}
        if name in mine and {key: mine[name][key] for key in call} != call:
            raise SystemExit(f"case {name!r} is another call in the file: take a new name")
        if outputs(old) != old["out"]:
            raise SystemExit(f"case {name!r} would change: the noise of a given place is promised")
    for seed, draws in vectors["draws"].items():
        if drawn().get(seed, draws) != draws:
            raise SystemExit(f"the draws after manual_seed({seed}) would change")


def add_cases(path: pathlib.Path) -> int:
    """How many cases were added."""
    mine: dict[str, dict[str, Any]] = {}
    kinds = (layouts, shapes, widths, integer_dtypes, counters, alphas, scales, variants, rounding)
    for kind in (*kinds, middles, together):
        for new in kind():
            assert new["name"] not in mine, new["name"]
            mine[new["name"]] = json.loads(json.dumps(new))
    vectors = {"spec_version": SPEC_VERSION, "about": ABOUT, "draws": {}, "cases": []}
    if path.exists():
        vectors = golden.read(path)
    refuse_changes(vectors, mine)
    known = {old["name"] for old in vectors["cases"]}
    added = [new for name, new in mine.items() if name not in known]
    vectors["draws"] = {**drawn(), **vectors["draws"]}
    vectors["cases"] += [{**new, "out": outputs(new)} for new in added]
    path.write_text(formatted(vectors) + "\n")
    return len(added)


if __name__ == "__main__":
    print(f"{add_cases(golden.PATH)} cases added to {golden.PATH}")
