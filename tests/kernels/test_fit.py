"""The fit of the costs by which a backend is chosen on a CPU, to times that are made up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mixadapters.kernels import costs

pytest.importorskip("scipy")
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "bench"))

import cpu
import fit


def timed(wrong: float) -> list[tuple[cpu.Case, dict[str, float]]]:
    """Cases that take what the table says; `wrong` times that where each row uses all experts."""
    found = []
    for case in cpu.drawn(400, seed=0):
        shape = fit.shape_of(case)
        factor = wrong if case.k == case.E else 1.0
        found.append((case, {name: factor * costs.expected(name, shape, case.T) for name in costs.BACKENDS}))
    return found


def test_costs_are_found_again_whatever_mixtures_of_all_experts_take() -> None:
    cases = timed(wrong=0.1)
    assert any(case.k == case.E for case, _ in cases)
    table = fit.table_of(cases)
    for case, times in cases:
        if case.k < case.E:
            for name, time in times.items():
                assert costs.expected(name, fit.shape_of(case), case.T, table) == pytest.approx(time, rel=0.02)


def test_what_a_rule_loses_is_against_the_fastest() -> None:
    case = cpu.Case("drawn", "mixture", 4096, 8, 64, 1024, k=2)
    times = {name: 100.0 * (1 + i) for i, name in enumerate(costs.BACKENDS)}
    for i, name in enumerate(costs.BACKENDS):
        cheap = {key: tuple(cost * (0 if key[0] == name else 1) for cost in each) for key, each in costs.COSTS.items()}
        assert fit.losses([(case, times)], cheap) == [pytest.approx(i)]
    everyone = cpu.Case("drawn", "mixture", 4096, 8, 64, 1024, k=8)
    assert fit.losses([(everyone, times)], costs.COSTS) == [pytest.approx(3)]
