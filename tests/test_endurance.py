"""Long use leaves nothing behind: `make test-long`.

Held to be constant: the objects that Python's garbage collector knows, the bytes that Python asked
for, and the bytes that glibc handed out. Whatever is left behind once a step is seen: an int takes
32 bytes, like malloc's smallest piece. torch's own caches fill for some thousand steps, with and
without noise; then they move by a few bytes a step, up and down.
"""

import ctypes
import gc
import multiprocessing
import threading
import tracemalloc
from typing import NamedTuple

import pytest
import torch
from conftest import make_batch, same_bits
from torch import nn

from neftune_kernels import NEFTuneEmbedding, apply_neftune, noisy_embedding

SMALLEST = 32  # bytes


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2, malloc.h."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")
    _fields_ = [(name, ctypes.c_size_t) for name in (*NAMES, "fordblks", "keepcost")]


def native_bytes():
    """0 where it is not glibc, or one older than 2.33."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0
    ask.restype = Mallinfo
    found = ask()
    return found.uordblks + found.hblkhd


def traced_bytes():
    return tracemalloc.get_traced_memory()[0]


@pytest.fixture(params=(traced_bytes, native_bytes), ids=("python", "native"))
def handed_out(request, threads):
    """One at a time: what tracemalloc notes down is malloc's too."""
    threads(1)  # steps this small have no work for two
    if request.param is traced_bytes:
        tracemalloc.start(1)
    yield request.param
    tracemalloc.stop()


class Held(NamedTuple):
    objects: int
    bytes: int


def held(handed_out):
    for _ in range(3):
        gc.collect()
    return Held(len(gc.get_objects()), handed_out())


def assert_constant(run, times, handed_out):
    """After two thirds of the times to warm up in, nothing grows with them."""
    warm = 2 * times // 3
    for number in range(warm):
        run(number)
    before = held(handed_out)
    for number in range(warm, times):
        run(number)
    after, done = held(handed_out), times - warm
    assert after.objects - before.objects < done // 100, (before, after)
    assert after.bytes - before.bytes < SMALLEST * done, (before, after)


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    return transformers.LlamaForCausalLM(config).train()


def trains(model):
    optimizer = torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def step(number):
        columns = 8 + number % 3  # every length comes again
        ids = torch.randint(32, (2, columns), generator=generator)
        mask = (torch.arange(columns) < torch.tensor([[columns], [3]])).long()
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return step


@pytest.mark.long
def test_training_steps_leave_nothing(llama, handed_out):
    handle = apply_neftune(llama, 5.0)
    assert_constant(trains(llama), 2000, handed_out)
    assert handle.stats()["calls"] == 2000


@pytest.mark.long
def test_cycles_of_apply_and_remove_leave_nothing(llama, handed_out):
    step = trains(llama)

    def cycle(number):
        if number % 2:
            with apply_neftune(llama, 5.0):
                step(number)
        else:
            handle = apply_neftune(llama, 5.0)
            step(number)
            handle.remove()

    assert_constant(cycle, 1000, handed_out)


@pytest.mark.long
def test_modules_leave_nothing(handed_out):
    def make(number):
        module = NEFTuneEmbedding(32, 16, noise_alpha=5.0).train()
        module(torch.arange(8)[None]).sum().backward()

    assert_constant(make, 1000, handed_out)


def test_what_is_left_is_seen(handed_out):
    numbers, addresses = [0] * 300, (ctypes.c_void_p * 300)()
    library = ctypes.CDLL(None)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

    def leave(number):
        numbers[number] = 10**6 + number
        addresses[number] = library.malloc(ctypes.c_size_t(SMALLEST))

    if handed_out():
        with pytest.raises(AssertionError):
            assert_constant(leave, 300, handed_out)
    with pytest.raises(AssertionError):
        kept = []
        assert_constant(lambda number: kept.append([number]), 300, handed_out)
    for address in addresses:
        library.free(address)


@pytest.mark.long
def test_eight_threads(kernel):
    """Each trains 200 calls of its own beside the others and gets what it gets alone."""
    batch = make_batch("ragged", rows=4, columns=64)
    weights = torch.randn(8, 11, 32, generator=torch.Generator().manual_seed(0)).unbind()

    def calls(number):
        weight, found = weights[number].clone().requires_grad_(), []
        for seed in range(200):
            out = noisy_embedding(
                batch.input_ids, weight, 5.0, lengths=batch.lengths, seed=seed, backend=kernel
            )
            out.square().sum().backward()
            found.append(out.detach())
        return torch.stack(found), weight.grad

    expected = [calls(number) for number in range(8)]
    got, start = {}, threading.Barrier(8)

    def run(number):
        start.wait()
        got[number] = calls(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for number, pair in enumerate(expected):
        assert all(map(same_bits, got[number], pair))


def call_after_fork(given, results):
    torch.set_num_threads(1)  # a forked child has none of its parent's OpenMP threads
    ids, weight, lengths = given
    results.put(noisy_embedding(ids, weight, 5.0, lengths=lengths, seed=4).numpy())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_forked_children(threads):
    """As torch allows: after its parent's calls on two threads a child calls on one."""
    threads(2)
    batch = make_batch("ragged", rows=64, columns=256)
    weight = nn.Embedding(11, 64).weight.detach()
    given = batch.input_ids, weight, batch.lengths
    expected = noisy_embedding(*given[:2], 5.0, lengths=batch.lengths, seed=4)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    children = [context.Process(target=call_after_fork, args=(given, results)) for _ in range(2)]
    for one in children:
        one.start()
    for _ in children:
        assert torch.equal(torch.from_numpy(results.get()), expected)
    for one in children:
        one.join(60)
        assert one.exitcode == 0
