"""Under transforms of torch.func the definition runs, of which torch knows what becomes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mixadapters.kernels import adapter_backend, lowrank

BATCH, ROWS, EXPERTS, RANK, WIDE = 3, 8, 3, 2, (6, 5)


@pytest.fixture
def given() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (BATCH, ROWS, WIDE[0]), "base": (BATCH, ROWS, WIDE[1]), "weights": (BATCH, ROWS, 2),
        "w_down": (EXPERTS * RANK, WIDE[0]), "w_up": (WIDE[1], EXPERTS * RANK),
    }  # fmt: skip
    made = {k: torch.randn(*shape, generator=generator, dtype=torch.float64) for k, shape in shapes.items()}
    return made | {"indices": torch.randint(-1, EXPERTS, (BATCH, ROWS, 2), generator=generator)}


def run(**given: Tensor) -> Tensor:
    return lowrank(**given, ranks=(RANK,) * EXPERTS)


def of(batch: int, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t[batch] if t.dim() == 3 else t for name, t in given.items()}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("routed", [False, True])
def test_vmap_is_a_loop(given, routed, train) -> None:
    if not routed:  # all experts, each with a weight
        given["weights"] = torch.cat([given["weights"], given["weights"][..., :1]], dim=2)
        del given["indices"]
    names = list(given)
    dims = tuple(0 if given[name].dim() == 3 else None for name in names)
    with torch.set_grad_enabled(train):
        found = torch.func.vmap(lambda *t: run(**dict(zip(names, t, strict=True))), in_dims=dims)(*given.values())
        for i in range(BATCH):
            torch.testing.assert_close(found[i], run(**of(i, given)))


@pytest.mark.parametrize("field", ["x", "w_down", "w_up", "weights", "base"])
@pytest.mark.parametrize("within_no_grad", [False, True])
def test_derivatives_of_a_function_are_those_of_backward(given, field, within_no_grad) -> None:
    """Whichever argument the transform is of: the others are ordinary tensors."""
    one = of(0, given)

    def loss(value: Tensor) -> Tensor:
        return run(**one | {field: value}).sin().sum()

    value = one[field].clone().requires_grad_()
    with adapter_backend("reference"):
        (expected,) = torch.autograd.grad(loss(value), value)
    direction = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
    with torch.set_grad_enabled(not within_no_grad):
        _, tangent = torch.func.jvp(loss, (one[field],), (direction,))
    torch.testing.assert_close(tangent, (expected * direction).sum())
    torch.testing.assert_close(torch.func.grad(loss)(one[field]), expected)


def test_second_derivatives_are_those_of_the_definition(given) -> None:
    one = of(0, given)

    def loss(x: Tensor) -> Tensor:
        return run(**one | {"x": x}).square().sum()

    x = one["x"][:2]
    one |= {name: one[name][:2] for name in ("base", "weights", "indices")}
    found: Callable[[Tensor], Tensor] = torch.func.hessian(loss)
    with adapter_backend("reference"):
        expected = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(found(x), expected)
