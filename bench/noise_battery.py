"""dieharder's battery on a stream of words, and the rule by which it is judged.

The rule:

    a p-value below 1e-6 or above 1 - 1e-6 is FAILED      dieharder's own limit
    one below 0.005 or above 0.995 is WEAK                dieharder's own; 1% of a good generator's
    a WEAK one is tested once more, on other seeds and other fixed words, and is FAILED where the
    second lies below 0.001 or above 0.999

A stream with anything FAILED is bad, but where AES in counter mode FAILED the same test: then the
test is.

Of dieharder's several p-values of one test we take Kolmogorov's and Smirnov's test ourselves.
dieharder's own compares the i-th of n with i / (n + 1), which is nearer than the distance whose
distribution it then asks: of uniform p-values its result is above 0.995 in 28% of cases where n is
5, in 6% where it is 25, in 1.7% where it is 100 (its library's kstest, of uniform numbers).
"""

import pathlib
import re
import subprocess
from typing import Any, NamedTuple

from scipy import stats

from .noise_streams import Stream, open_words, piped

FAILED, WEAK, WEAK_AGAIN = 1e-6, 0.005, 0.001
CONTROL = Stream("AES", (), "AES-128 in counter mode, by openssl: a good generator")
AES_KEYS = ("000102030405060708090a0b0c0d0e0f", "f0e0d0c0b0a090807060504030201000")
# dieharder's tests with its own numbers of samples, but where -p says fewer: those read gigabytes
# or take minutes. Left out: 5, 6, 7 and 14, which dieharder itself calls suspect or not to be used.
# 203 at three of its 33 lags: every word, every fourth (the same word of each block), every eighth.
BATTERY = (
    "-d 100",
    "-d 101 -p 25",
    "-d 15",
    "-d 8",
    "-d 0",
    "-d 11",
    "-d 4",
    "-d 10",
    "-d 12 -p 50",
    "-d 16",
    "-d 9",
    "-d 3",
    "-d 13 -p 25",
    "-d 1 -p 25",
    "-d 2 -p 25",
    "-d 17 -p 5",
    "-d 102 -p 25",
    "-d 200 -n 4",
    "-d 200 -n 8 -p 25",
    "-d 201 -n 2 -p 100",
    "-d 201 -n 5 -p 100",
    "-d 202 -n 5 -p 50",
    "-d 203 -n 0",
    "-d 203 -n 3 -p 25",
    "-d 203 -n 7 -p 20",
    "-d 204 -p 100",
    "-d 205",
    "-d 206",
    "-d 207",
    "-d 208",
    "-d 209",
)
SAMPLES = "65536"  # the flag that dieharder -F calls psample_values, and knows by its number alone
OPTIONS = f"-D test_name -D ntuple -D pvalues -D {SAMPLES}"
RESULT = re.compile(r"^ *(\w+)\| *(\d+)\|[\d.]+ *$")
SAMPLE = re.compile(r"^\|([\d.]+)\|$")


class Value(NamedTuple):
    """A p-value, and what it is of: dieharder's name of the test, its ntuple, and which of several
    lines of that name.
    """

    test: str
    ntuple: int
    line: int
    p: float

    @property
    def tail(self) -> float:
        return min(self.p, 1 - self.p)


def uniform(samples: list[float]) -> float:
    """How likely it is that uniform numbers lie as far from a uniform as these: Kolmogorov's and
    Smirnov's test, exact. One sample is its own p-value.
    """
    return samples[0] if len(samples) == 1 else float(stats.kstest(samples, "uniform").pvalue)


def values_of(printed: str) -> list[Value]:
    """Of what dieharder prints: test | ntuple | p-value, then the samples that it is made of."""
    tests: list[tuple[str, int, list[float]]] = []
    for line in printed.splitlines():
        if result := RESULT.match(line):
            tests.append((result[1], int(result[2]), []))
        elif sample := SAMPLE.match(line):
            tests[-1][2].append(float(sample[1]))
    found: list[Value] = []
    for test, ntuple, samples in tests:
        same = [one for one in found if one[:2] == (test, ntuple)]
        found.append(Value(test, ntuple, len(same), uniform(samples)))
    return found


def verdicts(first: list[Value], again: list[Value]) -> dict[Value, str]:
    """PASSED, WEAK (once, and not again) or FAILED of each, by the rule above. `again` holds the
    same test on other words, where it had to be repeated.
    """
    second = {one[:3]: one for one in again}
    judged = {}
    for one in first:
        judged[one] = "PASSED"
        if one.tail < FAILED:
            judged[one] = "FAILED"
        elif one.tail < WEAK:
            judged[one] = "FAILED" if second[one[:3]].tail < WEAK_AGAIN else "WEAK"
    return judged


def needs_repeating(values: list[Value]) -> bool:
    return any(FAILED <= one.tail < WEAK for one in values)


def open_source(
    program: pathlib.Path, stream: Stream, test: int, attempt: int
) -> subprocess.Popen[bytes]:
    """Each test has words of its own."""
    if stream != CONTROL:
        return open_words(program, stream, test * stream.slot, attempt)
    command = ("openssl", "enc", "-aes-128-ctr", "-nosalt", "-K", AES_KEYS[attempt])
    vector = f"{test:016x}{0:016x}"
    return subprocess.Popen(
        (*command, "-iv", vector, "-in", "/dev/zero"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_test(
    program: pathlib.Path, stream: Stream, test: str, attempt: int
) -> tuple[list[Value], int]:
    """What dieharder says, and how many bytes the stream had written by then, up to a buffer more
    than were read (0 for the control, which does not count).

    Raises:
        RuntimeError: dieharder says nothing.
    """
    with open_source(program, stream, BATTERY.index(test), attempt) as source:
        command = ("dieharder", "-g", "200", *test.split(), *OPTIONS.split())
        done = subprocess.run(command, stdin=piped(source), capture_output=True, text=True)
        piped(source).close()
        assert source.stderr is not None
        told = source.stderr.read().decode()
    values = values_of(done.stdout)
    if not values:
        raise RuntimeError(f"{' '.join(command)} printed no p-value: {done.stderr or done.stdout}")
    return values, int(told) if stream != CONTROL else 0


def judge(program: pathlib.Path, stream: Stream, test: str) -> dict[str, Any]:
    """A test of a stream, and once more where that was WEAK."""
    first, read = run_test(program, stream, test, 0)
    again: list[Value] = []
    if needs_repeating(first):
        again, more = run_test(program, stream, test, 1)
        read += more
    return {"first": first, "again": again, "bytes": read}


def judge_bad(program: pathlib.Path, stream: Stream) -> dict[str, Any]:
    """A known-bad generator: until the first test that it fails."""
    read = 0
    for number, test in enumerate(BATTERY):
        made = judge(program, stream, test)
        read += made["bytes"]
        failed = [
            one for one, said in verdicts(made["first"], made["again"]).items() if said == "FAILED"
        ]
        if failed:
            return {"test": failed[0].test, "p": failed[0].p, "passed": number, "bytes": read}
    return {"test": None, "p": None, "passed": len(BATTERY), "bytes": read}
