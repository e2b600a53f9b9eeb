"""The choice of experts under budgets equals brute force, and no budget is exceeded."""

from __future__ import annotations

import itertools
import random
from math import fsum

import numpy as np
import pytest
import torch

from mixadapters.serving.selection import Budget, Selection, fit_mapping, mask_gate, select_experts


def problem(seed: int, categories: int, experts: int) -> tuple[dict, dict, dict, dict]:
    """Scores, two costs and shares. Some scores and costs are equal, some are 0."""
    draw = random.Random(seed)
    names = [f"expert{i}" for i in range(experts)]
    scores = {
        f"category{i}": {name: draw.choice([0.1, 0.5, draw.random()]) for name in names} for i in range(categories)
    }
    costs = [{name: draw.choice([0.0, 0.3, draw.random()]) for name in names} for _ in range(2)]
    share = {category: draw.choice([0.0, 1.0, 2.5]) for category in scores}
    share[next(iter(share))] = 1.0
    return scores, *costs, share


def brute_force(scores, budgets, share, count=None) -> float | None:
    """The largest mean score of all mappings that keep within the budgets; None where none does."""
    experts = list(next(iter(scores.values())))
    fitting = [
        quality_of(mapping, scores, share)
        for chosen in itertools.product(experts, repeat=len(scores))
        if (mapping := dict(zip(scores, chosen, strict=True)))
        and (count is None or len(set(chosen)) <= count)
        and all(cost_of(mapping, budget, share) <= budget.limit * (1 + 1e-12) for budget in budgets)
    ]
    return max(fitting, default=None)


def cost_of(mapping, budget, share) -> float:
    if budget.per == "request":
        return fsum(share[c] * budget.cost[e] for c, e in mapping.items()) / sum(share.values())
    costs = [budget.cost[e] for e in set(mapping.values())]
    return fsum(costs) if budget.per == "kept" else max(costs)


def quality_of(mapping, scores, share) -> float:
    return fsum(share[c] * scores[c][e] for c, e in mapping.items()) / sum(share.values())


@pytest.mark.parametrize("seed", range(12))
def test_mapping_equals_brute_force_and_keeps_within_its_budgets(seed) -> None:
    scores, cost, _, share = problem(seed, *[(3, 4), (4, 4), (5, 3), (6, 3)][seed % 4])
    for budget, total in [(0.25, None), (0.4, 0.8), (None, 0.7)]:
        budgets = [
            Budget(cost, limit, per) for limit, per in ((budget, "request"), (total, "kept")) if limit is not None
        ]
        expected = brute_force(scores, budgets, share)
        if expected is None:
            with pytest.raises(ValueError, match="no choice of experts"):
                fit_mapping(scores, cost, budget, total=total, share=share)
            continue
        mapping = fit_mapping(scores, cost, budget, total=total, share=share)
        assert quality_of(mapping, scores, share) == pytest.approx(expected, abs=1e-9)
        if budget is not None:
            assert fsum(share[c] * cost[e] for c, e in mapping.items()) / sum(share.values()) <= budget * (1 + 1e-9)
        if total is not None:
            assert fsum(cost[e] for e in set(mapping.values())) <= total * (1 + 1e-12)


@pytest.mark.parametrize("seed", [6, 11])
def test_the_best_of_many_mappings_is_found_and_not_one_nearly_as_good(seed) -> None:
    """390,625 of them, of which a solver that stops within five hundredths of the best takes another."""
    draw = random.Random(seed)
    cost = {f"expert{i}": 0.1 + draw.random() for i in range(5)}
    scores = {f"category{i}": {e: cost[e] * (0.8 + 0.4 * draw.random()) for e in cost} for i in range(8)}
    budget = 0.97 * sorted(cost.values())[2]
    choices = np.array(list(itertools.product(range(5), repeat=8)))
    quality = np.array([list(row.values()) for row in scores.values()])[np.arange(8), choices].mean(1)
    fits = np.array(list(cost.values()))[choices].mean(1) <= budget
    mapping = fit_mapping(scores, cost, budget)
    assert fsum(scores[c][e] for c, e in mapping.items()) / 8 == pytest.approx(quality[fits].max(), abs=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_selection_equals_brute_force_under_latency_and_energy(seed) -> None:
    scores, delay, energy, share = problem(100 + seed, *[(3, 5), (4, 4), (5, 3)][seed % 3])
    budgets = [Budget(delay, 0.6, "slowest"), Budget(energy, 0.5, "kept"), Budget(delay, 0.35)]
    expected = brute_force(scores, budgets, share, count=2)
    if expected is None:
        with pytest.raises(ValueError, match="no choice of experts"):
            select_experts(scores, budgets, count=2, share=share)
        return
    found = select_experts(scores, budgets, count=2, share=share)
    assert found.quality == pytest.approx(expected, abs=1e-9)
    assert set(found.experts) == set(found.mapping.values())
    assert len(found.experts) <= 2
    for budget, spent in zip(budgets, found.spent, strict=True):
        assert spent <= budget.limit * (1 + 1e-12)


def test_more_budget_is_never_worse() -> None:
    scores, cost, _, share = problem(7, 4, 5)
    limits = [0.1 * i for i in range(11)]
    qualities = []
    for limit in limits:
        try:
            qualities.append(select_experts(scores, [Budget(cost, limit)], share=share).quality)
        except ValueError:
            assert not qualities, "a larger budget fits nothing"
    assert len(qualities) > 3
    assert qualities == sorted(qualities)


def test_without_budgets_every_category_has_its_best() -> None:
    scores = {"law": {"a": 0.9, "b": 0.2, "c": 0.4}, "code": {"a": 0.1, "b": 0.2, "c": 0.3}}
    assert fit_mapping(scores, {"a": 5.0, "b": 0.0, "c": 9.0}) == {"law": "a", "code": "c"}


def test_a_budget_holds_to_the_last_bit() -> None:
    """The solver allows a millionth of a budget more, which a choice by its answer alone would spend."""
    scores = {"only": {"cheap": 0.1, "dear": 0.9}}
    assert fit_mapping(scores, {"cheap": 0.5, "dear": 1 + 1e-8}, 1.0) == {"only": "cheap"}
    assert fit_mapping(scores, {"cheap": 0.5, "dear": 1.0}, 1.0) == {"only": "dear"}
    with pytest.raises(ValueError, match="no choice of experts keeps within the budgets"):
        fit_mapping(scores, {"cheap": 1 + 1e-8, "dear": 1 + 1e-8}, 1.0)
    tenths = {"x": {"a": 1.0, "b": 0.0}, "y": {"a": 0.0, "b": 1.0}}
    assert fit_mapping(tenths, {"a": 0.1, "b": 0.2}, total=0.3) == {"x": "a", "y": "b"}  # 0.1 + 0.2 is above 0.3


def test_small_differences_between_scores_decide() -> None:
    scores = {f"c{i}": {"a": 0.5, "b": 0.5 + 1e-7} for i in range(3)}
    assert set(fit_mapping(scores, {"a": 1.0, "b": 1.0}).values()) == {"b"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": {}}, "scores are empty"),
        (
            {"scores": {"law": {"a": 1.0}, "code": {"b": 1.0}}},
            r"scores\['code'\] must have one number for each expert",
        ),
        ({"scores": {"law": {"a": float("nan"), "b": 1.0}}}, r"scores\['law'\]\['a'\]=nan must be a finite number"),
        ({"cost": {"a": 1.0}}, r"the costs of budget 0 .* missing \['b'\]"),
        ({"cost": {"a": -1.0, "b": 1.0}}, r"cost\['a'\]=-1.0 must be a finite number, at least 0"),
        ({"budget": -1.0}, "limit=-1.0 must be"),
        ({"share": {"law": -1.0}}, "share=.* must be numbers of 0 or more"),
        ({"share": {"code": 1.0}}, r"share must have one number for each category"),
        ({"budget": 0.5}, r"no choice of experts keeps within the budgets \(0.5 request\)"),
    ],
)
def test_bad_numbers_and_names_are_refused(arguments, message) -> None:
    given = {"scores": {"law": {"a": 1.0, "b": 0.5}}, "cost": {"a": 2.0, "b": 1.0}, "budget": 1.5}
    with pytest.raises(ValueError, match=message):
        fit_mapping(**{**given, **arguments})
    with pytest.raises(ValueError, match="per='token' is unknown"):
        Budget({"a": 1.0}, 1.0, "token")
    with pytest.raises(ValueError, match="count=0 must be"):
        select_experts(given["scores"], count=0)


def test_a_masked_gate_keeps_proportions_and_sums_to_one() -> None:
    probs = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
    masked = mask_gate(probs, ["a", "b", "c"], ("c", "a"))
    assert torch.allclose(masked, torch.tensor([[0.4, 0.0, 0.6], [0.5, 0.0, 0.5]]))
    assert torch.allclose(masked.sum(1), torch.ones(2))
    with pytest.raises(ValueError, match="no arm 'd'"):
        mask_gate(probs, ["a", "b", "c"], ["d"])
    with pytest.raises(ValueError, match="names no arm"):
        mask_gate(probs, ["a", "b", "c"], [])


def test_experts_that_serve_nothing_are_not_kept() -> None:
    found = select_experts({"law": {"a": 1.0, "b": 0.0}}, [Budget({"a": 1.0, "b": 1.0}, 9.0, "kept")])
    assert found == Selection(("a",), {"law": "a"}, 1.0, (1.0,))
