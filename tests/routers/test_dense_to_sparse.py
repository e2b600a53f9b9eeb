"""Dense to sparse: the schedule, what is kept, and that evaluation is where training ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixadapters.core.context import ForwardContext
from mixadapters.core.routing import Routing
from mixadapters.routers import build_router

TOKENS = torch.randn(4, 25, 6, generator=torch.Generator().manual_seed(1))
NAMES = list("abcd")


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    return build_router({"kind": "dense_to_sparse", "init_range": 0.5, **options}, 6, NAMES).eval()


def run(router: Any) -> Routing:
    return router(TOKENS, ForwardContext())


def active(routing: Routing) -> Tensor:
    return (routing.indices >= 0).sum(1)


@pytest.mark.parametrize("schedule", ["linear", "exp"])
def test_temperature_is_exact_at_the_ends_of_the_schedule(schedule) -> None:
    router = make(temperature=2.0, temperature_min=0.3, duration=0.6, schedule=schedule).train()
    assert [router.temperature_at(p) for p in (0.0, 0.6, 0.8, 1.0)] == [2.0, 0.3, 0.3, 0.3]
    middle = router.temperature_at(0.3)
    assert middle == pytest.approx(1.15 if schedule == "linear" else (2.0 * 0.3) ** 0.5)
    router.at_progress(0.3)
    assert router.current_temperature == router.temperature == middle


def test_arms_above_the_threshold_are_kept_with_their_probability() -> None:
    router = make(temperature=1.0, temperature_min=1.0)
    routing = run(router)
    logits = router.score(TOKENS).flatten(0, 1)
    probs = logits.softmax(-1)
    kept = probs > 0.25
    assert torch.equal(routing.selected, kept)
    dense = torch.zeros(100, 4).scatter_add(1, routing.indices.clamp_min(0), routing.weights)
    torch.testing.assert_close(dense, probs * kept)
    assert (active(routing) >= 1).all()
    assert active(routing).float().mean() > 1


def test_the_largest_is_always_kept() -> None:
    routing = run(make(threshold=0.99))
    assert (active(routing) == 1).all()
    assert torch.equal(routing.indices[:, 0], routing.probs.argmax(1))


def test_fewer_are_kept_as_the_temperature_falls() -> None:
    counts = [active(run(make(temperature=5.0, temperature_min=t))) for t in (5.0, 2.0, 1.0, 0.3, 0.05)]
    means = [float(count.float().mean()) for count in counts]
    assert means == sorted(means, reverse=True)
    assert means[0] > means[-1] + 0.5


def test_a_high_temperature_without_a_threshold_is_the_dense_mean() -> None:
    routing = run(make(temperature=1e6, temperature_min=1e6, threshold=0))
    torch.testing.assert_close(routing.weights, torch.full((100, 4), 0.25))


def test_evaluation_is_at_the_end_of_the_schedule_and_has_no_noise() -> None:
    router, last = make(temperature=5.0), make(temperature=0.3)
    assert torch.equal(run(router).weights, run(last).weights)
    assert not torch.equal(run(router.train()).weights, run(router).weights)
    router.gumbel = False
    assert torch.equal(run(router).weights, run(router).weights)
    torch.testing.assert_close(run(router).probs, (router.score(TOKENS).flatten(0, 1) / 5).softmax(-1))


def test_gumbel_noise_samples_from_the_distribution() -> None:
    router = make(temperature=1.0, temperature_min=1.0)
    tokens = TOKENS[:1, :1].expand(1, 20000, -1)
    expected = router(tokens, ForwardContext()).probs[0]
    drawn = router.train()(tokens, ForwardContext()).probs.argmax(1)
    shares = torch.bincount(drawn, minlength=4) / 20000
    torch.testing.assert_close(shares, expected.detach(), atol=0.02, rtol=0)


def test_it_may_turn_hard() -> None:
    router = make(hard_after=0.5, threshold=0).train()
    router.at_progress(0.4)
    assert (active(run(router)) == 4).all()
    router.at_progress(0.5)
    assert (active(run(router)) == 1).all()
    assert (active(run(router.eval())) == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": "median"}, "threshold='median' must be a finite number, at least 0, less than 1, or 'mean'"),
        ({"schedule": "cosine"}, "schedule='cosine' is unknown"),
        ({"duration": 0}, "duration=0 must be a finite number, above 0, at most 1"),
        ({"temperature_min": 0}, "temperature_min=0 must be a finite number, above 0"),
        ({"hard_after": 2}, "hard_after=2 must be a number from 0 to 1, or None"),
        ({"gumbel": 1}, "gumbel=1 must be True or False"),
    ],
)
def test_nonsense_is_refused_by_name(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_what_ends_hard_is_hard_in_evaluation_at_any_time() -> None:
    router = make(hard_after=0.5)
    assert bool((active(run(router)) == 1).all())
    assert bool((active(run(make())) > 1).any())
    router.train().at_progress(0.2)
    assert bool((active(run(router)) > 1).any())
