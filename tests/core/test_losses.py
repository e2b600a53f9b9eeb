"""Auxiliary losses by hand, and what each of them is for."""

from __future__ import annotations

import math

import pytest
import torch

from mixadapters.core.losses import (
    group_balance,
    importance,
    load,
    load_balance,
    null_balance,
    squared_variation,
    win_chances,
)

PROBS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
SELECTED = torch.tensor([[True, True, False], [False, True, True]])


def test_balance_counts_what_has_been_selected() -> None:
    # f = (.5, 1, .5), p = (.3, .45, .25): 3 (.15 + .45 + .125)
    assert float(load_balance(PROBS, None, SELECTED)) == pytest.approx(2.175)
    assert float(load_balance(PROBS)) == pytest.approx(3 * (0.5 * 0.3 + 0.5 * 0.45))  # the largest alone


def test_balance_is_k_for_balanced_rows_of_k_arms() -> None:
    selected = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    assert float(load_balance(torch.full((2, 4), 0.25), None, selected)) == pytest.approx(2)


def test_balance_equals_that_of_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(7, 5)
    selected = torch.zeros(7, 5).scatter(1, logits.topk(2).indices, 1).bool()
    theirs = load_balancing_loss_func((logits,), 5, 2)
    torch.testing.assert_close(load_balance(logits.softmax(-1), None, selected), theirs)


def test_null_arms_share_their_load() -> None:
    # A = 3, of which two are null: f = (.5, 1, .5) -> (.5, .75, .75)
    expected = 3 * (0.5 * 0.3 + 0.75 * (0.45 + 0.25))
    assert float(null_balance(PROBS, None, SELECTED, slice(1, 3))) == pytest.approx(expected)
    swapped = null_balance(PROBS[:, [0, 2, 1]], None, SELECTED[:, [0, 2, 1]], slice(1, 3))
    assert float(swapped) == pytest.approx(expected)
    assert torch.equal(null_balance(PROBS, None, SELECTED, slice(3, 3)), load_balance(PROBS, None, SELECTED))


def test_groups_balance_their_sums() -> None:
    # groups {0, 1}, {2}: mean f (.75, .5), sum p (.75, .25)
    assert float(group_balance(PROBS, None, SELECTED, [[0, 1], [2]])) == pytest.approx(3 * (0.5625 + 0.125))
    single = group_balance(PROBS, None, SELECTED, [[2], [0], [1]])
    torch.testing.assert_close(single, load_balance(PROBS, None, SELECTED))


def test_variation_is_0_for_equal_totals_alone() -> None:
    assert float(squared_variation(torch.full((5,), 3.0))) == 0
    assert float(squared_variation(torch.tensor([1.0, 0, 0, 0]))) == pytest.approx(3)
    assert float(squared_variation(torch.tensor([1.0, 3]))) == pytest.approx(0.25)  # variance 1, mean 2


def test_importance_is_the_variation_of_the_sums() -> None:
    # sums (.6, .9, .5): mean 2/3
    sums = [0.6, 0.9, 0.5]
    expected = sum((s - 2 / 3) ** 2 for s in sums) / 3 / (2 / 3) ** 2
    assert float(importance(PROBS)) == pytest.approx(expected, rel=1e-5)


def test_chance_to_be_chosen_is_that_of_the_noise() -> None:
    logits = torch.tensor([[1.0, 0.5, -2.0]])
    noisy = torch.tensor([[1.1, 0.2, -1.9]])
    phi = lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2)))  # noqa: E731
    expected = [phi((v - 0.2) / 0.5) for v in (1.0, 0.5, -2.0)]
    chances = win_chances(logits, noisy, 2, 0.5)
    assert chances[0].tolist() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(load(chances), squared_variation(chances[0]))


@pytest.mark.parametrize("loss", [importance, load, load_balance])
def test_rows_that_do_not_count_do_not(loss) -> None:
    mask = torch.tensor([True, False, True])
    broken = torch.stack([PROBS[0], torch.full((3,), torch.nan), PROBS[1]]).requires_grad_()
    found = loss(broken, mask)
    torch.testing.assert_close(found, loss(PROBS))
    found.backward()
    assert broken.grad[mask].isfinite().all()
    assert (broken.grad[1] == 0).all()
