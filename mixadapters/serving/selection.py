"""Which experts to keep, and which of them serves what, under budgets: exact, by mixed-integer programming."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any, Literal

import torch
from torch import Tensor

from mixadapters.core.fields import check_integer, check_kind, check_number, finite, one_of
from mixadapters.core.registry import nearest

Scores = Mapping[str, Mapping[str, float]]  # category -> expert -> how well it does there; more is better
ROUNDING = 1e-12  # of a budget: what sums of floats may be off by


@dataclass(frozen=True)
class Budget:
    """A limit on what experts cost: seconds, joules, bytes, parameters.

    Args:
        cost: of each expert, 0 or more.
        limit: what may be spent.
        per: "request": the mean over requests, each of which costs what the expert of its category does; "kept": the
            sum over all experts that are kept; "slowest": the largest of any of them.
    """

    cost: Mapping[str, float]
    limit: float
    per: Literal["request", "kept", "slowest"] = "request"

    def __post_init__(self) -> None:
        one_of("per", self.per, ("request", "kept", "slowest"))
        check_number("limit", self.limit, least=0)
        for name, cost in self.cost.items():
            check_number(f"cost[{name!r}]", cost, least=0)

    def spent(self, mapping: Mapping[str, str], share: Mapping[str, float]) -> float:
        """What this mapping of categories to experts costs."""
        if self.per == "request":
            return fsum(share[category] * self.cost[expert] for category, expert in mapping.items())
        costs = [self.cost[expert] for expert in set(mapping.values())]
        return fsum(costs) if self.per == "kept" else max(costs)

    def holds(self, spent: float) -> bool:
        return spent <= self.limit * (1 + ROUNDING)


@dataclass(frozen=True)
class Selection:
    """What `select_experts` has found."""

    experts: tuple[str, ...]  # those that are kept, in the order in which they were given
    mapping: dict[str, str]  # category -> the expert that serves it
    quality: float  # the mean score over requests
    spent: tuple[float, ...]  # of each budget


def fit_mapping(
    scores: Scores,
    cost: Mapping[str, float],
    budget: float | None = None,
    *,
    total: float | None = None,
    share: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """The expert of each category that scores best in the mean over requests, within what may be spent.

    Source: Jain et al. 2024 (Composition of Experts, arXiv 2412.01868), step 2: quality under a budget of active and
    of total parameters.

    Args:
        scores: category -> expert -> score.
        cost: of each expert, such as its parameters or seconds.
        budget: the mean cost of a request may be this much; None: any.
        total: the cost of all experts in use together may be this much; None: any.
        share: of each category in the requests; None: equal.

    Raises:
        ValueError: names that do not fit, numbers that are none, or budgets that nothing fits into.
        ImportError: scipy is missing.
    """
    limits: tuple[tuple[float | None, Any], ...] = ((budget, "request"), (total, "kept"))
    budgets = [Budget(cost, limit, per) for limit, per in limits if limit is not None]
    return select_experts(scores, budgets, share=share).mapping


def select_experts(
    scores: Scores,
    budgets: Sequence[Budget] = (),
    *,
    count: int | None = None,
    share: Mapping[str, float] | None = None,
) -> Selection:
    """The experts to keep, such that requests are served best within all budgets; each category has its best of them.

    Exact to 1e-9 of the largest score. A router that was trained over all experts is masked to these, by `mask_gate`.

    Source: Jin et al. 2025 (MoE^2), experts of edge servers under budgets of energy and delay; theirs searches by
    monotonic optimisation.

    Args:
        scores: category -> expert -> score, such as minus the validation loss.
        count: keep so many at most; None: any number.
        share: of each category in the requests; None: equal.

    Raises:
        ValueError: names that do not fit, numbers that are none, or budgets that nothing fits into.
        ImportError: scipy is missing.
    """
    categories, experts = _names(scores)
    if count is not None:
        check_integer("count", count, least=1)
    for number, budget in enumerate(budgets):
        _same_names(f"the costs of budget {number}", budget.cost, experts, "expert")
    weight = _shares(share, categories)
    program = _Program(scores, categories, experts, weight, budgets, count)
    while (mapping := program.best()) is not None:
        spent = tuple(budget.spent(mapping, weight) for budget in budgets)
        if all(budget.holds(much) for budget, much in zip(budgets, spent, strict=True)):
            used = set(mapping.values())
            quality = fsum(weight[category] * scores[category][expert] for category, expert in mapping.items())
            return Selection(tuple(name for name in experts if name in used), mapping, quality, spent)
        program.exclude(mapping)  # the solver allows itself a millionth, and we nothing
    said = [f"{budget.limit} {budget.per}" for budget in budgets] + ([] if count is None else [f"{count} experts"])
    raise ValueError(f"no choice of experts keeps within the budgets ({', '.join(said)}); raise one of them")


def mask_gate(probs: Tensor, arms: Sequence[str], kept: Iterable[str]) -> Tensor:
    """probs (N, A) of a router over `arms` -> those over the arms that are kept: 0 elsewhere, and rows sum to 1.

    A row whose kept arms had nothing gets equal shares of them.

    Raises:
        ValueError: no arm is kept, or one is that there is not.
    """
    check_kind("probs", probs, torch.Tensor, "a tensor (N, A)")
    names = list(kept)
    for name in names:
        if name not in arms:
            raise ValueError(f"kept: there is no arm {name!r}; have {list(arms)}.{nearest(name, arms)}")
    if not names:
        raise ValueError("kept names no arm; keep at least one")
    mask = torch.tensor([arm in set(names) for arm in arms], device=probs.device)
    masked = torch.where(mask, probs, 0.0)
    whole = masked.sum(-1, keepdim=True)
    return torch.where(whole > 0, masked / whole.clamp_min(torch.finfo(probs.dtype).tiny), mask / mask.sum())


def _names(scores: Scores) -> tuple[list[str], list[str]]:
    categories = list(scores)
    if not categories or not scores[categories[0]]:
        raise ValueError("scores are empty; give category -> expert -> score")
    experts = list(scores[categories[0]])
    for category in categories:
        _same_names(f"scores[{category!r}]", scores[category], experts, "expert")
        for expert, score in scores[category].items():
            check_number(f"scores[{category!r}][{expert!r}]", score)
    return categories, experts


def _same_names(what: str, given: Iterable[str], wanted: Sequence[str], noun: str) -> None:
    missing, unknown = set(wanted).difference(given), set(given).difference(wanted)
    if missing or unknown:
        raise ValueError(
            f"{what} must have one number for each {noun} of {list(wanted)}: missing {sorted(missing)}, unknown "
            f"{sorted(unknown)}"
        )


def _shares(share: Mapping[str, float] | None, categories: Sequence[str]) -> dict[str, float]:
    if share is None:
        return dict.fromkeys(categories, 1 / len(categories))
    _same_names("share", share, categories, "category")
    if not all(finite(part) and part >= 0 for part in share.values()) or not (whole := fsum(share.values())) > 0:
        raise ValueError(f"share={dict(share)} must be numbers of 0 or more, not all of them 0")
    return {name: share[name] / whole for name in categories}


class _Program:
    """The integer program: x[c, e], whether expert e serves category c, row by row; then y[e], whether it is kept."""

    def __init__(
        self, scores: Scores, categories: Sequence[str], experts: Sequence[str], share: Mapping[str, float],
        budgets: Sequence[Budget], count: int | None,
    ) -> None:  # fmt: skip
        self.categories, self.experts = categories, experts
        c, e = len(categories), len(experts)
        self.size = c * e + e
        worth = [share[category] * scores[category][expert] for category in categories for expert in experts]
        # The solver's gap is absolute, 1e-6: a thousand for the largest makes it a thousand-millionth.
        largest = max(map(abs, worth)) or 1.0
        self.worth = [-1e3 * value / largest for value in worth] + [0.0] * e
        self.rows: list[tuple[list[float], float, float]] = []  # coefficients, and bounds of their product
        for i in range(c):  # each category has one expert
            self._add({i * e + j: 1.0 for j in range(e)}, 1.0, 1.0)
        for i in range(c):
            for j in range(e):  # which is kept
                self._add({i * e + j: 1.0, c * e + j: -1.0}, -1.0, 0.0)
        self.upper = [1.0] * self.size
        for budget in budgets:
            self._limit(budget, share)
        if count is not None:
            self._add({c * e + j: 1.0 for j in range(e)}, 0.0, float(count))

    def _limit(self, budget: Budget, share: Mapping[str, float]) -> None:
        c, e = len(self.categories), len(self.experts)
        scale = budget.limit or max(budget.cost.values()) or 1.0
        costs = [budget.cost[expert] / scale for expert in self.experts]
        if budget.per == "slowest":
            for j, expert in enumerate(self.experts):
                if not budget.holds(budget.cost[expert]):
                    self.upper[c * e + j] = 0.0
        elif budget.per == "kept":
            self._add({c * e + j: cost for j, cost in enumerate(costs)}, 0.0, budget.limit / scale)
        else:
            parts = [share[category] * cost for category in self.categories for cost in costs]
            self._add(dict(enumerate(parts)), 0.0, budget.limit / scale)

    def _add(self, coefficients: Mapping[int, float], low: float, high: float) -> None:
        row = [0.0] * self.size
        for place, value in coefficients.items():
            row[place] = value
        self.rows.append((row, low, high))

    def exclude(self, mapping: Mapping[str, str]) -> None:
        """Rule out this one mapping."""
        e = len(self.experts)
        places = [i * e + self.experts.index(mapping[category]) for i, category in enumerate(self.categories)]
        self._add(dict.fromkeys(places, 1.0), 0.0, len(places) - 1.0)

    def best(self) -> dict[str, str] | None:
        """The best mapping that the rows allow; None where there is none.

        Raises:
            RuntimeError: the solver gave up.
        """
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp  # only who chooses needs scipy
        except ImportError as error:
            raise ImportError(
                "choosing experts under budgets needs scipy: pip install 'mixadapters[choose]'"
            ) from error
        rows, low, high = zip(*self.rows, strict=True)
        found = milp(
            self.worth, integrality=[1] * self.size, bounds=Bounds(0.0, self.upper),
            constraints=LinearConstraint(rows, low, high), options={"mip_rel_gap": 0.0},
        )  # fmt: skip
        if found.status == 2:  # infeasible
            return None
        if found.x is None or found.status != 0:
            raise RuntimeError(f"the solver found no answer: {found.message}")
        c, e = len(self.categories), len(self.experts)
        chosen = found.x[: c * e].reshape(c, e).argmax(1)
        return {category: self.experts[j] for category, j in zip(self.categories, chosen, strict=True)}
