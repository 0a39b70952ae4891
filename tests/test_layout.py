"""layout.py against the oracle's plain loops: exhaustively where shapes are tiny, then the hard
cases one by one, then every refusal.
"""

import itertools
import math
import re

import oracle
import pytest
import torch
from conftest import MASK_KINDS, make_batch, require_native

from neftune_kernels import neftune_noise
from neftune_kernels.backends import BACKENDS
from neftune_kernels.layout import per_token
from neftune_kernels.samples import Samples, make_layout

WORD = 2**32


BACKEND = "reference"


@pytest.fixture(autouse=True, params=["reference", "cpp"])
def numbering(request, monkeypatch):
    """Documents are numbered by layout.mask_layout or, through the operator, by the native library:
    every test asks both.
    """
    monkeypatch.setitem(globals(), "BACKEND", request.param)
    if request.param == "cpp":
        require_native()
        assert torch._C._dispatch_has_kernel_for_dispatch_key("neftune_kernels::mask_layout", "CPU")


def found(
    shape,
    attention_mask=None,
    lengths=None,
    cu_seqlens=None,
    position_ids=None,
    sample_offset=0,
    position_offset=0,
):
    """(sample, position, length) of every token as the package sees it, None for padding."""
    shape, device = torch.Size(shape), torch.device("cpu")
    layout = make_layout(
        shape, device, Samples(attention_mask, lengths, cu_seqlens, position_ids), BACKENDS[BACKEND]
    )
    sample, position, length = per_token(layout, shape, device, sample_offset, position_offset)
    assert sample.shape == position.shape == length.shape == (shape.numel(),)
    rows = zip(sample.tolist(), position.tolist(), length.tolist(), strict=True)
    return [None if count == 0 else (index, place, count) for index, place, count in rows]


def expected(
    shape, attention_mask=None, lengths=None, cu_seqlens=None, position_ids=None, **offsets
):
    """The same from the oracle's loops."""
    if position_ids is not None:
        position_ids = position_ids.expand(shape)
    given = {
        "attention_mask": attention_mask,
        "lengths": lengths,
        "cu_seqlens": cu_seqlens,
        "position_ids": position_ids,
    }
    return oracle.places(
        shape, **{k: v.flatten().tolist() for k, v in given.items() if v is not None}, **offsets
    )


def agree(shape, **arguments):
    assert found(shape, **arguments) == expected(shape, **arguments)


def all_tensors(shape, values):
    for cells in itertools.product(values, repeat=torch.Size(shape).numel()):
        yield torch.tensor(cells).reshape(shape)


def test_every_small_mask():
    """All 6 561 masks of 2 rows of 4 with values 0, 1, 2."""
    for mask in all_tensors((2, 4), range(3)):
        agree((2, 4), attention_mask=mask)


def test_every_small_mask_with_positions():
    """All masks of 1 row of 4 with values 0, 1, with all position ids 0 to 3."""
    for mask in all_tensors((1, 4), range(2)):
        for position_ids in all_tensors((1, 4), range(4)):
            agree((1, 4), attention_mask=mask, position_ids=position_ids)


def test_every_small_position_pattern():
    """All position ids 0 to 2 of 2 rows of 3 without a mask, and all -1 to 3 of 1 row of 4."""
    for position_ids in itertools.chain(
        all_tensors((2, 3), range(3)), all_tensors((1, 4), range(-1, 4))
    ):
        agree(tuple(position_ids.shape), position_ids=position_ids)


def test_every_small_cu_seqlens():
    """All non-decreasing bounds of up to 4 documents over 4 tokens, empty documents anywhere, on
    (4,), (1, 4) and (2, 2) tokens.
    """
    for documents in range(1, 5):
        for inner in itertools.combinations_with_replacement(range(5), documents - 1):
            for dtype in (torch.int32, torch.int64):
                for shape in ((4,), (1, 4), (2, 2)):
                    agree(shape, cu_seqlens=torch.tensor([0, *inner, 4], dtype=dtype))


def test_every_small_lengths():
    """All lengths 0 to 5 of 2 rows of 3, as a whole and as a shard that starts at position 2."""
    for lengths in all_tensors((2,), range(6)):
        for position_offset in (0, 2):
            agree((2, 3), lengths=lengths, position_offset=position_offset)


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 40), (5, 1), (7, 33)])
def test_hard_masks(kind, rows, columns):
    for seed in range(5):
        mask = make_batch(kind, rows=rows, columns=columns, seed=seed).attention_mask
        agree((rows, columns), attention_mask=mask)
        generator = torch.Generator().manual_seed(seed)
        position_ids = torch.randint(0, 6, (rows, columns), generator=generator).cummax(
            1
        ).values + torch.arange(columns)
        agree((rows, columns), attention_mask=mask, position_ids=position_ids)


def test_mask_worked_out_by_hand():
    """Left padding, a hole, a change of document across a hole, an all-padding row that still
    counts as a sample.
    """
    mask = torch.tensor(
        [[0, 0, 1, 1, 0, 1], [1, 0, 2, 2, 2, 0], [0, 0, 0, 0, 0, 0], [0, 5, 5, 5, 0, 0]]
    )
    rows = [
        [None, None, (0, 0, 3), (0, 1, 3), None, (0, 3, 3)],
        [(1, 0, 1), None, (2, 0, 3), (2, 1, 3), (2, 2, 3), None],
        [None] * 6,
        [None, (4, 0, 3), (4, 1, 3), (4, 2, 3), None, None],
    ]
    assert found((4, 6), attention_mask=mask) == [place for row in rows for place in row]


def test_positions_worked_out_by_hand():
    """Ids that restart open a document; ids that count columns across a hole, or count real tokens
    across it, do not.
    """
    packed = torch.tensor([[0, 1, 2, 0, 1, 0]])
    three = [(0, 0, 3), (0, 1, 3), (0, 2, 3), (1, 0, 2), (1, 1, 2), (2, 0, 1)]
    assert found((1, 6), position_ids=packed) == three
    assert found((6,), position_ids=packed[0]) == three
    mask = torch.tensor([[0, 1, 1, 0, 0, 1]])
    one = [None, (0, 0, 3), (0, 1, 3), None, None, (0, 4, 3)]
    for ids in ([9, 3, 4, 0, 0, 5], [9, 3, 4, 0, 0, 7]):
        assert found((1, 6), attention_mask=mask, position_ids=torch.tensor([ids])) == one
    two = [None, (0, 0, 2), (0, 1, 2), None, None, (1, 0, 1)]
    assert (
        found((1, 6), attention_mask=mask, position_ids=torch.tensor([[9, 3, 4, 0, 0, 6]])) == two
    )


@pytest.mark.parametrize("kind", ["full", "ragged", "left", "holes", "empty_rows"])
def test_one_document_per_row_gives_what_the_mask_gives(kind):
    """Both usual position ids of a padded row, counting columns or counting real tokens, change
    nothing.
    """
    mask = make_batch(kind).attention_mask
    alone = found((4, 13), attention_mask=mask)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    assert found((4, 13), attention_mask=mask, position_ids=counted) == alone
    assert found((4, 13), attention_mask=mask, position_ids=torch.arange(13)[None]) == alone


MASK_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_mask_dtypes(dtype):
    mask = make_batch("numbered").attention_mask.to(dtype)
    agree((4, 13), attention_mask=mask)
    assert any(place is None for place in found((4, 13), attention_mask=mask))


def test_mask_values_are_numbers_not_truth():
    """2.0 beside 1.0 is another document, -0.0 padding."""
    mask = torch.tensor([[1.0, 1.0, 2.0, -0.0, 65504.0, 65504.0]])
    places = [(0, 0, 2), (0, 1, 2), (1, 0, 1), None, (2, 0, 2), (2, 1, 2)]
    assert found((1, 6), attention_mask=mask) == places


def test_every_float16_value():
    """Whole numbers are told apart, every other pattern is refused with its value."""
    values = torch.arange(2**16).to(torch.int16).view(torch.float16)
    whole = values.isfinite() & (values >= 0) & (values == values.trunc())
    agree((1, int(whole.sum())), attention_mask=values[whole][None])
    for value in values[~whole][::97].tolist():
        printed = "nan" if math.isnan(value) else f"{value:g}"
        mask = torch.tensor([[1, 0, value, 1]], dtype=torch.float16)
        with pytest.raises(ValueError, match=f"such as {re.escape(printed)}:"):
            found((1, 4), attention_mask=mask)


@pytest.mark.parametrize("far", [2**32, -(2**32), 2**33, 2**62, -(2**62)])
def test_jumps_are_not_counted_in_words(far):
    """Position ids that go on modulo 2³² do not go on."""
    two_tokens = torch.tensor([[5, 5 + far + 1]])
    assert found((1, 2), position_ids=two_tokens) == [(0, 0, 1), (1, 0, 1)]
    mask = torch.tensor([[1, 0, 0, 1]])
    for jump in (1, 3):  # the next token, and their column distance
        ids = torch.tensor([[5, 0, 0, 5 + far + jump]])
        assert found((1, 4), attention_mask=mask, position_ids=ids)[3] == (1, 0, 1)
        ids[0, 3] -= far
        assert found((1, 4), attention_mask=mask, position_ids=ids)[3] == (0, 3, 2)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str
)
def test_integer_dtypes_of_lengths_and_positions(dtype):
    agree((3, 5), lengths=torch.tensor([5, 0, 7], dtype=dtype))
    position_ids = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7], [1, 0, 1, 2, 2]], dtype=dtype)
    agree((3, 5), position_ids=position_ids)
    agree((3, 5), position_ids=position_ids, lengths=torch.tensor([2, 6, 1], dtype=dtype))


def test_positions_of_a_shard_in_any_order():
    """With lengths, position ids say each token's place, in zigzag or any order, and open no
    document.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([16, 9, 0, 40])
    whole = expected((4, 16), lengths=lengths)
    order = torch.randperm(16, generator=generator)
    shuffled = found((4, 16), lengths=lengths, position_ids=order.expand(4, 16))
    assert [
        shuffled[row * 16 + column] for row in range(4) for column in order.argsort().tolist()
    ] == whole
    agree(
        (4, 16),
        lengths=lengths,
        position_ids=torch.randint(0, 50, (4, 16), generator=generator),
        position_offset=3,
    )


def test_lengths_beyond_the_row():
    """A shard at position 4 of samples of 9, 6 and 3 tokens sees 4, 2 and 0 of them, each with the
    whole sample's length.
    """
    places = found((3, 4), lengths=torch.tensor([9, 6, 3]), position_offset=4)
    rows = [
        [(0, 4, 9), (0, 5, 9), (0, 6, 9), (0, 7, 9)],
        [(1, 4, 6), (1, 5, 6), None, None],
        [None] * 4,
    ]
    assert places == [place for row in rows for place in row]
    assert found((1, 2), lengths=torch.tensor([2**40])) == [(0, 0, 2**40), (0, 1, 2**40)]


OFFSETS = ((0, 0), (1, 0), (0, 1), (WORD - 1, WORD - 1), (2**31, 2**31 - 1), (WORD - 2, 5))


@pytest.mark.parametrize("sample_offset, position_offset", OFFSETS)
def test_offsets_wrap(sample_offset, position_offset):
    offsets = {"sample_offset": sample_offset, "position_offset": position_offset}
    agree((3, 4), **offsets)
    agree(
        (3, 4), attention_mask=torch.tensor([[1, 1, 2, 0], [0, 0, 0, 0], [0, 1, 0, 1]]), **offsets
    )
    agree((3, 4), position_ids=torch.tensor([[0, 1, 0, 1]]), **offsets)
    agree((3, 4), lengths=torch.tensor([4, 2**33, 2]), **offsets)
    agree((3, 4), cu_seqlens=torch.tensor([0, 0, 5, 5, 12, 12]), **offsets)


def test_wrapped_sums_by_hand():
    assert found((2, 3), sample_offset=WORD - 1, position_offset=WORD - 2)[1:4] == [
        (WORD - 1, WORD - 1, 3),
        (WORD - 1, 0, 3),
        (0, WORD - 2, 3),
    ]


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 5), (3, 2, 1, 2)])
def test_leading_axes_are_the_samples(shape):
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(0, 3, shape, generator=generator)
    agree(shape)
    agree(shape, attention_mask=mask)
    agree(shape, position_ids=mask)
    agree(shape, position_ids=torch.arange(shape[-1]).reshape((1,) * (len(shape) - 1) + shape[-1:]))
    agree(shape, lengths=torch.randint(0, 6, shape[:-1], generator=generator))
    tokens = torch.Size(shape).numel()
    agree(shape, cu_seqlens=torch.tensor([0, 1, tokens - 1, tokens]))


def test_zero_dimensional_token_is_one_row_of_one():
    assert found(()) == [(0, 0, 1)]
    for mask, place in ((0, None), (1, (0, 0, 1))):
        assert found((), attention_mask=torch.tensor(mask)) == [place]
    for length, place in ((0, None), (1, (0, 0, 1)), (4, (0, 0, 4))):
        assert found((), lengths=torch.tensor(length)) == [place]
    assert found((), position_ids=torch.tensor(7)) == [(0, 0, 1)]
    assert found((), position_ids=torch.tensor(7), lengths=torch.tensor(8)) == [(0, 7, 8)]
    assert found((), cu_seqlens=torch.tensor([0, 0, 1])) == [(1, 0, 1)]


def test_one_row_of_tokens():
    """(N,) is one row: its lengths are 0-D."""
    assert found((3,), lengths=torch.tensor(2)) == [(0, 0, 2), (0, 1, 2), None]
    agree((5,), attention_mask=torch.tensor([1, 1, 0, 2, 2]))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (0, 0), (2, 0, 3)])
def test_empty_tokens(shape):
    mask = torch.zeros(shape, dtype=torch.int64)
    arguments = (
        {},
        {"attention_mask": mask},
        {"position_ids": mask},
        {"lengths": mask.sum(-1)},
        {"cu_seqlens": torch.tensor([0])},
    )
    for given in (
        *arguments,
        {"cu_seqlens": torch.tensor([0, 0, 0])},
        {"position_ids": mask, "lengths": mask.sum(-1)},
    ):
        assert found(shape, **given) == []


def test_strided_layouts():
    """Values count, not how they lie in memory."""
    batch = make_batch("numbered", rows=6, columns=10)
    mask = batch.attention_mask
    agree((6, 10), attention_mask=mask.t().contiguous().t())
    agree((3, 5), attention_mask=mask[::2, ::2])
    agree((6, 10), attention_mask=mask[:1].expand(6, 10))
    agree((6, 10), position_ids=mask.t().contiguous().t())
    agree((6, 10), lengths=torch.tensor([[4, 9], [0, 9], [12, 9], [1, 9], [2, 9], [3, 9]])[:, 0])
    agree((6, 10), lengths=torch.tensor([4]).expand(6))
    agree((6, 10), cu_seqlens=torch.tensor([0, 7, 20, 7, 60, 7])[::2])
    agree((6, 10), position_ids=mask.t().contiguous().t(), lengths=torch.tensor([4]).expand(6))


def shaped(*shape):
    return torch.ones(shape, dtype=torch.int64)


REFUSED = {
    "mask and lengths": (
        {"attention_mask": shaped(2, 3), "lengths": shaped(2)},
        ValueError,
        "at most one .*attention_mask and lengths",
    ),
    "mask and cu_seqlens": (
        {"attention_mask": shaped(2, 3), "cu_seqlens": torch.tensor([0, 6])},
        ValueError,
        "at most one .*attention_mask and cu_seqlens",
    ),
    "lengths and cu_seqlens": (
        {"lengths": shaped(2), "cu_seqlens": torch.tensor([0, 6])},
        ValueError,
        "at most one .*lengths and cu_seqlens",
    ),
    "all three": (
        {"attention_mask": shaped(2, 3), "lengths": shaped(2), "cu_seqlens": torch.tensor([0, 6])},
        ValueError,
        "at most one .*attention_mask and lengths and cu_seqlens",
    ),
    "cu_seqlens and position_ids": (
        {"cu_seqlens": torch.tensor([0, 6]), "position_ids": shaped(2, 3)},
        ValueError,
        "position_ids.*cu_seqlens",
    ),
    "mask of another shape": (
        {"attention_mask": shaped(2, 4)},
        ValueError,
        r"attention_mask.*\(2, 3\).*\(2, 4\)",
    ),
    "mask of one row": (
        {"attention_mask": shaped(1, 3)},
        ValueError,
        r"attention_mask.*\(2, 3\).*\(1, 3\)",
    ),
    "mask of four axes": (
        {"attention_mask": shaped(2, 1, 1, 3)},
        ValueError,
        r"attention_mask.*\(2, 3\).*\(2, 1, 1, 3\)",
    ),
    "complex mask": (
        {"attention_mask": shaped(2, 3).to(torch.complex64)},
        TypeError,
        "attention_mask.*complex64",
    ),
    "mask as a list": (
        {"attention_mask": [[1, 1, 1], [1, 1, 1]]},
        TypeError,
        "attention_mask must be a tensor, got list",
    ),
    "NaN mask": (
        {"attention_mask": torch.tensor([[1, 1, 1], [1, float("nan"), 0]])},
        ValueError,
        "attention_mask.*NaN.*0",
    ),
    "negative mask": (
        {"attention_mask": torch.tensor([[1, 1, 1], [1, -1, 0]])},
        ValueError,
        "attention_mask.*negative.*0",
    ),
    "additive mask": (
        {"attention_mask": torch.tensor([[0, 0, 0], [0, 0, -float("inf")]])},
        ValueError,
        "attention_mask.*negative.*0",
    ),
    "lengths of another shape": ({"lengths": shaped(3)}, ValueError, r"lengths.*\(2,\).*\(3,\)"),
    "lengths of one axis too many": (
        {"lengths": shaped(2, 1)},
        ValueError,
        r"lengths.*\(2,\).*\(2, 1\)",
    ),
    "lengths 0-D": ({"lengths": torch.tensor(3)}, ValueError, r"lengths.*\(2,\).*\(\)"),
    "lengths in float": ({"lengths": shaped(2).float()}, TypeError, "lengths.*integer.*float32"),
    "lengths in bool": ({"lengths": shaped(2).bool()}, TypeError, "lengths.*integer.*bool"),
    "lengths as a list": ({"lengths": [3, 2]}, TypeError, "lengths must be a tensor, got list"),
    "negative lengths": ({"lengths": torch.tensor([3, -2])}, ValueError, "lengths.*negative.*-2"),
    "cu_seqlens in float": (
        {"cu_seqlens": torch.tensor([0.0, 6.0])},
        TypeError,
        "cu_seqlens.*int32 or int64.*float32",
    ),
    "cu_seqlens in int16": (
        {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int16)},
        TypeError,
        "cu_seqlens.*int32 or int64.*int16",
    ),
    "cu_seqlens of two axes": (
        {"cu_seqlens": torch.tensor([[0, 6]])},
        ValueError,
        r"cu_seqlens.*\(documents \+ 1,\).*\(1, 2\)",
    ),
    "cu_seqlens of none": (
        {"cu_seqlens": torch.tensor([], dtype=torch.int64)},
        ValueError,
        r"cu_seqlens.*\(documents \+ 1,\).*\(0,\)",
    ),
    "cu_seqlens without documents": (
        {"cu_seqlens": torch.tensor([0])},
        ValueError,
        "cu_seqlens.*0 to the number of tokens 6.*0 to 0",
    ),
    "cu_seqlens from 1": (
        {"cu_seqlens": torch.tensor([1, 6])},
        ValueError,
        "cu_seqlens.*0 to the number of tokens 6.*1 to 6",
    ),
    "cu_seqlens too short": (
        {"cu_seqlens": torch.tensor([0, 5])},
        ValueError,
        "cu_seqlens.*0 to the number of tokens 6.*0 to 5",
    ),
    "cu_seqlens too long": (
        {"cu_seqlens": torch.tensor([0, 7])},
        ValueError,
        "cu_seqlens.*0 to the number of tokens 6.*0 to 7",
    ),
    "cu_seqlens that fall": (
        {"cu_seqlens": torch.tensor([0, 4, 3, 6])},
        ValueError,
        "cu_seqlens.*decrease",
    ),
    "cu_seqlens below zero": (
        {"cu_seqlens": torch.tensor([0, -1, 6])},
        ValueError,
        "cu_seqlens.*decrease",
    ),
    "cu_seqlens beyond the end": (
        {"cu_seqlens": torch.tensor([0, 9, 6])},
        ValueError,
        "cu_seqlens.*decrease",
    ),
    "cu_seqlens as a list": (
        {"cu_seqlens": [0, 6]},
        TypeError,
        "cu_seqlens must be a tensor, got list",
    ),
    "positions of another shape": (
        {"position_ids": shaped(2, 4)},
        ValueError,
        r"position_ids.*\(2, 3\).*\(2, 4\)",
    ),
    "positions of other rows": (
        {"position_ids": shaped(3, 3)},
        ValueError,
        r"position_ids.*\(2, 3\).*\(3, 3\)",
    ),
    "positions of no row": (
        {"position_ids": shaped(3)},
        ValueError,
        r"position_ids.*\(2, 3\).*\(3,\)",
    ),
    "mask in float8": (
        {"attention_mask": torch.ones(2, 3).to(torch.float8_e4m3fn)},
        TypeError,
        "attention_mask must be.*float8_e4m3fn",
    ),
    "soft mask": (
        {"attention_mask": torch.tensor([[1.0, 0.0, 0.25]] * 2)},
        ValueError,
        "attention_mask has values that are no whole numbers, such as 0.25: a token is real where "
        ".*a soft mask is none",
    ),
    "mask with infinity": (
        {"attention_mask": torch.tensor([[1.0, 0.0, float("inf")]] * 2)},
        ValueError,
        "attention_mask has values that are no whole numbers, such as inf:",
    ),
    "mask that is additive": (
        {"attention_mask": torch.tensor([[0, 0, -1.5]] * 2)},
        ValueError,
        "attention_mask has negative.*such as -1.5:",
    ),
    "mask with NaN": (
        {"attention_mask": torch.tensor([[0, 0, float("nan")]] * 2)},
        ValueError,
        "attention_mask has.*such as nan:",
    ),
    "positions in float": (
        {"position_ids": shaped(2, 3).float()},
        TypeError,
        "position_ids.*integer.*float32",
    ),
    "positions as a list": (
        {"position_ids": [[0, 1, 2]]},
        TypeError,
        "position_ids must be a tensor, got list",
    ),
    "another device": (
        {"lengths": torch.ones(2, dtype=torch.int64, device="meta")},
        ValueError,
        "lengths is on meta.*cpu",
    ),
}


@pytest.mark.parametrize("arguments, error, message", REFUSED.values(), ids=REFUSED)
def test_refused(arguments, error, message):
    with pytest.raises(error) as caught:
        found((2, 3), **arguments)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_one_row_of_positions_serves_every_row():
    positions = torch.tensor([[0, 1, 0, 1]])
    expected = noise_of((2, 3, 4), position_ids=positions.expand(2, 3, 4))
    for one in (positions, positions[None]):
        assert torch.equal(noise_of((2, 3, 4), position_ids=one), expected)
    assert torch.equal(
        noise_of((4,), position_ids=positions), noise_of((4,), position_ids=positions[0])
    )


def noise_of(shape, **samples):
    return neftune_noise(shape, 16, 5.0, seed=3, **samples)
