"""The weight's gradient in CUDA C++ against the oracle, bit for bit: the tests of Triton's,
on a GPU or, without one, in this machine's memory as test_cuda.py says.
"""

import ctypes
import functools
import warnings

import oracle
import pytest
import test_triton_gradients
import torch
from conftest import FLOAT_DTYPES, cuda_shim
from test_cuda import device, gpu, grid_limit  # noqa: F401  (fixtures)
from test_gradients import assert_equal
from test_triton_gradients import (  # noqa: F401  (a fixture, and tests that are collected here, too)
    FEW,
    RUNS,
    agree,
    by_kernel,
    expected,
    launch_into,
    runs_of,
    small_chunks,
    test_beyond_2_31_elements,
    test_chunks_of_their_own_size,
    test_compiled_on_a_gpu,
    test_every_lookup_has_it,
    test_gradients_of_any_strides,
    test_large_calls_on_a_gpu,
    test_no_synchronisation_and_graphs,
    test_nothing_to_add,
    test_padding_and_ids_out_of_range,
    test_refused_shapes,
    test_runs,
    test_scale_and_counts,
    test_scratch_memory,
    test_special_values,
    test_torchs_own_is_the_default,
    test_widths,
)

from neftune_kernels import backends, cuda_gradients, noisy_embedding, reference, self_check

OPS = torch.ops.neftune_kernels
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def by_cuda(monkeypatch):
    """And no Triton in front of it."""
    monkeypatch.setattr(test_triton_gradients, "kernels", lambda: cuda_gradients)
    left_out = functools.cache(lambda module="": "left out by this test")
    monkeypatch.setattr(backends, "load_triton", left_out)


def zipf(tokens, num_embeddings):
    weights = 1 / torch.arange(1, num_embeddings + 1, dtype=torch.float64)
    return torch.multinomial(weights, tokens, replacement=True)


HOT = {
    "one id": lambda: runs_of(33 * 1024),
    "across groups": lambda: runs_of(1, 1000, 31, 2100, 40),
    "all different": lambda: torch.randperm(1100),
    "Zipf": lambda: zipf(3000, 500),
}


@pytest.mark.parametrize("name", HOT)
def test_runs_of_long_calls(device, name):  # noqa: F811
    """In chunks of 32, the first beyond 1024 of them; and by the reference itself."""
    ids = HOT[name]()
    rows = int(ids.max()) + 2
    grad = torch.randn(ids.numel(), 8)
    agree(device, grad, ids, rows, chunk=32)
    found = by_kernel(device, grad, ids, rows, 1, 0.5, True)
    sums, kept = reference.chunked_gradient(grad, ids, rows, 1, 0.5, True)
    assert torch.equal(found[kept], sums)


@pytest.mark.parametrize("by_freq", (False, True))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_kernel(small_chunks, dtype, by_freq):  # noqa: F811
    """Vectors and single values, of strips that a block has one, two and four of."""
    ids = runs_of(2, 25, 1, 4)
    for columns in (8, 256, 264, 520, 1288, 9, 257, 600):
        grad = torch.randn(32, columns).to(dtype)
        agree(small_chunks, grad, ids, 4, 2, -1 / 3, by_freq)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_views_that_are_not_aligned(small_chunks, dtype):  # noqa: F811
    """Rows that begin between 16 bytes, and an output that does."""
    ids = runs_of(2, 18, 1)
    for start, columns, width in ((1, 16, 24), (8, 16, 24), (0, 16, 20), (3, 264, 267)):
        agree(small_chunks, torch.randn(21, width).to(dtype)[:, start : start + columns], ids, 4)
    grad = torch.randn(21, 16).to(dtype)
    memory = torch.full((65,), 7.0, dtype=dtype, device=small_chunks)
    launch_into(memory[1:].view(4, 16), grad.to(small_chunks), ids.to(small_chunks))
    truth = oracle.chunked_gradient(
        grad.double().numpy(), ids.tolist(), 4, str(dtype).removeprefix("torch."), chunk=FEW
    )
    assert_equal(memory[1:].view(4, 16)[:3].cpu(), truth[:3])
    assert memory[0] == 7 and (memory[49:] == 7).all()


def test_grids_smaller_than_the_chunks(small_chunks, grid_limit):  # noqa: F811
    """Chunks folded into z."""
    for columns in (8, 300, 600):
        ids = runs_of(1, 20, 3, 9)
        agree(small_chunks, torch.randn(33, columns), ids, 4)


@pytest.fixture
def backwards(device):  # noqa: F811
    if cuda_shim is None:
        pytest.skip("a GPU has its own order")
    cuda_shim.neftune_shim_backwards(ctypes.c_bool(True))
    yield
    cuda_shim.neftune_shim_backwards(ctypes.c_bool(False))


@pytest.mark.parametrize("columns", (8, 600, 9))
def test_any_order_of_warps(small_chunks, backwards, columns):  # noqa: F811
    """What is left for others is theirs in the next launch: the last warps may come first."""
    for name in RUNS:
        ids = runs_of(*RUNS[name])
        agree(small_chunks, torch.randn(ids.numel(), columns), ids, len(RUNS[name]))


def sorted_call(device, **changed):  # noqa: F811
    """Arguments of the operator on sorted tokens."""
    given = {
        "grad": torch.ones(6, 8, device=device),
        "ids": torch.tensor([0, 0, 1, 1, 1, 2], dtype=torch.int32, device=device),
        "order": torch.arange(6, device=device),
        "scratch": torch.zeros(4, 8, device=device),
        "chunk": FEW,
        "padding_idx": -1,
        "embed_scale": 1.0,
        "scale_grad_by_freq": False,
        "out": torch.zeros(3, 8, device=device),
    }
    given |= changed
    OPS.cuda_sorted_gradient.out(**given)
    return given["out"]


def test_ids_of_64_bits(device):  # noqa: F811
    """As they are where a table has 2**31 rows; and a padding_idx that no 32 bits hold is none."""
    wide = sorted_call(device, ids=torch.tensor([-1, 0, 0, 2, 2, 3], device=device))
    assert wide[:, 0].tolist() == [2.0, 0.0, 2.0]
    assert sorted_call(device, padding_idx=2**32 + 1)[:, 0].tolist() == [2.0, 3.0, 1.0]


def test_bad_arguments_are_refused(device):  # noqa: F811
    """What would be read or written beside tensors; values are not looked at."""
    ones = torch.ones(6, 8, device=device)
    for changed, message in (
        ({"grad": ones.double()}, "grad must be float32, bfloat16 or float16"),
        ({"grad": ones.t().contiguous().t()}, "grad must have consecutive columns"),
        ({"grad": ones[0]}, "grad must have shape"),
        ({"ids": ones[:, 0].short()}, "ids must be contiguous|ids must be int32 or int64"),
        ({"ids": torch.zeros(5, dtype=torch.int32, device=device)}, "ids must be contiguous and"),
        ({"order": torch.zeros(6, dtype=torch.int32, device=device)}, "order must be int64"),
        ({"order": torch.zeros(6, 2, dtype=torch.int64, device=device)[:, 0]}, "order must be con"),
        ({"scratch": torch.zeros(3, 8, device=device)}, r"scratch must be contiguous and hold \(4"),
        ({"scratch": torch.zeros(4, 8, device=device).half()}, "scratch must be contiguous"),
        ({"scratch": ones[:4], "grad": ones}, "scratch must not overlap another argument"),
        ({"chunk": 6}, "chunk must be a multiple of 4 below 2..30, got 6"),
        ({"chunk": 0}, "chunk must be a multiple of 4"),
        ({"out": ones[:3].half()}, "out must have the dtype of grad"),
        ({"out": ones[:3, :4]}, "out must have the result's shape"),
        ({"out": ones[:3], "grad": ones}, "out must not overlap grad"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            sorted_call(device, **changed)


def test_wrong_sums_are_noticed(small_chunks, monkeypatch):  # noqa: F811
    """By the first call of its kind; the next one is not looked at."""
    monkeypatch.setattr(self_check, "_failures", {})
    monkeypatch.setattr(self_check, "passed", set())
    monkeypatch.setattr(self_check, "ENABLED", True)
    grad, ids = torch.randn(21, 8).to(small_chunks), runs_of(20, 1).to(small_chunks)
    out = torch.zeros(2, 8, device=small_chunks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch_into(out, grad, ids)
        assert len(self_check.passed) == 1
    right = reference.chunked_gradient
    monkeypatch.setattr(reference, "chunked_gradient", lambda *_: 1 / 0)
    launch_into(out, grad, ids)
    self_check.passed.clear()

    def other(*args):
        rows, kept = right(*args)
        return rows + rows.new_tensor([0.0] * 7 + [1.0])[: rows.shape[1]], kept

    monkeypatch.setattr(reference, "chunked_gradient", other)
    with pytest.warns(RuntimeWarning, match="'cuda' is out of service.*gradients of 8 columns"):
        launch = cuda_gradients.embedding_gradient_out
        assert launch(grad, ids, -1, 1.0, False, out=out) is NotImplemented
    assert self_check.failure("cuda", small_chunks.type)


# ---- a real GPU


def test_it_is_asked_for_by_name(gpu, monkeypatch):  # noqa: F811
    """backend="cuda", with Triton there, too."""
    monkeypatch.undo()
    asked, launch = [], cuda_gradients.embedding_gradient_out

    def noted(*args, **named):
        asked.append(1)
        return launch(*args, **named)

    monkeypatch.setattr(cuda_gradients, "embedding_gradient_out", noted)
    ids, grad = runs_of(1, 40, 2), torch.randn(43, 16)
    weight = torch.randn(5, 16, device=gpu, requires_grad=True)
    how = {"deterministic_grad": True, "backend": "cuda"}
    noisy_embedding(ids.to(gpu), weight, 5.0, **how).backward(grad.to(gpu))
    assert asked == [1]
    assert_equal(weight.grad.cpu(), expected(grad, ids, 5))


def standard_cases():
    """For tests/test_cuda_build.py: every kernel, runs across every bound, padding."""
    test_triton_gradients.kernels = lambda: cuda_gradients
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    for chunk in (FEW, 2 * FEW):
        reference.SUM_CHUNK = chunk
        for dtype, columns in ((torch.float32, 520), (torch.bfloat16, 264), (torch.float16, 9)):
            ids = runs_of(2, 3 * chunk**2 + 5, 1, chunk, 2 * chunk, 3)
            ids[::7] = torch.tensor([-3, 6, 2**40])[torch.arange(ids[::7].numel()) % 3]
            grad = torch.randn(ids.numel(), columns).to(dtype)
            for how in ((), (1, -1 / 3, True), (0, 1.5, True), (4, 3.0, False)):
                agree(cpu, grad, ids, 6, *how, chunk=chunk)
    cuda_shim.neftune_shim_grid_limit(ctypes.c_int64(2))
    cuda_shim.neftune_shim_backwards(ctypes.c_bool(True))
    ids = runs_of(1, 420, 3, 9)
    agree(cpu, torch.randn(433, 600), ids, 4, chunk=2 * FEW)


if __name__ == "__main__":
    standard_cases()
