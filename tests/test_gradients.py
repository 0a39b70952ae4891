"""The weight's gradient against the oracle, which shares no code with the package: bit for bit, on
every backend of the CPU, for any number of threads.
"""

import os
import pickle

import numpy as np
import oracle
import pytest
import torch
from conftest import FLOAT_DTYPES, KERNELS, running

from neftune_kernels import (
    NEFTuneEmbedding,
    apply_neftune,
    functional,
    gradients,
    lookup,
    modules,
    noisy_embedding,
    reference,
)

OPERATOR = torch.ops.neftune_kernels.embedding_gradient.out
BY = ("reference", *KERNELS)


def by_reference(grad, ids, *how, out):
    from neftune_kernels import reference_ops

    reference_ops.embedding_gradient_out(grad, ids, *how, out=out)


def computed(by, grad, ids, num_embeddings, padding_idx=-1, scale=1.0, by_freq=False):
    """(V, d) by a backend; rows of ids that do not occur are marked by what they hold."""
    out = torch.zeros(num_embeddings, grad.shape[-1], dtype=grad.dtype)
    if by == "reference":
        by_reference(grad, ids, padding_idx, scale, by_freq, out=out)
    else:
        with running(by):
            OPERATOR(grad, ids, padding_idx, scale, by_freq, out=out)
    return out


def expected(grad, ids, num_embeddings, padding_idx=-1, scale=1.0, by_freq=False):
    name = str(grad.dtype).removeprefix("torch.")
    rows = grad.double().reshape(ids.numel(), grad.shape[-1]).numpy()
    return oracle.embedding_gradient(
        rows, ids.flatten().tolist(), num_embeddings, name, padding_idx, scale, by_freq
    )


def assert_equal(found, truth):
    found = found.double().numpy()
    assert np.array_equal(found, truth, equal_nan=True)
    assert np.array_equal(np.signbit(found[truth == 0]), np.signbit(truth[truth == 0]))


@pytest.fixture(params=BY)
def by(request):
    return request.param


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape, columns", [((3, 40), 7), ((61,), 513), ((2, 3, 5), 1100), ((), 8)])
@pytest.mark.parametrize("scale, by_freq", [(1.0, False), (11.3125, False), (-1 / 3, True)])
@pytest.mark.parametrize("padding_idx, ids_dtype", [(-1, torch.int64), (2, torch.int32)])
def test_equals_the_oracle(by, dtype, shape, columns, scale, by_freq, padding_idx, ids_dtype):
    ids = torch.randint(0, 9, shape).to(ids_dtype)
    if len(shape) == 1:
        ids[::2] = 4  # hot
    grad = torch.randn(*shape, columns).to(dtype)
    how = padding_idx, scale, by_freq
    assert_equal(computed(by, grad, ids, 12, *how), expected(grad, ids, 12, *how))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_special_values(by, dtype):
    """Infinities, NaN, zeros of both signs, subnormal values, sums beyond the largest."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), info.max, -info.max]
    special += [info.smallest_normal, tiny, -tiny, 1.0, info.max / 2, 1 / 3, -1 / 3]
    values = torch.tensor(special, dtype=torch.float64).to(dtype)
    chosen = torch.randint(len(special), (200, 17))
    ids = torch.randint(0, 90, (200,))
    assert_equal(computed(by, values[chosen], ids, 90), expected(values[chosen], ids, 90))
    assert_equal(
        computed(by, values[chosen], ids, 90, -1, 0.3), expected(values[chosen], ids, 90, -1, 0.3)
    )


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_is_rounded_once(by, dtype):
    """1 + half an ulp + what float32 does not see: to float32 first, it would be a tie."""
    half = torch.finfo(dtype).eps / 2
    small = 2.0**-24 if dtype is torch.float16 else 2.0**-40
    for sign in (1, -1):
        addends = [sign, sign * half, sign * small]
        grad = torch.tensor(addends, dtype=torch.float64).to(dtype)[:, None].repeat(1, 9)
        found = computed(by, grad, torch.zeros(3, dtype=torch.int64), 1)
        assert found.tolist() == [[sign * (1 + 2 * half)] * 9]


def test_many_occurrences_in_bfloat16(by):
    """torch's own sum stops at 256."""
    grad = torch.full((3000, 3), 0.5, dtype=torch.bfloat16)
    ids = torch.zeros(3000, dtype=torch.int64)
    assert computed(by, grad, ids, 2).tolist() == [[1504.0] * 3, [0.0] * 3]  # 1500's nearest


@pytest.mark.parametrize("level", KERNELS)
def test_threads_change_no_bit(level):
    before = torch.get_num_threads()
    grad, ids = torch.randn(700, 1030), torch.randint(0, 50, (700,))
    ids[::3] = 7
    truth = expected(grad, ids, 50)
    try:
        for threads in (1, 2, 3, 7, 8):
            torch.set_num_threads(threads)
            assert_equal(computed(level, grad, ids, 50), truth)
    finally:
        torch.set_num_threads(before)


def test_large_ids(by):
    """Several digits of the sort; tokens of one id stay in their order."""
    ids = torch.tensor([1 << 22, 5, 2049, 5, (1 << 22) - 1, 2048, 5, 1 << 11, 1 << 22])
    grad = torch.tensor([1.0, 2.0**60, 3, 1, 4, 5, -(2.0**60), 6, 7])[:, None]
    assert_equal(computed(by, grad, ids, (1 << 22) + 1), expected(grad, ids, (1 << 22) + 1))


def test_rows_that_do_not_occur_keep_what_they_hold(by):
    out = torch.full((4, 3), 9.0)
    ids, grad = torch.tensor([1, 2]), torch.ones(2, 3)
    if by == "reference":
        by_reference(grad, ids, 2, 1.0, False, out=out)
    else:
        with running(by):
            OPERATOR(grad, ids, 2, 1.0, False, out=out)
    assert out.tolist() == [[9.0] * 3, [1.0] * 3, [9.0] * 3, [9.0] * 3]


@pytest.mark.parametrize(
    "tokens, num_embeddings, columns", [(0, 3, 4), (0, 0, 4), (3, 3, 0), (0, 3, 0)]
)
def test_nothing_to_add(by, tokens, num_embeddings, columns):
    ids = torch.zeros(tokens, dtype=torch.int64)
    found = computed(by, torch.zeros(tokens, columns), ids, num_embeddings)
    assert torch.equal(found, torch.zeros(num_embeddings, columns))


def test_what_is_refused(by):
    call = by_reference if by == "reference" else OPERATOR
    ids, grad = torch.tensor([0, 1]), torch.ones(2, 3)

    def refused(error, words, grad=grad, ids=ids, out=None):
        out = torch.zeros(2, 3) if out is None else out
        with running(by), pytest.raises(error, match=words):
            call(grad, ids, -1, 1.0, False, out=out)
        assert torch.equal(out, torch.zeros_like(out))

    refused(IndexError, r"\[0, num_embeddings = 2\), got 2", ids=torch.tensor([0, 2]))
    refused(IndexError, r"\[0, num_embeddings = 2\), got -1", ids=torch.tensor([-1, 0]))
    refused(RuntimeError, "grad", grad=torch.ones(3, 3))
    refused(RuntimeError, "grad", grad=torch.ones(2, 4))
    refused(RuntimeError, "grad|out", out=torch.zeros(2, 3, dtype=torch.float16))
    memory = torch.zeros(4, 3)
    refused(RuntimeError, "overlap", grad=memory[1:3], out=memory[:2])
    if by != "reference":
        refused(RuntimeError, "consecutive columns", grad=torch.ones(3, 2).t())
        refused(RuntimeError, "contiguous", out=torch.zeros(3, 2).t())


# ---- in backward


@pytest.mark.parametrize("shape", [(2, 5), (40, 60)])  # on both sides of the shorter eager path
@pytest.mark.parametrize("how", ["function", "module", "fused site", "normal"])
@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.float64], ids=str)
def test_every_noisy_lookup_has_it(shape, how, dtype):
    ids = torch.randint(0, 4, shape)
    values, grad = torch.randn(50, 300).to(dtype), torch.randn(*shape, 300).to(dtype)
    plain = torch.nn.Embedding(50, 300, padding_idx=1, _weight=values)
    if how == "function":
        out = noisy_embedding(ids, plain.weight, 5.0, padding_idx=1)
    elif how == "fused site":
        model = torch.nn.Sequential(plain)
        apply_neftune(model, 5.0, embedding="0", embedding_multiplier=1.0)
        out = model(ids)
    else:
        kind = {"distribution": "normal"} if how == "normal" else {}
        out = NEFTuneEmbedding.from_embedding(plain, **kind)(ids)
    out.backward(grad)
    assert_equal(plain.weight.grad, expected(grad, ids, 50, 1))


def test_gradients_of_any_strides():
    ids = torch.randint(0, 4, (6, 5))
    for grad in (
        torch.randn(8, 5, 6).permute(2, 1, 0),
        torch.randn(()).expand(6, 5, 8),
        torch.randn(6, 1, 8).expand(6, 5, 8),
        torch.randn(6, 5, 16)[..., ::2],
        torch.randn(5, 6, 8).transpose(0, 1),
    ):
        weight = torch.randn(4, 8, requires_grad=True)
        noisy_embedding(ids, weight, 5.0).backward(grad)
        assert_equal(weight.grad, expected(grad, ids, 4))


@pytest.mark.parametrize("kind", ["scale_grad_by_freq", "max_norm", "sparse", "both"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_modules_options(kind, dtype):
    by_freq = kind in ("scale_grad_by_freq", "both")
    options = {"scale_grad_by_freq": by_freq, "sparse": kind in ("sparse", "both")}
    options |= {"max_norm": 0.5} if kind == "max_norm" else {}
    ids = torch.randint(0, 6, (4, 30))
    values = torch.randn(9, 16).to(dtype)
    module = NEFTuneEmbedding(9, 16, padding_idx=0, _weight=values, **options)
    grad = torch.randn(4, 30, 16).to(dtype)
    (found,) = torch.autograd.grad(module(ids), module.weight, grad)
    module(ids).backward(grad)
    assert torch.equal(found.to_dense(), module.weight.grad.to_dense())
    if options["sparse"]:
        assert found.is_coalesced() and torch.equal(found.indices()[0], ids[ids != 0].unique())
        # whose mark AccumulateGrad leaves behind
        assert torch.equal(module.weight.grad._indices(), found.indices())
        torch.sparse_coo_tensor(
            found.indices(), found.values(), found.shape, check_invariants=True, is_coalesced=True
        )
    assert_equal(found.to_dense(), expected(grad, ids, 9, 0, 1.0, by_freq))


def test_sparse_of_no_tokens():
    module = NEFTuneEmbedding(9, 4, padding_idx=0, sparse=True)
    module(torch.zeros(2, 3, dtype=torch.int64)).sum().backward()  # padding alone
    assert module.weight.grad._nnz() == 0 and module.weight.grad.shape == (9, 4)


# ---- deterministic_grad=True


def lookups():
    """Every lookup that takes the word, by its name: (ids, values) -> (weight, output)."""

    def function(alpha):
        def call(ids, values, **asked):
            weight = values.clone().requires_grad_()
            how = {"padding_idx": 1, "embed_scale": 3.0, **asked}
            return weight, noisy_embedding(ids, weight, alpha, **how)

        return call

    def module(is_training=True, **options):
        def call(ids, values, **asked):
            how = {"padding_idx": 1, "_weight": values.clone(), **options, **asked}
            made = NEFTuneEmbedding(*values.shape, **how).train(is_training)
            return made.weight, made(ids)

        return call

    return {
        "function": function(5.0),
        "function, alpha 0": function(0),
        "module": module(embed_scale=3.0),
        "eval": module(False, embed_scale=3.0),
        "normal": module(distribution="normal", embed_scale=3.0),
        "scale_grad_by_freq": module(scale_grad_by_freq=True),
        "max_norm": module(max_norm=0.5),
        "eval, scale_grad_by_freq": module(False, scale_grad_by_freq=True),
    }


@pytest.mark.parametrize("name", lookups())
def test_every_lookup_can_be_asked_for_it(name, monkeypatch):
    """As on a GPU: none but the sums that were asked for come to be."""
    ids, values, grad = torch.randint(0, 9, (4, 30)), torch.randn(9, 16), torch.randn(4, 30, 16)
    by_freq, scale = "freq" in name, 3.0 if name in ("function", "module", "normal") else 1.0
    sums = torch.randn(9, 16)
    asked = []

    def noted(*args, **named):
        asked.append((args, named))
        return sums

    monkeypatch.setattr(gradients, "asks_for_ours", lambda weight, is_sparse=False: True)
    monkeypatch.setattr(functional, "asks_for_ours", gradients.asks_for_ours)
    monkeypatch.setattr(modules, "asks_for_ours", gradients.asks_for_ours)
    monkeypatch.setattr(gradients, "deterministic", noted)
    monkeypatch.setattr(lookup, "_embed_quickly", lambda *args: None)
    monkeypatch.setattr(lookup, "IN_PLACE_LIMIT", 0)
    weight, out = lookups()[name](ids, values, deterministic_grad=True)
    out.backward(grad)
    (((given, given_ids, rows, *how), named),) = asked
    assert torch.equal(weight.grad, sums) and torch.equal(given_ids, ids) and rows == 9
    # without noise the scale is a product of its own
    product = 3.0 if name in ("function, alpha 0", "eval") else 1.0
    assert torch.equal(given, product * grad)
    padding_idx, embed_scale, freq = (*how, *(-1, 1.0, False)[len(how) :])
    assert padding_idx == 1 and embed_scale == scale
    assert named.get("scale_grad_by_freq", freq) == by_freq
    asked.clear()
    weight, out = lookups()[name](ids, values)
    out.backward(grad)
    assert not asked, "torch's own is the default"


@pytest.mark.parametrize(
    "backend, operator",
    [("cuda", "cuda_embedding_gradient"), ("reference", "embedding_gradient")],
)
def test_by_whose_kernels(backend, operator, monkeypatch):
    """Noise of the CUDA C++ kernels has their sums; others have the device's best."""
    called = []
    monkeypatch.setattr(gradients, "asks_for_ours", lambda weight, is_sparse=False: True)
    monkeypatch.setattr(gradients, "deterministic", lambda *_, operator: called.append(operator))
    monkeypatch.setattr(lookup, "_embed_quickly", lambda *args: None)
    monkeypatch.setattr(lookup, "IN_PLACE_LIMIT", 0)
    weight = torch.randn(9, 16, requires_grad=True)
    with running(backend) as name:
        asked = {"deterministic_grad": True, "backend": name}
        noisy_embedding(torch.arange(9), weight, 5.0, **asked).sum().backward()
    assert called == [operator] and weight.grad is None


@pytest.mark.parametrize("operator", ["cuda_embedding_gradient", "embedding_gradient"])
def test_the_operator_that_is_named(operator, monkeypatch):
    """On another device than the CPU, eager; nothing is computed there."""
    called = []
    monkeypatch.setattr(gradients, "entry", lambda overload: called.append(overload) or overload)
    grad, ids = torch.ones(3, 4, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    with torch.no_grad():
        assert gradients.deterministic(grad, ids, 5, operator=operator).shape == (5, 4)
    assert called == [getattr(torch.ops.neftune_kernels, operator).out]


@pytest.mark.parametrize("name", lookups())
def test_eager_cpus_have_it_anyway(name):
    ids, values, grad = torch.randint(0, 9, (4, 30)), torch.randn(9, 16), torch.randn(4, 30, 16)
    found = []
    for asked in (True, False):
        torch.manual_seed(1)
        weight, out = lookups()[name](ids, values, deterministic_grad=asked)
        out.backward(grad)
        found.append((out, weight.grad))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("name", ["function", "scale_grad_by_freq"])
def test_compiled_code_has_it_where_it_is_asked_for(name):
    """bfloat16, which torch's own sums would lose."""
    ids, values = torch.zeros(3000, dtype=torch.int64), torch.randn(3, 16).bfloat16()
    call = torch.compile(lookups()[name], backend="aot_eager")
    weight, out = call(ids, values, deterministic_grad=True)
    out.backward(torch.full_like(out, 0.5))
    wanted = {"function": 4512.0, "scale_grad_by_freq": 0.5}[name]
    assert weight.grad[0].tolist() == [wanted] * 16


def test_where_it_is_refused():
    """A device other than the CPU, where nothing is computed."""
    ids, weight = torch.zeros(3, dtype=torch.int64), torch.zeros(5, 4, requires_grad=True)
    ids, weight = ids.to("meta"), weight.detach().to("meta").requires_grad_()
    for training in (True, False):
        options = {"deterministic_grad": True, "device": "meta"}
        module = NEFTuneEmbedding(5, 4, sparse=True, **options).train(training)
        with pytest.raises(ValueError, match="no sparse gradient on meta: set sparse=False"):
            module(ids)
        with torch.no_grad():
            module(ids)
    out = noisy_embedding(ids, weight, 5.0, deterministic_grad=True)
    with pytest.raises(NotImplementedError, match="no second derivative on meta: leave it out"):
        torch.autograd.grad(out.sum(), weight, create_graph=True)
    out = noisy_embedding(ids, weight, 5.0, deterministic_grad=True)
    (found,) = torch.autograd.grad(out.sum(), weight)
    assert found.shape == (5, 4) and found.is_meta
    with pytest.raises(NotImplementedError, match="no torch.func transform on meta"):
        torch.func.grad(lambda w: noisy_embedding(ids, w, 5.0, deterministic_grad=True).sum())(
            weight
        )

    class Wrapped(torch.Tensor):
        pass

    wrapped = weight.detach().as_subclass(Wrapped).requires_grad_()
    with pytest.raises(ValueError, match="plain weight on meta, got a Wrapped: leave it out"):
        noisy_embedding(ids, wrapped, 5.0, deterministic_grad=True)
    for call in (
        lambda: noisy_embedding(ids, weight, 5.0, deterministic_grad=1),
        lambda: NEFTuneEmbedding(5, 4, deterministic_grad=None),
    ):
        with pytest.raises(TypeError, match="deterministic_grad must be True or False, got"):
            call()


def test_modules_keep_the_word():
    module = NEFTuneEmbedding(5, 4, deterministic_grad=True)
    assert "deterministic_grad=True" in repr(module)
    assert pickle.loads(pickle.dumps(module)).deterministic_grad
    plain = module.to_embedding()
    assert NEFTuneEmbedding.from_embedding(plain, deterministic_grad=True).deterministic_grad
    state = NEFTuneEmbedding(5, 4).__getstate__()
    del state["deterministic_grad"]
    old = NEFTuneEmbedding.__new__(NEFTuneEmbedding)
    old.__setstate__(state)
    old(torch.arange(3)).sum().backward()


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.float64], ids=str)
def test_the_order_on_a_gpu(dtype):
    """The reference of other devices' sums, a hot id in three groups of chunks."""
    ids = torch.randint(-2, 60, (2500,))
    ids[::2] = 7
    grad, how = torch.randn(2500, 3).to(dtype), (50, 3, 1.5, True)
    if dtype == torch.float64:
        rows, kept = reference.chunked_gradient(grad, ids, *how)
        truth, of = reference.embedding_gradient(grad, ids, 1.5, True)
        assert torch.equal(kept, of[(of >= 0) & (of < 50) & (of != 3)])
        torch.testing.assert_close(rows, truth[(of >= 0) & (of < 50) & (of != 3)])
        return
    rows, kept = reference.chunked_gradient(grad, ids, *how)
    found = torch.zeros(50, 3, dtype=dtype)
    found[kept] = rows
    name = str(dtype).removeprefix("torch.")
    wide = grad.double().numpy()
    assert_equal(found, oracle.chunked_gradient(wide, ids.tolist(), 50, name, *how[1:]))


# ---- pages that are made when they are written


def test_large_gradients_are_zeros_of_their_own():
    shape = (gradients.LAZY_BYTES // 8, 3)
    one, other = gradients.zeros(shape, torch.float32), gradients.zeros(shape, torch.float32)
    assert torch.equal(one, torch.zeros(shape)) and one.is_contiguous()
    one[5] = 1.0
    row = one[5]
    kept = pickle.loads(pickle.dumps(one))
    del one
    assert torch.equal(row, torch.ones(3)) and not other.any() and torch.equal(kept[5], row)
    assert gradients.zeros((2, 3), torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_beyond_2_31_elements_and_no_page_too_many():
    """A gradient of 4 GiB, of which three rows are there."""
    rows, columns = (1 << 20) + 3, 2048
    ids = torch.tensor([rows - 1, 0, 1 << 19, rows - 1])
    grad = torch.randn(4, columns).half()

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    with torch.no_grad():
        found = gradients.dense(grad, ids, rows)
    assert resident() - before < 1 << 28
    kept = [0, 1 << 19, rows - 1]
    places = torch.tensor([2, 0, 1, 2])
    assert_equal(found[kept], expected(grad, places, 3))
    assert not found[1:1000].any()
