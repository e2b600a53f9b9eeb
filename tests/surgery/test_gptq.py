"""GPTQ against rounding to nearest, and against its definition column by column."""

from __future__ import annotations

import pytest
import torch

from mixadapters.surgery.gptq import gptq, nearest_rounding, second_moments


def correlated(rows: int = 400, width: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.linspace(2, 0.05, width)
    return torch.randn(rows, width, generator=generator) @ mix.t()


def to_half(column: torch.Tensor, _: int) -> torch.Tensor:
    return (column * 2).round() / 2


def error(weight: torch.Tensor, quantized: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (weight - quantized).t()).square().sum())


@pytest.mark.parametrize("seed", range(5))
def test_gptq_errs_less_than_rounding_to_nearest_on_correlated_inputs(seed: int) -> None:
    inputs, weight = correlated(seed=seed), torch.randn(16, 24, generator=torch.Generator().manual_seed(seed))
    nearest = error(weight, nearest_rounding(weight, to_half), inputs)
    ours = error(weight, gptq(weight, second_moments(inputs), to_half, 0.01), inputs)
    assert ours < 0.7 * nearest


def test_blocks_do_not_change_the_result() -> None:
    inputs, weight = correlated().double(), torch.randn(5, 24, dtype=torch.float64)
    results = [gptq(weight, second_moments(inputs), to_half, block=block) for block in (1, 7, 128)]
    assert torch.allclose(results[0], results[1])
    assert torch.allclose(results[0], results[2])


def test_each_column_corrects_what_is_left_as_least_squares_would() -> None:
    inputs, weight = correlated(width=3).double(), torch.randn(1, 3, dtype=torch.float64)
    moments, left = second_moments(inputs), weight.clone()
    damped = moments + 0.1 * moments.diagonal().mean() * torch.eye(3, dtype=torch.float64)
    for j in range(3):
        fixed = to_half(left[:, j], j)
        change, rest = fixed - left[:, j], slice(j + 1, 3)
        left[:, j] = fixed
        left[:, rest] -= change * torch.linalg.solve(damped[rest, rest], damped[rest, j])
    assert torch.allclose(gptq(weight, moments, to_half), left)


@pytest.mark.parametrize("moments", [torch.zeros(24, 24), torch.full((24, 24), float("nan")), -torch.eye(24)])
def test_without_usable_inputs_it_rounds_to_nearest(moments: torch.Tensor) -> None:
    weight = torch.randn(4, 24)
    assert torch.equal(gptq(weight, moments, to_half), nearest_rounding(weight, to_half))


def test_moments_whose_inverse_is_beyond_floats_give_numbers() -> None:
    weight, inputs = torch.randn(4, 24), correlated() * 1e-22
    assert torch.equal(gptq(weight, second_moments(inputs), to_half), nearest_rounding(weight, to_half))


def test_wrong_shapes_and_dampings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"moments \(3, 3\) must be \(4, 4\)"):
        gptq(torch.zeros(2, 4), torch.eye(3), to_half)
    with pytest.raises(ValueError, match="damping=0 must be a finite number, above 0"):
        gptq(torch.zeros(2, 4), torch.eye(4), to_half, damping=0)
