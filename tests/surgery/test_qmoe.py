"""Ternary experts: what they hold, what they err, and that codes are exactly what they hold."""

from __future__ import annotations

import pytest
import torch
from single_experts import FORMS, activation_of, make_expert, make_inputs
from torch.nn import functional as F

from mixadapters.surgery.function import hidden_of
from mixadapters.surgery.qmoe import (
    CODECS,
    MATRICES,
    SCALES,
    TernaryMatrix,
    encode_matrix,
    levels_of,
    ternarize,
    ternary_expert,
)
from mixadapters.surgery.view import expert_output


def correlated(rows: int, width: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, width) @ (torch.randn(width, width) * torch.linspace(2, 0.05, width))


def test_levels_are_the_extremes_or_the_means_of_the_large_weights() -> None:
    rows = torch.tensor([[-1.0, -0.5, 0.0, 0.25, 2.0], [1.0, 2.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert levels_of(rows).tolist() == [[-1.0, 2.0], [0.0, 3.0], [0.0, 0.0]]
    assert levels_of(torch.tensor([[1.0, 3.0], [-3.0, -1.0]])).tolist() == [[0.0, 3.0], [-3.0, 0.0]]  # of one sign
    # means of magnitude .75, 1.2, 0: large are those above .5625, .9, 0
    assert levels_of(rows, "mean").tolist() == [[-1.0, 2.0], [0.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
@pytest.mark.parametrize("scale", SCALES)
def test_each_row_or_column_whichever_is_longer_holds_three_values(shape: tuple[int, int], scale: str) -> None:
    weight, inputs = torch.randn(shape), correlated(200, shape[1])
    for reads in (None, inputs):
        found = ternarize(weight, reads, scale=scale)
        rows = found if shape[0] < shape[1] else found.t()
        assert all(len(set(row.tolist()) | {0.0}) <= 3 for row in rows)
        assert any(len(set(row.tolist()) | {0.0}) > 3 for row in rows.t())


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
@pytest.mark.parametrize("scale", SCALES)
def test_gptq_errs_less_than_rounding_on_the_inputs_it_was_given(shape: tuple[int, int], scale: str) -> None:
    inputs, weight = correlated(400, shape[1]), torch.randn(shape)
    nearest, ours = (
        float(F.linear(inputs, ternarize(weight, inputs, scale=scale, rounding=rounding) - weight).norm())
        for rounding in ("nearest", "gptq")
    )
    assert ours < nearest


@pytest.mark.parametrize(("form", "dtype"), [*((form, torch.float32) for form in FORMS), ("lora", torch.bfloat16)])
def test_a_ternary_expert_is_the_expert_with_ternary_matrices_in_its_own_dtype(form: str, dtype: torch.dtype) -> None:
    weights, act = make_expert(form, width=64, rank=8, out=64), activation_of(form)
    weights = weights._replace(down=weights.down.to(dtype), up=weights.up.to(dtype))
    found = ternary_expert(weights, make_inputs(100, 64).to(dtype), act)
    for name in MATRICES:
        matrix = getattr(found, name)
        if getattr(weights, name) is not None:
            assert matrix.dtype == dtype
            assert torch.equal(encode_matrix(matrix).dense(dtype), matrix)
    assert all(getattr(found, n) is getattr(weights, n) for n in ("b_down", "b_up", "b_gate", "norm", "scale"))


def test_up_is_rounded_for_what_the_ternary_down_makes() -> None:
    weights, inputs = make_expert("glu", width=48, rank=12, out=48), correlated(300, 48)
    whole = ternary_expert(weights, inputs, "gelu")
    blind = ternary_expert(weights, None, "gelu")
    expected = expert_output(weights, "gelu", inputs)
    assert (expert_output(whole, "gelu", inputs) - expected).norm() < (
        expert_output(blind, "gelu", inputs) - expected
    ).norm()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (17, 3), (4, 6, 33), (2, 33, 6)])
def test_codes_hold_a_matrix_exactly_and_their_size_is_that_of_their_parts(shape: tuple[int, ...], codec: str) -> None:
    rows = torch.randn(shape)
    by_columns = len(shape) == 2 and shape[0] > shape[1]
    matrix = torch.stack([ternarize(m, None) for m in rows.view(-1, *shape[-2:])]).view(shape)
    form = encode_matrix(matrix, codec)
    assert torch.equal(form.dense(torch.float32), matrix)
    assert form.by_columns == by_columns or shape == (1, 1) or len(shape) == 3
    words = form.rows[0].numel() * (2 if codec == "qmoe" else 1)
    count = matrix.numel() // form.rows.width
    assert form.nbytes == words + count * (4 + (4 if codec == "qmoe" else 0))


@pytest.mark.parametrize(
    "matrix",
    [
        torch.randn(4, 5),
        torch.tensor([[1.0, -0.0]] * 2),
        torch.tensor([[1.0 + 2**-20, 0.0], [1.0 + 2**-20, 2.0 + 2**-20]]),
        torch.ones(4),
        torch.ones(2, 2, dtype=torch.long),
        torch.zeros(0, 3),
        torch.full((2, 2), float("nan")),
    ],
)
def test_what_is_not_ternary_is_left_as_it_is(matrix: torch.Tensor) -> None:
    assert encode_matrix(matrix) is None


def test_codes_of_another_shape_are_refused() -> None:
    form = encode_matrix(ternarize(torch.randn(4, 6), None))
    for wrong, message in (
        (form._replace(shape=(4, 7)), "24 ternary weights do not make up"),
        (form._replace(shape=(6, 4)), "rows of 6 ternary weights"),
        (form._replace(shape=(24,)), "do not make up"),
        (form._replace(levels=form.levels[:3]), "two numbers of bfloat16 for each row"),
        (form._replace(levels=form.levels.float()), "two numbers of bfloat16 for each row"),
    ):
        assert isinstance(wrong, TernaryMatrix)
        with pytest.raises(ValueError, match=message):
            wrong.dense(torch.float32)


def test_unknown_scales_roundings_and_codecs_are_refused() -> None:
    weight = torch.randn(2, 3)
    for call in (
        lambda: ternarize(weight, None, scale="max"),
        lambda: ternarize(weight, None, rounding="up"),
        lambda: encode_matrix(weight, "zip"),
    ):
        with pytest.raises(ValueError, match="is unknown; choose one of"):
            call()


@pytest.mark.parametrize("form", FORMS)
def test_up_is_rounded_for_what_the_ternary_down_and_gate_make(form: str) -> None:
    weights, act, inputs = make_expert(form, width=64, rank=8, out=64), activation_of(form), correlated(200, 64)
    found = ternary_expert(weights, inputs, act)
    hidden = hidden_of(found, inputs, act)
    assert torch.equal(found.up, ternarize(weights.up, hidden))
    assert not torch.equal(found.up, ternarize(weights.up, None))
