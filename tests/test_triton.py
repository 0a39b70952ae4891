"""The Triton kernels against the reference, bit for bit: on a GPU; without one, as what the
compiler's front end produced and as Python.

    pytest -m gpu                                                 on a GPU
    python -m ttsem.sanitize pytest -m gpu tests/test_triton.py   the compiler's IR executed on the
                                                                  CPU, every access checked
    TRITON_INTERPRET=1 pytest -m gpu tests/test_triton.py         Triton's interpreter

`make test` runs the last two. ttsem (Potenza 2026, github.com/alepot55/ttsem) reports an access
outside a tensor at its line.
"""

import importlib.util
import itertools
import math
import os
import pathlib
import subprocess
import sys
import warnings

import golden_vectors
import pytest
import torch
import torch.nn.functional as F
from conftest import FLOAT_DTYPES, MASK_KINDS, equals_oracle, make_batch, same_bits
from numbering_forms import forms, table_and_record, words_of

from neftune_kernels import (
    NEFTuneEmbedding,
    add_noise,
    apply_neftune,
    available_backends,
    backends,
    lookup,
    neftune_noise,
    noisy_embedding,
    reference_ops,
    self_check,
)
from neftune_kernels import layout as layouts

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXECUTED = (
    "ttsem" in sys.modules
)  # ttsem.sanitize runs us: "cuda" tensors live in this machine's memory
WORD = 2**32
POISON = 2**30  # fresh int32 memory holds more, here and under ttsem


@pytest.fixture(autouse=True)
def needs_triton():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")


@pytest.fixture
def device(needs_triton, monkeypatch):
    """Where Triton kernels run: a GPU, real or executed by ttsem, or the interpreter's CPU."""
    if INTERPRETED:
        small_programs(monkeypatch, 32)  # its scans take a Python step per element
        mend_interpreter(monkeypatch)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(
            "no GPU here: `make test` runs these on the compiled IR (ttsem) and in Triton's "
            "interpreter"
        )
    return torch.device("cuda", 0)


def small_programs(monkeypatch, block):
    """Number documents in blocks of so many tokens, added up by twos where a row has more."""
    for name, value in {"ROW_BLOCKS": (block,), "PIECE": block, "PIECES_AT_ONCE": 2}.items():
        monkeypatch.setattr(kernels(), name, value)


def serve_tiles(monkeypatch, is_tiled=True):
    """Several tokens a program in these small calls, or one."""
    monkeypatch.setattr(kernels(), "PROGRAMS", 0 if is_tiled else 2048)
    monkeypatch.setattr(kernels(), "TILED_FROM", 0 if is_tiled else 10**6)
    monkeypatch.setattr(kernels(), "TILED_COLUMNS", 1)


def mend_interpreter(monkeypatch):
    """What the interpreters of older Tritons get wrong."""
    import triton
    from triton.runtime import interpreter

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version >= (3, 9):
        # A launch has patched the language; again at every call inside takes most of the time.
        inner = interpreter.InterpretedFunction
        monkeypatch.setattr(
            inner, "__call__", lambda self, *args, **named: self.rewrite()(*args, **named)
        )
    if version < (3, 7):  # a scalar is an array of one element, no int to numpy 2.4
        patch = interpreter._patch_lang_tensor

        def patched(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    if version < (3, 9):  # fma rounds its product too; float64 holds it exactly: 24 + 16 bits

        def fma(self, x, y, z):
            exact = x.data.astype("float64") * y.data + z.data
            return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


@pytest.fixture
def gpu(device):
    if INTERPRETED or EXECUTED:
        pytest.skip("needs a real GPU: streams, graphs, devices, memory")
    return device


@pytest.fixture
def alpha_on_device(device, monkeypatch):
    """Alpha is taken for the device's, wherever that is."""
    monkeypatch.setattr(kernels(), "is_on_host", lambda noise_alpha: False)


@pytest.fixture
def public(device, monkeypatch):
    """Where the public functions choose Triton by themselves."""
    if INTERPRETED:
        pytest.skip(
            "the interpreter runs on CPU tensors, which the public functions give to the CPU "
            "backends"
        )
    if EXECUTED:  # ttsem's "cuda" tensors say is_cpu, and would be served by the CPU's shortcut
        monkeypatch.setattr(lookup, "_embed_quickly", lambda *args: None)
    return device


pytestmark = pytest.mark.gpu


def kernels():
    from neftune_kernels import triton_kernels

    return triton_kernels


def cuda(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def triton_layout(
    shape,
    device,
    attention_mask=None,
    lengths=None,
    cu_seqlens=None,
    position_ids=None,
    padded_ids=None,
    padding_idx=-1,
    per_token=False,
):
    """The operators' layout arguments, documents numbered by the Triton kernel; per_token: in
    arrays, as noise masks need them.
    """
    attention_mask, lengths, cu_seqlens, position_ids, padded_ids = (
        cuda(value, device)
        for value in (attention_mask, lengths, cu_seqlens, position_ids, padded_ids)
    )
    if padded_ids is not None:
        return numbered("padding", per_token, padded_ids, padding_idx)
    if cu_seqlens is not None:
        return (None, None, None, cu_seqlens)
    position_ids, lengths = (  # as the operators take them
        value.long() if value is not None and value.itemsize < 4 else value
        for value in (position_ids, lengths)
    )
    if position_ids is not None:
        position_ids = position_ids.expand(shape)
    if lengths is not None:
        return (
            None,
            None if position_ids is None else position_ids.reshape(-1),
            lengths.reshape(-1),
        )
    if attention_mask is None and position_ids is None:
        return ()
    return numbered("documents", per_token, attention_mask, position_ids)


def numbered(what, per_token, *given):
    if per_token:
        arrays = {"documents": "mask_layout", "padding": "padding_layout"}[what]
        return getattr(kernels(), arrays)(*given)
    return layouts.Layout(numbering=getattr(kernels(), f"number_{what}")(*given))


class NotServed(AssertionError):
    """The launcher left the call to its caller."""


def by_kernel(
    device,
    input_ids,
    weight,
    noise_alpha,
    *,
    seed,
    replica=0,
    sample_offset=0,
    position_offset=0,
    embed_scale=1.0,
    capturable=False,
    launch=None,
    **samples,
):
    """noisy_embedding through the launcher itself, so that the interpreter serves too, or through
    `launch`; capturable: alpha is the device's, as the fixture alpha_on_device says.
    """
    alpha = torch.tensor(samples.pop("sign", 1) * noise_alpha, dtype=torch.float64)
    padding_idx, noise_mask = samples.pop("padding_idx", None), samples.pop("noise_mask", None)
    if padding_idx is not None and not samples:
        samples = {"padded_ids": input_ids, "padding_idx": padding_idx}
    per_token = noise_mask is not None
    layout = layouts.Layout(*triton_layout(input_ids.shape, device, per_token=per_token, **samples))
    if noise_mask is not None:
        document = torch.ops.neftune_kernels.noisy_documents(
            cuda(noise_mask, device), *layout, position_offset
        )
        layout = layouts.by_document(layout, document, input_ids.shape)
    out = torch.full(
        (*input_ids.shape, weight.shape[1]), float("nan"), dtype=weight.dtype, device=device
    )
    served = (launch or kernels().noisy_embedding_out)(
        cuda(input_ids, device),
        cuda(weight, device),
        torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device),
        cuda(alpha, device) if capturable else alpha,
        *layout,
        replica,
        sample_offset,
        position_offset,
        -1,
        embed_scale,
        out=out,
    )
    if served is NotImplemented:
        raise NotServed
    return out.cpu()


def agree(device, input_ids, weight, noise_alpha=5.0, **arguments):
    """Kernel and reference give the same bits; and there is noise, or the case proves nothing."""
    if INTERPRETED and weight.dtype == torch.bfloat16:
        pytest.skip(
            "Triton's interpreter truncates float32 to bfloat16 (3.9): ttsem and GPUs prove "
            "bfloat16"
        )
    arguments = {"seed": 3, **arguments}
    wanted = {name: value for name, value in arguments.items() if name != "capturable"}
    expected = noisy_embedding(input_ids, weight, noise_alpha, **wanted, backend="reference")
    if not torch.equal(expected, F.embedding(input_ids, weight)):
        assert same_bits(by_kernel(device, input_ids, weight, noise_alpha, **arguments), expected)
        return
    raise AssertionError("a case without noise proves nothing")


def make_weight(embedding_dim, dtype, vocabulary=11):
    return torch.randn(
        vocabulary, embedding_dim, generator=torch.Generator().manual_seed(embedding_dim)
    ).to(dtype)


# ---- bits


VECTORS = golden_vectors.read()["cases"]
UNIFORM = [
    case for case in VECTORS if case["arguments"].get("distribution", "uniform") == "uniform"
]
QUICK_VECTORS = (  # a GPU runs all of them; as IR or Python they take minutes
    "layout, offsets: mask, numbered",
    "layout, offsets: lengths beyond T",
    "layout, offsets: cu_seqlens, empty documents",
    "layout, offsets: noise_mask, position_ids",
    "width: 9",
    "seed: 9223372036854775808",
    "every word: 4294967295, places",
    "length: 8589934593",
    "special values: alpha 600000.0, embed_scale 1.5",
    "normal, sign -1, equal_variance True: lengths",
)


def golden_cases(cases):
    return [
        pytest.param(
            case, id=case["name"], marks=() if case["name"] in QUICK_VECTORS else pytest.mark.long
        )
        for case in cases
    ]


def served(case):
    """Everything but float64, which is the reference's alone."""
    return [dtype for dtype in golden_vectors.dtypes(case) if dtype in FLOAT_DTYPES]


@pytest.mark.parametrize("case", golden_cases(UNIFORM))
def test_golden_vectors(device, case):
    """The noise that is promised for good: tests/golden_vectors.py."""
    dtypes = served(case)
    if INTERPRETED and "bfloat16" in case["out"]:
        dtypes.remove(torch.bfloat16)
    if INTERPRETED and case["arguments"]["alpha"] == 5e-324:
        pytest.skip("the interpreter takes alpha's bits for an int32 where they are a small number")
    if not dtypes:
        pytest.skip("Triton's interpreter truncates float32 to bfloat16 (3.9)")
    for dtype in dtypes:
        input_ids, weight, keywords = golden_vectors.call(case, dtype)
        keywords.pop("equal_variance", None)  # of the other distributions
        if keywords["noise_alpha"] > torch.finfo(torch.float32).max:
            with pytest.raises(NotServed):
                by_kernel(device, input_ids, weight, **keywords)
            keywords["launch"] = with_what_it_leaves
        out = by_kernel(device, input_ids, weight, **keywords)
        assert golden_vectors.spelled(out) == golden_vectors.expected(case, dtype), dtype


def with_what_it_leaves(*args, out):
    """noisy_embedding.out as GPUs have it: what the launcher leaves, the reference serves."""
    by_reference = reference_ops.noisy_embedding_out
    return backends.on_gpu("noisy_embedding_out", by_reference, None)(*args, out=out)


def assert_golden(device, case, backend):
    """Through the public function, which serves the other distributions too."""
    assert served(case)
    for dtype in served(case):
        input_ids, weight, keywords = golden_vectors.call(case, dtype)
        keywords = {name: cuda(value, device) for name, value in keywords.items()}
        out = noisy_embedding(input_ids.to(device), weight.to(device), **keywords, backend=backend)
        assert golden_vectors.spelled(out) == golden_vectors.expected(case, dtype), dtype


@pytest.mark.parametrize("case", golden_cases(VECTORS))
def test_golden_vectors_by_the_public_function(public, case):
    assert_golden(public, case, "triton")


def test_drawn_calls(device, monkeypatch):
    """What hypothesis draws, against the oracle; tests/test_properties.py for the CPU's kernels."""
    hypothesis = pytest.importorskip("hypothesis")
    import oracle
    from drawn_calls import ALPHAS, cases, noise_of, wide
    from test_properties import QUICK

    dtypes, alphas = FLOAT_DTYPES, ALPHAS
    if INTERPRETED:  # whose numpy has no bfloat16, and takes a small number's bits for an int32
        dtypes = (torch.float32, torch.float16)
        alphas = ALPHAS.filter(lambda alpha: alpha > 1e-300)

    @hypothesis.settings(QUICK, max_examples=15 if EXECUTED else 60)  # as IR a second each
    @hypothesis.given(cases(dtypes, ("uniform",), alphas), hypothesis.strategies.booleans())
    def check(case, is_tiled):
        serve_tiles(monkeypatch, is_tiled)
        said = {**case.layout, **case.offsets, "noise_mask": case.noise_mask}
        said |= {"padding_idx": case.padding_idx, "sign": case.variant["sign"], "seed": case.seed}
        said |= {"embed_scale": case.embed_scale}
        try:
            out = by_kernel(device, case.input_ids, case.weight, case.alpha, **said)
        except NotServed:
            assert case.alpha > 1e30, "only a step beyond float32 is left to the caller"
            return
        name, noise = str(case.dtype).removeprefix("torch."), noise_of(case, by_ids=True)
        rows = wide(case.weight[case.input_ids.long()]).reshape(noise.shape)
        truth = oracle.embedded_with_noise(rows, noise, name, case.embed_scale)
        assert equals_oracle(out, truth)

    check()


@pytest.mark.parametrize("tokens", (1, 31, 32, 128, 129, 512, 513, 10**6))
def test_rows_are_shared_out_where_tokens_are_few(device, tokens):
    """A program keeps one of a row's sixteen pieces, four, or all."""
    shares = [kernels().row_shares(tokens, d, 32) for d in (256, 576, 1024, 4096, 8192, 9000)]
    wide = 16 if tokens <= 128 else 4 if tokens <= 512 else 1
    assert shares == [1, 1, min(wide, 4), wide, wide, min(wide, 4)]
    for d, share in zip((1024, 4096, 9000), shares[2:4] + shares[5:], strict=True):
        _, pieces, _ = kernels().row_shape(d, 32)
        _, constexprs = kernels().row_constants(torch.bfloat16, d, d, 1, True, False, 32, share)
        assert constexprs[3:5] == (-(-pieces // share), share)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_rows_that_are_not_shared(device, monkeypatch, dtype):
    """The program of larger calls, which these tests' calls are too small for."""
    monkeypatch.setattr(kernels(), "PROGRAMS", 0)
    batch = make_batch("ragged", rows=2, columns=2)
    for embedding_dim in (1024, 4104):
        weight = make_weight(embedding_dim, dtype)
        agree(device, batch.input_ids, weight)
        agree(device, batch.input_ids, weight, lengths=batch.lengths, embed_scale=1.7)


@pytest.mark.parametrize("tokens", (4096, 4097))
def test_tiles_serve_where_tokens_are_many(device, tokens):
    """In rows of 64 tokens at least, at 2048 columns at most."""
    sizes = ((1, tokens, 2048), (1, tokens, 2056), (tokens, 63, 8), (tokens // 64, 64, 8))
    many = tokens == 4097
    assert [kernels().has_tiles(*size) for size in sizes] == [many, False, False, False]
    assert kernels().has_tiles(tokens, 64, 8)
    for d, tile, blocks, pieces in (
        (8, 4, 8, 1),
        (576, 4, 8, 9),
        (1024, 4, 8, 16),
        (1032, 2, 16, 9),
    ):
        warps, found = kernels().row_constants(
            torch.bfloat16, d, d, 1, True, False, 32, is_tiled=True
        )
        assert (warps, *found[2:6]) == (1, blocks, pieces, 1, tile)
        _, found = kernels().row_constants(torch.bfloat16, d, d, 1, False, False, 32, is_tiled=True)
        assert found[5] == 1, "rows that no vector reads"
        _, found = kernels().row_constants(torch.bfloat16, d, d, 1, True, True, 32, is_tiled=True)
        assert found[5] == 1, "a tile of scaled rows would spill"
    assert kernels().tile_of(576, 64) == 8 and kernels().tile_of(1032, 64) == 4


TILED_LAYOUTS = {
    "nothing": {},
    "lengths": {"lengths": torch.tensor([5, 0, 3])},
    "mask": {"attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 1, 0]])},
    "numbered": {"attention_mask": torch.tensor([[1, 1, 2, 2, 2, 0], [0] * 6, [3, 3, 3, 3, 4, 5]])},
    "position_ids": {
        "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0], [0] * 6, [4, 5, 6, 7, 0, 1]])
    },
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 4, 4, 7, 13, 18])},
    "noise_mask": {"noise_mask": torch.tensor([[0, 1, 1, 0, 1, 1], [0] * 6, [1] * 6]).bool()},
    "padding_idx": {"padding_idx": 2},
}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", TILED_LAYOUTS)
def test_tiles(device, monkeypatch, layout, dtype):
    """Four tokens a program, or two, the last of a row's six perhaps twice."""
    serve_tiles(monkeypatch)
    given = TILED_LAYOUTS[layout]
    ids = torch.tensor([[1, 2, 3, 4, 5, 0], [2, 6, 7, 8, 2, 2], [9, 10, 2, 1, 3, 4]])
    weight = make_weight(24, dtype)
    weight[2:6] = -0.0  # which noise of zero would turn into zeros
    agree(device, ids, weight, **given, replica=3, sample_offset=1, position_offset=1)
    agree(device, ids.int(), weight, **given, embed_scale=1.7)
    if layout == "lengths":
        agree(device, ids[:, :3], make_weight(1032, dtype), lengths=torch.tensor([2, 0, 3]))


@pytest.mark.parametrize("capturable", (False, True))
def test_tiles_of_ids_out_of_range(device, monkeypatch, capturable, alpha_on_device):
    """Their rows alone are NaN, in training and where no noise is."""
    monkeypatch.setattr(kernels(), "is_on_host", lambda noise_alpha: not capturable)
    serve_tiles(monkeypatch)
    ids = torch.tensor([[1, 11, 3, 4, 5, 0], [-1, 6, 7, 8, 2, 2]])
    weight = make_weight(24, torch.float32)
    is_bad = (ids < 0) | (ids > 10)
    for lengths in ((6, 2), (0, 0)):
        given = {"seed": 3, "lengths": torch.tensor(lengths)}
        out = by_kernel(device, ids, weight, 5.0, **given, capturable=capturable)
        good = noisy_embedding(
            ids.masked_fill(is_bad, 0), weight, 5.0, **given, backend="reference"
        )
        assert out[is_bad].isnan().all() and same_bits(out[~is_bad], good[~is_bad])


@pytest.mark.parametrize("embedding_dim", (1, 7, 8, 20, 64, 100, 576, 896, 4096, 4104))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_dtype_and_width(device, dtype, embedding_dim):
    batch = (
        make_batch("ragged", rows=2, columns=2)
        if embedding_dim > 1000
        else make_batch("ragged", rows=3, columns=4)
    )
    weight = make_weight(embedding_dim, dtype)
    agree(device, batch.input_ids, weight)
    agree(
        device,
        batch.input_ids.int(),
        weight,
        lengths=batch.lengths + 4,
        replica=2,
        sample_offset=3,
        position_offset=4,
    )
    agree(
        device,
        batch.input_ids,
        weight,
        attention_mask=batch.attention_mask,
        embed_scale=embedding_dim**0.5 + 0.1,
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_every_mask(device, kind, dtype):
    batch = make_batch(kind)
    weight = make_weight(24, dtype)
    if kind == "nothing_real":
        out = by_kernel(
            device, batch.input_ids, weight, 5.0, seed=1, attention_mask=batch.attention_mask
        )
        assert same_bits(out, F.embedding(batch.input_ids, weight))
        return
    agree(device, batch.input_ids, weight, attention_mask=batch.attention_mask, seed=-(2**63))
    agree(device, batch.input_ids, weight, attention_mask=batch.attention_mask != 0, seed=2**64 - 1)


TAILS = {
    "none": [[5, 6, 7, 5, 6, 7, 8]],
    "a run": [[5, 6, 7, 5, 0, 0, 0]],
    "one token": [[5, 6, 7, 5, 6, 7, 0]],
    "a whole row": [[0, 0, 0, 0, 0, 0, 0]],
    "all but the first": [[5, 0, 0, 0, 0, 0, 0]],
    "in the middle alone": [[5, 0, 0, 5, 0, 0, 9]],
    "rows": [[5, 6, 0, 5, 0, 0, 0], [0, 5, 6, 7, 8, 9, 9]],
}
PLACES = [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0]]
BOUNDS = [[0, 3, 7], [0, 4, 5, 5, 7], [0, 7], [0, 2, 5], [1, 3, 6]]


@pytest.mark.gpu
@pytest.mark.parametrize("is_end", [False, True])
@pytest.mark.parametrize("token", [None, 0, 9])
def test_tails(token, is_end, device, monkeypatch):
    monkeypatch.setattr(kernels(), "TAIL_BLOCK", 4)  # several blocks
    for ids in map(torch.tensor, TAILS.values()):
        for told in PLACES:
            places = torch.tensor(told).expand(ids.shape)
            expected = layouts.untailed(ids, places, None, token, is_end)
            found = kernels().untailed(ids.to(device), places.to(device), None, token, is_end)
            assert torch.equal(found.cpu(), expected) and found.dtype == expected.dtype
        for told in BOUNDS if len(ids) == 1 else []:
            bounds = torch.tensor(told, dtype=torch.int32)
            expected = layouts.untailed(ids, None, bounds, token, is_end)
            found = kernels().untailed(ids.to(device), None, bounds.to(device), token, is_end)
            assert torch.equal(found.cpu(), expected), (ids, told)


def assert_same_layout(shape, device, attention_mask=None, position_ids=None):
    """Documents, positions of real tokens and lengths of documents as layout.mask_layout numbers
    them.
    """
    expected = layouts.mask_layout(
        attention_mask, None if position_ids is None else position_ids.expand(shape).long()
    )
    on_device = (
        cuda(attention_mask, device),
        None if position_ids is None else cuda(position_ids, device).expand(shape),
    )
    document, position, lengths = (tensor.cpu() for tensor in kernels().mask_layout(*on_device))
    real = expected[0] >= 0
    documents = expected[0][real].unique()
    assert torch.equal(document, expected[0])
    assert torch.equal(position[real], expected[1][real])
    assert torch.equal(lengths[documents], expected[2][documents])
    numbering = kernels().number_documents(*on_device)
    told = attention_mask, None if position_ids is None else position_ids.expand(shape)
    assert_same_tables(numbering.cpu(), layouts.number_documents(*told), shape)


def assert_same_tables(numbering, expected, shape):
    """What must be written is as the reference has it, and nothing else is written."""
    words, expected_words = words_of(numbering, shape), words_of(expected, shape)
    before = torch.where(words[:, 3] < 0, expected_words[:, 3], words[:, 3])
    assert torch.equal(torch.cat((words[:, :3], before[:, None]), 1), expected_words)
    found, wanted = table_and_record(numbering, shape), table_and_record(expected, shape)
    for row, documents in enumerate(words[:, 0].tolist()):
        (table, record), (expected_table, expected_record) = (
            (tables[row, :documents], records[row]) for tables, records in (found, wanted)
        )
        assert torch.equal(table, expected_table)
        assert bool((found[0][row, documents:] > POISON).all())
        assert torch.equal(record, expected_record) if documents else bool((record > POISON).all())


@pytest.mark.parametrize("block", (16, 64 if INTERPRETED else 2048))
def test_numbering_of_random_masks_and_positions(device, monkeypatch, block):
    """Blocks and programs much smaller than a row, so that every carry from block to block and
    program to program matters.
    """
    small_programs(monkeypatch, block)
    generator = torch.Generator().manual_seed(block)
    for trial in range(6 if block == 16 else 2):
        rows, columns = (int(torch.randint(1, high, (1,), generator=generator)) for high in (9, 40))
        mask = torch.randint(0, 3, (rows, columns), generator=generator)
        if trial % 2:
            mask = mask * (torch.rand(rows, columns, generator=generator) < 0.4)
            mask[rows // 2] = 0
        place = torch.arange(columns).repeat(rows, 1)
        cut = int(torch.randint(0, columns, (1,), generator=generator))
        place[:, cut:] -= cut
        shape = (rows, columns)
        assert_same_layout(shape, device, attention_mask=mask)
        assert_same_layout(shape, device, attention_mask=mask != 0)
        assert_same_layout(shape, device, attention_mask=mask, position_ids=place)
        assert_same_layout(shape, device, position_ids=place.int())
        assert_same_layout(shape, device, position_ids=place[:1])


def test_numbering_of_every_kind_of_row(device, monkeypatch):
    """In one program and in pieces, some of them without a real token: what is written, and what
    the row kernel reads.
    """
    rows = [
        "1111111111111111111111111111111111111",
        "1111111111111111111111100000000000000",
        "0000000000000000000000000000000011111",
        "0000000000000111111111111111111000000",
        "0000000000000000000000000000000000000",
        "1100000000000000000000000000000000011",
        "1111100111111111111111111011111111111",
        "1111111111122222222222222222223333333",
        "0122222003000000000000000000000544555",
        "1112110000000000000000000000000001121",
    ]
    mask = torch.tensor([[int(digit) for digit in row] for row in rows])
    column = torch.arange(mask.shape[1]).expand_as(mask)
    then = column[:, :1] + torch.tensor([0, -20, 7, 0, -20, 7, -20, 7, 0, 7])[:, None]
    packed = torch.where(column < 20, column, column + then)  # or ahead, or on
    for block in (64, 8):
        small_programs(monkeypatch, block)
        for told in (
            (mask, None),
            (mask != 0, None),
            (None, packed),
            ((mask != 0).int(), packed),
            (mask.T.contiguous().T, None),
        )[: 5 if block == 8 else 3]:
            assert_same_layout(mask.shape, device, *told)
    numbering = kernels().number_padding(cuda(torch.where(mask == 0, 7, mask), device), 7)
    expected = layouts.number_documents(mask != 0, None)
    assert_same_tables(numbering.cpu(), expected, mask.shape)


def test_documents_of_many_rows_are_counted(device):
    """A reader adds up those of 32 rows at a time."""
    mask = torch.tensor([[1, 2], [1, 1], [0, 0]]).repeat(23, 1)
    assert_same_layout(mask.shape, device, mask)


def test_jumps_are_not_counted_in_words(device):
    """Position ids that go on modulo 2³² do not go on."""
    mask = torch.tensor([[1, 1, 0, 1]])
    for far in (0, 2**32, -(2**32)):
        for jump in (1, 2):
            ids = torch.tensor([[5, 6, 0, 6 + far + jump]])
            assert_same_layout((1, 4), device, attention_mask=mask, position_ids=ids)
            assert_same_layout((1, 2), device, position_ids=ids[:, 1::2].contiguous())


MASK_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
)


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_every_mask_dtype_and_strides(device, dtype):
    mask = make_batch("numbered").attention_mask.to(dtype)
    assert_same_layout(mask.shape, device, attention_mask=mask)
    if dtype in (torch.int8, torch.int64):
        assert_same_layout(mask.T.shape, device, attention_mask=mask.T)
        longer = torch.cat((mask, mask), dim=1)
        assert_same_layout((4, 13), device, attention_mask=longer[:, 13:])


def test_positions_lengths_and_bounds(device):
    batch = make_batch("full", rows=3, columns=10)
    weight = make_weight(40, torch.float32)
    place = torch.arange(10).repeat(3, 1)
    place[1, 4:] -= 4
    agree(device, batch.input_ids, weight, position_ids=place)
    agree(
        device,
        batch.input_ids,
        weight,
        position_ids=place.int(),
        attention_mask=batch.attention_mask,
    )
    agree(
        device,
        batch.input_ids,
        weight,
        position_ids=place.flip(1),
        lengths=torch.tensor([10, 6, 3]),
    )
    agree(device, batch.input_ids, weight, lengths=torch.tensor([40, 12, 0]), position_offset=8)
    agree(device, batch.input_ids, weight, lengths=torch.tensor([10, 6, 3], dtype=torch.int32))
    agree(device, batch.input_ids, weight, cu_seqlens=torch.tensor([0, 0, 4, 4, 21, 30, 30]))
    agree(
        device,
        batch.input_ids,
        weight,
        cu_seqlens=torch.tensor([0, 7, 30], dtype=torch.int32),
        sample_offset=WORD - 1,
    )
    agree(
        device,
        batch.input_ids.flatten(),
        weight,
        cu_seqlens=torch.tensor([0, 1, 30]),
        position_offset=WORD - 2,
    )


def test_strided_layouts(device):
    """The launcher reads them dense, whatever a raw operator was given."""
    weight, ids = make_weight(24, torch.float32), torch.arange(6)[None]
    bounds = torch.tensor([0, 9, 2, 9, 6, 9])[::2]
    agree(device, ids, weight, cu_seqlens=bounds)
    places = torch.tensor([[0, 9, 3, 9, 1, 9, 4, 9, 2, 9, 5, 9]])[:, ::2]
    assert places.reshape(-1).stride() == (2,)
    agree(device, ids, weight, position_ids=places, lengths=torch.tensor([6]))


@pytest.mark.parametrize("sign", (1, -1))
def test_noise_masks_and_signs(device, sign):
    """Documents that the noise mask's operator has told, in every kind of layout."""
    batch = make_batch("full", rows=3, columns=10)
    weight = make_weight(40, torch.float32)
    given = {
        "noise_mask": torch.rand(3, 10, generator=torch.Generator().manual_seed(2)) < 0.5,
        "sign": sign,
        "position_offset": 3,
    }
    holes = make_batch("numbered", rows=3, columns=10).attention_mask
    for layout in (
        {},
        {"attention_mask": holes},
        {"position_ids": torch.arange(10).repeat(3, 1) % 4},
        {"lengths": torch.tensor([40, 9, 0])},
        {
            "lengths": torch.tensor([10, 6, 5], dtype=torch.int32),
            "position_ids": torch.arange(10).repeat(3, 1).flip(1),
        },
        {"cu_seqlens": torch.tensor([0, 0, 4, 21, 30, 30], dtype=torch.int32)},
        {"padding_idx": int(batch.input_ids[1, 1])},
    ):
        agree(device, batch.input_ids, weight, **layout, **given)
        agree(device, batch.input_ids, weight, **layout, sign=sign)


@pytest.mark.parametrize("form", (0, 1))
def test_numbering_of_any_form(device, form):
    """Runs and records, documents counted by the writer or the reader."""
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 1, 2, 3]])
    weight, ids = make_weight(16, torch.bfloat16), torch.arange(10).view(2, 5)

    def noisy(layout):
        out = torch.full((2, 5, 16), float("nan"), dtype=weight.dtype, device=device)
        kernels().noisy_embedding_out(
            cuda(ids, device),
            cuda(weight, device),
            torch.tensor(9, device=device),
            torch.tensor(5.0, dtype=torch.float64),
            *(cuda(tensor, device) for tensor in layout),
            *(3, 2**32 - 2, 7),
            out=out,
        )
        return out.cpu()

    expected = noisy(layouts.Layout(*layouts.mask_layout(mask, None)))
    numbering = list(forms(mask))[form]
    assert same_bits(noisy(layouts.Layout(numbering=numbering)), expected)


@pytest.mark.parametrize("distribution", ("normal", "rademacher"))
def test_other_distributions(public, distribution):
    """Unfused, but with the kernel's own draws."""
    batch = make_batch("holes", rows=2, columns=5)
    for dtype in FLOAT_DTYPES:
        for given in (
            {"attention_mask": batch.attention_mask},
            {"lengths": torch.tensor([7, 2])},
            {"cu_seqlens": torch.tensor([0, 4, 10])},
        ):
            kind = {
                "distribution": distribution,
                "sign": -1,
                "seed": 4,
                "sample_offset": 2,
                "position_offset": 1,
            }
            expected = noisy_embedding(
                batch.input_ids, make_weight(24, dtype), 5.0, **given, **kind, backend="reference"
            )
            on_device = {name: value.to(public) for name, value in given.items()}
            out = noisy_embedding(
                batch.input_ids.to(public),
                make_weight(24, dtype).to(public),
                5.0,
                **on_device,
                **kind,
                backend="triton",
            )
            assert same_bits(out.cpu(), expected)


def test_shapes_strides_and_padding_idx(device):
    weight = make_weight(16, torch.float32)
    ids = torch.randint(11, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    agree(device, ids, weight)
    agree(device, ids[0, 0], weight)
    agree(device, ids[0, 0, 0], weight)
    agree(
        device, ids.permute(2, 0, 1), weight, lengths=torch.tensor([[1, 2], [3, 0], [1, 1], [2, 2]])
    )
    agree(device, ids[:, 0, ::2], weight)
    agree(device, ids[0], weight, padding_idx=int(ids[0, 1, 2]))
    agree(device, ids[0], make_weight(11, torch.float32, 16).T, seed=9)  # columns apart
    agree(
        device, ids[0], torch.cat((weight, weight), dim=1)[:, 4:20]
    )  # rows apart, not 16-byte aligned for 16-bit
    for dtype in (torch.bfloat16, torch.float16) if not INTERPRETED else (torch.float16,):
        wide = make_weight(40, dtype)
        agree(device, ids[0], wide[:, 8:24])
        agree(device, ids[0], wide[:, 1:17])
        agree(device, ids[0], wide[:, 4:20], embed_scale=1.5)


def test_empty(device):
    weight = make_weight(8, torch.float32)
    for shape in ((0,), (2, 0), (0, 3)):
        assert by_kernel(
            device, torch.zeros(shape, dtype=torch.int64), weight, 5.0, seed=0
        ).shape == (*shape, 8)
    assert by_kernel(
        device, torch.zeros(2, 3, dtype=torch.int64), weight[:, :0], 5.0, seed=0
    ).shape == (2, 3, 0)
    assert (
        by_kernel(device, torch.zeros(2, 3, dtype=torch.int64), weight[:0], 5.0, seed=0)
        .isnan()
        .all()
    )
    for tensor in kernels().mask_layout(torch.ones(0, 3, device=device), None):
        assert tensor.shape == (0,)


def test_extremes_of_alpha(device):
    ids = torch.arange(6).reshape(2, 3)
    weight = torch.zeros(6, 16)
    for alpha in (1e-26, 1e30, 2.0**-86):
        agree(device, ids, weight, alpha)
        agree(device, ids, weight, alpha, lengths=torch.tensor([3, 1]))
        agree(device, ids, weight, alpha, sign=-1)
        agree(device, ids, weight, alpha, sign=-1, lengths=torch.tensor([3, 1]))
    for arguments in (
        {},
        {"lengths": torch.tensor([3, 2])},
        {"sign": -1},
        {"sign": -1, "lengths": torch.tensor([3, 2])},
    ):  # magnitudes below 2**-90: no noise, and no bit of a -0.0 changes
        assert same_bits(
            by_kernel(device, ids, -torch.zeros(6, 16), 1e-28, seed=0, **arguments),
            -torch.zeros(2, 3, 16),
        )
    out = torch.full((2, 3, 16), 7.0, device=device)
    beyond = torch.tensor(1e300, dtype=torch.float64)  # float32: the reference serves it
    given = (cuda(weight, device), torch.tensor(0, device=device), beyond)
    served = kernels().noisy_embedding_out(cuda(ids, device), *given, out=out)
    if getattr(kernels(), "__name__", "").endswith("triton_kernels"):
        assert served is NotImplemented and bool((out == 7).all())
    else:  # the CUDA C++ kernels serve any alpha
        assert same_bits(out.cpu(), noisy_embedding(ids, weight, 1e300, seed=0))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("samples", [{}, {"lengths": torch.tensor([4, 4])}], ids=["row", "lengths"])
def test_smallest_magnitude(device, samples, sign):
    """2⁻⁹⁰ is noise, the next smaller float32 none: where the host works out the step and where
    the kernel does. √(4·16) = 8: alpha is eight magnitudes.
    """
    ids, arguments = torch.arange(8).reshape(2, 4), {"sign": sign, **samples}
    agree(device, ids, torch.zeros(8, 16), 8 * 2.0**-90, **arguments)
    smaller = 8 * float(torch.nextafter(torch.tensor(2.0**-90), torch.tensor(0.0)))
    quiet = by_kernel(device, ids, -torch.zeros(8, 16), smaller, seed=3, **arguments)
    assert same_bits(quiet, -torch.zeros(2, 4, 16))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("width", (16, 20))
def test_alpha_on_the_device(device, alpha_on_device, width, dtype):
    """Read by the kernel, in every layout, with the host's bits."""
    batch, weight = make_batch("holes", rows=3, columns=5), make_weight(width, dtype)
    place = torch.arange(15).reshape(3, 5) % 4
    other = {"embed_scale": 1.7, "sign": -1, "replica": 2, "position_offset": 1}
    for said in (
        {},
        other,
        {"lengths": torch.tensor([5, 2, 1]), **other},
        {"attention_mask": batch.attention_mask},
        {"attention_mask": batch.attention_mask, "position_ids": place, **other},
        {"cu_seqlens": torch.tensor([0, 4, 4, 15])},
        {"attention_mask": batch.attention_mask, "noise_mask": torch.arange(15).view(3, 5) % 3},
    ):
        agree(device, batch.input_ids, weight, 7.3, capturable=True, **said)


@pytest.mark.parametrize("samples", [{}, {"lengths": torch.tensor([4, 4])}], ids=["row", "lengths"])
def test_extremes_of_alpha_on_the_device(device, alpha_on_device, samples):
    """0 and what is below the threshold are no noise; NaN is loud, as nobody else looks at it."""
    ids, quiet = torch.arange(8).reshape(2, 4), -torch.zeros(8, 16)
    for alpha in (8 * 2.0**-90, 1e30):
        agree(device, ids, torch.zeros(8, 16), alpha, capturable=True, **samples)
    below = 8 * float(torch.nextafter(torch.tensor(2.0**-90), torch.tensor(0.0)))
    for alpha in (0.0, -0.0, below, -below):
        out = by_kernel(device, ids, quiet, alpha, seed=3, capturable=True, **samples)
        assert same_bits(out, -torch.zeros(2, 4, 16))
    nan = float("nan")
    assert by_kernel(device, ids, quiet, nan, seed=3, capturable=True, **samples).isnan().all()
    assert by_kernel(device, ids, quiet, math.inf, seed=3, capturable=True, **samples).isinf().any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_padding_keeps_its_bits(device, dtype):
    """-0.0 stays -0.0, and NaN payloads and infinities go through."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("not in the interpreter")
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    weight = torch.zeros(4, 16, dtype=dtype)
    weight[1] = -0.0
    weight[2] = float("inf")
    weight[3].view(integer)[:] = torch.tensor(
        0x7FC00123 if dtype == torch.float32 else 0x7FF3, dtype=integer
    )
    ids = torch.arange(4).reshape(1, 4)
    out = by_kernel(device, ids, weight, 5.0, seed=0, lengths=torch.tensor([0]))
    assert torch.equal(out.view(integer), F.embedding(ids, weight).view(integer))


def test_ids_out_of_range_give_rows_of_nan(device):
    ids = torch.tensor([[0, -1, 10, 11, 2**40, -(2**63)]])
    for dtype in (torch.float32, torch.float16):
        for width in (16, 20):
            for arguments in ({}, {"lengths": torch.tensor([3])}):
                out = by_kernel(device, ids, make_weight(width, dtype), 5.0, seed=0, **arguments)[0]
                assert out[[1, 3, 4, 5]].isnan().all() and not out[[0, 2]].isnan().any()


def test_bad_bounds_and_lengths_reach_nothing(device):
    """Values are not read back from an accelerator: tokens outside every document are padding, and
    no access leaves a tensor.
    """
    ids = torch.arange(10).reshape(1, 10)
    weight = make_weight(16, torch.float32)
    plain = F.embedding(ids, weight)
    out = by_kernel(device, ids, weight, 5.0, seed=0, cu_seqlens=torch.tensor([2, 5]))
    assert torch.equal(out[0, [0, 1, 5, 9]], plain[0, [0, 1, 5, 9]]) and not torch.equal(
        out[0, 2:5], plain[0, 2:5]
    )
    for bounds in ([0], [7, 3, 900, -4], [-(2**62), 2**62]):
        assert (
            by_kernel(device, ids, weight, 5.0, seed=0, cu_seqlens=torch.tensor(bounds))
            .isfinite()
            .all()
        )
    assert torch.equal(
        by_kernel(device, ids, weight, 5.0, seed=0, lengths=torch.tensor([-3])), plain
    )


@pytest.fixture
def debug(device, monkeypatch):
    """NEFTUNE_DEBUG=1, which triton_kernels reads when imported."""
    if INTERPRETED:
        pytest.skip("Triton's debug mode is the compiler's")
    monkeypatch.setattr(kernels(), "DEBUG", True)
    for name in ("launch_rows", "launch_documents"):
        known = getattr(kernels(), name)
        launcher = kernels().Launcher(known.kernel, known.registers)
        monkeypatch.setattr(kernels(), name, launcher)


def test_debug_lets_good_calls_pass(device, debug):
    """Philox wraps on purpose; debug=True alone has Triton assert that nothing overflows."""
    batch = make_batch("holes", rows=2, columns=5)
    counters = {"replica": WORD - 1, "sample_offset": WORD - 1, "seed": 2**64 - 1}
    for dtype, width in ((torch.float32, 16), (torch.float16, 20)):
        agree(device, batch.input_ids, make_weight(width, dtype), embed_scale=1.5, **counters)
    weight = make_weight(16, torch.bfloat16)
    agree(device, batch.input_ids, weight, lengths=torch.tensor([5, 2]))
    agree(
        device,
        batch.input_ids,
        weight,
        cu_seqlens=torch.tensor([0, 4, 10]),
        position_offset=WORD - 2,
    )
    agree(device, batch.input_ids, weight, attention_mask=batch.attention_mask)


def test_debug_stops_bad_calls(device, debug):
    if not EXECUTED:
        pytest.skip("a failed assert ends a GPU's context: test_debug_asserts there")
    ids, weight = torch.tensor([[0, 1, 2]]), make_weight(16, torch.float32)
    negative, soft = torch.tensor([[1, -1, 1]]), torch.tensor([[1.0, 0.5, 1.0]])
    bounds = r"cu_seqlens must run from 0 to the number of tokens and not decrease"
    for message, bad_ids, arguments in (
        (r"input_ids must lie in \[0, num_embeddings\)", torch.tensor([[0, 11, 2]]), {}),
        (r"input_ids must lie in \[0, num_embeddings\)", torch.tensor([[0, -1, 2]]), {}),
        (r"lengths must not be negative", ids, {"lengths": torch.tensor([-1])}),
        (bounds, ids, {"cu_seqlens": torch.tensor([1, 3])}),
        (bounds, ids, {"cu_seqlens": torch.tensor([0, 2])}),
        (r"attention_mask must not have negative or NaN values", ids, {"attention_mask": negative}),
        (r"attention_mask must hold whole numbers", ids, {"attention_mask": soft}),
        (r"attention_mask must hold whole numbers", ids, {"attention_mask": soft * math.inf}),
    ):
        with pytest.raises(Exception, match=message):
            by_kernel(device, bad_ids, weight, 5.0, seed=0, **arguments)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_add_noise(device, dtype):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("not in the interpreter")
    batch = make_batch("holes", rows=2, columns=5)
    embeds = F.embedding(batch.input_ids, make_weight(24, dtype))
    expected = add_noise(
        embeds, 5.0, attention_mask=batch.attention_mask, seed=4, backend="reference"
    )
    for given in (
        embeds,
        embeds.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat((embeds, embeds), dim=-1)[..., 24:],
    ):
        source, out = (
            cuda(given, device),
            torch.full(given.shape, float("nan"), dtype=dtype, device=device),
        )
        seed, alpha = torch.tensor(4, device=device), torch.tensor(5.0, dtype=torch.float64)
        layout = triton_layout(batch.input_ids.shape, device, attention_mask=batch.attention_mask)
        kernels().add_noise_out(source, seed, alpha, *layout, out=out)
        assert same_bits(out.cpu(), expected)
        in_place = source.contiguous().clone()
        kernels().add_noise_out(in_place, seed, alpha, *layout, out=in_place)
        assert same_bits(in_place.cpu(), expected)


def test_rows_beyond_65535(device):
    """More rows than a grid's y axis holds."""
    if INTERPRETED or EXECUTED:
        pytest.skip(
            "131 075 programs take minutes without a GPU; test_grid_of_many_rows checks the "
            "arithmetic"
        )
    ids = torch.arange(131075).reshape(-1, 1) % 11
    agree(device, ids, make_weight(8, torch.float32))


def test_grid_of_many_rows(device, monkeypatch):
    """The launcher folds rows beyond 65535 into z, and a program reads its row back: checked with a
    launch that only records.
    """
    seen = []
    monkeypatch.setattr(
        kernels().Launcher,
        "__call__",
        lambda self, key, found, index, grid, args, num_warps: seen.append(grid),
    )
    by_kernel(
        device,
        torch.zeros(131071, 2, dtype=torch.int64),
        make_weight(8, torch.float32),
        5.0,
        seed=0,
    )
    by_kernel(
        device, torch.zeros(65535, 2, dtype=torch.int64), make_weight(8, torch.float32), 5.0, seed=0
    )
    assert seen == [(2, 65535, 3), (2, 65535, 1)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("width", "of_table"), ((2048, False), (4096, False), (4096, True)), ids=str
)
def test_more_than_int32_elements_of_the_ir(device, monkeypatch, width, of_table):
    """The last programs of a grid that writes as many elements, in tiles and a token each; and rows
    of as large a table.
    """
    if not EXECUTED:
        pytest.skip("ttsem alone leaves programs out; a GPU has test_more_than_int32_elements")
    import ttsem.interp

    def last_programs(num_programs, order=""):
        assert of_table or num_programs[0] >= 2**31 // width // 8
        few = range(num_programs[0])[0 if of_table else -3 :]
        return itertools.product(few, *map(range, num_programs[1:]))

    monkeypatch.setattr(ttsem.interp, "grid_order", last_programs)
    many = 2**31 // width + 3
    tokens, rows = (3, many) if of_table else (many, 11)
    weight = torch.zeros(rows, width, dtype=torch.float16)
    weight[-11:] = make_weight(width, torch.float16)
    ids = (torch.arange(tokens)[None] % 11).add_(rows - 11)
    alpha = 5.0 * math.sqrt(tokens)
    out = by_kernel(device, ids, weight, alpha, lengths=torch.tensor([tokens - 1]), seed=1)[0, -3:]
    expected = noisy_embedding(
        ids[:, -3:] - (rows - 11),
        weight[-11:],
        alpha,
        lengths=torch.tensor([tokens - 1]),
        position_offset=tokens - 3,
        seed=1,
        backend="reference",
    )
    assert same_bits(out.cpu(), expected[0])


# ---- the public functions choose it


def test_public_functions_choose_triton(public):
    assert available_backends("cuda")["triton"] == "available"
    assert backends.choose_backend(None, public, torch.bfloat16).name == "triton"
    assert backends.choose_backend(None, public, torch.float64).name == "reference"
    with pytest.raises(ValueError, match=r"backend 'triton' is not available: dtype torch.float64"):
        backends.choose_backend("triton", public, torch.float64)
    batch = make_batch("numbered")
    weight = make_weight(64, torch.bfloat16)
    on_gpu = {"attention_mask": batch.attention_mask.to(public), "seed": 5}
    expected = noisy_embedding(
        batch.input_ids, weight, 5.0, attention_mask=batch.attention_mask, seed=5
    )
    out = noisy_embedding(batch.input_ids.to(public), weight.to(public), 5.0, **on_gpu)
    assert out.device == public and same_bits(out.cpu(), expected)
    assert same_bits(
        add_noise(F.embedding(batch.input_ids, weight).to(public), 5.0, **on_gpu).cpu(), expected
    )
    noise = neftune_noise((4, 13), 64, 5.0, **on_gpu)
    assert same_bits(
        noise.cpu(), neftune_noise((4, 13), 64, 5.0, attention_mask=batch.attention_mask, seed=5)
    )
    by_reference = noisy_embedding(
        batch.input_ids.to(public), weight.to(public), 5.0, **on_gpu, backend="reference"
    )
    assert same_bits(by_reference.cpu(), expected)


def test_launches(public, monkeypatch):
    """One launch where the samples are known; one small one more for masks, position ids and
    padding_idx.
    """
    counts = {"noisy_rows": 0, "number_rows": 0}
    for launcher in (kernels().launch_rows, kernels().launch_documents):
        assert launcher.kernel.fn.__name__ in counts
    inner = kernels().Launcher.__call__

    def counted(self, *args, **kwargs):
        counts[self.kernel.fn.__name__] += 1
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(kernels().Launcher, "__call__", counted)
    batch = make_batch("ragged")
    ids, weight = batch.input_ids.to(public), make_weight(16, torch.bfloat16).to(public)
    mask, lengths = batch.attention_mask.to(public), batch.lengths.to(public)

    def launches(*args, **arguments):
        counts.update(dict.fromkeys(counts, 0))
        noisy_embedding(*args, 5.0, **arguments)
        return tuple(counts.values())

    assert launches(ids, weight) == (1, 0)
    assert launches(ids, weight, lengths=lengths, embed_scale=2.0) == (1, 0)
    assert launches(ids, weight, cu_seqlens=torch.tensor([0, 52], device=public)) == (1, 0)
    if EXECUTED:
        # the dispatcher takes ttsem's tensors to the CPU's kernels;
        # test_operators_are_registered_for_gpus
        return
    assert launches(ids, weight.requires_grad_(), attention_mask=mask) == (1, 1)
    assert launches(ids, weight, position_ids=torch.arange(13, device=public)[None]) == (1, 1)
    assert launches(ids, weight, padding_idx=3) == (1, 1)


def test_operators_are_registered_for_gpus():
    for name in ("noisy_embedding.out", "add_noise.out", "mask_layout", "padding_layout"):
        for key in ("CUDA", "XPU"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"neftune_kernels::{name}", key)
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(
                f"neftune_kernels::reference_{name}", key
            )


def test_training_on_it(public):
    """The module's forward, the generator's contract and the gradient of a lookup."""
    torch.manual_seed(0)
    module = NEFTuneEmbedding(11, 64, padding_idx=0, noise_alpha=5.0, embed_scale=1.5).to(public)
    ids = make_batch("full").input_ids.to(public)
    torch.manual_seed(7)
    first = module(ids)
    torch.manual_seed(7)
    seed = torch.empty((), dtype=torch.int64, device=public).random_(-(2**63), None)
    again = noisy_embedding(ids, module.weight, 5.0, padding_idx=0, embed_scale=1.5, seed=seed)
    assert torch.equal(first, again) and not torch.equal(module(ids), first)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randint(-8, 9, first.shape, generator=generator).float().to(public)  # exact sums
    (noisy,) = torch.autograd.grad(first, module.weight, grad)
    (plain,) = torch.autograd.grad(F.embedding(ids, module.weight, 0) * 1.5, module.weight, grad)
    assert torch.equal(noisy, plain)
    assert torch.equal(module.eval()(ids), F.embedding(ids, module.weight, 0) * 1.5)


# ---- every test can fail


MUTATIONS = {
    "multiplier": ("* 0xD2511F53", "* 0xD2511F57"),
    "key step": ("k1 += 0xBB67AE85", "k1 += 0xBB67AE87"),
    "rounds": ("tl.static_range(7)", "tl.static_range(6)"),
    "half-words swapped": (
        "return tl.fma(low, step * 65536, step * 32768), tl.fma(high",
        "return tl.fma(high, step * 65536, step * 32768), tl.fma(low",
    ),
    "half a step": ("step * 32768), tl.fma", "step * 0), tl.fma"),
    "word order": (
        "joined(tl.join(v0, v2), tl.join(v1, v3)",
        "joined(tl.join(v0, v1), tl.join(v2, v3)",
    ),
    "mask flipped": ("tl.where(real != 0, number, -1)", "tl.where(real != 0, -1, number)"),
    "one token too many": (
        "real = place.to(tl.int64) < length",
        "real = place.to(tl.int64) <= length",
    ),
    "replica dropped": ("replica.to(tl.uint32), k0, k1)", "(replica * 0).to(tl.uint32), k0, k1)"),
    "product not rounded": (
        "value = (value * scale).to(DTYPE).to(tl.float32)",
        "value = value * scale",
    ),
    "sample offset dropped": ("(sample + sample_offset).to(tl.uint32)", "sample.to(tl.uint32)"),
}
OUTSIDE = {
    "tail of a row": (
        "tl.store(target + column, value, mask=column < D)",
        "tl.store(target + column, value, mask=column < D + 8)",
    ),
    "id at the end": ("(index < num_embeddings)", "(index <= num_embeddings)"),
    "tail of a mask": ("inside = at < end\n", "inside = at < end + 1\n"),
}


def mutated(old, new, tmp_path):
    """triton_kernels with one text replaced in it or in its triton_numbering, as a module of its
    own.
    """
    folder = pathlib.Path(layouts.__file__).parent
    names = ("triton_numbering", "triton_kernels")
    sources = {name: (folder / f"{name}.py").read_text() for name in names}
    assert any(old in source for source in sources.values()), old
    for name, source in sources.items():
        path = tmp_path / f"mutated_{name}.py"
        taken = source.replace(old, new).replace("from .triton_n", "from .mutated_triton_n")
        path.write_text(taken)
        spec = importlib.util.spec_from_file_location(f"neftune_kernels.mutated_{name}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def standard_cases(device):
    batch = make_batch("holes", rows=3, columns=5)
    for width, dtype in ((16, torch.float16), (20, torch.float16), (16, torch.float32)):
        weight = make_weight(width, dtype)
        arguments = {"replica": 2, "sample_offset": 3, "embed_scale": 1.7}
        agree(device, batch.input_ids, weight, lengths=torch.tensor([5, 2, 1]), **arguments)
        agree(device, batch.input_ids, weight, attention_mask=batch.attention_mask, **arguments)


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_kernels_are_seen(device, monkeypatch, tmp_path, name):
    standard_cases(device)
    module = mutated(*MUTATIONS[name], tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "kernels", lambda: module)
    with pytest.raises(AssertionError):
        standard_cases(device)


@pytest.mark.parametrize("name", ("multiplier", "mask flipped"))
def test_first_launches_are_compared_with_the_reference(device, monkeypatch, tmp_path, name):
    """The right kernels pass without a word, a wrong one is named at its first launch."""
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setattr(self_check, "ENABLED", True)
    monkeypatch.setattr(self_check, "_failures", {})
    if EXECUTED:  # torch has no CUDA then, and cannot be asked whether a stream captures
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    batch, weight = make_batch("holes", rows=3, columns=5), make_weight(16, torch.float16)

    def launch(module):
        """What was said, whether the rows were served, and whether documents were numbered."""
        monkeypatch.setattr(sys.modules[__name__], "kernels", lambda: module)
        lengths, served = torch.tensor([5, 2, 1]), True
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                by_kernel(device, batch.input_ids, weight, 5.0, seed=0, lengths=lengths)
            except NotServed:
                served = False
            numbered = module.mask_layout(cuda(batch.attention_mask, device), None)
        said = " ".join(str(one.message) for one in seen if one.category is RuntimeWarning)
        return said, served, numbered is not NotImplemented

    right = mutated("", "", tmp_path)
    assert launch(right) == ("", True, True) and launch(right) == ("", True, True)
    assert len(right.launch_rows.checked) == len(right.launch_documents.checked) == 1
    said, served, numbered = launch(mutated(*MUTATIONS[name], tmp_path))
    assert "'triton' is out of service" in said
    assert (served, numbered) == ((True, False) if name == "mask flipped" else (False, True))
    assert self_check.failure("triton", device.type)


@pytest.mark.parametrize("name", OUTSIDE)
def test_stray_accesses_are_seen(device, monkeypatch, tmp_path, name):
    if not EXECUTED:
        pytest.skip("ttsem checks every access: `make test` runs this there")
    ids = torch.tensor([[0, 10, 11]])  # the last row, and one past it
    mask = torch.tensor([[1, 1, 0]])
    by_kernel(device, ids, make_weight(20, torch.float16), 5.0, seed=0, attention_mask=mask)
    module = mutated(*OUTSIDE[name], tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "kernels", lambda: module)
    with pytest.raises(Exception, match="past the end|outside"):
        by_kernel(device, ids, make_weight(20, torch.float16), 5.0, seed=0, attention_mask=mask)


# ---- a real GPU


def test_cuda_graph_replays_fresh_noise(gpu):
    ids, weight = make_batch("ragged").input_ids.to(gpu), make_weight(64, torch.bfloat16).to(gpu)
    mask = make_batch("ragged").attention_mask.to(gpu)
    noisy_embedding(ids, weight, 5.0, attention_mask=mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed = torch.empty((), dtype=torch.int64, device=gpu).random_(-(2**63), None)
        out = noisy_embedding(ids, weight, 5.0, attention_mask=mask, seed=seed)
        drawn = noisy_embedding(ids, weight, 5.0, attention_mask=mask)
    replays = []
    for _ in range(3):
        graph.replay()
        expected = noisy_embedding(
            ids.cpu(), weight.cpu(), 5.0, attention_mask=mask.cpu(), seed=int(seed)
        )
        assert same_bits(out.cpu(), expected)
        replays.append((out.cpu(), drawn.cpu()))
    assert all(
        not torch.equal(replays[i][k], replays[j][k])
        for i, j in ((0, 1), (1, 2), (0, 2))
        for k in (0, 1)
    )


def test_captured_module_replays_with_todays_alpha(gpu):
    """A training step captured by hand: fresh noise, and the alpha that was set last."""
    batch, weight = make_batch("ragged"), make_weight(64, torch.float32)
    ids, mask = batch.input_ids.to(gpu), batch.attention_mask.to(gpu)
    module = NEFTuneEmbedding(11, 64, capturable=True, noise_alpha=0).to(gpu)
    with torch.no_grad():
        module.weight.copy_(weight)

    def step():
        seed = torch.empty((), dtype=torch.int64, device=gpu).random_(-(2**63), None)
        known, drawn = module(ids, mask, seed=seed), module(ids, mask)
        (known * drawn.detach()).sum().backward()
        return seed, known, drawn

    stream = torch.cuda.Stream(gpu)
    with torch.cuda.stream(stream):
        for _ in range(3):
            module.weight.grad = None
            step()
    torch.cuda.synchronize()
    graph, seen = torch.cuda.CUDAGraph(), []
    module.weight.grad = None
    with torch.cuda.graph(graph):
        seed, known, drawn = step()
    for alpha in (5, 7, 0, 2.5):
        module.noise_alpha = alpha
        graph.replay()
        wanted = {"attention_mask": batch.attention_mask, "seed": int(seed)}
        expected = noisy_embedding(batch.input_ids, weight, float(alpha), **wanted)
        assert same_bits(known.detach().cpu(), expected), alpha
        seen.append(drawn.detach().clone())
    assert same_bits(seen[2].cpu(), F.embedding(batch.input_ids, weight))
    assert not torch.equal(seen[0], seen[1]) and module.weight.grad.isfinite().all()


def test_alpha_set_in_a_capture_is_refused(gpu):
    module = NEFTuneEmbedding(11, 64, capturable=True, device=gpu)
    module(torch.arange(8, device=gpu))
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(RuntimeError, match="set while a CUDA graph is captured"):
            module.noise_alpha = 7
        module(torch.arange(8, device=gpu))
    assert module.noise_alpha == 5 and float(module._alpha) == 5


class Looked(torch.nn.Module):
    """A model that apply_neftune noises."""

    def __init__(self, device):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 256, device=device)

    def forward(self, input_ids):
        return self.embed(input_ids)


def assert_loud(noisy, ids, weight, alpha):
    """The largest of 2048 draws says what alpha was."""
    noise = noisy.detach() - F.embedding(ids, weight.detach())
    bound = alpha / (8 * 256) ** 0.5
    assert 0.98 * bound - 1e-6 <= float(noise.abs().max()) <= bound + 1e-6, alpha
    return noise.clone()


@pytest.mark.parametrize("fused", [True, False])
def test_captured_model_replays_with_todays_alpha(gpu, fused):
    """Under apply_neftune; alpha is written by the handle."""
    ids, model = torch.arange(8, device=gpu)[None], Looked(gpu)
    options = {"embedding": "embed", "embedding_multiplier": 1.0, "fused": fused}
    handle = apply_neftune(model, 5.0, capturable=True, **options)
    stream = torch.cuda.Stream(gpu)
    with torch.cuda.stream(stream):
        model(ids)
    torch.cuda.synchronize()
    graph, seen = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        out = model(ids)
    for alpha in (5, 5, 7, 0, 2):
        handle.noise_alpha = alpha
        graph.replay()
        seen.append(assert_loud(out, ids, model.embed.weight, alpha))
        stats = handle.stats()
        assert stats["magnitude_max"] == pytest.approx(alpha / (8 * 256) ** 0.5)
    assert not torch.equal(seen[0], seen[1])


def test_reduce_overhead_replays_with_todays_alpha(gpu):
    """Nothing is skipped, nothing compiled anew."""
    ids = torch.arange(8, device=gpu)[None]
    module = NEFTuneEmbedding(11, 256, capturable=True, device=gpu)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, seen = torch.compile(module, mode="reduce-overhead", fullgraph=True), []
    for alpha in (5, 5, 5, 7, 0, 2):
        torch.compiler.cudagraph_mark_step_begin()
        module.noise_alpha = alpha
        with torch.no_grad():  # a backward that never comes would keep the graph from replaying
            seen.append(assert_loud(compiled(ids), ids, module.weight, alpha))
    assert not torch.equal(seen[1], seen[2])
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["inductor"]["cudagraph_skips"]


def test_more_than_int32_elements(gpu):
    if torch.cuda.mem_get_info(gpu)[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    width, tokens = 4096, 2**31 // 4096 + 3
    ids = torch.full((1, tokens), 5, device=gpu)
    ids[0, -1] = 2**31 // width + 6
    weight = torch.zeros(2**31 // width + 8, width, dtype=torch.bfloat16, device=gpu)
    weight[-2] = 1
    out = noisy_embedding(ids, weight, 5.0, seed=1)[0, -2:].float().cpu()
    noise = neftune_noise(
        (1, 2), width, 5.0, lengths=torch.tensor([tokens]), position_offset=tokens - 2, seed=1
    )[0]
    assert torch.equal(out, (torch.tensor([[0.0], [1.0]]) + noise).bfloat16().float())


def test_side_stream(gpu):
    ids, weight = torch.arange(8, device=gpu)[None], make_weight(4096, torch.float32).to(gpu)
    stream = torch.cuda.Stream(gpu)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        filled = weight * 2
        out = noisy_embedding(ids, filled, 5.0, seed=1)
    stream.synchronize()
    assert same_bits(out.cpu(), noisy_embedding(ids.cpu(), weight.cpu() * 2, 5.0, seed=1))


def test_other_devices(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1)
    ids, weight = torch.arange(8)[None], make_weight(64, torch.bfloat16)
    for device in (gpu, other, gpu):
        assert torch.cuda.current_device() == 0
        assert same_bits(
            noisy_embedding(ids.to(device), weight.to(device), 5.0, seed=1).cpu(),
            noisy_embedding(ids, weight, 5.0, seed=1),
        )


def test_compiled_on_a_gpu(gpu):
    ids, weight = torch.arange(8, device=gpu)[None], make_weight(64, torch.bfloat16).to(gpu)
    compiled = torch.compile(
        lambda ids, weight, seed: noisy_embedding(ids, weight, 5.0, seed=seed) * 2, fullgraph=True
    )
    seed = torch.tensor(3, device=gpu)
    assert same_bits(compiled(ids, weight, seed), noisy_embedding(ids, weight, 5.0, seed=seed) * 2)


def test_debug_asserts(gpu):
    """A good call passes and the bad one after it is stopped."""
    program = (
        "import torch, neftune_kernels as n\n"
        "weight = torch.zeros(3, 8, device='cuda')\n"
        "for id in (2, 99):\n"
        "    n.noisy_embedding(torch.tensor([[id]], device='cuda'), weight, 5.0)\n"
        "    torch.cuda.synchronize()\n"
        "    print('passed', id, flush=True)\n"
    )
    environment = os.environ | {"NEFTUNE_DEBUG": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.stdout.split() == ["passed", "2"], run.stderr
    assert run.returncode != 0 and "input_ids must lie in [0, num_embeddings)" in run.stderr
