"""The products that a compiled graph sees in place of the operator keep its promises."""

from __future__ import annotations

import random

import pytest
import torch
from problems import WIDE, drawn
from torch import Tensor

from mixadapters.kernels import adapter_backend, lowrank
from mixadapters.kernels.opened import by_runs
from mixadapters.kernels.problem import Problem

EXPERTS, RANK = 4, 3
BY_EXPERT = ("w_down", "w_up", "b_down", "b_up", "w_gate", "b_gate", "scale")


def draw(seed: int, dtype: torch.dtype = torch.float64) -> dict:
    """A problem whose rows choose some of its experts, or none."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    run, slots = chance.choice([1, 1, 3]), chance.randint(1, 3)
    numbers = torch.randint(-1, EXPERTS, (chance.randint(1, 6), slots), generator=generator)
    return drawn(chance, generator, numbers, run, EXPERTS, RANK, dtype)


def opened(given: dict) -> Tensor:
    places = {"w_down": "down", "w_up": "up", "w_gate": "gate"}
    return by_runs(Problem(**{places.get(name, name): value for name, value in given.items()}).cast())


def test_the_numbers_are_those_of_the_definition() -> None:
    for seed in range(80):
        given = draw(seed)
        with adapter_backend("reference"):
            torch.testing.assert_close(opened(given), lowrank(**given))


def test_half_precision_is_near_the_definition_and_as_wide_as_its_base() -> None:
    given = {**draw(0, torch.bfloat16), "base": torch.randn(len(draw(0)["x"]), WIDE[1])}
    with adapter_backend("reference"):
        torch.testing.assert_close(opened(given), lowrank(**given), atol=0.1, rtol=0.05)
    nothing = {**given, "w_up": torch.zeros_like(given["w_up"]), "b_up": None, "base_weight": None}
    assert torch.equal(opened(nothing), given["base"])


def test_a_broken_expert_touches_only_the_rows_that_chose_it() -> None:
    for seed in range(60):
        given = draw(seed)
        sound, broken = opened(given), seed % EXPERTS
        apart = (given["indices"] != broken).all(1)
        for name in [n for n in BY_EXPERT if n in given]:
            own = given[name].clone()
            by_expert = own.t() if name == "w_up" else own
            by_expert.unflatten(0, (EXPERTS, -1))[broken].fill_((torch.inf, torch.nan)[seed % 2])
            found = opened({**given, name: own})
            torch.testing.assert_close(found[apart], sound[apart], msg=lambda m, n=name: f"{n}: {m}")
            assert torch.equal(found[apart].isfinite(), sound[apart].isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_expert_is_its_base_bit_for_bit(dtype) -> None:
    given = draw(3, dtype) | {"base": torch.randn(len(draw(3)["x"]), WIDE[1]).to(dtype)}
    given.pop("base_weight", None)
    given["indices"] = torch.full_like(given["indices"], -1)
    given["base"][0, 0] = -0.0  # to which adding nothing would give 0.0
    given["x"].fill_(torch.nan)  # what padding holds does not matter
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(opened(given).view(bits), given["base"].view(bits))


@pytest.mark.parametrize("number", [EXPERTS, -2])
def test_a_number_of_no_expert_is_refused_in_a_compiled_graph(number) -> None:
    given = draw(0) | {"indices": torch.zeros(len(draw(0)["x"]), 1, dtype=torch.long), "run": 1}
    given.pop("weights", None)
    torch._dynamo.reset()
    compiled = torch.compile(lowrank, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given), lowrank(**given))
        given["indices"][-1] = number
        with pytest.raises(RuntimeError, match=r"indices must run from -1 \(no expert\) to 3, one less than the 4"):
            compiled(**given)
    torch._dynamo.reset()


def test_no_rows_are_no_rows_in_a_compiled_graph() -> None:
    for seed in range(12):
        given = draw(seed) | {"run": 1}
        by_row = {"x", "indices", "weights", "base", "base_weight"}.intersection(given)
        given |= {name: given[name][:0] for name in by_row}
        torch._dynamo.reset()
        with torch.no_grad():
            y = torch.compile(lowrank, fullgraph=True, backend="eager")(**given)
        assert y.shape == (0, WIDE[1])
    torch._dynamo.reset()
