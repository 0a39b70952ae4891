"""Padding-free batches: how much more than by hand is launched on a device, and the same noise."""

import pytest
import torch

from bench.launches import MOST, counts
from neftune_kernels import layout as layouts


@pytest.mark.parametrize("pad_token", [None, 0, 2])
def test_a_padding_free_batch_takes_few_launches_more_than_by_hand(pad_token):
    for name, (ours, by_hand) in counts(pad_token).items():
        assert "noisy_embedding" in ours and "noisy_embedding" in by_hand
        assert len(ours) - len(by_hand) <= MOST, (name, ours)


@pytest.mark.parametrize("is_end", [False, True])
@pytest.mark.parametrize("token", [None, 0])
def test_untailed_by_a_loop(token, is_end):
    """Against the rule said token by token."""
    drawn = torch.Generator().manual_seed(3)
    for _ in range(200):
        columns = int(torch.randint(1, 9, (), generator=drawn))
        ids = torch.randint(0, 2, (1, columns), generator=drawn)
        opened = torch.rand(columns, generator=drawn) < 0.3
        opened[0] = True
        starts = [c for c in range(columns) if opened[c]]
        places = [c - max(s for s in starts if s <= c) for c in range(columns)]
        run = columns
        while run > 1 and ids[0, run - 1] == 0:
            run -= 1
        anew = min((c for c in starts if c >= run), default=columns)
        cut = anew
        if token is not None:
            whole = run == 1 and ids[0, 0] == 0
            cut = run if not is_end else min(anew, run if whole else run + 1)
        bounds = torch.tensor([*starts, columns], dtype=torch.int32)
        kept = layouts.untailed(ids, torch.tensor([places]), None, token, is_end)
        number = layouts.untailed(ids, None, bounds, token, is_end)
        assert kept[0].tolist() == [c < cut for c in range(columns)]
        documents = [sum(s <= c for s in starts) if c < cut else 0 for c in range(columns)]
        assert number[0].tolist() == documents
