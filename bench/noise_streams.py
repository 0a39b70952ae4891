"""The words under the noise as streams: which words of counter and key each one walks, the program
that writes it (noise_words.cpp, around the kernels' own headers), and what the reference says that
it must be.
"""

import pathlib
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import IO, NamedTuple

import torch
from torch import Tensor

from neftune_kernels import neftune_noise
from neftune_kernels.reference import UINT32, philox4x32

from .resumed import ROOT, digest_of

SOURCE = ROOT / "bench" / "noise_words.cpp"
HEADERS = ROOT / "csrc"
BUILD = ROOT / "build" / "noise_words"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-Wall", "-Wextra", "-Werror")
SEEDS = 33_000  # steps of 2**20 counters, more than any stream is read for
COUNTER = ("block", "position", "sample", "replica")
KEY = ("seed_low", "seed_high")
# What a walk leaves alone, and where it begins. Few bits are set: the hardest case for a cipher.
FIRST = (
    {"block": 5, "position": 17, "sample": 3, "replica": 1, "seed_low": 42, "seed_high": 0},
    {"block": 9, "position": 33, "sample": 6, "replica": 2, "seed_low": 43, "seed_high": 1},
)
LENGTH, DIM, SAMPLES, REPLICAS = 512, 2048, 4, 2  # a step; sqrt(LENGTH * DIM) is a power of two
PER_WORD = {"words": 1 / 4, "column": 2, "signs": 4}  # blocks to one word of output


class Stream(NamedTuple):
    name: str
    walk: tuple[tuple[str, int], ...]  # words and their extents, the fastest first
    what: str
    output: str = "words"
    rounds: int = 7

    @property
    def steps(self) -> bool:
        """Whether the seeds are those that torch draws, step by step."""
        return any(word == "step" for word, _ in self.walk)

    @property
    def slot(self) -> int:
        """Counters that each test of a battery has for itself: 32 of them before a word wraps."""
        return 1 << 30 if self.steps else 1 << 27

    def first(self, attempt: int) -> dict[str, int]:
        """Where each word begins. With drawn seeds all begin at 0."""
        if not self.steps:
            return FIRST[attempt]
        walked = {word for word, _ in self.walk}
        return {word: 0 if word in walked else FIRST[attempt][word] for word in COUNTER}


ALL = 1 << 32
BLOCKS = DIM // 8
ORDER = (("block", BLOCKS), ("position", LENGTH), ("sample", SAMPLES), ("replica", REPLICAS))
TRAINING = (*ORDER, ("step", ALL))
ONE_COLUMN = (*ORDER[1:], ORDER[0], ("step", ALL))


def without(word: str) -> tuple[tuple[str, int], ...]:
    """The order of a training whose generator forgets a word."""
    return tuple(("unused" if one == word else one, extent) for one, extent in TRAINING)


STREAMS = (
    Stream("column blocks", (("block", ALL),), "counter word 0"),
    Stream("positions", (("position", ALL),), "counter word 1"),
    Stream("samples", (("sample", ALL),), "counter word 2"),
    Stream("replicas", (("replica", ALL),), "counter word 3"),
    Stream("seeds", (("seed_low", ALL),), "key word 0: seeds 42, 43, 44, ..."),
    Stream("seeds, high word", (("seed_high", ALL),), "key word 1"),
    Stream(
        "steps",
        (("step", SEEDS - 1), ("block", ALL)),
        "the same columns of one token at successive steps, seeds as torch draws them",
    ),
    Stream("training", TRAINING, "all of them, in the order of a training"),
    Stream("one column", ONE_COLUMN, "16 bits a token: one column in eight, by itself", "column"),
    Stream("signs", TRAINING, "the bits that rademacher noise has, one a column", "signs"),
)
BAD = (  # a battery that passes these proves nothing
    *(Stream(f"{n} rounds", TRAINING, f"Philox with {n} rounds", rounds=n) for n in (2, 3, 4)),
    Stream("no position", without("position"), "all tokens of a sample have the same noise"),
)
BEYOND = (  # how far it sees
    *(Stream(f"{n} rounds", TRAINING, f"Philox with {n} rounds", rounds=n) for n in (5, 6)),
    Stream("no sample", without("sample"), "all samples of a step have the same noise, 2 MiB each"),
)


def compile_words(headers: pathlib.Path = HEADERS, to: pathlib.Path = BUILD) -> pathlib.Path:
    """The program, compiled once for each state of its sources.

    Raises:
        FileNotFoundError: no g++.
        subprocess.CalledProcessError: it does not compile; g++ has said why.
    """
    if shutil.which("g++") is None:
        raise FileNotFoundError("no g++: bench/noise_words.cpp is compiled by it; install one")
    digest = digest_of((SOURCE, *(headers / f"{n}.h" for n in ("compiler", "noise", "philox"))))
    program = to.with_name(f"{to.name}-{digest}")
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        command = ("g++", *FLAGS, "-I", headers, SOURCE, "-o", program)
        subprocess.run(tuple(map(str, command)), check=True)
    return program


@cache
def seeds_of_steps(attempt: int) -> list[int]:
    """What torch draws, call by call, after manual_seed(attempt): docs/specification.md, Seeds."""
    generator = torch.Generator().manual_seed(attempt)
    one = torch.empty((), dtype=torch.int64)
    return [int(one.random_(-(2**63), None, generator=generator)) for _ in range(SEEDS)]


def seeds_file(attempt: int) -> pathlib.Path:
    file = BUILD.with_name(f"noise_seeds-{attempt}")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        seeds = torch.tensor(seeds_of_steps(attempt), dtype=torch.int64)
        file.write_bytes(seeds.numpy().astype("<i8").tobytes())
    return file


def open_words(
    program: pathlib.Path, stream: Stream, skip: int, attempt: int = 0
) -> subprocess.Popen[bytes]:
    """The stream from its counter number `skip` on, on stdout, until nobody reads; then the bytes
    that were written, on stderr. attempt: 0, or 1 for other seeds and other fixed words.
    """
    command = [str(program), str(stream.rounds), stream.output, str(skip)]
    command += [f"{word}={value}" for word, value in stream.first(attempt).items()]
    command += [f"{word}:{extent}" for word, extent in stream.walk]
    command += [f"seeds={seeds_file(attempt)}"] if stream.steps else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def piped(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


def read_words(
    program: pathlib.Path, stream: Stream, skip: int, count: int, attempt: int = 0
) -> Tensor:
    """(count,) words as int64."""
    process = open_words(program, stream, skip, attempt)
    with process:
        data = bytearray(piped(process).read(4 * count))
        piped(process).close()
    return torch.frombuffer(data, dtype=torch.int32).long() & UINT32


def counters_of(stream: Stream, numbers: Tensor, attempt: int) -> dict[str, Tensor]:
    """The six words of counters number `numbers`."""
    words = {word: numbers * 0 + value for word, value in stream.first(attempt).items()}
    for place, (word, extent) in enumerate(stream.walk):
        last = place == len(stream.walk) - 1
        index = numbers if last else numbers % extent
        words[word] = (words.get(word, 0) + index) & UINT32
        numbers = numbers // extent
    if stream.steps:
        seeds = torch.tensor(seeds_of_steps(attempt), dtype=torch.int64)[words["step"]]
        words["seed_low"], words["seed_high"] = seeds & UINT32, (seeds >> 32) & UINT32
    return words


def reference_words(stream: Stream, skip: int, count: int, attempt: int = 0) -> Tensor:
    """What reference.py says that :func:`read_words` must return."""
    numbers = torch.arange(skip, skip + int(count * PER_WORD[stream.output]))
    words = counters_of(stream, numbers, attempt)
    counter, key = tuple(words[one] for one in COUNTER), (words["seed_low"], words["seed_high"])
    block = torch.stack(philox4x32(counter, key, stream.rounds), dim=-1)  # (blocks, 4)
    if stream.output == "words":
        return block.flatten()
    halves = torch.stack((block & 0xFFFF, block >> 16), dim=-1).flatten(1)  # (blocks, 8 columns)
    parts, bits = (halves[:, :1], 16) if stream.output == "column" else (halves >> 15, 1)
    parts = parts.reshape(count, 32 // bits)
    return (parts << (bits * torch.arange(32 // bits))).sum(-1)


def kernel_halves(backend: str | None = None) -> Tensor:
    """The training stream's first step, as halves in the order of columns, recovered from the noise
    that the package's kernel makes: magnitude 1, so u * 2**16 = 2 * int16(half) + 1.
    """
    root = float(LENGTH * DIM) ** 0.5
    made = [
        neftune_noise(
            (SAMPLES, LENGTH), DIM, root, seed=seeds_of_steps(0)[0], replica=one, backend=backend
        )
        for one in range(REPLICAS)
    ]
    return ((torch.stack(made).flatten() * 2.0**16).long() - 1) // 2 & 0xFFFF


def variants_of(halves: Tensor) -> Iterator[tuple[dict[str, object], Tensor]]:
    """What replica 0 of :func:`kernel_halves` makes of each variant, magnitude 1 and worked out
    without the package: arguments, values.
    """
    signed = (halves ^ 0x8000) - 0x8000
    u = (2 * signed + 1).double() * 2.0**-16
    normal = statistics.NormalDist()
    table = [normal.inv_cdf((k + 0.5) / 65536) for k in range(65536)]
    z = torch.tensor(table, dtype=torch.float64)[signed + 32768]
    yield {"sign": -1}, -u.float()
    yield {"distribution": "rademacher", "equal_variance": False}, u.sign().float()
    yield {"distribution": "normal", "equal_variance": False}, z.float()


def check_words(program: pathlib.Path) -> int:
    """How many words of all streams, at their beginning and far on, are the reference's.

    Raises:
        ValueError: one is not.
    """
    count, compared = 4096, 0
    for stream in (*STREAMS, *BAD, *BEYOND):
        for attempt, skip in ((0, 0), (1, 0), (0, 12_345_678), (1, 31 * stream.slot)):
            read = read_words(program, stream, skip, count, attempt)
            if not torch.equal(read, reference_words(stream, skip, count, attempt)):
                raise ValueError(
                    f"the stream {stream.name!r} is not the reference's from counter {skip} on: "
                    "csrc/noise.h or bench/noise_words.cpp is wrong"
                )
            compared += count
    return compared


def check_kernel(program: pathlib.Path) -> int:
    """How many values of the package's own noise and its variants are the training stream's.

    Raises:
        ValueError: one is not.
    """
    (training,) = [one for one in STREAMS if one.name == "training"]
    halves = kernel_halves()
    words = read_words(program, training, 0, halves.numel() // 2)
    ours = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten()
    if not torch.equal(halves, ours):
        raise ValueError("the noise of the package's kernel is not made of the training stream")
    one = halves[: halves.numel() // REPLICAS]
    for arguments, values in variants_of(one):
        root = float(LENGTH * DIM) ** 0.5
        made = neftune_noise(
            (SAMPLES, LENGTH),
            DIM,
            root,
            seed=seeds_of_steps(0)[0],
            **arguments,  # type: ignore[arg-type]
        )
        if not torch.equal(made.flatten(), values):
            raise ValueError(f"the noise with {arguments} is not made of the training stream")
    return halves.numel() + 3 * one.numel()
