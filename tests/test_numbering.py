"""layout.number_documents: what it stores, and that every backend reads all of its forms.

The forms: `before` told or to be counted, runs with nothing per token. tests/test_layout.py holds
what the tables mean against the oracle.
"""

import pytest
import torch
from conftest import FLOAT_DTYPES, make_batch, same_bits
from numbering_forms import UNWRITTEN, forms, table_and_record, told, words_of

from neftune_kernels import layout as layouts

OPS = torch.ops.neftune_kernels
SEED = torch.tensor(9)
ALPHA = torch.tensor(5.0, dtype=torch.float64)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("offsets", [(0, 0, 0), (3, 2**32 - 2, 7)])
def test_every_form_gives_the_noise_of_arrays_per_token(backend, dtype, offsets):
    family = {"cpp": ""}.get(backend, f"{backend}_")
    weight = torch.randn(11, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    input_ids = make_batch("full", rows=5, columns=13).input_ids
    embed = getattr(OPS, f"{family}noisy_embedding")
    add = getattr(OPS, f"{family}add_noise")
    for mask, position_ids in told():
        per_token = layouts.Layout(*layouts.mask_layout(mask, position_ids))
        expected = embed(input_ids, weight, SEED, ALPHA, *per_token, *offsets)
        for numbering in forms(mask, position_ids):
            layout = layouts.Layout(numbering=numbering)
            found = embed(input_ids, weight, SEED, ALPHA, *layout, *offsets)
            assert same_bits(found, expected)
            scaled = (-1, 0.5)
            assert same_bits(
                embed(input_ids, weight, SEED, ALPHA, *layout, *offsets, *scaled),
                embed(input_ids, weight, SEED, ALPHA, *per_token, *offsets, *scaled),
            )
            embeds = weight[input_ids]
            assert same_bits(add(embeds, SEED, ALPHA, *layout, *offsets), expected)
            odd = embeds[..., 1:8]  # no vectors
            assert same_bits(
                add(odd, SEED, ALPHA, *layout, *offsets),
                add(odd, SEED, ALPHA, *per_token, *offsets),
            )


def test_tokens_from_the_middle():
    """A thread of the C++ kernel may begin at any token: rows of 40 000 elements make many."""
    mask = make_batch("numbered", rows=9, columns=11).attention_mask
    embeds = torch.zeros(9, 11, 40_000)
    expected = OPS.add_noise(embeds, SEED, ALPHA, *layouts.mask_layout(mask, None))
    for numbering in forms(mask):
        layout = layouts.Layout(numbering=numbering)
        assert same_bits(OPS.add_noise(embeds, SEED, ALPHA, *layout), expected)


@pytest.mark.parametrize("kind", ["full", "ragged", "left", "empty_rows"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.uint8])
def test_a_run_has_three_words_and_nothing_per_token(kind, dtype):
    mask = make_batch(kind, rows=5, columns=150).attention_mask
    real, shape = mask != 0, mask.shape
    first = torch.where(real.any(1), real.int().argmax(1), 0)
    words = torch.stack((torch.zeros_like(first), first, real.sum(1), torch.arange(5)), 1)
    for number in (OPS.number_documents, OPS.reference_number_documents):
        numbering = number(mask.to(dtype), None)
        assert numbering.dtype == torch.int32
        assert torch.equal(words_of(numbering, shape).long(), words)
        embeds = torch.zeros(5, 150, 8)
        expected = OPS.add_noise(embeds, SEED, ALPHA, *layouts.Layout(numbering=numbering))
        numbering[20:] = UNWRITTEN  # no kernel reads what need not be written
        found = OPS.add_noise(embeds, SEED, ALPHA, *layouts.Layout(numbering=numbering))
        assert same_bits(found, expected)


def test_padding_is_a_run_too():
    input_ids = torch.tensor([[7, 7, 3, 4, 7], [1, 2, 3, 4, 5], [7, 7, 7, 7, 7], [1, 7, 2, 7, 7]])
    words = torch.tensor([[0, 2, 2, 0], [0, 0, 5, 1], [0, 0, 0, 2], [1, 0, 2, 3]])
    for dtype in (torch.int64, torch.int32):
        for number in (OPS.number_padding, OPS.reference_number_padding):
            numbering = number(input_ids.to(dtype), 7)
            assert torch.equal(words_of(numbering, (4, 5)).long(), words)
    nowhere = OPS.number_padding(torch.ones(1, 3, dtype=torch.int32), 2**32 + 1)
    length = layouts.numbered_tokens(nowhere, (1, 3))[2]
    assert length.tolist() == [3, 3, 3]


@pytest.mark.parametrize("strides", ["transposed", "stepped", "expanded"])
def test_any_strides(strides):
    mask = make_batch("numbered", rows=6, columns=12).attention_mask
    if strides == "transposed":
        mask = mask.T
    elif strides == "stepped":
        mask = mask[::2, ::3]
    else:
        mask = mask[:1].expand(4, 12)
    for given in ((mask, None), (None, mask), (mask, mask.cumsum(1))):
        found = layouts.numbered_tokens(OPS.number_documents(*given), mask.shape)
        expected = layouts.numbered_tokens(layouts.number_documents(*given), mask.shape)
        real = expected[2] > 0
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours[real], theirs[real])
        assert torch.equal(found[2], expected[2])


def test_a_document_that_the_row_does_not_hold_is_padding(backend):
    """Bad tables reach nothing outside of the tensor."""
    family = {"cpp": ""}.get(backend, f"{backend}_")
    add = getattr(OPS, f"{family}add_noise")
    mask = torch.tensor([[1, 1, 2, 2, 3]])
    numbering = layouts.number_documents(mask, None)
    embeds = torch.zeros(1, 5, 8)
    right = add(embeds, SEED, ALPHA, *layouts.Layout(numbering=numbering))
    for bad in (3, -2, 10**9, UNWRITTEN, -(2**31)):
        spoilt = numbering.clone()
        spoilt[-2] = bad  # the record of token 3
        table_and_record(spoilt, mask.shape)[0][0, 3:] = 0  # what no document has is anything
        found = add(embeds, SEED, ALPHA, *layouts.Layout(numbering=spoilt))
        assert not found[0, 3].any()
        found[0, 3] = right[0, 3]
        assert same_bits(found, right)


@pytest.mark.parametrize("words", [0, 3, 5, 4 + 15 + 1, 4 + 14])
def test_wrong_size_is_refused(backend, words):
    family = {"cpp": ""}.get(backend, f"{backend}_")
    add = getattr(OPS, f"{family}add_noise")
    numbering = torch.zeros(words, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"numbering must be what number_documents returns"):
        add(torch.zeros(1, 5, 8), SEED, ALPHA, *layouts.Layout(numbering=numbering))
    with pytest.raises(ValueError, match=r"numbering must be .* got (torch\.int64|.*Long)"):
        layout = layouts.Layout(numbering=torch.zeros(19, dtype=torch.int64))
        add(torch.zeros(1, 5, 8), SEED, ALPHA, *layout)


def test_rows_beyond_int32_are_refused():
    mask = torch.ones(1, 1, dtype=torch.bool).expand(1, 2**31)
    for number in (OPS.number_documents, OPS.reference_number_documents):
        with pytest.raises(ValueError, match=r"rows must have fewer than 2\*\*31 tokens"):
            number(mask, None)
