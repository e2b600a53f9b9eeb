"""Dropout by a hash: the documented integer arithmetic, and what a mask should look like."""

from __future__ import annotations

import pytest
import torch

from mixadapters.kernels import adapter_backend, hashing, lowrank

BITS = 0xFFFFFFFF


def mix(h: int) -> int:
    h ^= h >> 16
    h = h * 0x7FEB352D & BITS
    h ^= h >> 15
    h = h * 0x846CA68B & BITS
    return h ^ (h >> 16)


@pytest.mark.parametrize("seed", [0, 1, -5, 2**40 + 3, 2**63 - 1])
def test_mask_is_the_documented_hash_in_plain_integers(seed) -> None:
    rows = torch.tensor([0, 3, 4096, 2**31 + 7])
    mask = hashing.kept(torch.tensor(seed), rows, 9, 0.4)
    unsigned = seed & (2**64 - 1)
    for i, row in enumerate(rows.tolist()):
        key = mix(row & BITS ^ mix(unsigned & BITS ^ mix(unsigned >> 32)))
        for column in range(9):
            expected = mix(key ^ (column * 0x9E3779B1 & BITS)) >= round(0.4 * 2**32)
            assert bool(mask[i, column]) is expected


def test_masks_keep_the_right_share_and_differ_by_seed_row_and_column() -> None:
    rows = torch.arange(2048)
    one, other = (hashing.kept(torch.tensor(seed), rows, 512, 0.1).float() for seed in (1, 2))
    for part in (one, other):
        assert abs(part.mean() - 0.9) < 2e-3
        assert (part.mean(0) - 0.9).abs().max() < 0.04  # five standard deviations, each column
        assert (part.mean(1) - 0.9).abs().max() < 0.07
    for a, b in ((one, other), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 5e-3


def test_mask_does_not_depend_on_which_rows_are_asked_for() -> None:
    seed = torch.tensor(7)
    whole = hashing.kept(seed, torch.arange(50), 16, 0.5)
    assert torch.equal(hashing.kept(seed, torch.tensor([41, 3]), 16, 0.5), whole[[41, 3]])


@pytest.mark.parametrize("backend", ["segments", "grouped", "gathered", "dense"])
def test_every_backend_drops_the_same_elements(backend) -> None:
    """An expert that copies x shows the mask."""
    x, eye = torch.ones(40, 8), torch.eye(8)
    indices, seed = torch.zeros(40, 1, dtype=torch.long), torch.tensor(3)
    with adapter_backend(backend):
        y = lowrank(x, eye, eye, [8], indices=indices, act="identity", dropout=0.25, seed=seed)
    expected = hashing.kept(seed, torch.arange(40), 8, 0.25) / 0.75
    torch.testing.assert_close(y, expected)
