"""The forms that layout.number_documents' tables may have, made from the reference's."""

import torch
from conftest import MASK_KINDS, make_batch

from neftune_kernels import layout as layouts

UNWRITTEN = torch.iinfo(torch.int32).max  # stands for any value


def words_of(numbering, shape):
    rows, columns = shape
    return numbering[: numbering.numel() - 3 * rows * columns].view(-1, 4)


def table_and_record(numbering, shape):
    tokens = shape[0] * shape[1]
    return numbering[-3 * tokens : -tokens].view(*shape, 2), numbering[-tokens:].view(shape)


def uncounted(numbering, shape):
    """The same with `before` left to the reader."""
    numbering = numbering.clone()
    words_of(numbering, shape)[:, 3] = -1
    return numbering


def forms(mask, position_ids=None):
    numbering = layouts.number_documents(mask, position_ids)
    shape = tuple((position_ids if mask is None else mask).shape)
    yield numbering
    yield uncounted(numbering, shape)


def told():
    for kind in MASK_KINDS:
        yield make_batch(kind, rows=5, columns=13).attention_mask, None
    packed = torch.tensor([0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 4, 5, 6]).expand(5, 13)
    yield None, packed
    yield make_batch("holes", rows=5, columns=13).attention_mask, packed
