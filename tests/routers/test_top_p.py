"""Top-p: the mass is reached, and by no more than needed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mixadapters.core.context import ForwardContext
from mixadapters.core.routing import Routing
from mixadapters.routers import build_router

TOKENS = torch.randn(4, 25, 6, generator=torch.Generator().manual_seed(1))


def run(**options: Any) -> Routing:
    torch.manual_seed(0)
    router = build_router({"kind": "top_p", "init_range": 0.5, **options}, 6, list("abcdefgh")).eval()
    return router(TOKENS, ForwardContext())


def active(routing: Routing) -> Tensor:
    return (routing.indices >= 0).sum(1)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_mass_is_reached_and_minimal(p) -> None:
    routing = run(p=p)
    for row in range(100):
        chosen = sorted(routing.weights[row][routing.indices[row] >= 0].tolist())
        others = routing.probs[row][~routing.selected[row]]
        assert sum(chosen) >= p - 1e-6
        assert sum(chosen[1:]) < p
        assert len(others) == 0 or float(others.max()) <= chosen[0]
    assert torch.equal(active(routing), routing.selected.sum(1))


def test_mass_that_is_reached_exactly_is_enough() -> None:
    router = build_router({"kind": "top_p", "init_range": 0.0, "p": 0.5}, 6, list("abcd")).eval()
    routing = router(TOKENS, ForwardContext())  # a quarter each
    assert (active(routing) == 2).all()


def test_ends_are_dense_and_top_1_and_more_mass_is_more_experts() -> None:
    assert (active(run(p=1)) == 8).all()
    assert (active(run(p=1, init_range=20.0)) == 8).all()  # where one alone rounds to 1
    assert (active(run(p=1e-6)) == 1).all()
    counts = [active(run(p=p)) for p in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert all((more >= fewer).all() for fewer, more in pairwise(counts))
    assert float(counts[3].float().mean()) > float(counts[1].float().mean())


def test_weights_are_the_probabilities() -> None:
    routing = run(p=0.5)
    chosen = routing.indices >= 0
    expected = routing.probs.gather(1, routing.indices.clamp_min(0))
    assert torch.equal(routing.weights[chosen], expected[chosen])


def test_no_more_than_are_allowed() -> None:
    routing = run(p=0.9, max_experts=2)
    assert routing.indices.shape == (100, 2)
    assert (active(routing) <= 2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0}, "p=0 must be a finite number, above 0, at most 1"),
        ({"p": 1.5}, "p=1.5 must be a finite number, above 0, at most 1"),
        ({"max_experts": 0}, "max_experts=0 must be an integer, at least 1, or None"),
        ({"scoring_func": "sigmoid"}, "TopPRouter takes no argument 'scoring_func'"),
    ],
)
def test_nonsense_is_refused_by_name(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_a_price_on_entropy_makes_the_gate_decide() -> None:
    torch.manual_seed(0)
    router = build_router({"kind": "top_p", "entropy_coef": 1.0, "p": 0.6, "init_range": 0.1}, 6, list("abcdefgh"))
    optimizer = torch.optim.Adam(router.parameters(), 0.05)
    first = active(router(TOKENS, ForwardContext())).float().mean()
    for _ in range(60):
        optimizer.zero_grad()
        router.losses(router(TOKENS, ForwardContext()), None)["entropy"][0].backward()
        optimizer.step()
    assert active(router(TOKENS, ForwardContext())).float().mean() < first - 1
