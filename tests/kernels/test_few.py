"""A few rows without gradient go past the operation: same numbers, and what is in doubt is left to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixadapters.kernels import Few, adapter_backend, costs, lowrank
from mixadapters.kernels.few import ROWS

EXPERTS, RANK, WIDTH, OUT, N = 4, 3, 6, 5, 7


def arguments(dtype: torch.dtype = torch.float32, **changed: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    total = EXPERTS * RANK
    given = {
        "ranks": (RANK,) * EXPERTS, "w_down": torch.randn(total, WIDTH), "w_up": torch.randn(total, OUT).t(),
        "b_down": None, "b_up": None, "scale": None, **changed,
    }  # fmt: skip
    return {name: t.to(dtype) if isinstance(t, Tensor) else t for name, t in given.items()}


def call(dtype: torch.dtype = torch.float32, rows: int = N, **changed: Any) -> dict[str, Any]:
    indices = torch.randint(EXPERTS, (rows, 3))  # of which some name an expert twice
    given = {
        "x": torch.randn(rows, WIDTH), "indices": indices, "weights": torch.rand(rows, 3),
        "base": torch.randn(rows, OUT), "base_weight": None, "run": 1, **changed,
    }  # fmt: skip
    return {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in given.items()}


EXPERTS_OF = {
    "LoRA": {},
    "scaled": {"scale": torch.rand(EXPERTS)},
    "biases": {"b_down": torch.randn(EXPERTS * RANK), "b_up": torch.randn(EXPERTS, OUT)},
    "gated": {"w_gate": torch.randn(EXPERTS * RANK, WIDTH), "b_gate": torch.randn(EXPERTS * RANK)},
}
ROUTED = {
    "chosen": {},
    "weight 1": {"weights": None},
    "numbers of 4 bytes": {"indices": torch.randint(EXPERTS, (N, 3), dtype=torch.int32)},
    "all experts": {"indices": None, "weights": torch.rand(N, EXPERTS)},
    "base weighed": {"base_weight": torch.rand(N)},
}


@pytest.mark.parametrize("routed", ROUTED)
@pytest.mark.parametrize("experts", EXPERTS_OF)
def test_the_numbers_are_those_of_the_definition(experts: str, routed: str) -> None:
    held, given = arguments(torch.float64, **EXPERTS_OF[experts]), call(torch.float64, **ROUTED[routed])
    act = "identity" if experts == "LoRA" else "gelu"
    with torch.no_grad():
        found = Few(act, held)(**given)
        with adapter_backend("reference"):
            expected = lowrank(**given, act=act, **held)
    assert found is not None
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routed", ROUTED)
@pytest.mark.parametrize("experts", EXPERTS_OF)
def test_the_bits_are_those_of_dense(experts: str, routed: str, dtype: torch.dtype) -> None:
    """So that a forward without gradients is that with them, where the rule takes `dense` for both."""
    held, given = arguments(dtype, **EXPERTS_OF[experts]), call(dtype, **ROUTED[routed])
    act = "identity" if experts == "LoRA" else "gelu"
    with torch.no_grad():
        found = Few(act, held)(**given)
        with adapter_backend("dense"):
            expected = lowrank(**given, act=act, **held)
    assert found is not None
    assert torch.equal(found, expected)


def test_half_precision_is_near_the_definition() -> None:
    held, given = arguments(torch.bfloat16), call(torch.bfloat16)
    with torch.no_grad():
        found = Few("gelu", held)(**given)
        with adapter_backend("reference"):
            expected = lowrank(**given, act="gelu", **held)
    assert found is not None
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)


LEFT = {
    "a row without expert": {"indices": torch.tensor([[0, -1, 1]] * N)},
    "a number of no expert": {"indices": torch.full((N, 3), EXPERTS)},
    "weights of other slots": {"weights": torch.rand(N, 4)},
    "indices of other rows": {"indices": torch.zeros(N - 1, 3, dtype=torch.long), "weights": torch.rand(N - 1, 3)},
    "weights of other experts": {"indices": None, "weights": torch.rand(N, EXPERTS + 1)},
    "no base": {"base": None},
    "nobody's choice": {"indices": None, "weights": None},
    "no slots": {"indices": torch.zeros(N, 0, dtype=torch.long), "weights": None},
}


@pytest.mark.parametrize("doubt", LEFT)
def test_what_is_in_doubt_is_left_to_the_operation(doubt: str) -> None:
    with torch.no_grad():
        assert Few("gelu", arguments())(**call(**LEFT[doubt])) is None


def test_rows_that_another_way_is_faster_for_are_left_to_the_operation(monkeypatch) -> None:
    monkeypatch.setattr(costs, "SMALL", 0)
    monkeypatch.setattr(costs, "cheapest", lambda *_: "dense")
    with torch.no_grad():
        assert Few("gelu", arguments())(**call()) is not None
        monkeypatch.setattr(costs, "cheapest", lambda *_: "grouped")
        assert Few("gelu", arguments())(**call()) is None


def test_other_rows_dtypes_and_ranks_are_left_to_the_operation() -> None:
    few, more = Few("gelu", arguments()), call(rows=ROWS + 1)
    with torch.no_grad():
        assert few(**more) is None
        assert few(**call(base=torch.randn(N, OUT).double())) is not None  # `call` makes it float32
        given = call()
        assert few(**{**given, "base": given["base"].double()}) is None
        assert (
            Few("gelu", arguments(scale=torch.rand(EXPERTS)) | {"scale": torch.rand(EXPERTS).double()})(**given)
            is None
        )
        assert Few("gelu", arguments(ranks=(1, 5, 3, 3)))(**given) is None


def test_whoever_looks_on_gets_the_operation() -> None:
    few, given = Few("gelu", arguments()), call()
    assert few(**given) is None  # gradients are recorded
    with torch.no_grad():
        assert few(**given) is not None
        with adapter_backend("dense"):
            assert few(**given) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert few(**given) is None


def test_a_broken_expert_is_left_to_the_operation_and_one_that_nobody_chose_too() -> None:
    held, given = arguments(), call(indices=torch.tensor([[0, 1, 2]] * N))
    held["w_up"][:, -1] = torch.inf  # of the last expert
    with torch.no_grad():
        assert Few("gelu", held)(**given) is None
        assert lowrank(**given, act="gelu", **held).isfinite().all()
