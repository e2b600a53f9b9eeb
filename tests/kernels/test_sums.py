"""Sums are float32 sums: in half precision, however many terms there are, every gradient is near that of fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixadapters.kernels import adapter_backend, lowrank

BACKENDS = ("segments", "gathered", "dense", "grouped", "reference")
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def many_rows(routing: str, dtype: torch.dtype, *, rows: int = 8192, wide: int = 16, rank: int = 8) -> dict:
    """Few experts for thousands of rows; every number is positive, so that a sum that stalls is seen."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, factor: float = 1.0) -> Tensor:
        return (torch.rand(*shape, generator=generator) * factor).to(dtype)

    experts, slots = 4, {"runs": 1, "one": 1, "two": 2, "all": 4}[routing]
    given = {
        "x": leaf(rows, wide), "w_down": leaf(experts * rank, wide, factor=1 / wide),
        "w_up": leaf(wide, experts * rank, factor=1 / rank), "ranks": [rank] * experts, "act": "identity",
        "b_down": leaf(experts * rank), "b_up": leaf(experts, wide), "scale": leaf(experts) + 0.5,
        "weights": leaf(rows, slots), "base": leaf(rows, wide), "base_weight": leaf(rows),
    }  # fmt: skip
    if routing == "runs":
        given |= {"indices": torch.arange(rows).unsqueeze(1) * experts // rows, "run": rows // experts}
    elif routing != "all":
        given["indices"] = torch.rand(rows, experts, generator=generator).argsort(1)[:, :slots]
    return given


def gradients(given: dict, backend: str) -> dict[str, Tensor]:
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if isinstance(v, Tensor) and k != "indices"}
    with adapter_backend(backend):
        y = lowrank(**{**given, **leaves})
    return {
        "y": y.detach(),
        **dict(zip(leaves, torch.autograd.grad(0.25 * y.double().sum(), list(leaves.values())), strict=True)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ["runs", "one", "two", "all"])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_no_gradient_stalls_over_thousands_of_rows(backend, routing, dtype) -> None:
    given = many_rows(routing, dtype)
    exact = {k: v.double() if isinstance(v, Tensor) and k != "indices" else v for k, v in given.items()}
    expected, found = gradients(exact, "reference"), gradients(given, backend)
    for name, value in expected.items():
        error = (found[name].double() - value).norm() / value.norm()
        # Operands are rounded on the way: twice for y, up to four times for a gradient, whatever the number of rows.
        assert error < 2 * ROUNDING[dtype], (name, error.item())
        worst = ((found[name].double() - value).abs() / value.abs().clamp_min(1e-3)).max()
        if value.numel() < 1000:
            assert worst < 3 * ROUNDING[dtype], (name, worst.item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_of_a_power_of_two_is_exact(backend) -> None:
    """65,536 ones: a bfloat16 sum that is rounded on the way stops at 256."""
    rows, rank, wide = 8192, 8, 16
    ones = {"x": torch.ones(rows, wide), "w_down": torch.full((2 * rank, wide), 1 / 16)}
    ones |= {"w_up": torch.full((wide, 2 * rank), 1 / 8), "scale": torch.ones(2), "base_weight": torch.ones(rows)}
    ones |= {"b_up": torch.zeros(2, wide), "b_down": torch.zeros(2 * rank), "base": torch.ones(rows, wide)}
    given = {name: t.bfloat16() for name, t in ones.items()}
    given |= {"indices": torch.arange(rows).unsqueeze(1) * 2 // rows, "run": rows // 2, "ranks": [rank] * 2}
    found = gradients({**given, "act": "identity"}, backend)  # of a quarter of the sum
    assert found["scale"].tolist() == [rows / 8 * wide] * 2
    assert (found["b_up"] == rows / 8).all()
    assert (found["w_up"] == rows / 8).all()
    assert (found["b_down"] == rows / 8 * wide / 8).all()
    assert (found["w_down"] == rows / 8 * wide / 8).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_sums_over_many_slots_are_rounded_once(backend, dtype) -> None:
    """Sixty-four experts for each row: in y and in the gradient of x."""
    generator = torch.Generator().manual_seed(0)
    experts, rank, wide, rows = 64, 8, 16, 12

    def leaf(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(dtype)

    given = {
        "x": leaf(rows, wide), "w_down": leaf(experts * rank, wide) / wide, "w_up": leaf(wide, experts * rank) / rank,
        "ranks": [rank] * experts, "act": "identity", "base": leaf(rows, wide), "weights": leaf(rows, experts),
        "indices": torch.rand(rows, experts, generator=generator).argsort(1),
    }  # fmt: skip
    exact = {k: v.double() if isinstance(v, Tensor) and k != "indices" else v for k, v in given.items()}
    expected, found = gradients(exact, "reference"), gradients(given, backend)
    for name in ("y", "x", "weights", "base"):
        error = (found[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < ROUNDING[dtype], (name, error.item())
