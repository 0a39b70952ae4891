"""What `make noise-quality` judges is our noise, and it can say no: the streams are the reference's
words, a wrong constant is seen, and the rule calls a bad generator bad.
"""

import math
import os
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from bench import noise_battery, noise_moments, noise_quality, noise_streams
from bench.noise_battery import BATTERY, CONTROL, Value, values_of, verdicts
from bench.noise_streams import BAD, BEYOND, STREAMS, Stream

STREAM = {one.name: one for one in (*STREAMS, *BAD, *BEYOND)}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(noise_streams.HEADERS, tmp_path_factory.mktemp("words"))


def compiled(headers, folder):
    if shutil.which("g++") is None:
        if os.environ.get("NEFTUNE_REQUIRE_CPP") == "1":
            pytest.fail("NEFTUNE_REQUIRE_CPP=1, but no g++ here: the words' program needs it")
        pytest.skip("no g++ here: the words' program is not compiled")
    with pytest.MonkeyPatch.context() as patch:  # compiles in a second; these streams are short
        flags = [flag for flag in noise_streams.FLAGS if flag != "-O3"]
        patch.setattr(noise_streams, "FLAGS", flags)
        return noise_streams.compile_words(headers, folder / "noise_words")


# ---- the streams


def test_streams_are_the_references_words(program):
    assert noise_streams.check_words(program) == 4 * 4096 * len(STREAM)


def test_noise_and_its_variants_are_made_of_the_training_stream(program):
    noise_streams.check_kernel(program)


@pytest.mark.parametrize(
    ("header", "right", "wrong"),
    [
        ("philox.h", "0xCD9E8D57u", "0xCD9E8D59u"),
        ("philox.h", "0xBB67AE85u", "0xBB67AE84u"),
        ("noise.h", "multiply(kPhiloxMultiplier1, sample)", "multiply(kPhiloxMultiplier1, 0u)"),
    ],
    ids=["multiplier", "key step", "sample"],
)
def test_a_wrong_generator_is_seen(header, right, wrong, tmp_path):
    for name in ("compiler.h", "noise.h", "philox.h"):
        text = (noise_streams.HEADERS / name).read_text()
        if name == header:
            assert text.count(right) == 1
            text = text.replace(right, wrong)
            if name == "noise.h":
                text = text.replace("uint32_t sample,", "uint32_t,")
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="is not the reference's"):
        noise_streams.check_words(compiled(tmp_path, tmp_path))


def test_each_stream_walks_what_it_says():
    """One word of counter and key, or all that a training walks; drawn seeds in order."""
    numbers = torch.arange(1 << 12)
    for stream in STREAMS:
        words = noise_streams.counters_of(stream, numbers, 0)
        moving = {word for word, values in words.items() if len(values.unique()) > 1}
        if not stream.steps:
            ((walked, _),) = stream.walk
            assert moving == {walked}
    steps = noise_streams.counters_of(STREAM["steps"], numbers, 0)
    assert steps["seed_low"].tolist() == [
        seed & 0xFFFFFFFF for seed in noise_streams.seeds_of_steps(0)[: 1 << 12]
    ]
    everything = noise_streams.counters_of(STREAM["training"], numbers << 9, 0)
    for word in (*noise_streams.COUNTER[1:], *noise_streams.KEY):
        assert len(everything[word].unique()) > 1, word


@pytest.mark.parametrize("walk", [["block"], ["column:8"], ["block:0"], ["seeds=/nowhere"], []])
def test_the_program_refuses_what_it_does_not_know(walk, program):
    arguments = ["7", "words", "0", *walk]
    done = noise_streams.subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("noise_words: ")


# ---- the rule


def one(p, test="sts_serial", ntuple=3, line=0):
    return Value(test, ntuple, line, p)


@pytest.mark.parametrize(
    ("p", "again", "said"),
    [
        (0.5, None, "PASSED"),
        (0.0049, 0.5, "WEAK"),
        (0.9951, 0.5, "WEAK"),
        (0.0049, 0.0009, "FAILED"),
        (0.9951, 0.9992, "FAILED"),
        (0.0049, 0.9992, "FAILED"),
        (9e-7, None, "FAILED"),
        (0.99999999, None, "FAILED"),
        (0.0, None, "FAILED"),
        (1.0, None, "FAILED"),
    ],
)
def test_rule(p, again, said):
    repeated = [] if again is None else [one(again)]
    assert noise_battery.needs_repeating([one(p)]) is bool(repeated)
    assert verdicts([one(p)], repeated) == {one(p): said}


def test_a_repetition_is_of_the_same_line():
    first = [one(0.001, line=0), one(0.4, line=1)]
    again = [one(0.3, line=0), one(0.0001, line=1)]
    assert list(verdicts(first, again).values()) == ["WEAK", "PASSED"]


PRINTED = """          sts_serial|   3|0.99872560
#=============================================================================#
#                          Values of test p-values                            #
#=============================================================================#
|0.19303994|
|0.30350094|
|0.71211507|
#=============================================================================#

          sts_serial|   3|0.71700304 
|0.25000000|
|0.75000000|

        sts_monobit|   1|0.00000000
|0.00000000|
"""  # noqa: W291


def test_what_dieharder_prints_is_read():
    """Of (0.25, 0.75) no distance is more than 1/4, and none can be less: p = 1. Of the three it
    is the share of random ones that lie as far away, by the definition of the test.
    """
    first, second, third = values_of(PRINTED)
    assert second == one(1.0, line=1) and third == one(0.0, "sts_monobit", 1)
    assert first[:3] == ("sts_serial", 3, 0)
    drawn = np.sort(np.random.default_rng(0).random((1 << 16, 3)))
    steps = np.arange(4) / 3
    distance = np.maximum(steps[1:] - drawn, drawn - steps[:-1]).max(-1)
    measured = np.array([0.19303994, 0.30350094, 0.71211507])
    least = np.maximum(steps[1:] - measured, measured - steps[:-1]).max()
    share = (distance >= least).mean()
    assert abs(first.p - share) < 5 * math.sqrt(share * (1 - share) / (1 << 16))
    assert values_of("") == []


def test_uniform_samples_are_uniform():
    """dieharder's own statistic is above 0.995 in 28% of such: 5 samples, 4096 times."""
    samples = np.random.default_rng(0).random((4096, 5))
    high = np.mean([noise_battery.uniform(list(some)) > 0.995 for some in samples])
    assert abs(high - 0.005) < 5 * math.sqrt(0.005 * 0.995 / 4096)


def monobit(words):
    """NIST SP 800-22, 2.1: two-sided p-value of the number of ones."""
    ones = int(np.unpackbits(words.numpy().astype("<u4").view(np.uint8)).sum())
    bits = 32 * words.numel()
    return math.erfc(abs(2 * ones - bits) / math.sqrt(2 * bits))


@pytest.mark.parametrize("rounds", [2, 3, 7])
def test_few_rounds_are_called_bad(rounds, program):
    """By the rule, of 2**20 words of positions in a row and one test of our own."""
    stream = Stream("positions", STREAM["positions"].walk, "", rounds=rounds)
    p = monobit(noise_streams.read_words(program, stream, 0, 1 << 20))
    (said,) = verdicts([one(p)], [one(0.5)]).values()
    assert said == ("PASSED" if rounds == 7 else "FAILED")


@pytest.mark.skipif(shutil.which("dieharder") is None, reason="no dieharder here")
@pytest.mark.parametrize(("name", "bad"), [("training", False), ("2 rounds", True)])
def test_dieharder_reads_a_stream(name, bad, program):
    values, read = noise_battery.run_test(program, STREAM[name], "-d 100", 0)
    assert [value.test for value in values] == ["sts_monobit"] and read >= 100 * 100_000 * 4
    assert (values[0].tail < noise_battery.FAILED) is bad


def judgements(**failed):
    """A run in which everything passes, but for tests of a stream that are told."""
    done = {
        f"{stream.name}: {test}": {"first": [one(0.5)], "again": [], "bytes": 10**9}
        for stream in (*STREAMS, CONTROL)
        for test in BATTERY
    }
    for name, test in failed.items():
        done[f"{name}: {test}"]["first"] = [one(0.0)]
    for stream in (*BAD, *BEYOND):
        done[stream.name] = {"test": "sts_monobit", "p": 0.0, "passed": 0, "bytes": 1}
    return done


@pytest.mark.parametrize(
    ("failed", "count", "void"),
    [
        ({}, 0, []),
        ({"training": "-d 15"}, 1, []),
        ({"training": "-d 15", "AES": "-d 15"}, 0, ["-d 15"]),
        ({"training": "-d 15", "signs": "-d 8", "AES": "-d 8"}, 1, ["-d 8"]),
    ],
)
def test_what_the_control_fails_is_no_test(failed, count, void):
    lines, failures = noise_quality.table(judgements(**failed))
    assert failures == count
    told = [line for line in lines if line.startswith("Failed by AES")]
    assert told == [f"Failed by AES, and therefore no test here: {test}." for test in void]


# ---- moments


@pytest.mark.parametrize("dtype", noise_moments.DTYPES.values(), ids=noise_moments.DTYPES)
def test_moments_of_a_few_values(dtype):
    chunks = [torch.tensor([-1.0, 0.5, 0.5]), torch.tensor([0.0, -0.5, 0.5])]
    values, counts = noise_moments.counted(iter([one.to(dtype) for one in chunks]), dtype)
    assert values.tolist() == [-1.0, -0.5, 0.0, 0.5] and counts.tolist() == [1, 1, 1, 3]
    found = noise_moments.moments(values, counts)
    assert found["n"] == 6 and found["mean"] == 0.0 and found["square"] == 2 / 6
    assert found["sign"] == 1 / 6 and found["unpaired"] == 1 and found["zeros"] == 1
    at = np.array([-1.0, 0.0, 1.0])
    assert noise_moments.distance(values, counts, at) == [1 / 6, 0.0, 0.0]


def test_a_negative_zero_is_a_zero():
    """In 16 bits they are two patterns and one value."""
    half = torch.tensor([0.0, -0.0, -0.0], dtype=torch.bfloat16)
    found = noise_moments.moments(*noise_moments.counted(iter([half]), torch.bfloat16))
    assert found["distinct"] == 1 and found["zeros"] == 3 and found["unpaired"] == 0


def test_errors_are_those_of_a_uniform():
    """A mean that is off by its standard error says 1, and so on."""
    n = 1 << 20
    values, counts = np.array([-0.5, 0.5]), np.array([n // 2 - 512, n // 2 + 512])
    found = noise_moments.moments(values, counts)
    assert found["sign in errors"] == 1.0  # 1024 / 2**20 = 1 / sqrt(n)
    assert found["mean in errors"] == pytest.approx(0.5 * 3**0.5, rel=1e-12)
    assert found["square in errors"] == pytest.approx((0.25 - 1 / 3) * (n * 45 / 4) ** 0.5)


def test_dependence_is_seen(monkeypatch):
    """A generator without its replica has a correlation of 1 there, and the others' are what they
    were; noise of our own lies within five standard errors everywhere.
    """
    monkeypatch.setattr(noise_moments, "CHUNKS", 1)
    monkeypatch.setattr(noise_moments, "SAMPLES", 4)
    monkeypatch.setattr(noise_moments, "LENGTH", 32)
    monkeypatch.setattr(noise_moments, "DIM", 512)
    monkeypatch.setattr(noise_moments, "ROOT_OF_SIZE", 128.0)
    found = noise_moments.measure_pairs()["pairs"]
    assert set(found) == set(noise_moments.NEIGHBOURS)
    for name, pairs in found.items():
        assert pairs["n"] > 2**14 and abs(pairs["in errors"]) < 5, name
        assert abs(pairs["of squares, in errors"]) < 5, name
    whole = noise_moments.noise
    monkeypatch.setattr(noise_moments, "noise", lambda seed, replica=0: whole(seed))
    forgot = noise_moments.measure_pairs()["pairs"]
    for name, pairs in forgot.items():
        if name.startswith("replicas"):
            assert pairs["correlation"] == pytest.approx(1, abs=0.05)
        else:
            assert pairs == found[name]
