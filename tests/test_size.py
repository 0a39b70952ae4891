"""More than 2**31 elements, computed: outputs, sources and gradients of 4 GiB in fp16, where 32
bits hold no place of an element. `make test-long`; 10 GiB of memory.

tests/test_cuda_build.py runs this file with the CUDA kernels' bodies, tests/test_triton.py the
compiler's IR at such sizes.
"""

import pathlib
import re

import pytest
import torch
import torch.nn.functional as F

from neftune_kernels import add_noise, noisy_embedding

WIDTH = 4096
COLUMNS = 2**31 // WIDTH // 3 + 1  # of three rows
LENGTHS = torch.tensor([COLUMNS, 5, COLUMNS - 7])
PIECE = 2**14  # tokens that are computed again by small calls
ALPHA = 5.0 * 300  # noise that fp16 sees in rows so long
NEEDED = 10 * 2**30


def memory_left():
    """Bytes; 0 where Linux does not say."""
    file = pathlib.Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+) kB", file.read_text()) if file.exists() else None
    return int(found[1]) * 2**10 if found else 0


@pytest.fixture(autouse=True)
def room():
    if memory_left() < NEEDED:
        pytest.skip(f"{memory_left() / 2**30:.0f} GiB of memory are left, 10 are needed")
    torch.utils.deterministic.fill_uninitialized_memory = False  # of gigabytes, for every output


def make_ids():
    ids = torch.randint(16, (3, COLUMNS), generator=torch.Generator().manual_seed(0))
    assert ids.numel() * WIDTH > 2**31 > (ids.numel() - 3) * WIDTH
    return ids


def make_weight():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, WIDTH, generator=generator).half()


def assert_shards_agree(out, shard):
    """Every token again, in calls of a few; the ends and the border of noise among them."""
    for sample, length in enumerate(LENGTHS.tolist()):
        for start in range(0, COLUMNS, PIECE):
            place = slice(start, min(COLUMNS, start + PIECE))
            expected = shard(
                sample,
                place,
                lengths=torch.tensor([length]),
                sample_offset=sample,
                position_offset=start,
                seed=3,
            )
            assert torch.equal(out[sample, place], expected[0]), (sample, start)


@pytest.mark.long
def test_output(kernel):
    ids, weight = make_ids(), make_weight()
    out = noisy_embedding(ids, weight, ALPHA, lengths=LENGTHS, seed=3, backend=kernel)

    def shard(sample, place, **layout):
        few = ids[sample : sample + 1, place]
        return noisy_embedding(few, weight, ALPHA, backend=kernel, **layout)

    assert_shards_agree(out, shard)
    end = slice(COLUMNS - 12, COLUMNS)  # of noise and of the third row: by the reference
    named = {"lengths": LENGTHS[2:], "sample_offset": 2, "position_offset": end.start, "seed": 3}
    expected = noisy_embedding(ids[2:, end], weight, ALPHA, backend="reference", **named)
    assert torch.equal(out[2:, end], expected)
    is_noisy = (out[2, end] != F.embedding(ids[2, end], weight)).any(1)
    assert is_noisy.tolist() == [True] * 5 + [False] * 7


@pytest.mark.long
def test_source(kernel):
    source = make_weight()[make_ids()]
    out = add_noise(source, ALPHA, lengths=LENGTHS, seed=3, backend=kernel)

    def shard(sample, place, **layout):
        return add_noise(source[sample : sample + 1, place], ALPHA, backend=kernel, **layout)

    assert_shards_agree(out, shard)


@pytest.mark.long
def test_gradient():
    """Of 16 rows some 32 768 tokens each, whose gradients are one of 2**-5 and 2: exact in fp16."""
    ids, weight = make_ids(), make_weight().requires_grad_()
    out = noisy_embedding(ids, weight, ALPHA, lengths=LENGTHS, seed=3)
    gradient = torch.full_like(out, 2.0**-5)
    gradient[-1, -PIECE:] = 2.0
    out.backward(gradient)
    late = torch.zeros(ids.shape, dtype=torch.bool)
    late[-1, -PIECE:] = True
    few, many = (torch.bincount(ids[part], minlength=16).double() for part in (~late, late))
    expected = (few * 2.0**-5 + many * 2.0).half()[:, None].expand(16, WIDTH)
    assert torch.equal(weight.grad, expected)
