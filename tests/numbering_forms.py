"""The forms that layout.number_documents' tables may have, made from the reference's."""

import torch
from conftest import MASK_KINDS, make_batch

from neftune_kernels import layout as layouts

UNWRITTEN = torch.iinfo(torch.int32).max  # stands for any value


def units_of(numbering, shape):
    rows, columns = shape
    return numbering[: numbering.numel() - 3 * rows * columns].view(-1, 4)


def table_and_record(numbering, shape):
    tokens = shape[0] * shape[1]
    return numbering[-3 * tokens : -tokens].view(*shape, 2), numbering[-tokens:].view(shape)


def cut(numbering, shape, pieces):
    """The same documents with every row cut into that many pieces, by plain loops."""
    rows, columns = shape
    table, record = table_and_record(numbering, shape)
    width = -(-columns // pieces)
    units, new_table, new_record = [], torch.zeros_like(table), torch.full_like(record, UNWRITTEN)
    for row in range(rows):
        documents, first, count, before = units_of(numbering, shape)[row].tolist()
        for start in range(0, pieces * width, width):
            if documents == 0 or start >= columns:
                units.append((0, first, count, before))
                continue
            piece = record[row, start : start + width]
            held = sorted(set(piece[piece >= 0].tolist())) or [0]
            ends = [*table[row, 1:documents, 1].tolist(), count]
            for number, document in enumerate(range(held[0], held[-1] + 1)):
                new_table[row, start + number] = table[row, document]
            new_record[row, start : start + width] = torch.where(piece >= 0, piece - held[0], -1)
            units.append((held[-1] - held[0] + 1, -7, ends[held[-1]], before + held[0]))
    units = torch.tensor(units, dtype=torch.int32)
    return torch.cat((units.flatten(), new_table.flatten(), new_record.flatten()))


def uncounted(numbering, shape):
    """The same with `before` left to the reader."""
    numbering = numbering.clone()
    units_of(numbering, shape)[:, 3] = -1
    return numbering


def forms(mask, position_ids=None):
    numbering = layouts.number_documents(mask, position_ids)
    shape = tuple((position_ids if mask is None else mask).shape)
    yield numbering
    yield uncounted(numbering, shape)
    for pieces in (2, 3, shape[1]):
        yield cut(numbering, shape, pieces)


def told():
    for kind in MASK_KINDS:
        yield make_batch(kind, rows=5, columns=13).attention_mask, None
    packed = torch.tensor([0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 4, 5, 6]).expand(5, 13)
    yield None, packed
    yield make_batch("holes", rows=5, columns=13).attention_mask, packed
