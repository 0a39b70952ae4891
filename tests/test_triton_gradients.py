"""The weight's gradient in Triton against the oracle, bit for bit: on a GPU; without one as
test_triton.py says, with which `make test` runs it.
"""

import itertools
import warnings

import numpy as np
import oracle
import pytest
import torch
from conftest import FLOAT_DTYPES
from test_gradients import assert_equal
from test_triton import (  # noqa: F401  (fixtures)
    EXECUTED,
    INTERPRETED,
    cuda,
    device,
    gpu,
    needs_triton,
)

from neftune_kernels import (
    NEFTuneEmbedding,
    gradients,
    noisy_embedding,
    reference,
    reference_ops,
    self_check,
)

pytestmark = pytest.mark.gpu
FEW = 4  # tokens of a chunk: three levels are there from 17 tokens on


def kernels():
    from neftune_kernels import triton_gradients

    return triton_gradients


@pytest.fixture
def small_chunks(device, monkeypatch):  # noqa: F811
    monkeypatch.setattr(reference, "SUM_CHUNK", FEW)
    return device


def by_kernel(device, grad, ids, num_embeddings, *how):  # noqa: F811
    """(V, d); rows that nobody writes hold NaN."""
    if INTERPRETED and grad.dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates float32 to bfloat16 (3.9)")
    shape = num_embeddings, grad.shape[-1]
    out = torch.full(shape, float("nan"), dtype=grad.dtype, device=device)
    how = (*how, *(-1, 1.0, False)[len(how) :])
    launch = kernels().embedding_gradient_out
    assert launch(cuda(grad, device), cuda(ids, device), *how, out=out) is None
    return out.cpu()


def agree(device, grad, ids, num_embeddings, *how, chunk=FEW):  # noqa: F811
    found = by_kernel(device, grad, ids, num_embeddings, *how)
    rows = grad.double().reshape(ids.numel(), grad.shape[-1]).numpy()
    dtype, numbers = str(grad.dtype).removeprefix("torch."), ids.flatten().tolist()
    truth = oracle.chunked_gradient(rows, numbers, num_embeddings, dtype, *how, chunk=chunk)
    padding = how[0] if how else -1
    occurring = sorted({id for id in numbers if 0 <= id < num_embeddings} - {padding})
    assert occurring and found.double().nan_to_num(0).abs().max() > 0
    assert_equal(found[occurring], truth[occurring])
    found[occurring] = float("nan")
    assert found.isnan().all(), "a row of an id that does not occur was written"


def runs_of(*lengths):
    """Shuffled ids, so many of each."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ids[torch.randperm(ids.numel())]


RUNS = {
    "all different": (1,) * 21,
    "one id": (37,),
    "one id of a chunk": (4,),
    "beside chunks": (4, 4, 8, 4),
    "across one bound": (3, 3, 2, 5, 1, 9),
    "to groups' ends": (16, 12, 4, 16, 3),
    "through groups": (5, 31, 2, 9, 1),
    "from a chunk's last": (15, 34, 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs(small_chunks, name):
    """Runs that begin, end and pass wherever chunks and groups of them do."""
    ids = runs_of(*RUNS[name])
    agree(small_chunks, torch.randn(ids.numel(), 8), ids, len(RUNS[name]))


@pytest.mark.parametrize("scale, by_freq", [(-1 / 3, True), (11.3125, False)])
def test_scale_and_counts(small_chunks, scale, by_freq):
    ids = runs_of(3, 19, 2, 1)
    agree(small_chunks, torch.randn(25, 8), ids, 4, -1, scale, by_freq)


QUICK = {(torch.float32, 264), (torch.bfloat16, 264), (torch.float16, 300), (torch.bfloat16, 7)}


@pytest.mark.parametrize(
    "dtype, columns",
    [
        pytest.param(
            *case, id=f"{case[0]}-{case[1]}", marks=() if case in QUICK else pytest.mark.long
        )
        for case in itertools.product(FLOAT_DTYPES, (1, 7, 16, 264, 300))
    ],
)
def test_widths(small_chunks, dtype, columns):
    """Vectors and single columns, one strip and two."""
    ids = runs_of(2, 18, 1, 4)
    agree(small_chunks, torch.randn(25, columns).to(dtype), ids, 4, 2, 1.5)


def test_chunks_of_their_own_size(device):  # noqa: F811
    ids = runs_of(3, 70, 1, 9)
    agree(device, torch.randn(83, 8), ids, 4, chunk=32)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_padding_and_ids_out_of_range(small_chunks, ids_dtype):
    """Neither is written or read, and both take places."""
    ids = torch.tensor([5, -1, 2, 7, 2, 9, 2, -4, 5, 5, 5, 5, 2, 0, 5, 7, 2, 2, 2, 2, 2])
    grad = torch.randn(21, 8)
    grad[(ids == 5) | (ids < 0) | (ids > 6)] = float("nan")
    agree(small_chunks, grad, ids.to(ids_dtype), 7, 5)
    far = torch.tensor([0, 2**32 + 1, -(2**32) + 1, 1])  # whose low halves are in range
    agree(small_chunks, torch.randn(4, 8), far, 3)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(torch.float32, marks=pytest.mark.long),
        pytest.param(torch.bfloat16, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_special_values(small_chunks, dtype):
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), info.max, -info.max]
    special += [info.smallest_normal, tiny, -tiny, 1.0, info.max / 2, 1 / 3, -1 / 3]
    values = torch.tensor(special, dtype=torch.float64).to(dtype)
    ids = runs_of(*[1] * 6, *[2] * 4, 9)
    grad = values[torch.randint(len(special), (ids.numel(), 16))]
    grad[:, 0] = 1.0
    agree(small_chunks, grad, ids, 11)


def test_gradients_of_any_strides(small_chunks):
    ids = torch.randint(0, 4, (2, 5))
    for grad in (
        torch.randn(()).expand(2, 5, 8),
        torch.randn(2, 1, 8).expand(2, 5, 8),
        torch.randn(2, 5, 16)[..., ::2],
        torch.randn(5, 2, 8).transpose(0, 1),
        torch.randn(2, 5, 9)[..., 1:],
    ):
        agree(small_chunks, grad, ids, 4)


def test_nothing_to_add(device):  # noqa: F811
    for tokens, rows, columns in ((0, 3, 4), (3, 0, 4), (3, 3, 0)):
        ids = torch.zeros(tokens, dtype=torch.int64)
        found = by_kernel(device, torch.zeros(tokens, columns), ids, rows)
        assert found.shape == (rows, columns) and found.isnan().all()


def test_scratch_memory(small_chunks, monkeypatch):
    """Two float32 rows for each chunk begun."""
    taken, empty = [], torch.empty

    def noted(*shape, **how):
        if len(shape) == 2:
            taken.append(shape[0] * shape[1] * how["dtype"].itemsize)
        return empty(*shape, **how)

    monkeypatch.setattr(torch, "empty", noted)
    by_kernel(small_chunks, torch.randn(21, 8), runs_of(20, 1), 2)
    assert taken == [2 * 6 * 8 * 4]


def test_beyond_2_31_elements(small_chunks):
    """Of the gradient, whose pages nobody else touches, and between two rows of the output's."""
    if EXECUTED:
        pytest.skip("ttsem copies what a kernel reads: the interpreter and GPUs prove this")
    if small_chunks.type == "cuda" and torch.cuda.mem_get_info(small_chunks)[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    rows, columns = (1 << 20) + 3, 2048
    ids = torch.tensor([rows - 1, 0, 1 << 20, rows - 1])
    grad = torch.randn(4, columns).half()
    out = gradients.zeros((rows, columns), torch.float16).to(small_chunks)
    launch_into(out, cuda(grad, small_chunks), cuda(ids, small_chunks))
    kept = [0, 1 << 20, rows - 1]
    truth = oracle.chunked_gradient(grad.double().numpy(), [2, 0, 1, 2], 3, "float16", chunk=FEW)
    assert_equal(out[kept].cpu(), truth)
    assert not out[1:1000].any() and not out[1 << 19].any()
    far = gradients.zeros((3, 1 << 30), torch.float16).to(small_chunks)[:, :8]
    far[2], out = 3.0, torch.zeros(2, 8, dtype=torch.float16, device=small_chunks)
    launch_into(out, far, torch.tensor([0, 0, 1], device=small_chunks))
    assert out.tolist() == [[0.0] * 8, [3.0] * 8]


def launch_into(out, grad, ids):
    kernels().embedding_gradient_out(grad, ids, -1, 1.0, False, out=out)


def test_refused_shapes(device):  # noqa: F811
    out, ids = torch.zeros(3, 4, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    for grad in (torch.zeros(3, 4), torch.zeros(2, 5), torch.zeros(2, 4).half()):
        with pytest.raises(RuntimeError, match="grad of .* for out"):
            launch_into(out, grad.to(device), ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_where_triton_does_not_serve(small_chunks, dtype):
    """The host adds, in the same order; float64 in float64."""
    if INTERPRETED:
        pytest.skip("the reference has another definition for the interpreter's CPU tensors")
    ids = torch.tensor([2, 7, 2, -1, 2, 2, 1, 0, 2, 2, 2, 1])
    grad = torch.randn(12, 8).to(dtype)
    out = torch.full((4, 8), 9.0, dtype=dtype, device=small_chunks)
    how = 1, 1.5, True
    reference_ops.embedding_gradient_out(
        cuda(grad, small_chunks), cuda(ids, small_chunks), *how, out=out
    )
    out = out.cpu()
    if dtype == torch.float64:
        truth = oracle.embedding_gradient(grad.numpy(), ids.tolist(), 8, "float64", *how)
        np.testing.assert_allclose(out[[0, 2]].numpy(), truth[[0, 2]], rtol=1e-14)
    else:
        rows = grad.double().numpy()
        truth = oracle.chunked_gradient(rows, ids.tolist(), 4, "bfloat16", *how, chunk=FEW)
        assert_equal(out[[0, 2]], truth[[0, 2]])
    assert (out[[1, 3]] == 9).all()


def test_wrong_sums_are_noticed(small_chunks, monkeypatch):
    monkeypatch.setattr(self_check, "_failures", {})
    grad, ids = torch.randn(21, 8), runs_of(20, 1)
    out = by_kernel(small_chunks, grad, ids, 2, -1, 0.5)
    how = "triton", out, grad, ids, -1, 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert self_check.gradient_agrees(*how, False)
    out[0, 7] = float(np.nextafter(np.float32(out[0, 7]), np.float32(9)))
    with pytest.warns(RuntimeWarning, match="out of service.*gradients of 8 columns"):
        assert not self_check.gradient_agrees(*how, False)
    assert self_check.failure("triton", out.device.type)


# ---- a real GPU


def expected(grad, ids, num_embeddings, *how):
    rows = grad.double().reshape(ids.numel(), grad.shape[-1]).numpy()
    dtype = str(grad.dtype).removeprefix("torch.")
    return oracle.chunked_gradient(rows, ids.flatten().tolist(), num_embeddings, dtype, *how)


@pytest.mark.parametrize(
    "kind", ["function", "function, alpha 0", "module", "eval", "normal", "by_freq"]
)
def test_every_lookup_has_it(gpu, kind):  # noqa: F811
    ids, values, grad = runs_of(1, 40, 2), torch.randn(5, 16), torch.randn(43, 16)
    by_freq, scale = kind == "by_freq", 1.0 if kind in ("eval", "by_freq") else 3.0
    weight = values.to(gpu).requires_grad_()
    asked = {"deterministic_grad": True, "padding_idx": 2}
    if kind.startswith("function"):
        alpha = 0.0 if "0" in kind else 5.0
        scale = 1.0 if alpha == 0 else scale
        out = noisy_embedding(ids.to(gpu), weight, alpha, embed_scale=scale, **asked)
    else:
        asked |= {"scale_grad_by_freq": by_freq, "embed_scale": scale, "device": gpu}
        asked |= {"distribution": "normal"} if kind == "normal" else {}
        module = NEFTuneEmbedding(5, 16, _weight=weight, **asked).train(kind != "eval")
        weight = module.weight
        out = module(ids.to(gpu))
    out.backward(grad.to(gpu))
    assert_equal(weight.grad.cpu(), expected(grad, ids, 5, 2, scale, by_freq))


def test_torchs_own_is_the_default(gpu, monkeypatch):  # noqa: F811
    monkeypatch.setattr(kernels(), "embedding_gradient_out", lambda *_, **__: 1 / 0)
    weight = torch.randn(5, 16, device=gpu, requires_grad=True)
    ids = torch.arange(5, device=gpu)
    noisy_embedding(ids, weight, 5.0).sum().backward()
    assert torch.equal(weight.grad.cpu(), torch.ones(5, 16))
    with pytest.raises(ZeroDivisionError):
        noisy_embedding(ids, weight, 5.0, deterministic_grad=True).sum().backward()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_large_calls_on_a_gpu(gpu, dtype):  # noqa: F811
    """Zipf ids, four strips: the bits of the host's sums, every time and on any stream."""
    weights = 1 / torch.arange(1, 32001, dtype=torch.float64)
    ids = torch.multinomial(weights, 40000, replacement=True)
    grad = torch.randn(40000, 1024).to(dtype)
    rows, kept = reference.chunked_gradient(grad, ids, 32000, 7, 2.5)
    truth = torch.zeros(32000, 1024, dtype=dtype)
    truth[kept] = rows
    for stream in (torch.cuda.current_stream(gpu), torch.cuda.Stream(gpu)):
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(5):
                how = 32000, 7, 2.5
                found = gradients.deterministic(grad.to(gpu), ids.to(gpu), *how)
                assert torch.equal(found.cpu(), truth)


def test_no_synchronisation_and_graphs(gpu):  # noqa: F811
    """A captured step replays with what its ids and gradients hold by then."""
    ids, grad = torch.randint(0, 500, (5000,)).to(gpu), torch.randn(5000, 64).to(gpu)
    with torch.no_grad():
        gradients.deterministic(grad, ids, 500)  # compiled, compared
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients.deterministic(grad, ids, 500)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = gradients.deterministic(grad, ids, 500)
        for _ in range(3):
            ids.copy_(torch.randint(0, 500, (5000,)))
            grad.copy_(torch.randn(5000, 64))
            graph.replay()
            rows, kept = reference.chunked_gradient(grad.cpu(), ids.cpu(), 500)
            assert torch.equal(out.cpu()[kept], rows)


def test_compiled_on_a_gpu(gpu):  # noqa: F811
    ids, grad = torch.randint(0, 9, (5000,)), torch.randn(5000, 64)
    module = NEFTuneEmbedding(500, 64, deterministic_grad=True, device=gpu)
    torch.compile(module, fullgraph=True)(ids.to(gpu)).backward(grad.to(gpu))
    assert_equal(module.weight.grad.cpu(), expected(grad, ids, 500))
