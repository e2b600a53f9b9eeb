"""A product of low rank plus some rows."""

from __future__ import annotations

import pytest
import torch
from single_experts import FORMS, activation_of, make_expert, make_inputs

from mixadapters.surgery.lowrank import low_rank_sparse, low_rank_sparse_expert, rank_for
from mixadapters.surgery.view import expert_output


def planted() -> torch.Tensor:
    """Rank 2, and two rows that are like no other."""
    torch.manual_seed(0)
    weight = torch.randn(20, 2) @ torch.randn(2, 16)
    weight[[3, 11]] += 4 * torch.randn(2, 16)
    return weight


@pytest.mark.parametrize("rank", [0, 3, 16])
def test_with_all_rows_it_is_the_weight(rank: int) -> None:
    weight = planted()
    assert torch.allclose(low_rank_sparse(weight, rank, 1.0).dense(), weight, atol=1e-5)


@pytest.mark.parametrize("inputs", [None, torch.randn(50, 16, generator=torch.Generator().manual_seed(1))])
def test_a_few_rows_beside_the_product_hold_what_it_cannot(inputs: torch.Tensor | None) -> None:
    weight = planted()
    form, product = low_rank_sparse(weight, 2, 0.1, inputs), low_rank_sparse(weight, 2, 0.0)
    assert len(form.kept) == 2
    assert (form.dense() - weight).norm() < 0.5 * (product.dense() - weight).norm()
    assert torch.allclose(form.dense()[form.kept], weight[form.kept], atol=1e-5)


def test_the_rows_that_stay_are_those_that_the_inputs_make_matter() -> None:
    weight = torch.zeros(6, 4)
    weight[0, 0], weight[1, 1] = 10.0, 1.0
    inputs = torch.tensor([[0.01, 5.0, 0.0, 0.0]])
    assert low_rank_sparse(weight, 0, 1 / 6).kept.tolist() == [0]
    assert low_rank_sparse(weight, 0, 1 / 6, inputs).kept.tolist() == [1]


@pytest.mark.parametrize("form", FORMS)
def test_an_expert_that_keeps_all_rows_is_itself_and_fewer_bytes_err_more(form: str) -> None:
    weights, act, inputs = make_expert(form), activation_of(form), make_inputs()
    expected = expert_output(weights, act, inputs)
    errors, sizes = [], []
    for share, keep in ((0.2, 0.1), (0.5, 0.3), (0.5, 1.0)):
        smaller, forms = low_rank_sparse_expert(weights, inputs, act, share=share, keep=keep)
        assert forms.keys() == {"down", "up"} | ({"gate"} if form == "glu" else set())
        errors.append(float((expert_output(smaller, act, inputs) - expected).norm() / expected.norm()))
        sizes.append(sum(form.nbytes for form in forms.values()))
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    assert errors[-1] < 1e-5


def test_ranks_and_shares_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="rank=17 must be an integer, at least 0, at most 16"):
        low_rank_sparse(planted(), 17, 0.1)
    with pytest.raises(ValueError, match=r"keep=1.5 must be a number from 0 to 1"):
        low_rank_sparse(planted(), 2, 1.5)
    with pytest.raises(ValueError, match="share=nan must be a number from 0 to 1"):
        low_rank_sparse_expert(make_expert(), None, "identity", share=float("nan"), keep=0.1)
    assert [rank_for(20, 20, share) for share in (0.5, 0.0, 1.0, 0.51)] == [5, 1, 10, 6]
