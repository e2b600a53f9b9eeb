"""Plans of which experts lie on which devices."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixadapters.sharding import deal_tasks, even_placement, placement, plan_placement

ZIPF = [1 / rank for rank in range(1, 65)]


@st.composite
def problems(draw: st.DrawFn) -> dict:
    devices = draw(st.integers(1, 6))
    load = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=20))
    slots = draw(st.lists(st.integers(0, 20), min_size=devices, max_size=devices))
    slots[0] += max(0, len(load) - sum(slots))
    return {
        "load": load, "devices": devices, "slots": slots, "t": draw(st.integers(0, 8)), "m": draw(st.integers(0, 8))
    }  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_a_plan_keeps_its_promises(problem: dict) -> None:
    plan = plan_placement(**problem)
    load, devices, slots = problem["load"], problem["devices"], problem["slots"]
    assert len(plan.holders) == len(load)
    assert all(held and len(set(held)) == len(held) for held in plan.holders)  # every expert somewhere, once on each
    assert all(len(plan.on(device)) <= slots[device] + problem["m"] for device in range(devices))
    assert sum(plan.loads(load)) == pytest.approx(sum(load))  # copies share, and add nothing
    busiest = sorted(range(len(load)), key=lambda e: (-load[e], e))[: problem["t"]]
    assert all(len(held) == 1 or expert in busiest for expert, held in enumerate(plan.holders))
    even = even_placement(len(load), devices)
    if all(len(even.on(device)) <= slots[device] for device in range(devices)):
        assert max(plan.loads(load)) <= max(even.loads(load)) * (1 + 1e-12)


def test_a_skewed_load_is_within_a_quarter_of_even() -> None:
    """64 experts on 8 devices, used as by Zipf's law with exponent 1; the plan does not know their order."""
    order = random.Random(0).sample(ZIPF, 64)
    assert even_placement(64, 8).max_over_mean(ZIPF) == pytest.approx(2.197, abs=1e-3)
    assert plan_placement(order, 8, 8).max_over_mean(order) == pytest.approx(1.880, abs=1e-3)
    for t, m in ((1, 1), (8, 8), (8, 1), (64, 2)):
        assert plan_placement(order, 8, 8, t, m).max_over_mean(order) <= 1.25


def test_few_enough_busy_experts_lie_everywhere() -> None:
    plan = plan_placement(ZIPF, 8, 8, t=3, m=3)
    assert [len(held) for held in plan.holders] == [8, 8, 8, *[1] * 61]


def test_places_for_copies_go_to_whichever_expert_has_most_for_each() -> None:
    plan = plan_placement([8.0, 4.0, 1.0, 1.0], 4, 1, t=4, m=1)
    assert [len(held) for held in plan.holders] == [4, 2, 1, 1]
    plan = plan_placement([100.0, 4.0, 1.0, 1.0], 4, 1, t=4, m=1)  # to an expert that lies everywhere goes no more
    assert [len(held) for held in plan.holders] == [4, 2, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": 0}, "devices=0 must be"),
        ({"t": -1}, "t=-1 must be"),
        ({"m": 0.5}, "m=0.5 must be"),
        ({"slots": [1]}, r"slots=\[1\] must be .* the 2 devices"),
        ({"slots": 1}, "2 places for 3 experts; give each device 2"),
        ({"load": [1.0, float("nan"), 1.0]}, r"load\[1\]=nan must be a finite number, at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_placement(**{"load": [3.0, 2.0, 1.0], "devices": 2, "slots": 2, **change})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8), st.integers(1, 6))
def test_tasks_of_uneven_size_are_dealt_evenly_and_whole(sizes: list[int], devices: int) -> None:
    rows = {f"task{i}": size for i, size in enumerate(sizes)}
    dealt = deal_tasks(rows, devices)
    assert {name: sum(mine.get(name, 0) for mine in dealt) for name in rows} == rows
    assert max(sum(mine.values()) for mine in dealt) <= -(-1.25 * sum(sizes) // devices) + len(sizes)


def test_tasks_are_copied_no_more_than_balance_asks_for() -> None:
    assert deal_tasks({"a": 100, "b": 100}, 2) == [{"a": 100}, {"b": 100}]
    assert deal_tasks({"a": 300, "b": 50, "c": 50}, 2) == [{"a": 150, "b": 50}, {"a": 150, "c": 50}]
    assert deal_tasks({"a": 100}, 1) == [{"a": 100}]
    assert deal_tasks({"a": 100}, 2, at_most=1) == [{"a": 50}, {"a": 50}]
    assert deal_tasks({"a": 100, "b": 100, "c": 200}, 3) == [{"a": 50, "c": 100}, {"c": 100}, {"a": 50, "b": 100}]
    with pytest.raises(ValueError, match="at_most="):
        deal_tasks({"a": 100}, 1, at_most=0.5)
    with pytest.raises(ValueError, match="1 or more"):
        deal_tasks({"a": 0}, 1)


def test_few_plans_are_looked_at_however_many_tasks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(load: list[int], *others: int) -> placement.Placement:
        made.append(1)
        return plan_placement(load, *others)

    monkeypatch.setattr(placement, "plan_placement", counted)
    deal_tasks({f"task{i}": 1000 if i == 0 else 1 for i in range(60)}, 4)
    assert len(made) < 12


def test_even_placements_and_loads_are_checked_by_name() -> None:
    for numbers, message in (((3, 0), "devices=0"), ((-1, 2), "experts=-1"), ((3, True), "devices=True")):
        with pytest.raises(ValueError, match=message):
            even_placement(*numbers)
    with pytest.raises(ValueError, match="2 loads for 3 experts"):
        even_placement(3, 2).max_over_mean([1.0, 2.0])
